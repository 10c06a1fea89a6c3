"""The learning rate and scheduled values."""

import jax.numpy as jnp
import numpy as np

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
