"""Optimizers by name."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cifar10 import TINY

from train.recipes.cifar10 import make_schedule
from train.recipes.optimizer import adapt_schedule, make_optimizer

pytestmark = pytest.mark.usefixtures("lenient")


def test_other_optimizers_follow_the_learning_rate():
    config = dataclasses.replace(
        TINY, optimizer="optax.lion", weight_decay=0.0, learning_rate=1e-2
    )
    schedule = make_schedule(config, 4)
    assert set(schedule.at(0)) == {"learning_rate"}  # and nothing else
    tx = make_optimizer(config, schedule)
    params = jnp.ones(1)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jnp.ones(1), state, params)
        rate = schedule.at(step)["learning_rate"]
        np.testing.assert_allclose(updates, -rate, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "optax.adamw"])
def test_no_decay_is_no_decay(optimizer):
    """Not AdamW's default of 1e-4."""
    config = dataclasses.replace(TINY, optimizer=optimizer, weight_decay=0.0)
    tx = make_optimizer(config, make_schedule(config, 4))
    params = jnp.array([5.0])
    updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
    assert updates == 0


def test_b1_is_dropped():
    schedule = make_schedule(TINY, 4)
    assert adapt_schedule(TINY, schedule) == schedule
    lion = dataclasses.replace(TINY, optimizer="optax.lion")
    rates = adapt_schedule(lion, schedule)
    assert "b1" in schedule.at(3) and "b1" not in rates.at(3)
    assert rates.at(3)["learning_rate"] == schedule.at(3)["learning_rate"]
