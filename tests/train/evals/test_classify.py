"""Loss, accuracy and divergence of a classifier."""

import numpy as np
import pytest

from train.evals import classify


def test_loss_and_accuracy():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.25, 0.75]])
    loss, accuracy = classify.cross_entropy_and_accuracy(
        np.log(p), np.array([0, 0, 1, 1])
    )
    assert accuracy == 50.0  # the first of equals is the prediction
    assert loss == pytest.approx(-np.log([0.9, 0.2, 0.5, 0.75]).mean())


def test_the_mean_of_views_is_that_of_probabilities():
    p = np.random.default_rng(0).dirichlet(np.ones(3), (4, 5))
    found = classify.mean_of_views(np.log(p))
    np.testing.assert_allclose(np.exp(found), p.mean(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("losses", "test_loss", "expected"),
    [
        ([2.0, 1.0], 1.0, None),
        ([2.0, 9.0, 1.0], 90.0, None),  # one bad batch, a poor running mean: not yet
        ([2.0, np.nan, 1.0], 1.0, 1),
        ([2.0, 1.0, np.inf], np.nan, 2),
        ([2.0, 1.0], np.nan, 1),
        ([2.0, 8.0, 9.0], 1.0, 1),
    ],
)
def test_divergence(losses, test_loss, expected):
    assert classify.divergent_step(np.array(losses), test_loss) == expected
