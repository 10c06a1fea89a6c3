"""Summaries of accuracies, on numbers whose answer is known."""

import numpy as np
import pytest

from train.evals import statistics


def test_the_interval_covers_the_mean_in_95_of_100():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    intervals = [statistics.confidence_interval(draw) for draw in draws]
    inside = np.mean([i["low"] <= 3.0 <= i["high"] for i in intervals])
    assert inside == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5])
def test_the_slope_of_the_best_decay_is_found(slope):
    lrs, decays = np.geomspace(1e-3, 1e-1, 5), np.geomspace(1e-4, 1e2, 13)
    best = 0.3 * (lrs / 1e-2) ** slope
    distance = np.log10(decays[None] / best[:, None])
    noise = np.random.default_rng(0).normal(0, 0.1, (5, 13, 6))
    accuracy = 90 - 4 * distance[..., None] ** 2 + noise
    found = statistics.decay_slope(lrs, decays, accuracy)
    assert found is not None
    assert found["mean"] == pytest.approx(slope, abs=0.1)
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["high"] - found["low"] < 0.3
    assert statistics.decay_slope(lrs, decays, accuracy[..., :2]) is None  # two seeds


def test_the_best_cell_on_an_edge_is_reported():
    accuracy = np.zeros((3, 4, 2))
    accuracy[2, 0] = 90
    accuracy[2, 1] = 89.6
    best = statistics.summarize_grid(np.arange(1, 4), np.arange(1, 5), accuracy)
    assert (best["lr"], best["decay"]) == (3, 1)
    assert best["edges"] == ["highest learning rate", "lowest decay"]
    assert (best["basin"], best["cells"]) == (2, 12)


def test_the_target_is_reached_or_not():
    accuracy = np.array([[50, 91, 92], [50, 60, 95], [10, 20, 30]])
    curves = np.stack([accuracy, accuracy], -1)
    tested = statistics.summarize_test(curves, np.array([4, 8, 12]), 90)
    assert (tested["reached"], tested["n"]) == (2, 3)
    assert tested["epochs_to_target"] == 10
    never = statistics.summarize_test(curves, np.array([4, 8, 12]), 99)
    assert (never["reached"], never["epochs_to_target"]) == (0, None)
