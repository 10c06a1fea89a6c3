"""Test-time augmentation."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def predict(
    logits_fn: Callable[[Any], jax.Array],
    x: Any,
    augment: Callable[[Any, Any], Any],
    tables: Any,
) -> jax.Array:
    """Class probabilities: the mean of softmax over a plain and some augmented passes.

    The article has four augmented passes, with the transformations of training. Call it
    under `jit`; the augmented passes are one program in a loop.

    Args:
        logits_fn: from a batch to its logits, (batch, classes), in evaluation mode.
        x: the plain batch.
        augment: from the batch and an entry of `tables` to the augmented batch.
        tables: random numbers, with a leading axis for the passes: arrays, or keys from
            `jax.random.split(key, 4)`.

    Returns:
        (batch, classes); a row sums to 1.

    Source: fastai 0.7, `Learner.TTA`.
    """
    plain = jax.nn.softmax(logits_fn(x))
    views = lax.map(lambda table: jax.nn.softmax(logits_fn(augment(x, table))), tables)
    return (plain + views.sum(0)) / (1 + len(views))
