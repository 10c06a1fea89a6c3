"""The learning rate and scheduled values, in every form that Optax's links accept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_jax as aj


def test_scheduled_decay_is_read_at_the_step_of_its_update(x64):
    for make in (aj.add_decayed_weights, aj.add_l2_gradient):
        tx, p = make(lambda t: 0.1 * jnp.float64(t)), jnp.ones(1)
        state = tx.init(p)
        for k in range(3):
            updates, state = tx.update(jnp.zeros(1), state, p)
            np.testing.assert_allclose(updates, 0.1 * k)


def test_flip_sign():
    tx = aj.scale_by_learning_rate(0.5, flip_sign=False)
    np.testing.assert_array_equal(tx.update(jnp.ones(1), tx.init(None))[0], 0.5)


ROWS = np.array([[0.1], [-0.2]])  # one for each row of the leaf
ELEMENTS = np.array([0.1, 0.0, 0.3])  # one for each column
LINKS = {
    "no rate": lambda lib: lib.scale_by_learning_rate(),
    "None": lambda lib: lib.scale_by_learning_rate(None, flip_sign=False),
    "negative rate": lambda lib: lib.scale_by_learning_rate(-0.1),
    "negative schedule": lambda lib: lib.scale_by_learning_rate(lambda t: 0.1 - t),
    "rows": lambda lib: lib.scale_by_learning_rate(ROWS),
    "elements": lambda lib: lib.scale_by_learning_rate(jnp.asarray(ELEMENTS)),
    "scheduled rows": lambda lib: lib.scale_by_learning_rate(lambda t: ROWS * (t + 1)),
    "not flipped": lambda lib: lib.scale_by_learning_rate(ROWS, flip_sign=False),
    "no decay": lambda lib: lib.add_decayed_weights(),
    "negative decay": lambda lib: lib.add_decayed_weights(-0.1),
    "decay of rows": lambda lib: lib.add_decayed_weights(ROWS),
    "decay of elements": lambda lib: lib.add_decayed_weights(ELEMENTS, mask=True),
    "sum": lambda lib: lib.trace(1.0),
    "large decay": lambda lib: lib.trace(decay=1.5, nesterov=True),
    "negative momentum": lambda lib: lib.trace(-0.5),
    "momentum of rows": lambda lib: lib.trace(jnp.asarray(ROWS), True),
    "no clipping": lambda lib: lib.clip_by_global_norm(np.inf),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_accept_what_optax_accepts(x64, lenient, name):
    p, g = (
        jnp.asarray(x).reshape(2, 3) / 7 for x in (np.arange(6.0), np.arange(6, 0, -1))
    )
    results = []
    for lib in (aj, optax):
        tx = LINKS[name](lib)
        update, state = jax.jit(tx.update), tx.init(p)
        results.append([])
        for k in range(3):
            updates, state = update(g * (k + 1), state, p)
            results[-1].append(updates)
    np.testing.assert_allclose(*results, rtol=1e-14, atol=0)


def test_a_traced_rate_for_each_element():
    def update(rate):
        tx = aj.scale_by_learning_rate(rate)
        return tx.update(jnp.ones((2, 3)), tx.init(None))[0]

    np.testing.assert_array_equal(
        jax.jit(update)(jnp.array([1.0, 2.0, 3.0])), [[-1.0, -2.0, -3.0]] * 2
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("learning_rate", aj.scale_by_learning_rate),
        ("weight_decay", aj.add_decayed_weights),
        ("l2", aj.add_l2_gradient),
        ("decay", aj.trace),
    ],
)
def test_an_array_that_does_not_broadcast(name, make):
    tx, p = make(np.ones(3)), jnp.ones(2)
    message = rf"{name} of shape \(3,\) does not broadcast to a leaf of shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        tx.update(p, tx.init(p), p)
    with pytest.raises(ValueError, match=f"{name} must be finite, got"):
        make(np.array([1.0, np.nan]))


def test_a_gradient_through_no_clipping():
    tx = aj.clip_by_global_norm(np.inf)

    def total(g):
        return tx.update(g, tx.init(g))[0].sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([0.0, 3.0])), 1)
    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(2)), 1)
