"""What the training curves show, read from the drawn axes."""

import itertools

import numpy as np
import pytest
from figures import legend, lines, saved_figures
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adamw_jax import Phase, Phases, one_cycle
from train.plots import curves

PHASES = one_cycle(0.1, epochs=4, steps_per_epoch=5)


def epochs(seed, **values):
    """A log of as many epochs as each of the values has."""
    return [
        {"event": "epoch", "seed": seed, "epoch": i + 1}
        | {key: value[i] for key, value in values.items()}
        for i in range(len(next(iter(values.values()))))
    ]


def test_classifier(tmp_path):
    log = [
        {"event": "start"},
        *epochs(3, loss=[2.0, 1.0], valid_loss=[3.0, 2.0], accuracy=[50.0, 60.0]),
        *epochs(4, loss=[2.5, 1.5], valid_loss=[3.5, 2.5], accuracy=[40.0, 70.0]),
        {"event": "diverged", "seed": 4, "step": 15},
        {"event": "end", "seed": 3, "accuracy": 61.0, "passes": 2},
        {"event": "end", "seed": 4, "accuracy": 71.5, "passes": 2},
    ]
    with saved_figures() as figures:
        curves.plot_classifier(log, PHASES, 4, tmp_path / "a.png", held_out="valid")
    loss, accuracy, schedule, momentum = figures[0].axes
    assert legend(loss) == ["training, with augmentation", "valid", "diverged"]
    drawn = lines(loss)
    assert drawn["training, with augmentation"].tolist() == [[1, 2], [2, 1]]
    assert drawn["valid"].tolist() == [[1, 2], [3, 2]]
    assert len(loss.lines) == 2 * 2 + 1  # each seed's, and the divergence
    assert drawn["diverged"][0].tolist() == [3, 3]  # step 15 of 20, epoch 3 of 4
    assert accuracy.lines[1].get_ydata().tolist() == [40, 70]
    final = lines(accuracy)["at the end, mean of 2 passes"]
    assert final.tolist() == [[4, 4], [61, 71.5]]
    assert "66.25 % (n = 2)" in accuracy.get_title()
    assert accuracy.get_ylabel() == "valid accuracy, %"
    assert len(schedule.lines) == len(momentum.lines) == 1


def test_language_model(tmp_path):
    log = [
        *epochs(0, loss=np.log([90.0, 50.0, 30.0]), valid_loss=np.log([80, 60, 55])),
        {"event": "end", "test": {"perplexity": 50.0, "with_cache": 40.0}},
        {"event": "end", "test": {"perplexity": 52.0, "with_cache": 41.0}},
    ]
    with saved_figures() as figures:
        curves.plot_language_model(log, PHASES, 3, tmp_path / "a.png")
    perplexity, _, _ = figures[0].axes
    drawn = lines(perplexity)
    np.testing.assert_allclose(drawn["training, with dropout"][1], [90, 50, 30])
    np.testing.assert_allclose(drawn["validation"][1], [80, 60, 55])
    assert drawn["test: 51.0"].tolist() == [[3, 3], [50, 52]]
    assert drawn["test, with cache: 40.5"].tolist() == [[3, 3], [40, 41]]
    assert perplexity.get_yscale() == "log"


@pytest.mark.parametrize("diverged", [False, True])
def test_a_log_without_an_epoch_has_no_empty_axes(tmp_path, diverged):
    log = [{"event": "diverged", "seed": 0, "step": 10}] * diverged
    with saved_figures() as figures:
        curves.plot_classifier(log, PHASES, 4, tmp_path / "a.png")
        curves.plot_language_model(log, PHASES, 4, tmp_path / "b.png")
    for figure in figures:
        schedule, momentum = figure.axes
        assert len(schedule.lines) == 1 + diverged and len(momentum.lines) == 1


def test_one_pass_is_one(tmp_path):
    log = epochs(0, loss=[2.0, 1.0], test_loss=[3.0, 2.0], accuracy=[50.0, 60.0])
    log.append({"event": "end", "seed": 0, "accuracy": 61.0, "passes": 1})
    with saved_figures() as figures:
        curves.plot_classifier(log, PHASES, 4, tmp_path / "a.png")
    assert legend(figures[0].axes[1]) == ["at the end, mean of 1 pass"]


def boxes(figure, artists):
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [artist.get_window_extent(renderer) for artist in artists]


@pytest.mark.parametrize(
    "loss", [[2.0, 1.0, 0.5], [1.36, 1.35, 1.34], [9e3, 5.0, 1e-4]]
)
def test_what_is_drawn_can_be_read(tmp_path, loss):
    """Plain numbers, none upon another, and no legend where something is drawn."""
    log = epochs(0, loss=loss, test_loss=loss, accuracy=[99.999, 99.9991, 99.9992])
    log.append({"event": "end", "seed": 0, "accuracy": 99.9993, "passes": 2})
    with saved_figures() as figures:
        curves.plot_classifier(log, PHASES, 3, tmp_path / "a.png")
    (figure,) = figures
    for ax in figure.axes:
        shown = [
            label
            for label, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
            if ax.get_ylim()[0] <= at <= ax.get_ylim()[1]
        ]
        assert len(shown) >= 3
        assert all(
            float(label.get_text().replace("\N{MINUS SIGN}", "-")) >= 0
            for label in shown
        )
        for below, above in itertools.pairwise(boxes(figure, shown)):
            assert below.y1 <= above.y0
        assert not ax.yaxis.get_offset_text().get_text()
        if ax.get_legend():
            (inside, legend_box) = boxes(figure, [ax, ax.get_legend()])
            assert not ax.patch.get_window_extent().overlaps(
                legend_box.shrunk(0.99, 0.9)
            )


def test_seeds(tmp_path):
    runs = [{"accuracy": a} for a in (93.0, 94.0, 94.5, 94.5)]
    losses = np.linspace(3, 1, PHASES.total_steps)
    with saved_figures() as figures:
        curves.plot_seeds(runs, losses, PHASES, 94.0, tmp_path / "a.png")
    loss, end, rate = figures[0].axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), losses)
    assert sum(bar.get_height() for bar in end.patches) == 4
    assert legend(end) == ["mean 94.00", "target 94"]
    assert max(rate.lines[0].get_ydata()) == pytest.approx(0.1)


def test_switches(tmp_path):
    results = {
        "losses": [3.0, 2.0, 1.5, 1.25, 1.0],
        "stayed": [3.0, 2.0, 1.5, 1.0, 1.0],
        "without_moments": [1.5, 2.5],
    }
    with saved_figures() as figures:
        curves.plot_switches(results, (2, 4), tmp_path / "a.png")
    top, bottom = figures[0].axes
    drawn = lines(top)
    assert drawn["PyTorch"].tolist() == [[0, 1], [3, 2]]
    assert drawn["Flax"].tolist() == [[2, 3], [1.5, 1.25]]
    assert drawn["PyTorch again"].tolist() == [[4], [1]]
    assert drawn["Flax, without the moments"].tolist() == [[2, 3], [1.5, 2.5]]
    assert drawn["stayed in PyTorch"][1].tolist() == results["stayed"]
    difference = bottom.lines[0].get_ydata()
    assert difference[3] == 0.25 and np.isnan(difference[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("b1", ["cycled", "constant", None])
def test_schedules(b1):
    rates = {"learning_rate": (0.1, 0.0)}
    rates |= {"b1": 0.9} if b1 == "constant" else {}
    phases = PHASES if b1 == "cycled" else Phases([Phase(20, **rates)])
    ax = curves.new_figure(4, 3).subplots()
    momentum = curves.draw_schedules(ax, phases, 4)
    (rate,) = ax.lines
    np.testing.assert_allclose(rate.get_xdata(), np.arange(20) / 5)
    expected = [phases.at(step)["learning_rate"] for step in range(20)]
    np.testing.assert_allclose(rate.get_ydata(), expected, rtol=1e-6)
    if b1 == "cycled":
        assert len(momentum.lines) == 1
    else:  # no empty axes
        assert momentum is None and ax.figure.axes == [ax]
        assert ax.get_title() == ("b1 0.9 throughout" if b1 else "")
    assert ax.get_ylim()[0] == 0
