"""Heat maps of grids of hyperparameters, the best cell outlined in red."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from train.evals.comparison import NAMES
from train.evals.statistics import best_decays, plural
from train.plots.style import new_figure


def plot_tuning(tuning: dict[str, Any], path: Path) -> None:
    """Validation accuracy over learning rate and decay, Adam + L2 beside AdamW.

    The picture of Loshchilov and Hutter's paper. The colours span the best ten points;
    runs below that have failed.
    """
    grids = {
        name: {key: np.array(value) for key, value in tuning[name]["grid"].items()}
        for name in ("adam-l2", "adamw")
    }
    top = max(grid["accuracies"].mean(-1).max() for grid in grids.values())
    colours = Normalize(np.floor(top) - 10, top)

    figure = new_figure(12, 6)
    runs = grids["adamw"]["accuracies"].shape[-1]
    for ax, (name, grid) in zip(figure.subplots(1, 2), grids.items(), strict=True):
        lrs, decays, accuracy = grid.values()
        mean, best = accuracy.mean(-1), tuning[name]
        ax.imshow(mean.T, origin="lower", norm=colours, aspect="auto")
        _label_ticks(ax, [f"{lr:.2g}" for lr in lrs], [f"{d:.2g}" for d in decays])
        ax.set_xlabel("peak learning rate")
        ax.set_ylabel(
            "L2 coefficient" if name == "adam-l2" else "decoupled weight decay"
        )
        ax.set_title(
            f"{NAMES[name].short}: best {best['accuracy']:.1f} %\n"
            f"{best['basin']} of {best['cells']} cells within half a point of it",
            fontsize=12,
        )
        x, y = best_decays(lrs, decays, accuracy)
        x = np.searchsorted(lrs, x)
        y = np.interp(np.log(y), np.log(decays), np.arange(len(decays)))
        outline = [withStroke(linewidth=4, foreground="black")]
        ax.plot(x, y, "o-", color="white", lw=2, ms=5, path_effects=outline)
        _outline_cell(ax, *np.unravel_index(mean.argmax(), mean.shape))
        for (i, j), value in np.ndenumerate(mean):
            text, edge = ("white", "black")[:: 1 if colours(value) < 0.6 else -1]
            outline = [withStroke(linewidth=1.5, foreground=edge, alpha=0.4)]
            label = ax.text(i, j + 0.22, f"{value:.1f}", color=text, ha="center")
            label.set(fontsize=9, va="center", path_effects=outline)
    scale = ScalarMappable(colours)  # viridis, for the images as well
    bar = figure.colorbar(scale, ax=figure.axes, extend="min", pad=0.01)
    bar.set_label("validation accuracy, %")
    figure.supxlabel(
        f"Mean of {plural(runs, 'run')} per cell. Red: the best cell. White: the best "
        "decay of each learning rate that comes within a point of it.",
        fontsize=10,
    )
    figure.savefig(path)


def plot_cache(tuned: dict[str, Any], path: Path) -> None:
    """Perplexity with a neural cache over theta and lambda, at the best window."""
    best, windows, thetas, lambdas = (
        tuned[key] for key in ("tuned", "windows", "thetas", "lambdas")
    )
    grid = np.array(tuned["perplexities"])[windows.index(best["window"])]
    without_cache = tuned["valid"]["no cache"]
    # The colours end at the value without a cache, because a cache makes the cells
    # beyond it worse. They span at least half of the cells, and no empty range.
    high = np.clip(without_cache, np.median(grid), grid.max())
    colours = Normalize(grid.min(), max(high, grid.min() + 1e-6))
    figure = new_figure(10, 6)
    ax = figure.subplots()
    image = ax.imshow(
        grid.T, origin="lower", norm=colours, aspect="auto", cmap="viridis_r"
    )
    _label_ticks(ax, [f"{theta:g}" for theta in thetas], [f"{x:g}" for x in lambdas])
    ax.set_xlabel("theta")
    ax.set_ylabel("lambda")
    for (i, j), value in np.ndenumerate(grid):
        colour = "white" if colours(value) > 0.5 else "black"
        ax.text(i, j, f"{value:.4g}", color=colour, ha="center", va="center", size=8)
    _outline_cell(ax, thetas.index(best["theta"]), lambdas.index(best["lambda_"]))
    ax.set_title(
        f"best of {len(windows)} windows: {best['window']}, perplexity "
        f"{tuned['valid']['tuned']:.2f}; without a cache {without_cache:.2f}"
    )
    extend = "max" if grid.max() > colours.vmax else "neither"
    bar = figure.colorbar(image, ax=ax, extend=extend, pad=0.01, format="{x:g}")
    bar.set_label("validation perplexity")
    figure.savefig(path)


# ---------------------------------------------------------------------------
# parts of a figure
# ---------------------------------------------------------------------------


def _label_ticks(ax: Axes, x: Sequence[str], y: Sequence[str]) -> None:
    ax.set_xticks(range(len(x)), x)
    ax.set_yticks(range(len(y)), y)


def _outline_cell(ax: Axes, i: int, j: int) -> None:
    ax.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, ec="red", lw=2.5))
