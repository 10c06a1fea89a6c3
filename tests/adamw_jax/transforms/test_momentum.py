"""Momentum against a float64 loop."""

import itertools

import numpy as np
import pytest
from inputs import GRADS, P0, b1_schedule, run
from reference import constant, sgd_loop
from tiers import matrix

import adamw_jax as aj


@pytest.mark.parametrize(
    ("nesterov", "dampened", "momentum"),
    matrix(
        list(itertools.product((False, True), (False, True), (0.9, b1_schedule))),
        quick=[
            (False, False, b1_schedule),
            (False, True, 0.9),
            (True, False, 0.9),
            (True, True, b1_schedule),
        ],
    ),
)
def test_momentum_against_numpy(x64, nesterov, dampened, momentum):
    tx = aj.trace(momentum, nesterov, dampened=dampened)
    mu = momentum if callable(momentum) else constant(momentum)
    expected = sgd_loop(
        P0, GRADS, constant(1e-2), mu, nesterov=nesterov, dampened=dampened
    )
    np.testing.assert_allclose(
        run(tx, learning_rate=1e-2), expected, rtol=0, atol=1e-13
    )
