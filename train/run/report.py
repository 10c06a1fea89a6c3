"""Tables, numbers and lines of progress that all commands print alike."""

import datetime
import sys
import time
from collections.abc import Callable
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

    Args:
        line: with seed, epoch, step, loss, learning_rate and perhaps b1.
        epochs: of the run.
        steps: of the run.
        seconds_left: until all seeds are done.
        results: of evaluation, after the loss.
        speed: such as 1,234 images/s.
    """
    parts = [
        f"seed {line['seed']} epoch {line['epoch']}/{epochs}",
        f"step {line['step']}/{steps}",
        f"loss {line['loss']:.4f}",
        results,
        f"lr {line['learning_rate']:.2e}",
        f"b1 {line['b1']:.3f}" if "b1" in line else "",
        speed,
        f"{datetime.timedelta(seconds=round(seconds_left))} left",
    ]
    return " ".join(filter(None, parts))


# ---------------------------------------------------------------------------
# of train.compare
# ---------------------------------------------------------------------------

NAMES = {  # name: (optimizer, kind of decay, both in short)
    "sgd": ("SGD, momentum", "L2", "SGD + L2"),
    "adam-l2": ("Adam", "L2", "Adam + L2"),
    "adamw": ("AdamW", "decoupled", "AdamW"),
    "amsgrad-l2": ("AMSGrad", "L2", "AMSGrad + L2"),
    "amsgradw": ("AMSGrad", "decoupled", "AMSGrad + decay"),
}


def progress(total: int) -> Callable[[str, int], None]:
    """A function to be told what is running and how many runs it has just done."""
    begin = last = time.perf_counter()
    done, on_terminal = 0, sys.stdout.isatty()

    def advance(name: str, runs: int) -> None:
        nonlocal done, last
        done, now = done + runs, time.perf_counter()
        if on_terminal or done == total or now - last > 5:  # in a log: now and then
            last, rate = now, done / (now - begin)
            line = f"{done} of {total} runs, {rate:.3g} runs/s, "
            line += f"{(total - done) / rate:.0f} s left ({NAMES[name][2]})"
            end = "\r" if on_terminal and done < total else "\n"
            print(f"  {line:<70}", end=end, flush=True)

    return advance


def task(config: dict[str, Any]) -> str:
    return (
        f"{config['dataset']}: {config['train_size']} training images, "
        f"{100 * config['label_noise']:g} % of them labelled wrongly; "
        f"{config['eval_size']} validation and {config['eval_size']} test images; "
        f"{config['epochs']} epochs of 1cycle, batches of {config['batch_size']}."
    )


def text(config: dict[str, Any], results: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    how = (
        f"Rate and decay are the best of {config['grid']} x {config['grid']} on the "
        f"validation images, by the mean of {config['tune_seeds']} run(s); the test "
        f"accuracy is that of fresh seeds, mean ± standard deviation."
    )
    points = "\n".join(f"- {note}" for note in [*notes(results), speed(results)])
    paragraphs = [f"{task(config)} {how}", table(config, results), points]
    return "\n\n".join([*paragraphs, f"**{results['finding']}**"]) + "\n"


def table(config: dict[str, Any], results: dict[str, Any]) -> str:
    """The article's table."""
    rows: list[tuple[str, ...]] = [
        ("optimizer", "decay", "tuned rate", "tuned decay", "test accuracy, %")
        + (f"epochs (steps) to {config['target']:g} %", "s per run")
    ]
    steps_per_epoch = config["train_size"] // config["batch_size"]
    for name, test in results["test"].items():
        best = results["tuning"][name]
        when = "never"
        if test["reached"]:
            epochs = test["epochs_to_target"]
            when = f"{epochs:.1f} ({epochs * steps_per_epoch:.0f})"
        if 0 < test["reached"] < test["n"]:
            when += f" in {test['reached']} of {test['n']}"
        rows.append(
            NAMES[name][:2]
            + (f"{best['lr']:.2g}", f"{best['decay']:.2g}")
            + (f"{test['mean']:.2f} ± {test['std']:.2f} (n = {test['n']})", when)
            + (f"{best['seconds_per_run']:.2g}",)
        )
    return markdown(rows)


def notes(results: dict[str, Any]) -> list[str]:
    """What has to be said beside the table."""
    lines = []
    for name in ("adam-l2", "adamw"):
        best = results["tuning"][name]
        gain = best["accuracy"] - best["accuracy_at_lowest_decay"]
        slope = best["decay_slope"]
        move = "too few seeds or rates to say whether the best decay moves with them"
        if slope is not None:
            moves = round(slope["low"], 2) > 0 or round(slope["high"], 2) < 0
            move = (
                f"the best decay {'moves' if moves else 'does not clearly move'} with "
                f"the learning rate: it goes as its power {slope['mean']:.2f} "
                f"({slope['low']:.2f} to {slope['high']:.2f})"
            )
        lines.append(
            f"{NAMES[name][2]}: {best['basin']} of {best['cells']} cells within half a "
            f"point of the best; decay gains {gain:.2f} points; {move}."
        )
    for name, best in results["tuning"].items():
        if best["edges"]:
            lines.append(
                f"{NAMES[name][2]}: the best cell is on the edge of its grid "
                f"({', '.join(best['edges'])}); there may be a better one outside."
            )
    return lines


def speed(results: dict[str, Any]) -> str:
    """Runs per second, and what the runs would cost in PyTorch."""
    speed = results["speed"]
    line = (
        f"{speed['runs']} runs in {speed['seconds']:.1f} s, "
        f"{speed['runs'] / speed['seconds']:.3g} runs/s on {speed['devices']}, after "
        f"{speed['compile_seconds']:.1f} s of compilation."
    )
    if not speed["torch"]:
        return f"{line} Not compared with PyTorch: not installed, or --no-torch."
    sample = speed["torch"].values()
    each = sum(run["seconds"] for run in sample) / len(sample)
    line += (
        f" A PyTorch loop on one core needs {each:.2g} s per run, measured on one of "
        f"each optimizer and without evaluations: {each * speed['runs']:.0f} s for all."
    )
    if all(run["accuracy"] is not None for run in sample):
        gap = max(abs(run["accuracy"] - run["accuracy_here"]) for run in sample)
        line += (
            f" Its runs end within {gap:.2f} points of the same runs here; it corrects "
            f"the bias of a cycled b1 in another way."
        )
    return line


def finding(results: dict[str, Any]) -> str:
    """One sentence, from the numbers, whichever way they point."""
    difference = results["adamw_minus_adam_l2"]
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    verdict = "AdamW and Adam + L2 cannot be told apart"
    if low > 0 or high < 0:
        verdict = f"AdamW does {'better' if mean > 0 else 'worse'} than Adam + L2"
    basins = [results["tuning"][name]["basin"] for name in ("adamw", "adam-l2")]
    return (
        f"Each at its own best learning rate and decay, {verdict}: {mean:+.2f} points "
        f"of test accuracy (95 % confidence {low:+.2f} to {high:+.2f} over "
        f"{results['test']['adamw']['n']} paired seeds, for this split of the data and "
        f"these tuned values), with {basins[0]} against {basins[1]} cells of the grid "
        f"within half a point of the best."
    )
