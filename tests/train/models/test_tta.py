"""Test-time augmentation."""

import jax
import numpy as np
import pytest

from train.models import tta


@pytest.mark.usefixtures("lenient")
def test_test_time_augmentation_is_the_mean_of_softmax():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
    shifts = rng.normal(size=(4, 6, 4))

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    expected = [softmax(x @ weights)]
    expected += [softmax((2 * x + shift) @ weights) for shift in shifts]
    found = jax.jit(
        lambda x, shifts: tta.predict(
            lambda x: x @ weights, x, lambda x, shift: 2 * x + shift, shifts
        )
    )(x, shifts)
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-5)
    plain = tta.predict(lambda x: x @ weights, x, lambda x, _: x, shifts[:0])
    np.testing.assert_allclose(plain, expected[0], rtol=1e-5)
