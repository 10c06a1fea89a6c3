"""Training curves: loss, accuracy or perplexity over epochs, with the schedules."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from adamw_jax import Phases
from train.evals.statistics import plural
from train.plots.style import (
    COLOURS,
    HELD_OUT,
    TRAINING,
    hide_spines,
    new_figure,
    place_legend,
    set_log_scale,
    show_plain_numbers,
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
    by_seed = _epochs_by_seed(log)
    if not by_seed:
        _plot_schedules_only(log, phases, epochs, path)
        return
    figure = new_figure(9, 9)
    loss, accuracy, schedule = figure.subplots(
        3, 1, sharex=True, height_ratios=(3, 3, 2)
    )
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
        final, passes = [line["accuracy"] for line in ends], ends[0]["passes"]
        label = f"at the end, mean of {plural(passes, 'pass', 'passes')}"
        accuracy.plot([epochs] * len(final), final, "D", color="black", label=label)
        accuracy.set_title(f"final accuracy {np.mean(final):.2f} % (n = {len(final)})")
        place_legend(accuracy)
    set_log_scale(loss)
    loss.set_ylabel("loss")
    place_legend(loss)
    accuracy.set_ylabel(f"{held_out} accuracy, %")
    show_plain_numbers(accuracy)
    draw_schedules(schedule, phases, epochs)
    figure.align_ylabels([loss, accuracy, schedule])
    hide_spines(loss, accuracy)
    figure.savefig(path)


def plot_language_model(log: Log, phases: Phases, epochs: int, path: Path) -> None:
    """Perplexity of all seeds, and the schedules."""
    by_seed = _epochs_by_seed(log)
    if not by_seed:
        _plot_schedules_only(log, phases, epochs, path)
        return
    figure = new_figure(9, 7)
    ax, schedule = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
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
    place_legend(ax)
    draw_schedules(schedule, phases, epochs)
    figure.align_ylabels([ax, schedule])
    hide_spines(ax)
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
    rate.set_ylim(bottom=0)
    show_plain_numbers(loss, rate)
    accuracies = np.array([run["accuracy"] for run in runs])
    end.hist(accuracies, bins=min(20, len(runs)), color=TRAINING)
    end.axvline(accuracies.mean(), color="black", label=f"mean {accuracies.mean():.2f}")
    end.axvline(target, color="black", ls=":", label=f"target {target:g}")
    end.set_xlabel("test accuracy, %")
    end.set_ylabel("seeds" if len(runs) > 1 else "seed")
    show_plain_numbers(end)
    end.yaxis.set_major_locator(MaxNLocator(integer=True))
    place_legend(end, above=True)
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
    losses, stayed = np.array(results["losses"]), np.array(results["stayed"])
    difference = np.abs(losses - stayed)
    figure = new_figure(8, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
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
    place_legend(top, columns=3)
    show_plain_numbers(top)
    if difference.any():
        bottom.plot(np.where(difference > 0, difference, np.nan), "k.-", lw=1)
        set_log_scale(bottom)
    else:
        bottom.plot(difference, "k.-", lw=1)
    bottom.set_ylabel("difference to the\nrun in PyTorch alone")
    bottom.set_xlabel("step")
    figure.align_ylabels([top, bottom])
    hide_spines(top, bottom)
    figure.savefig(path)


# ---------------------------------------------------------------------------
# parts of a figure
# ---------------------------------------------------------------------------


def draw_schedules(ax: Axes, phases: Phases, epochs: float) -> Axes | None:
    """The learning rate on `ax`, and b1 on a second axis, which is returned.

    None where the phases do not change b1: it is then written above, or not set.
    """
    steps = np.arange(phases.total_steps)
    x = steps * epochs / phases.total_steps
    ax.plot(x, phases.schedule("learning_rate")(steps), color="black")
    ax.set_ylabel("learning rate")
    ax.set_xlabel("epoch")
    ax.set_ylim(bottom=0)
    show_plain_numbers(ax)
    values = phases.schedule("b1")(steps) if "b1" in phases.names else np.zeros(1)
    if np.ptp(values) == 0:
        if "b1" in phases.names:
            ax.set_title(f"b1 {values[0]:g} throughout", fontsize=10)
        hide_spines(ax)
        return None
    momentum = ax.twinx()
    momentum.plot(x, values, color="gray", ls="--")
    momentum.set_ylabel("b1 (dashed)", color="gray")
    show_plain_numbers(momentum)
    hide_spines(ax, momentum, right=False)
    return momentum


def _plot_schedules_only(log: Log, phases: Phases, epochs: int, path: Path) -> None:
    """Where no epoch has been finished: no axes without a curve."""
    figure = new_figure(9, 3)
    ax = figure.subplots()
    draw_schedules(ax, phases, epochs)
    _mark_divergence(log, phases, epochs, ax)
    figure.suptitle("no epoch is finished")
    figure.savefig(path)


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
