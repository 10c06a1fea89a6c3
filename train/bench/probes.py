"""What a program must do at least, and how fast the hardware can do it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.bench.harness import Probe, Program


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The FLOPs of a call, as XLA counts them: two per multiply-add.

    Convolutions do not count the taps outside of an image; norms and activations count.
    XLA counts the body of a loop once, so `function` must not depend on a loop.

    Args:
        function: lowered, but not compiled or run.
        *args: arrays or their shapes.
    """
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return analysis["flops"]


def matmul_rows(rows: int | None) -> int:
    """Of the matrix product; by default enough to reach the device's full rate."""
    return rows or (2048 if jax.default_backend() == "cpu" else 8192)


def matrix_product(rows: int, dtype: Any, mesh: Mesh) -> Probe:
    """A product of two square matrices on every device at once: FLOP/s."""

    def make() -> Program:
        shape, spec = (mesh.size, rows, rows), PartitionSpec("data")
        a, b = (
            jax.device_put(
                np.random.default_rng(seed).normal(size=shape).astype(dtype),
                NamedSharding(mesh, spec),
            )
            for seed in range(2)
        )
        specs = {"in_specs": (spec, spec), "out_specs": spec}
        product: Any = jax.jit(
            jax.shard_map(lambda a, b: a @ b, mesh=mesh, check_vma=False, **specs)
        )
        run = functools.partial(product, a, b)
        return Program(
            lambda: jax.block_until_ready(run()), work=2.0 * mesh.size * rows**3
        )

    return Probe(
        "a large matrix product", make, "flops", "matmul_tflops", "TFLOP/s", 1e12
    )


def copy(size: int, calls: int) -> Probe:
    """x + 1 in place, for float32 in one array: bytes per second, in and out."""

    def make() -> Program:
        x = jnp.zeros(size)
        program: Any = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()

        def run():
            nonlocal x
            for _ in range(calls):
                x = program(x)
            x.block_until_ready()

        return Program(run, calls, work=2.0 * x.nbytes)

    return Probe("a copy", make, "floor_bytes", "copy_gb_per_second", "GB/s", 1e9)
