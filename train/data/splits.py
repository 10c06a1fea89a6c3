"""Images with labels, and their split into training, validation and test."""

from typing import NamedTuple

import numpy as np

SPLIT_SEED = 0  # which images are for training, validation and test: always the same


class Images(NamedTuple):
    x: np.ndarray  # uint8: digits (n, 64), 0 to 16; CIFAR-10 (n, 32, 32, 3), 0 to 255
    y: np.ndarray  # (n,) int32


class Splits(NamedTuple):
    train: Images
    validation: Images  # as many as in test, so that one program takes either
    test: Images


def check_sizes(
    train_size: int, eval_size: int | None, largest: int, remaining: int
) -> int:
    """The number of validation images, which is that of test images.

    Args:
        train_size: number of training images.
        eval_size: the number asked for; None: all that remain.
        largest: training size that is allowed.
        remaining: images for validation, and for test.
    """
    if not 1 <= train_size <= largest:
        raise ValueError(f"train_size must be in [1, {largest}], got {train_size}")
    if eval_size is None:
        return remaining
    if not 1 <= eval_size <= remaining:
        raise ValueError(
            f"eval_size must be in [1, {remaining}] beside {train_size} training "
            f"images, got {eval_size}"
        )
    return eval_size
