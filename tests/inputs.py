"""Gradients, schedules and a tree of parameters that several test modules use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reference import trajectory

import adamw_jax as aj

rng = np.random.default_rng(1)
P0 = 0.25 * rng.normal(size=20)
GRADS = rng.normal(size=(60, 20))
GRADS[0] *= 10  # a first gradient that dominates


def run(tx, p0=P0, grads=GRADS, dtype=jnp.float64, learning_rate=None):
    """Parameters after every step of a jitted loop over the given gradients."""
    if learning_rate is not None:
        tx = optax.chain(tx, aj.scale_by_learning_rate(learning_rate))

    loop = jax.jit(functools.partial(trajectory, tx))
    return np.asarray(loop(jnp.asarray(p0, dtype), jnp.asarray(grads, dtype)))


def b1_schedule(t):
    return 0.95 - 0.1 * jnp.asarray(t, float) / 60


def b2_schedule(t):
    return 0.9 + 0.09 * jnp.asarray(t, float) / 60


FLAX = {
    "Conv_0": {"kernel": jnp.ones((3, 3, 1, 4))},
    "BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "layers": {  # stacked by scan: every leaf has a dimension more
        "Dense_0": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
        "LayerNorm_0": {"scale": jnp.ones((3, 4))},
    },
    "Embed_0": {"embedding": jnp.ones((5, 4))},
}


def flat(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
