"""The test curves of `train.compare`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from adamw_jax import Phases
from train.evals.comparison import NAMES
from train.evals.statistics import confidence_interval
from train.plots.curves import draw_schedules
from train.plots.style import (
    COLOURS,
    hide_spines,
    new_figure,
    place_legend,
    show_plain_numbers,
)


def plot_test(test: dict[str, Any], phases: Phases, target: float, path: Path) -> None:
    """Test accuracy of the tuned optimizers over epochs and at the end.

    Args:
        test: by optimizer, the summary by `train.evals.statistics`.
        phases: the schedules of learning rate (as a share of the peak) and b1.
        target: accuracy in % to mark.
        path: where the picture is written.
    """
    figure = new_figure(12, 6)
    axes = figure.subplot_mosaic(
        [["curve", "end"], ["schedule", "end"]],
        width_ratios=(5, 3),
        height_ratios=(3, 1),
    )
    curve, schedule, end = axes["curve"], axes["schedule"], axes["end"]
    for row, (name, result) in enumerate(test.items()):
        epochs, accuracy = np.array(result["epochs"]), np.array(result["accuracy"])
        _draw_curve(curve, name, epochs, accuracy)
        _draw_end(end, name, row, accuracy[:, -1])
    curve.axhline(target, color="black", lw=0.8, ls=":", label=f"target, {target:g} %")
    curve.set_ylabel("test accuracy, %")
    curve.set_title("mean over seeds ± one standard deviation")
    place_legend(curve, columns=3)
    curve.tick_params(labelbottom=False)
    end.set_yticks(range(len(test)), [NAMES[name].short for name in test])
    end.invert_yaxis()
    end.set_xlabel("final test accuracy, %")
    end.set_title("each seed; mean and its 95 % interval")
    draw_schedules(schedule, phases, epochs[-1])
    schedule.set_ylabel("learning rate\n/ peak")
    schedule.sharex(curve)
    show_plain_numbers(curve)
    end.xaxis.set_major_formatter("{x:g}")
    hide_spines(curve, end)
    figure.savefig(path)


def _draw_curve(ax: Axes, name: str, epochs: np.ndarray, accuracy: np.ndarray) -> None:
    """Mean of the (seeds, epochs) accuracies, in a band of one standard deviation."""
    mean, std, colour = accuracy.mean(0), accuracy.std(0, ddof=1), COLOURS[name]
    ax.plot(epochs, mean, "o-", color=colour, ms=4, lw=2, label=NAMES[name].short)
    ax.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.1, lw=0)


def _draw_end(ax: Axes, name: str, row: int, accuracy: np.ndarray) -> None:
    """The accuracy of each seed, their mean and its confidence interval."""
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(accuracy))
    ax.plot(accuracy, row + jitter, ".", color=COLOURS[name], alpha=0.35, ms=6)
    interval = confidence_interval(accuracy)
    ax.plot([interval["low"], interval["high"]], [row, row], color="black", lw=2)
    ax.plot(interval["mean"], row, "D", color=COLOURS[name], mec="black", ms=8)
