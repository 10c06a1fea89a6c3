"""Loss and accuracy of a classifier, and the step at which its training diverges."""

from collections.abc import Sequence

import numpy as np


def cross_entropy_and_accuracy(
    log_probs: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Of (images, classes) log-probabilities; the accuracy in %.

    The first of several equal classes is the prediction.
    """
    loss = -log_probs[np.arange(len(labels)), labels].mean()
    return float(loss), 100 * float((log_probs.argmax(-1) == labels).mean())


def mean_of_views(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    """The logarithm of the mean probability over views of the same images."""
    return np.logaddexp.reduce(list(log_probs)) - np.log(len(log_probs))


def divergent_step(
    losses: np.ndarray, test_loss: float, classes: int = 10
) -> int | None:
    """The step of an epoch at which training diverges; None if it does not.

    It is the first step whose loss is not finite, or, where the mean loss is above
    twice that of guessing, the first step whose loss is. A test loss that is not finite
    counts as the last step.
    """
    limit = 2 * np.log(classes)
    bad = ~np.isfinite(np.append(losses, test_loss))
    if not bad.any() and losses.mean() > limit:
        bad = losses > limit
    return min(int(bad.argmax()), len(losses) - 1) if bad.any() else None
