"""The shared library of the kernel: compiled at first use, kept in the user's cache."""

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
# No -ffast-math, which would ignore NaN and infinity. A product and a sum may be fused
# (rounded once instead of twice), because XLA's compiler does so as well.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fPIC", "-shared", "-pthread"),
)
NATIVE = "-march=native"


def why_no_kernel() -> str | None:
    """The reason why this process has no kernel; None if it has one."""
    if os.environ.get("ADAMW_JAX_KERNEL") == "0":
        return "ADAMW_JAX_KERNEL is 0"
    if jax.default_backend() != "cpu":
        return f"the kernel is for CPUs, the default backend is {jax.default_backend()}"
    with _lock:
        return _load()


_lock = threading.Lock()


@functools.cache
def target() -> str:
    """The name of the kernel in XLA; it changes with the source."""
    return f"adamw_jax_one_pass_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"


@functools.cache
def _load() -> str | None:
    """Registers the kernel, compiled if necessary; returns the reason of a failure."""
    try:
        compiler = _compiler()
        if compiler is None:
            return "there is no C++ compiler (CXX, c++, g++, clang++)"
        handler = jax.ffi.pycapsule(_library(compiler))
        jax.ffi.register_ffi_target(target(), handler, platform="cpu")
    except Exception as error:  # any failure: XLA computes the same without it
        stderr = getattr(error, "stderr", None) or ""
        reason = f"it cannot be compiled and loaded: {error}\n{stderr[-2000:]}".rstrip()
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as an error it would stop every update
            warnings.warn(
                f"adamw_jax runs without its CPU kernel: {reason}\n"
                "Updates are correct but slower. ADAMW_JAX_KERNEL=0 silences this.",
                RuntimeWarning,
                stacklevel=2,
            )
        return reason
    return None


def _compiler() -> list[str] | None:
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    paths = map(shutil.which, ("c++", "g++", "clang++"))
    return next(([path] for path in paths if path), None)


def _library(compiler: list[str]) -> Any:
    """Loads the function from the user's cache, or compiles it and stores it there.

    The file name is a hash of everything that it depends on, because machines may share
    a home directory.
    """
    dependencies = (SOURCE.read_text(), jaxlib.__version__, compiler, FLAGS, _machine())
    name = f"{hashlib.sha256(repr(dependencies).encode()).hexdigest()[:32]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~")) / ".cache"  # still "~" without a home
    path = cache / "adamw_jax" / name
    if path.exists():
        try:
            return ctypes.CDLL(str(path)).adamw_jax_one_pass
        except (OSError, AttributeError):
            pass  # damaged: compile it again
    try:
        if not cache.is_absolute():
            raise OSError("there is no home directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # the cache is not writable: compile for this process only
        folder = tempfile.mkdtemp()
        path = Path(folder) / name
    new = Path(folder) / "new.so"
    files = ["-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(new)]
    options: Any = {"capture_output": True, "errors": "replace", "timeout": 300}
    try:
        result = subprocess.run([*compiler, *FLAGS, NATIVE, *files], **options)
        if result.returncode:  # clang lacks -march=native on some processors
            subprocess.run([*compiler, *FLAGS, *files], check=True, **options)
        new.replace(path)  # atomic: another process sees the whole file or none
        return ctypes.CDLL(str(path)).adamw_jax_one_pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _machine() -> tuple:
    """The processor, on which -march=native depends, and the C library."""
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    cpu = [line for line in lines if line.startswith(kinds)]
    return (*cpu, platform.machine(), platform.processor(), *platform.libc_ver())
