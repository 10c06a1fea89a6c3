"""Devices, dtypes and the compilation cache."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh


def use_all_cores(batch_size: int | None = None) -> None:
    """Makes every core of a CPU a device; call it before JAX is used.

    A convolution or a small matrix product gains little from a second core. Without
    effect on other devices. Flags that XLA_FLAGS already has take precedence.

    Args:
        batch_size: the number of devices divides it; None: one per core.
    """
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    while batch_size and batch_size % cores:
        cores -= 1
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={cores} "
        f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}"
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start is fast.

    They are in ~/.cache/adamw_jax, in a folder per version of jaxlib, unless
    JAX_COMPILATION_CACHE_DIR is set.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        folder = home / "adamw_jax" / f"jaxlib-{jaxlib.__version__}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def print_compiling(what: str) -> None:
    """A line before the silence of compilation, which lasts seconds to minutes.

    Args:
        what: the program or the folder of its run.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    kernels = (home / "adamw_jax").glob("*.so")
    first = jax.default_backend() == "cpu" and next(kernels, None) is None
    note = ", and once for this machine the kernel of the update" if first else ""
    print(f"{what}: compiling{note} ...", flush=True)


def data_mesh() -> Mesh:
    """All devices on one axis, `data`, over which batches are split."""
    return Mesh(np.array(jax.devices()), ("data",))


def compute_dtype(name: str):
    """The dtype of activations; "auto": bfloat16 where the device computes in it."""
    if name == "auto":
        device = jax.devices()[0]
        old_gpu = float(getattr(device, "compute_capability", 8)) < 8  # T4, V100
        name = "float32" if device.platform == "cpu" or old_gpu else "bfloat16"
    return jnp.dtype(name)
