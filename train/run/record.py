"""The folder of a run, and the circumstances that are written there."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

try:
    import fcntl
except ImportError:  # on Windows
    fcntl: Any = None


def new_folder(config: Any, prefix: str) -> Path:
    """Makes the folder of a run; never that of another one unless told to."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = config.out / (config.name or f"{prefix}-{now}")
    if folder.exists() and not config.overwrite:
        raise ValueError(f"name: {folder} exists; choose another or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_folder(
    config: Any, script: str, name: str, free: tuple[str, ...], **more: Any
) -> Path:
    """Makes the folder of a run, or opens it to go on with a run of the same settings.

    Args:
        config: with out, name and overwrite; written to config.json.
        script: whose run it is; that of another is never touched.
        name: of the folder, where the configuration has none.
        free: the settings that may be others than before.
        **more: what must be the same beside the settings.

    Raises:
        ValueError: there is something else in the folder, or a run with other settings,
            or another process.
    """
    name = config.name or name
    if Path(name).name != name or name == "..":
        raise ValueError(f"name must be that of a folder, got {name!r}")
    folder = config.out / name
    path = folder / "config.json"
    before = read_config(path)
    if folder.exists() and before.get("script") != script:
        if not folder.is_dir() or any(p.suffix != ".tmp" for p in folder.iterdir()):
            raise ValueError(
                f"name: {folder} exists and is not the folder of a run of "
                f"train.{script}. Choose another --name"
            )
    settings = {"script": script} | vars(config) | more
    settings = json.loads(json.dumps(settings, default=str))
    if before and config.overwrite:
        with alone(folder):
            old = folder.with_name(f".{name}.removed")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)  # at once: a half of it would not be a run
            shutil.rmtree(old)
        before = {}
    others = [
        f"{key} = {before.get(key)!r}, now {value!r}"
        for key, value in settings.items()
        if before and key not in free and value != before.get(key)
    ]
    if others:
        raise ValueError(
            f"name: {folder} has a run with {'; '.join(others)}. Choose another "
            "--name, or pass --overwrite to remove it"
        )
    if not before:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings | environment())
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Empty if there is none, or something else under that name."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a second process in the folder; a killed one does not count."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"name: another process is at work in {folder}") from error
    finally:
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Completely or not at all."""
    draft = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1, default=str) + "\n"
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Adds a line of JSON, which is on disk when this returns.

    Of a line in which the process was killed, what there is goes.
    """
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        os.truncate(path, before.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; not the last one, if the process was killed in it."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewrite_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces a log, completely or not at all."""
    draft = path.with_suffix(".tmp")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def lines_of(folder: Path, event: str, seed: int | None = None) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl; of one seed, or those that are of none."""
    lines = read_lines(folder / "metrics.jsonl")
    return [x for x in lines if x["event"] == event and x.get("seed") == seed]


def append_start(folder: Path, compile_seconds: float) -> dict[str, Any]:
    """Logs and returns where a run begins or goes on; says if that is elsewhere."""
    start = {"event": "start", "compile_seconds": compile_seconds} | environment()
    if earlier := lines_of(folder, "start"):
        keys = ("devices", "versions", "xla_flags")
        others = [key for key in keys if start[key] != earlier[-1][key]]
        if others:
            print(f"Begun with other {', '.join(others)}: the bits will be others too.")
    append_line(folder / "metrics.jsonl", start)
    return start


def ended(folder: Path, seed: int) -> bool:
    return bool(lines_of(folder, "end", seed))


def forget(log: Path, seed: int, step: int, epochs: int) -> None:
    """Takes from a log what a killed run did after its last checkpoint.

    Args:
        log: of lines with event, seed and step.
        seed: of the run.
        step: of the checkpoint; 0: there is none.
        epochs: that were finished then.

    Raises:
        ValueError: the log has not so many epochs.
    """
    lines = [
        line
        for line in read_lines(log)
        if line.get("seed") != seed
        or (line["event"] == "epoch" and line["step"] <= step)
    ]
    logged = sum(line.get("seed") == seed for line in lines)
    if logged != epochs:
        raise ValueError(
            f"{log} has {logged} epochs of seed {seed}, its checkpoint {epochs}: "
            "was it changed? Choose another --name, or pass --overwrite"
        )
    rewrite_lines(log, lines)


def write_bench(
    folder: Path,
    config: Any,
    environment: dict[str, Any],
    results: dict[str, Any],
    page: str,
) -> None:
    """config.json, bench.json and bench.md, which is printed too."""
    write_json(folder / "config.json", dataclasses.asdict(config) | environment)
    write_json(folder / "bench.json", results)
    (folder / "bench.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nWrote {folder}.")


def changed(config: Any, recipe: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The settings that are not as in the recipe."""
    return {
        key: value
        for key, value in vars(config).items()
        if key not in left_out and value != getattr(recipe, key)
    }


def event_writer(folder: Path, step: int) -> Any:
    """For TensorBoard, going on after this step."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration."""
    versions = {"python": platform.python_version()}
    for package in ("adamw_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices, script = jax.devices(), Path(sys.argv[0]).stem
    command = f"python -m train.{script} {shlex.join(sys.argv[1:])}"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": "a notebook" if "ipykernel" in sys.modules else command,
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
