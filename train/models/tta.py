"""Test-time augmentation."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def predict(
    logits_of: Callable[[Any], jax.Array],
    x: Any,
    augment: Callable[[Any, Any], Any],
    tables: Any,
) -> jax.Array:
    """Class probabilities: the mean of softmax over a plain and some augmented passes.

    The article's has four augmented ones, with the transformations of training. Call it
    under `jit`; the augmented passes are one program, run once for each.

    Args:
        logits_of: from a batch to its logits, (batch, classes), in evaluation mode.
        x: the plain batch.
        augment: from the batch and an entry of `tables` to the augmented batch.
        tables: the random numbers of the passes, with a leading axis for the passes:
            arrays, or keys from `jax.random.split(key, 4)`.

    Returns:
        (batch, classes), which sum to 1.

    Source: fastai 0.7, `Learner.TTA`.
    """
    plain = jax.nn.softmax(logits_of(x))
    views = lax.map(lambda table: jax.nn.softmax(logits_of(augment(x, table))), tables)
    return (plain + views.sum(0)) / (1 + len(views))
