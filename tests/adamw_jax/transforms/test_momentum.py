"""Momentum against a float64 loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import constant, sgd_loop, trajectory
from tiers import matrix

import adamw_jax as aj

rng = np.random.default_rng(1)


P0 = 0.25 * rng.normal(size=20)


GRADS = rng.normal(size=(60, 20))


GRADS[0] *= 10


def run(tx, p0=P0, grads=GRADS, dtype=jnp.float64, learning_rate=None):
    """Parameters after every step of a jitted loop over the given gradients."""
    if learning_rate is not None:
        tx = optax.chain(tx, aj.scale_by_learning_rate(learning_rate))

    loop = jax.jit(functools.partial(trajectory, tx))
    return np.asarray(loop(jnp.asarray(p0, dtype), jnp.asarray(grads, dtype)))


def b1_schedule(t):
    return 0.95 - 0.1 * jnp.asarray(t, float) / 60


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
