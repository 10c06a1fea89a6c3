"""Summaries of grids and curves of accuracies, with their uncertainty."""

from typing import Any

import numpy as np
from scipy.special import stdtrit


def confidence_interval(values: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % confidence interval (Student's t)."""
    n, mean = len(values), float(np.mean(values))
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired_difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Mean of one's final accuracy minus the other's, seed by seed, and its interval.

    Args:
        one: from `summarize_test`.
        other: likewise, with the same seeds.
    """
    final = [np.array(tested["accuracy"])[:, -1] for tested in (one, other)]
    return confidence_interval(final[0] - final[1])


def plural(n: int, unit: str, units: str | None = None) -> str:
    """A number with its unit: 1 run, 2 runs.

    Args:
        n: the number.
        unit: the singular.
        units: the plural; None: with an s.
    """
    return f"{n:,} {unit if n == 1 else units or unit + 's'}"


def summarize_grid(
    lrs: np.ndarray, decays: np.ndarray, accuracy: np.ndarray
) -> dict[str, Any]:
    """The best cell of a grid, how wide the optimum is, and the grid itself.

    Args:
        lrs: learning rates, ascending.
        decays: ascending.
        accuracy: (learning rates, decays, seeds) in %.
    """
    mean = accuracy.mean(-1)
    i, j = np.unravel_index(mean.argmax(), mean.shape)
    edges = {
        "lowest learning rate": i == 0,
        "highest learning rate": i == len(lrs) - 1,
        "lowest decay": j == 0,
        "highest decay": j == len(decays) - 1,
    }
    return {
        "lr": float(lrs[i]),
        "decay": float(decays[j]),
        "accuracy": float(mean.max()),
        "accuracy_at_lowest_decay": float(mean[:, 0].max()),
        "edges": [edge for edge, is_best in edges.items() if is_best],
        "basin": int((mean >= mean.max() - 0.5).sum()),  # cells within half a point
        "cells": mean.size,
        "decay_slope": decay_slope(lrs, decays, accuracy),
        "grid": {
            "learning_rates": lrs.tolist(),
            "decays": decays.tolist(),
            "accuracies": np.round(accuracy, 2).tolist(),
        },
    }


def best_decays(
    lrs: np.ndarray, decays: np.ndarray, accuracy: np.ndarray, within: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The best decay of each learning rate that comes close to the best accuracy.

    The optimum between cells is the vertex of a parabola through three of them. Other
    learning rates are left out: far from the best accuracy the decay hardly matters,
    and the best one is noise.

    Args:
        lrs: learning rates, ascending.
        decays: ascending.
        accuracy: (learning rates, decays, seeds) in %.
        within: points of accuracy that count as close.

    Returns:
        The learning rates that come close, and their best decays.
    """
    mean = accuracy.mean(-1)
    close = mean.max(1) >= mean.max() - within
    best = []
    for row in mean[close]:
        j = row.argmax()
        below, top, above = np.pad(row, 1, mode="edge")[j : j + 3]
        curvature = 2 * top - below - above
        inside = 0 < j < len(row) - 1 and curvature > 0
        best.append(j + (above - below) / (2 * curvature) if inside else j)
    return lrs[close], np.exp(np.interp(best, np.arange(len(decays)), np.log(decays)))


def decay_slope(
    lrs: np.ndarray, decays: np.ndarray, accuracy: np.ndarray, resamples: int = 2000
) -> dict[str, float] | None:
    """The power s in "best decay ~ learning rate ** s".

    The slope of a line through the logarithms, and its 95 % interval by bootstrap over
    the seeds.

    Returns:
        mean, low and high, or None if there are fewer than three seeds or learning
        rates close to the best.
    """

    def slope(accuracy):
        x, y = best_decays(lrs, decays, accuracy)
        return np.polyfit(np.log(x), np.log(y), 1)[0] if len(x) > 2 else np.nan

    seeds, rng = accuracy.shape[-1], np.random.default_rng(0)
    if seeds < 3 or np.isnan(slope(accuracy)):
        return None
    draws = rng.integers(0, seeds, (resamples, seeds))
    low, high = np.nanquantile([slope(accuracy[..., d]) for d in draws], [0.025, 0.975])
    return {"mean": float(slope(accuracy)), "low": float(low), "high": float(high)}


def summarize_test(
    curves: np.ndarray, epochs: np.ndarray, target: float
) -> dict[str, Any]:
    """Final accuracy, epochs to the target, and the curves themselves.

    Args:
        curves: (seeds, points, 2) test accuracies in % and training losses.
        epochs: (points,) epochs after which they were measured.
        target: accuracy in %.
    """
    accuracy, loss = curves[..., 0], curves[..., 1]
    above = accuracy >= target
    first = epochs[above.argmax(1)][above.any(1)]
    return {
        "n": len(curves),
        "mean": float(accuracy[:, -1].mean()),
        "std": float(accuracy[:, -1].std(ddof=1)),
        "reached": len(first),  # seeds that reached the target
        "epochs_to_target": float(first.mean()) if len(first) else None,
        "epochs": epochs.tolist(),
        "accuracy": np.round(accuracy, 2).tolist(),
        "training_loss": np.round(loss, 4).tolist(),
    }
