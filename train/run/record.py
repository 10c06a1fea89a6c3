"""Old names, for scripts that have not adopted `train.run.folder.Run` yet."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from train.run import folder as folder_file
from train.run import log
from train.run.environment import environment as environment
from train.run.folder import Run
from train.run.folder import exclusive as alone
from train.run.log import append_line as append_line
from train.run.log import read_events as lines_of
from train.run.log import read_json as read_config
from train.run.log import read_lines as read_lines
from train.run.log import rewind_log as forget
from train.run.log import rewrite_lines as rewrite_lines
from train.run.log import write_json as write_json

__all__ = ["alone", "read_config", "lines_of", "forget", "json"]


def open_folder(config, script, name, free, **more) -> Path:
    run = Run(config, script=script, name=name, may_change=free, seeds=range(0), **more)
    run._open()
    return run.folder


def new_folder(config: Any, prefix: str) -> Path:
    return folder_file.new_folder(config, prefix)


def append_start(folder: Path, compile_seconds: float) -> dict[str, Any]:
    start = {"event": "start", "compile_seconds": compile_seconds} | environment()
    if earlier := lines_of(folder, "start"):
        keys = ("devices", "versions", "xla_flags")
        changed = [key for key in keys if start[key] != earlier[-1][key]]
        if changed:
            print(
                f"Warning: this run started with other {', '.join(changed)}; "
                "results will not be bit-identical."
            )
    append_line(folder / "metrics.jsonl", start)
    return start


def ended(folder: Path, seed: int) -> bool:
    return bool(lines_of(folder, "end", seed))


def write_bench(
    folder: Path, config: Any, environment: dict, results: dict, page: str
) -> None:
    """config.json, bench.json and bench.md, which is printed too: the benches' own."""
    log.write_json(folder / "config.json", dataclasses.asdict(config) | environment)
    log.write_json(folder / "bench.json", results)
    (folder / "bench.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nWrote {folder}.")


def changed(config: Any, recipe: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(config).items()
        if key not in left_out and value != getattr(recipe, key)
    }


def event_writer(folder: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
