"""What the heat maps show, read from the drawn axes."""

import numpy as np
import pytest
from figures import saved_figures
from matplotlib.patches import Rectangle

from train.evals.statistics import summarize_grid
from train.plots import grids


def outlined(ax):
    """The cell in the red frame."""
    (frame,) = [p for p in ax.patches if isinstance(p, Rectangle)]
    return frame.get_x() + 0.5, frame.get_y() + 0.5


def cell_texts(ax):
    return {(round(t.get_position()[0]), t.get_text()) for t in ax.texts}


@pytest.fixture
def tuning():
    lrs, decays = np.geomspace(1e-3, 1e-1, 3), np.geomspace(1e-4, 1e-1, 4)
    noise = np.array([-0.1, 0.1])
    l2 = np.full((3, 4), 80.0)
    l2[1, 2], l2[0, 2], l2[1, 1] = 92.0, 91.5, 90.0
    decoupled = np.full((3, 4), 60.0)
    decoupled[2, 0] = 93.0
    return {
        name: summarize_grid(lrs, decays, mean[..., None] + noise)
        for name, mean in (("adam-l2", l2), ("adamw", decoupled))
    }


def test_tuning(tuning, tmp_path):
    with saved_figures() as figures:
        grids.plot_tuning(tuning, tmp_path / "a.png")
    l2, decoupled, bar = figures[0].axes
    assert outlined(l2) == (1, 2) and outlined(decoupled) == (2, 0)
    assert len(l2.texts) == 12 and (1, "92.0") in cell_texts(l2)
    assert (
        l2.get_title()
        == "Adam + L2: best 92.0 %\n2 of 12 cells within half a point of it"
    )
    assert [t.get_text() for t in l2.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert bar.get_ylim() == (83, 93)  # of the best ten points, for both
    # The best decay of both rates within a point, between the cells where it is known.
    x, y = l2.lines[0].get_data()
    assert list(x) == [0, 1]
    assert y[0] == pytest.approx(2) and 1.5 < y[1] < 2
    assert "Mean of 2 runs per cell" in figures[0]._supxlabel.get_text()


@pytest.mark.parametrize(
    ("without_cache", "high"),
    [
        (55.0, 50.0),  # a little beyond all cells
        (500.0, 50.0),  # far beyond them: the colours still tell them apart
        (46.0, 46.0),  # in between: a cache makes what is beyond the colours worse
        (30.0, 45.5),  # below all: half of the cells have colours of their own
    ],
)
def test_colours_of_a_cache(without_cache, high, tmp_path):
    perplexities = np.array([40.0, 45.0, 46.0, 50.0]).reshape(1, 2, 2)
    tuned = {
        "windows": [100],
        "thetas": [0.1, 0.5],
        "lambdas": [0.1, 0.2],
        "perplexities": perplexities.tolist(),
        "tuned": {"window": 100, "theta": 0.1, "lambda_": 0.1},
        "valid": {"no cache": without_cache, "tuned": 40.0},
    }
    with saved_figures() as figures:
        grids.plot_cache(tuned, tmp_path / "a.png")
    ax, bar = figures[0].axes
    assert ax.images[0].norm.vmin == 40 and ax.images[0].norm.vmax == high


def test_cache(tmp_path):
    perplexities = np.full((2, 3, 2), 50.0)
    perplexities[1, 2, 0] = 40.25
    tuned = {
        "windows": [100, 200],
        "thetas": [0.1, 0.5, 1.0],
        "lambdas": [0.1, 0.2],
        "perplexities": perplexities.tolist(),
        "tuned": {"window": 200, "theta": 1.0, "lambda_": 0.1},
        "valid": {"no cache": 55.0, "tuned": 40.2},
    }
    with saved_figures() as figures:
        grids.plot_cache(tuned, tmp_path / "a.png")
    ax, bar = figures[0].axes
    assert outlined(ax) == (2, 0)
    assert len(ax.texts) == 6 and (2, "40.25") in cell_texts(ax)
    assert (
        ax.get_title()
        == "best of 2 windows: 200, perplexity 40.20; without a cache 55.00"
    )
    assert bar.get_ylim() == (40.25, 50)
