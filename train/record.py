"""The folder of a run, and the circumstances that are written there."""

import datetime
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


def new_folder(config: Any) -> Path:
    """Makes the folder of a run; never that of another one unless told to."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = config.out / (config.name or f"compare-{config.dataset}-{now}")
    if folder.exists() and not config.overwrite:
        raise ValueError(f"name: {folder} exists; choose another or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration."""
    versions = {"python": platform.python_version()}
    for package in ("adamw_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices, script = jax.devices(), Path(sys.argv[0]).stem
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python -m train.{script} {shlex.join(sys.argv[1:])}",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":")[1].strip() for line in lines if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor()
