"""Files that survive a kill: logs with a line of JSON per event, and JSON objects."""

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def append_line(path: Path, content: Event) -> None:
    """Appends a line of JSON, which is on disk when this returns.

    Drops a partial last line left by a killed process.
    """
    log = path.read_bytes() if path.exists() else b""
    if log and not log.endswith(b"\n"):
        os.truncate(path, log.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Event]:
    """The complete lines of a log; none if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewrite_lines(path: Path, lines: list[Event]) -> None:
    """Replaces a log atomically."""
    _replace(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_events(
    folder: Path, event: str | None = None, seed: int | None = None
) -> list[Event]:
    """Lines of a run's metrics.jsonl, of one event and one seed; None: of all."""
    return [
        line
        for line in read_lines(folder / "metrics.jsonl")
        if event in (None, line.get("event")) and seed in (None, line.get("seed"))
    ]


def rewind_log(path: Path, seed: int, step: int, epochs: int) -> None:
    """Drops what a killed run logged after its last checkpoint.

    Args:
        path: a log whose lines have an event and, in most cases, a seed and a step.
        seed: whose lines are dropped.
        step: of the checkpoint; 0 if there is none.
        epochs: finished before the checkpoint.

    Raises:
        ValueError: the log has another number of epochs.
    """
    lines = [
        line
        for line in read_lines(path)
        if line.get("seed") != seed
        or (line["event"] == "epoch" and line["step"] <= step)
        or (line["event"] == "stopped" and line["step"] == step)
    ]
    logged = sum(
        line.get("seed") == seed and line["event"] == "epoch" for line in lines
    )
    if logged != epochs:
        raise ValueError(
            f"{path} has {logged} epochs of seed {seed}, its checkpoint {epochs}: "
            "was it changed? Choose another --name, or pass --overwrite"
        )
    rewrite_lines(path, lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically."""
    _replace(path, json.dumps(content, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
