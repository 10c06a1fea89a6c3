"""What a computation costs, counted and measured; used by `train.bench`."""

import functools
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec


def flops(function: Callable[..., Any], *args) -> int:
    """Of the convolutions and matrix products of a call; loops count once.

    Two for every weight that a pixel or token of an output meets, taps outside of an
    image included; without norms and activations. Weights are on the right.
    """

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
                weights, outputs = eqn.invars[1].aval.size, eqn.outvars[0].aval
                total += 2 * weights * outputs.size // outputs.shape[-1]
            for inner in jaxprs_in_params(eqn.params):
                total += count(inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def matmul_program(rows: int, dtype, mesh) -> tuple[Callable[[], Any], float]:
    """A large product on every device at once, and its FLOPs."""
    shape, spec = (mesh.size, rows, rows), PartitionSpec("data")
    a, b = (
        jax.device_put(
            np.random.default_rng(i).normal(size=shape).astype(dtype),
            NamedSharding(mesh, spec),
        )
        for i in range(2)
    )
    specs = {"in_specs": (spec, spec), "out_specs": spec}
    program: Any = jax.jit(
        jax.shard_map(lambda a, b: a @ b, mesh=mesh, check_vma=False, **specs)
    )
    return functools.partial(program, a, b), 2.0 * mesh.size * rows**3


def in_turns(
    makers: dict[str, Callable[[], Callable[[], Any]]],
    turns: int,
    may_fail: Collection[str],
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Calls what is made in turns, after one that does not count.

    Returns:
        By name: the seconds of the turns, those until it was ready, and for those that
        may fail and did, why.
    """
    timed, ready, failed = {}, {}, {}
    for name, maker in makers.items():
        began = time.perf_counter()
        try:
            turn = maker()
            turn()
            timed[name] = turn
        except Exception as error:
            if name not in may_fail:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        ready[name] = time.perf_counter() - began
        print(
            f"{name}: {failed.get(name, f'ready in {ready[name]:.1f} s')}", flush=True
        )
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(turns):
        for name, turn in timed.items():
            began = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - began)
    return seconds, ready, failed
