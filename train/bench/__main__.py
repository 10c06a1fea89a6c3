"""Benchmarks, each of which prints and writes a table of times.

python -m train.bench --help
python -m train.bench update --help
"""

import functools
import operator
from typing import Annotated, Any

import tyro

from train.bench import (
    accumulation,
    cifar10,
    images,
    language_model,
    overhead,
    packing,
    update,
)
from train.run import devices
from train.run.command import run_command

BENCHES: dict[str, Any] = {
    "cifar10": cifar10,
    "language_model": language_model,
    "images": images,
    "update": update,
    "packing": packing,
    "accumulation": accumulation,
    "overhead": overhead,
}


def parse_args(args: list[str]) -> Any:
    """The configuration of the benchmark that the first argument names."""
    configs: Any = functools.reduce(
        operator.or_,
        (
            Annotated[bench.Config, tyro.conf.subcommand(name.replace("_", "-"))]
            for name, bench in BENCHES.items()
        ),
    )
    description = "Benchmarks, each of which prints and writes a table of times."
    return tyro.cli(
        configs, prog="python -m train.bench", description=description, args=args
    )


def main(config: Any) -> None:
    """Runs the benchmark that the command line names."""
    if not isinstance(config, update.Config | packing.Config):  # these time compilation
        devices.use_compilation_cache()
    if isinstance(config, cifar10.Config | images.Config):
        # convolutions use one core per device, large matrix products all of them
        devices.use_all_cores(config.batch_size)
    for bench in BENCHES.values():
        if isinstance(config, bench.Config):
            bench.main(config)


if __name__ == "__main__":
    run_command(main, parse_args)
