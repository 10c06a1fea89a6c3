"""Our chain is Optax's, and passes on the step of its last link."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ways import WAYS, assert_close, draws, trajectory

import adamw_jax as aj

PARAMS = {"kernel": draws((5, 3), 0), "bias": draws(3, 1)}
GRADS = [jax.tree.map(lambda p, i=i: draws(p.shape, 10 + i), PARAMS) for i in range(4)]


def test_updates_and_state_are_those_of_optax(lenient):
    links = aj.clip_by_global_norm(0.5), optax.trace(0.9), aj.adamw(0.1)
    ours, theirs = aj.chain(*links), optax.chain(*links)
    state, other_state = ours.init(PARAMS), theirs.init(PARAMS)
    chex.assert_trees_all_equal(state, other_state)
    for grads in GRADS:
        updates, state = ours.update(grads, state, PARAMS)
        expected, other_state = theirs.update(grads, other_state, PARAMS)
        chex.assert_trees_all_equal(updates, expected)
        chex.assert_trees_all_equal(state, other_state)
    assert isinstance(ours, optax.GradientTransformationExtraArgs)


def recorder(seen):
    """A last link with a step that does not know of factors."""

    def step(grads, state, params, **extra_args):
        seen.append((grads, extra_args))
        return params, state

    return aj.Transformation(*optax.identity(), step=step)


def test_a_factor_is_handed_to_the_step_or_multiplied():
    seen = []
    grads, clip = jnp.array([3.0, 4.0]), aj.clip_by_global_norm(1.0)
    tx = aj.chain(clip, recorder(seen))
    aj.update_and_apply(tx, grads, tx.init(grads), grads, value=7)
    np.testing.assert_allclose(seen[0][0], [0.6, 0.8], rtol=1e-6)
    assert seen[0][1] == {"value": 7}

    def step(grads, state, params, *, factor=None):
        seen.append((grads, factor))
        return params, state

    tx = aj.chain(clip, aj.Transformation(*optax.identity(), step=step))
    aj.update_and_apply(tx, grads, tx.init(grads), grads)
    np.testing.assert_array_equal(seen[1][0], grads)
    assert float(seen[1][1]) == pytest.approx(0.2)


def test_only_the_last_factor_is_handed_on():
    """The second norm is that of what the first has clipped."""
    links = aj.clip_by_global_norm(1.0), aj.clip_by_global_norm(0.5)
    tx = aj.chain(*links, aj.adamw(0.1, eps=1.0))
    inner = aj.chain(links[0], aj.chain(links[1], aj.adamw(0.1, eps=1.0)))
    for each in (tx, inner):
        assert_close(*(trajectory(way, each, PARAMS, GRADS) for way in WAYS), ulps=20)


@pytest.mark.parametrize(
    "links", [(aj.adamw(0.1), optax.scale(0.5)), (optax.sgd(0.1),)], ids=len
)
def test_no_step_without_that_of_the_last_link(links):
    tx = aj.chain(*links)
    assert not hasattr(tx, "step")
    assert aj.describe_step(tx).startswith("update, then apply_updates: ")


def test_extra_arguments_reach_every_link():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    link = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = aj.chain(link, aj.accumulate_gradients(aj.chain(link, aj.adamw(0.1)), 1))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1)
    aj.update_and_apply(tx, PARAMS, tx.init(PARAMS), PARAMS, value=2)
    assert seen == [1, 1, 2, 2]


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match="at least one transformation"):
        aj.chain()


def test_the_state_of_another_chain_is_refused():
    tx = aj.chain(optax.identity(), aj.adamw(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="the state must be that of 2 links, got 1"):
        aj.update_and_apply(tx, PARAMS, state[1:], PARAMS)
