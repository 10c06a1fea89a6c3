"""Linen's TrainState in one pass: the training and the state of Flax's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, serialization
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from ways import assert_close, needs_kernel

import adamw_jax as aj

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

CYCLE = aj.one_cycle(0.05, steps=10)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(64, use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=False)(x)
        return linen.Dense(1)(linen.tanh(x))


def with_statistics(base):
    """A subclass as people write it, for the statistics of batch normalization."""

    class TrainState(base):
        batch_stats: Any

    return TrainState


OURS, THEIRS = map(with_statistics, (aj.linen.TrainState, train_state.TrainState))


def create(cls, tx):
    variables = Net().init(jax.random.key(0), batch(0))
    return cls.create(apply_fn=Net().apply, tx=tx, **variables)


def batch(i):
    return jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, x):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, new = state.apply_fn(variables, x, mutable=["batch_stats"])
        return ((out - 1) ** 2).mean(), new["batch_stats"]

    grads, statistics = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=statistics)


@pytest.mark.parametrize(
    "tx", [aj.adamw(CYCLE, weight_decay=0.1), optax.sgd(0.1, 0.9)], ids=["step", "none"]
)
def test_a_training(tx):
    ours, theirs = create(OURS, tx), create(THEIRS, tx)
    start = ours.params["Dense_1"]["kernel"] + 0
    for i in range(4):
        ours, theirs = train_step(ours, batch(i)), train_step(theirs, batch(i))
    assert ours.step == theirs.step == 4 and isinstance(ours, OURS)
    assert np.abs(ours.params["Dense_1"]["kernel"] - start).max() > 0.01
    for field in ("params", "opt_state", "batch_stats"):
        assert_close(getattr(ours, field), getattr(theirs, field), ulps=50)


@needs_kernel
def test_the_kernel_is_called_with_donated_buffers():
    tx = aj.adamw(CYCLE, weight_decay=0.1)
    lowered = train_step.lower(create(OURS, tx), batch(0))
    assert "custom_call @adamw_jax_one_pass" in lowered.as_text()
    theirs = train_step.lower(create(THEIRS, tx), batch(0))
    assert "adamw_jax_one_pass" not in theirs.as_text()
    parameters = sum(x.size for x in jax.tree.leaves(create(OURS, tx).params))
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= 12 * parameters


def test_a_checkpoint_of_flax_is_restored():
    tx = aj.adamw(CYCLE, weight_decay=0.1)
    theirs = train_step(create(THEIRS, tx), batch(0))
    ours = serialization.from_bytes(create(OURS, tx), serialization.to_bytes(theirs))
    ours, theirs = train_step(ours, batch(1)), train_step(theirs, batch(1))
    assert ours.step == 2
    assert_close(ours.opt_state, theirs.opt_state, ulps=50)


def test_scales_of_fp8_layers_are_replaced():
    """They are not trained: their gradients are the new values."""
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"s": jnp.ones(1)}}
    grads = jax.tree.map(lambda x: 3 * x, params)
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=aj.adamw(0.1))
        for cls in (aj.linen.TrainState, train_state.TrainState)
    )
    ours, theirs = (s.apply_gradients(grads=grads) for s in (ours, theirs))
    assert_close(ours.params, theirs.params)
    assert ours.params[OVERWRITE_WITH_GRADIENT]["s"] == 3
    np.testing.assert_allclose(ours.params["params"]["w"], 0.9, rtol=1e-4)
