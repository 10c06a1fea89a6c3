"""AdamW on one leaf, update and application: on a CPU a compiled kernel, one pass.

XLA on a CPU computes the three results in three loops, which move 40 bytes a float32
parameter; the kernel in _one_pass.cc moves 28. It is compiled once, at the first use,
with the C++ compiler that is there. Without one, with ADAMW_JAX_KERNEL=0, on other
platforms, for other dtypes and under `vmap`, XLA computes the same: `plain`.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental.custom_partitioning import custom_partitioning

from .._tree import compute_dtype

# The order of the vector of scalars, here and in the kernel.
SCALARS = (
    *("decay1", "rest1", "correction1", "decay2", "rest2", "correction2"),
    *("eps", "eps_root", "learning_rate", "weight_decay", "gradient_factor"),
)
SOURCE = Path(__file__).with_suffix(".cc")
# NaN and infinity keep their meaning: no -ffast-math. Products and sums may be
# contracted (rounded once instead of twice), since XLA's compiler does so as well.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fPIC", "-shared", "-pthread"),
)
NATIVE = "-march=native"
NARROW = (jnp.dtype("float32"), jnp.dtype("bfloat16"))  # what p and g may be


# ---- the computation ----------------------------------------------------------------


def one_pass(p, m, v, g, scalars: jax.Array, decays: bool) -> tuple[Any, Any, Any]:
    """The new p, m and v of one leaf, in the dtypes of the old, where `is_available`.

    Args:
        p: the parameter.
        m: first moment.
        v: second moment.
        g: gradient; p, m and v have its shape.
        scalars: a vector of SCALARS, in the dtype of the computation.
        decays: whether this leaf does; if not, its weight decay must be 0.
    """
    wide = m.dtype == v.dtype == scalars.dtype == jnp.float32
    if wide and p.dtype in NARROW and g.dtype in NARROW:
        return _in_kernel(decays, p, m, v, g, scalars)
    return plain(decays, p, m, v, g, scalars)


def plain(decays: bool, p, m, v, g, scalars) -> tuple[Any, Any, Any]:
    """What the links of the chain and `apply_updates` compute, for XLA."""
    d1, r1, c1, d2, r2, c2, eps, eps_root, learning_rate, weight_decay, f = scalars
    g = f * g.astype(scalars.dtype)
    new_m = d1 * m.astype(g.dtype) + r1 * g
    new_v = d2 * v.astype(g.dtype) + r2 * g * g
    u = (new_m / c1) / (jnp.sqrt(new_v / c2 + eps_root) + eps)
    if decays:
        u = u + weight_decay * p.astype(g.dtype)
    u = -learning_rate * u
    wide = compute_dtype(p.dtype)
    new_p = (p.astype(wide) + u.astype(wide)).astype(p.dtype)
    return new_p, new_m.astype(m.dtype), new_v.astype(v.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(decays, p, m, v, g, scalars):
    @jax.custom_batching.custom_vmap
    def compute(*leaves):
        # Asked again where it is lowered, which may be for another platform.
        return jax.lax.platform_dependent(
            *leaves, cpu=_partitioned, default=functools.partial(plain, decays)
        )

    @compute.def_vmap
    def _(axis_size, in_batched, *leaves):
        del axis_size
        in_axes = [0 if batched else None for batched in in_batched]
        out = jax.vmap(functools.partial(plain, decays), in_axes)(*leaves)
        return out, (True,) * 3

    return compute(p, m, v, g, scalars)


@_differentiable.defjvp
def _(decays, primals, tangents):
    return jax.jvp(functools.partial(plain, decays), primals, tangents)


# A program within the program, so that leaves of one shape are traced once.
_in_kernel = jax.jit(_differentiable, static_argnums=0)


@custom_partitioning
def _partitioned(p, m, v, g, scalars):
    """Every device computes what it holds of the leaf."""
    results = [jax.typeof(x) for x in (p, m, v)]
    call = jax.ffi.ffi_call(_target(), results, input_output_aliases={0: 0, 1: 1, 2: 2})
    return tuple(call(p, m, v, g, scalars))


def _partition(mesh, arguments, results):
    del results
    leaf, scalars = _most_sharded(arguments), arguments[4].sharding
    return mesh, _partitioned.fun, (leaf,) * 3, (leaf,) * 4 + (scalars,)


def _propagate(mesh, arguments, results):
    del mesh, results
    return (_most_sharded(arguments),) * 3


def _most_sharded(arguments):
    """Of p, m, v and g: whole parameters are cut for nothing, moments are not sent."""
    shape = arguments[0].shape
    return min(
        (x.sharding for x in arguments[:4]),
        key=lambda sharding: math.prod(sharding.shard_shape(shape)),
    )


_partitioned.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_propagate,  # without Shardy
    sharding_rule="..., ..., ..., ..., k -> ..., ..., ...",
    need_replication_factors=("k",),
)


# ---- the kernel ---------------------------------------------------------------------


def is_available() -> bool:
    """Whether there is a kernel, and the default device is one that it is for."""
    return jax.default_backend() == "cpu" and why_not() is None


def why_not() -> str | None:
    """Why there is no kernel in this process; None if there is one."""
    if os.environ.get("ADAMW_JAX_KERNEL") == "0":
        return "ADAMW_JAX_KERNEL=0"
    with _lock:
        return _load()


_lock = threading.Lock()


@functools.cache
def _target() -> str:
    """The name under which XLA knows the kernel; another source is another kernel."""
    return f"adamw_jax_one_pass_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"


@functools.cache
def _load() -> str | None:
    """Compiles, if need be, and registers the kernel. Returns why it could not."""
    try:
        compiler = _compiler()
        if compiler is None:
            return "there is no C++ compiler (CXX, c++, g++, clang++)"
        handler = jax.ffi.pycapsule(_library(compiler))
        jax.ffi.register_ffi_target(_target(), handler, platform="cpu")
    except Exception as error:  # whatever it is: XLA computes the same
        stderr = getattr(error, "stderr", None) or ""
        why = f"it could not be compiled and loaded: {error}\n{stderr[-2000:]}".rstrip()
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # raised, it would come at each update
            warnings.warn(
                f"adamw_jax goes without its kernel for CPUs, {why}\n"
                "Updates are right, but slower. ADAMW_JAX_KERNEL=0 silences this.",
                RuntimeWarning,
                stacklevel=2,
            )
        return why
    return None


def _compiler() -> list[str] | None:
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


def _library(compiler: list[str]) -> Any:
    """The compiled function: from the user's cache, or new, into it where that can be.

    Named by all that it depends on: machines may share a home.
    """
    depends = (SOURCE.read_text(), jaxlib.__version__, compiler, FLAGS, _machine())
    name = f"{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~")) / ".cache"  # "~" if there is no home
    path = cache / "adamw_jax" / name
    if path.exists():
        try:
            return ctypes.CDLL(str(path)).adamw_jax_one_pass
        except (OSError, AttributeError):
            pass  # damaged: made anew
    try:
        if not cache.is_absolute():
            raise OSError("no home")
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # cannot be written: for this process only
        folder = tempfile.mkdtemp()
        path = Path(folder) / name
    new = Path(folder) / "new.so"
    files = ["-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(new)]
    options: Any = {"capture_output": True, "errors": "replace", "timeout": 300}
    try:
        done = subprocess.run([*compiler, *FLAGS, NATIVE, *files], **options)
        if done.returncode:  # clang does not have it for every processor
            subprocess.run([*compiler, *FLAGS, *files], check=True, **options)
        new.replace(path)  # another process sees all of it or nothing
        return ctypes.CDLL(str(path)).adamw_jax_one_pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _machine() -> tuple:
    """What -march=native depends on, and the C library."""
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    cpu = [line for line in lines if line.startswith(kinds)]
    return (*cpu, platform.machine(), platform.processor(), *platform.libc_ver())
