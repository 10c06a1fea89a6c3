"""What the curves of the comparison show, read from the drawn axes."""

import numpy as np
from figures import legend, lines, saved_figures

from train.evals.statistics import confidence_interval, summarize_test
from train.plots.comparison import plot_test
from train.recipes import compare as recipe


def test_test_curves(tmp_path):
    rng, epochs = np.random.default_rng(0), np.array([4, 8, 12])
    test = {
        name: summarize_test(rng.uniform(80, 95, (5, 3, 2)), epochs, 90.0)
        for name in recipe.OPTIMIZERS
    }
    schedule = recipe.make_schedule(recipe.Config(epochs=12))
    with saved_figures() as figures:
        plot_test(test, schedule, 90.0, tmp_path / "a.png")
    axes = {ax.get_label(): ax for ax in figures[0].axes}
    curve, end = axes["curve"], axes["end"]
    names = ["SGD + L2", "Adam + L2", "AdamW", "AMSGrad + L2", "AMSGrad + decay"]
    assert legend(curve) == [*names, "target, 90 %"]
    assert [label.get_text() for label in end.get_yticklabels()] == names
    for row, (name, result) in enumerate(zip(names, test.values(), strict=True)):
        accuracy = np.array(result["accuracy"])
        np.testing.assert_allclose(lines(curve)[name], [epochs, accuracy.mean(0)])
        points, interval, mean = end.lines[3 * row : 3 * row + 3]
        np.testing.assert_array_equal(points.get_xdata(), accuracy[:, -1])
        expected = confidence_interval(accuracy[:, -1])
        assert list(interval.get_xdata()) == [expected["low"], expected["high"]]
        assert list(mean.get_xdata()) == [expected["mean"]]
        assert {*interval.get_ydata(), *mean.get_ydata()} == {row}
    assert 11 < axes["schedule"].lines[0].get_xdata()[-1] < 12
