"""Tables, numbers and lines of progress that all commands print alike."""

import datetime
import shutil
import sys
from typing import Any

import numpy as np
from tabulate import tabulate

from train.run.output import Output


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    return tabulate(rows[1:], headers=rows[0], tablefmt="github", disable_numparse=True)


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation of runs; None for that of a single run."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "runs": values}


def spread(numbers: dict[str, Any]) -> str:
    """Formats a `summary`: 94.12 ± 0.15."""
    deviation = f" ± {numbers['std']:.2f}" if numbers["std"] is not None else ""
    return f"{numbers['mean']:.2f}{deviation}"


def machine(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """For results.json, from a run's "start" events: devices and compile_seconds."""
    return {
        "compile_seconds": [start["compile_seconds"] for start in starts],
        "devices": " and ".join(sorted({start["devices"] for start in starts})),
    }


def changed_settings(
    config: Any, recipe: Any, ignore: tuple[str, ...]
) -> dict[str, Any]:
    """The settings that differ from the recipe's, save those of `Output`."""
    ignore = (*ignore, *vars(Output()))
    return {
        key: value
        for key, value in vars(config).items()
        if key not in ignore and value != getattr(recipe, key)
    }


def progress_line(
    line: dict[str, Any],
    *,
    epochs: int,
    steps: int,
    seconds_left: float,
    results: str = "",
    speed: str = "",
) -> str:
    """A line of progress of a training run.

    On a terminal it leaves out what matters least until it fits into the width: another
    line would scroll away the ones before. In a log it is complete.

    Args:
        line: with seed, epoch, step, loss, learning_rate and perhaps b1.
        epochs: of the run.
        steps: of the run.
        seconds_left: until all seeds are done.
        results: of evaluation, after the loss.
        speed: such as 1,234 images/s.
    """
    parts = {
        "seed": f"seed {line['seed']}",
        "epoch": f"epoch {line['epoch']}/{epochs}",
        "step": f"step {line['step']}/{steps}",
        "loss": f"loss {line['loss']:.4f}",
        "results": results,
        "lr": f"lr {line['learning_rate']:.2e}",
        "b1": f"b1 {line['b1']:.3f}" if "b1" in line else "",
        "speed": speed,
        "left": f"{datetime.timedelta(seconds=round(seconds_left))} left",
    }
    text = " ".join(filter(None, parts.values()))
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        for least in ("b1", "lr", "speed", "step", "seed", "left", "loss"):
            if len(text) <= width:
                break
            del parts[least]
            text = " ".join(filter(None, parts.values()))
    return text
