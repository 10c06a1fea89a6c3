"""Training curves: loss, accuracy or perplexity over epochs, with the schedules."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from adamw_jax import Phases
from train.plots.style import (
    COLOURS,
    HELD_OUT,
    TRAINING,
    hide_spines,
    new_figure,
    set_log_scale,
)

Log = list[dict[str, Any]]  # the lines of a run's metrics.jsonl


def plot_classifier(
    log: Log, phases: Phases, epochs: int, path: Path, held_out: str = "test"
) -> None:
    """Loss and accuracy of all seeds, and the schedules.

    Args:
        log: the lines of the run's log.
        phases: the schedules of learning rate and, perhaps, b1.
        epochs: length of the run.
        path: where the picture is written.
        held_out: name of the evaluation set; its loss is logged as `{held_out}_loss`.
    """
    figure = new_figure(9, 9)
    loss, accuracy, schedule = figure.subplots(
        3, 1, sharex=True, height_ratios=(3, 3, 2)
    )
    by_seed = _epochs_by_seed(log)
    for index, lines in enumerate(by_seed.values()):
        epoch, train_loss, held_out_loss, right = (
            [line[key] for line in lines]
            for key in ("epoch", "loss", f"{held_out}_loss", "accuracy")
        )
        style: dict[str, Any] = {
            "ms": 3,
            "lw": 1.5,
            "alpha": max(0.3, 1 / len(by_seed)),
        }
        for values, colour, label in (
            (train_loss, TRAINING, "training, with augmentation"),
            (held_out_loss, HELD_OUT, held_out),
        ):
            label = label if index == 0 else None
            loss.plot(epoch, values, "o-", color=colour, label=label, **style)
        accuracy.plot(epoch, right, "o-", color=HELD_OUT, **style)
    _mark_divergence(log, phases, epochs, loss, accuracy)
    if ends := [line for line in log if line["event"] == "end"]:
        label = f"at the end, mean of {ends[0]['passes']} pass(es)"
        final = [line["accuracy"] for line in ends]
        accuracy.plot([epochs] * len(final), final, "D", color="black", label=label)
        accuracy.set_title(f"final accuracy {np.mean(final):.2f} % (n = {len(final)})")
        accuracy.legend(frameon=False, loc="lower right")
    set_log_scale(loss)
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    accuracy.set_ylabel(f"{held_out} accuracy, %")
    momentum = draw_schedules(schedule, phases, epochs)
    figure.align_ylabels([loss, accuracy, schedule])
    hide_spines(loss, accuracy)
    hide_spines(schedule, momentum, right=False)
    figure.savefig(path)


def plot_language_model(log: Log, phases: Phases, epochs: int, path: Path) -> None:
    """Perplexity of all seeds, and the schedules."""
    figure = new_figure(9, 7)
    ax, schedule = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    by_seed = _epochs_by_seed(log)
    for index, lines in enumerate(by_seed.values()):
        epoch = [line["epoch"] for line in lines]
        style: dict[str, Any] = {
            "ms": 3,
            "lw": 1.5,
            "alpha": max(0.3, 1 / len(by_seed)),
        }
        for key, colour, label in (
            ("loss", TRAINING, "training, with dropout"),
            ("valid_loss", HELD_OUT, "validation"),
        ):
            values = np.exp([line[key] for line in lines])
            label = label if index == 0 else None
            ax.plot(epoch, values, "o-", color=colour, label=label, **style)
    _mark_divergence(log, phases, epochs, ax)
    ends = [line for line in log if line["event"] == "end"]
    for key, marker, label in (
        ("perplexity", "D", "test"),
        ("with_cache", "*", "test, with cache"),
    ):
        if values := [line["test"][key] for line in ends]:
            label = f"{label}: {np.mean(values):.1f}"
            at = [epochs] * len(values)
            ax.plot(at, values, marker, color="black", label=label, ls="")
    set_log_scale(ax)
    ax.set_ylabel("perplexity")
    ax.legend(frameon=False)
    momentum = draw_schedules(schedule, phases, epochs)
    figure.align_ylabels([ax, schedule])
    hide_spines(ax)
    hide_spines(schedule, momentum, right=False)
    figure.savefig(path)


def plot_seeds(
    runs: Log, losses: ArrayLike, phases: Phases, target: float, path: Path
) -> None:
    """The loss of the last seed, and a histogram of the accuracy of all.

    Args:
        runs: one dictionary per seed, with its final `accuracy` in %.
        losses: (steps,) training losses of the last seed.
        phases: the schedule of the learning rate.
        target: accuracy in % to mark.
        path: where the picture is written.
    """
    figure = new_figure(10, 4.5)
    loss, end = figure.subplots(1, 2)
    losses = np.asarray(losses)
    steps = np.arange(len(losses))
    loss.plot(steps, losses, color=TRAINING, lw=1)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss, labels smoothed")
    loss.set_title("the last seed")
    rate = loss.twinx()
    rate.plot(steps, phases.schedule("learning_rate")(steps), color="gray", ls="--")
    rate.set_ylabel("learning rate (dashed)", color="gray")
    accuracies = np.array([run["accuracy"] for run in runs])
    end.hist(accuracies, bins=min(20, len(runs)), color=TRAINING)
    end.axvline(accuracies.mean(), color="black", label=f"mean {accuracies.mean():.2f}")
    end.axvline(target, color="black", ls=":", label=f"target {target:g}")
    end.set_xlabel("test accuracy, %")
    end.set_ylabel("seeds")
    end.yaxis.set_major_locator(MaxNLocator(integer=True))
    end.legend(frameon=False)
    hide_spines(loss, rate, right=False)
    hide_spines(end)
    figure.savefig(path)


def plot_switches(
    results: dict[str, Any], switches: tuple[int, int], path: Path
) -> None:
    """Losses of a run that switches libraries, and of one that stays in PyTorch.

    Args:
        results: the losses of `train.continue_from_torch`.
        switches: the steps before which the library changes.
        path: where the picture is written.
    """
    figure = new_figure(8, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses, stayed = np.array(results["losses"]), np.array(results["stayed"])
    top.plot(stayed, color="black", lw=4, alpha=0.25, label="stayed in PyTorch")
    first, last = switches
    for start, stop, name, label in (
        (0, first, "adam-l2", "PyTorch"),
        (first, last, "adamw", "Flax"),
        (last, len(losses), "amsgrad-l2", "PyTorch again"),
    ):
        steps, colour = np.arange(start, stop), COLOURS[name]
        top.plot(steps, losses[start:stop], ".-", color=colour, lw=1, label=label)
    label = "Flax, without the moments"
    top.plot(range(first, last), results["without_moments"], ":", c="gray", label=label)
    top.set_ylabel("training loss")
    top.legend(frameon=False)
    difference = np.abs(losses - stayed)
    bottom.semilogy(np.where(difference > 0, difference, np.nan), "k.-", lw=1)
    bottom.set_ylabel("difference to the\nrun in PyTorch alone")
    bottom.set_xlabel("step")
    figure.align_ylabels([top, bottom])
    hide_spines(top, bottom)
    figure.savefig(path)


def learning_rates(found: Any) -> Figure:
    """The curve of a range test, without its first ten and last five points."""
    figure = new_figure(8, 5)
    ax = figure.subplots()
    curve = np.stack(found[:3])  # rates, losses and smoothed losses
    rates, losses, smoothed = curve[:, 10:-5] if curve.shape[1] > 16 else curve
    ax.plot(rates, losses, ".", color="#7f7f7f", alpha=0.5, ms=4, label="each batch")
    ax.plot(rates, smoothed, color=COLOURS["adamw"], lw=2, label="smoothed")
    ax.set_xscale("log")
    low, high = min(losses, default=0), max(smoothed, default=0)
    if high > low:  # some losses lie far above
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    if found.why_not() is None:
        for name, style in (("suggestion", "-"), ("steepest", ":")):
            rate = getattr(found, name)
            label = f"{name}, {rate:.2g}"
            ax.axvline(rate, color=COLOURS["adam-l2"], ls=style, label=label)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("training loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


# ---------------------------------------------------------------------------
# parts of a figure
# ---------------------------------------------------------------------------


def draw_schedules(ax: Axes, phases: Phases, epochs: float) -> Axes:
    """The learning rate on `ax`, and b1 on a second axis, which is returned."""
    steps = np.arange(phases.total_steps)
    x = steps * epochs / phases.total_steps
    ax.plot(x, phases.schedule("learning_rate")(steps), color="black")
    ax.set_ylabel("learning rate")
    ax.set_xlabel("epoch")
    momentum = ax.twinx()
    if "b1" in phases.at(0):
        momentum.plot(x, phases.schedule("b1")(steps), color="gray", ls="--")
        momentum.set_ylabel("b1 (dashed)", color="gray")
    return momentum


def _epochs_by_seed(log: Log) -> dict[int, Log]:
    lines = [line for line in log if line["event"] == "epoch"]
    seeds = sorted({line["seed"] for line in lines})
    return {seed: [line for line in lines if line["seed"] == seed] for seed in seeds}


def _mark_divergence(log: Log, phases: Phases, epochs: int, *axes: Axes) -> None:
    for line in log:
        if line["event"] == "diverged":
            x = line["step"] * epochs / phases.total_steps
            for ax in axes:
                ax.axvline(x, color="black", ls=":", label="diverged")
