"""What grids and curves of accuracies say, and how sure that is."""

from typing import Any

import numpy as np
from scipy.special import stdtrit


def confidence(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % confidence interval (Student's t)."""
    n, mean = len(values), float(np.mean(values))
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def tuned(lrs: np.ndarray, decays: np.ndarray, accuracy: np.ndarray) -> dict[str, Any]:
    """What a grid says; `accuracy` is (learning rates, decays, seeds), in %."""
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
        "edges": [side for side, here in edges.items() if here],
        "basin": int((mean >= mean.max() - 0.5).sum()),  # cells within half a point
        "cells": mean.size,
        "decay_slope": decay_slope(lrs, decays, accuracy),
        "grid": {
            "learning_rates": lrs.tolist(),
            "decays": decays.tolist(),
            "accuracies": np.round(accuracy, 2).tolist(),
        },
    }


def best_decays(lrs, decays, accuracy, within: float = 1.0):
    """The learning rates that come within a point of the best, and their best decays.

    Those are read off between the cells, from a parabola through three of them. Farther
    from the best the decay hardly matters, and which is best is noise.
    """
    mean = accuracy.mean(-1)
    good = mean.max(1) >= mean.max() - within
    best = []
    for row in mean[good]:
        j = row.argmax()
        left, top, right = np.pad(row, 1, mode="edge")[j : j + 3]
        bend = 2 * top - left - right
        inside = 0 < j < len(row) - 1 and bend > 0
        best.append(j + (right - left) / (2 * bend) if inside else j)
    return lrs[good], np.exp(np.interp(best, np.arange(len(decays)), np.log(decays)))


def decay_slope(
    lrs, decays, accuracy, resamples: int = 2000
) -> dict[str, float] | None:
    """s in "the best decay goes as the learning rate to the power s".

    A line through the logarithms, its 95 % interval from resampled seeds. None if there
    are too few seeds or learning rates to tell.
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


def tested(curves: np.ndarray, epochs: np.ndarray, target: float) -> dict[str, Any]:
    """What (seeds, points, 2) test accuracies in % and training losses say."""
    accuracy, loss = curves[..., 0], curves[..., 1]
    above = accuracy >= target
    first = epochs[above.argmax(1)][above.any(1)]
    return {
        "n": len(curves),
        "mean": float(accuracy[:, -1].mean()),
        "std": float(accuracy[:, -1].std(ddof=1)),
        "reached": len(first),  # runs that came to the target at all
        "epochs_to_target": float(first.mean()) if len(first) else None,
        "epochs": epochs.tolist(),
        "accuracy": np.round(accuracy, 2).tolist(),
        "training_loss": np.round(loss, 4).tolist(),
    }


def paired(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How much better the first ended than the second, with the same seeds."""
    last = [np.array(tested["accuracy"])[:, -1] for tested in (one, other)]
    return confidence(last[0] - last[1])
