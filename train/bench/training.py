"""What the benchmarks of whole training steps share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from train.bench import harness, probes
from train.bench.harness import Bench, Program
from train.run import devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(harness.Turns):
    """Options of a benchmark of training steps in JAX and in PyTorch."""

    steps: int = 20  # per turn
    matmul: int | None = None  # rows of the matrix product; None: 8192, CPU 2048
    torch: bool = True  # time PyTorch as well
    torch_compile: bool = True  # and its compiler


def make_bench(
    config: Steps,
    title: str,
    units: tuple[str, int],
    dtype: Any,
    in_jax: Mapping[str, Callable[[], Program]],
    in_torch: Mapping[str, Callable[[], Program]],
) -> Bench:
    """Training steps in JAX, and in PyTorch as far as the options want them.

    Args:
        config: the options.
        title: of the benchmark.
        units: plural and number of what a step processes.
        dtype: of the matrix product that sets the floor.
        in_jax: what builds our programs; the first is compared with the others.
        in_torch: what builds PyTorch's, eager and compiled. They may fail: PyTorch, or
            what its compiler needs, is not installed everywhere.
    """
    number = config.torch + (config.torch and config.torch_compile)
    peers = dict(list(in_torch.items())[:number])
    programs = {**in_jax, **peers}
    first, *others = programs
    rows = probes.matmul_rows(config.matmul)
    return Bench(
        title,
        "step",
        f"{config.steps} steps",
        programs,
        probes.matrix_product(rows, dtype, devices.data_mesh()),
        may_fail=tuple(peers),
        units=units,
        ratios=[(first, other) for other in others],
    )
