"""The kernel's shared library: compiled at the first use, kept in the user's cache."""

import ctypes
import functools
import hashlib
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
import jaxlib

SOURCE = Path(__file__).with_name("kernel.cc")
# NaN and infinity keep their meaning: no -ffast-math. Products and sums may be
# contracted (rounded once instead of twice), since XLA's compiler does so as well.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fPIC", "-shared", "-pthread"),
)
NATIVE = "-march=native"


def why_no_kernel() -> str | None:
    """Why this process computes without the kernel; None if it has one."""
    if os.environ.get("ADAMW_JAX_KERNEL") == "0":
        return "ADAMW_JAX_KERNEL is 0"
    if jax.default_backend() != "cpu":
        return (
            f"the kernel is for CPUs, the default device is a {jax.default_backend()}"
        )
    with _lock:
        return _load()


_lock = threading.Lock()


@functools.cache
def target() -> str:
    """The name under which XLA knows the kernel, different for every source."""
    return f"adamw_jax_one_pass_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"


@functools.cache
def _load() -> str | None:
    """Compiles, if need be, and registers the kernel. Returns why it could not."""
    try:
        compiler = _compiler()
        if compiler is None:
            return "there is no C++ compiler (CXX, c++, g++, clang++)"
        handler = jax.ffi.pycapsule(_library(compiler))
        jax.ffi.register_ffi_target(target(), handler, platform="cpu")
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
