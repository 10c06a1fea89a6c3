"""What a result depends on besides its configuration, and TensorBoard."""

import contextlib
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("adamw_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")


def environment() -> dict[str, Any]:
    """Date, command, machine, devices and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
    }


def command() -> str:
    """The command line of this process: `python -m train.bench update --rounds 3`."""
    if "ipykernel" in sys.modules:
        return "a notebook"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # a file, not a module
        return f"python {shlex.join(sys.argv)}"
    module = spec.name.removesuffix(".__main__")
    return f"python -m {module} {shlex.join(sys.argv[1:])}".rstrip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":")[1].strip() for line in lines if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor()


WriteScalars = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def event_writer(folder: Path | None, step: int) -> Iterator[WriteScalars]:
    """Yields `write(step, scalars)` for TensorBoard.

    Args:
        folder: of the events; None: `write` does nothing.
        step: after which the run resumes; later events of a killed run are hidden.
    """
    if folder is None:
        yield lambda step, scalars: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def write(step: int, scalars: dict[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield write
