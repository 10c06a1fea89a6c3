"""Shuffles, crops and label noise, drawn on the host, and the augmentation of a step.

A program that takes its batches as tables compiles faster than one that draws them, and
sees the same batches on any device.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from train.data.splits import Images

PAD = 4  # pixels around CIFAR-10's training images, room for the crops
CIFAR10_MEAN = np.array([0.4914, 0.48216, 0.44653], np.float32)  # of pixels in [0, 1]
CIFAR10_STD = np.array([0.24703, 0.24349, 0.26159], np.float32)


# ---------------------------------------------------------------------------
# on the host
# ---------------------------------------------------------------------------


def order(rng, train_size: int, batch_size: int, epochs: int) -> np.ndarray:
    """(steps, batch_size) indices: a shuffle per epoch, the remainder left out."""
    steps = train_size // batch_size
    orders = [rng.permutation(train_size)[: steps * batch_size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch_size).astype(np.int32)


def with_label_noise(rng, y: np.ndarray, fraction: float, classes: int = 10):
    """Replaces a fraction of the labels by other classes."""
    noisy = y.copy()
    wrong = rng.choice(len(y), round(fraction * len(y)), replace=False)
    noisy[wrong] = (y[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return noisy


def crops_and_flips(rng, shape: tuple[int, ...]) -> np.ndarray:
    """(*shape, 3) uint8: row and column of the crop in the padded image, and flip."""
    corners = rng.integers(0, 2 * PAD + 1, (*shape, 2), dtype=np.uint8)
    flips = rng.integers(0, 2, (*shape, 1), dtype=np.uint8)
    return np.concatenate([corners, flips], -1)


def padded(x: np.ndarray) -> np.ndarray:
    """Images with room for the crops; digits, which are not cropped, as they are."""
    if x.ndim == 2:
        return x
    return np.pad(x, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="symmetric")


def in_batches(images: Images, limit: int = 1000) -> Images:
    """(batches, size, ...), since a large set at once would fill the memory."""
    size = min(len(images.y), limit)
    if len(images.y) % size:
        raise ValueError(
            f"eval_size above {limit} must be a multiple of it, got {len(images.y)}"
        )
    return Images(*(a.reshape(-1, size, *a.shape[1:]) for a in images))


# ---------------------------------------------------------------------------
# in the step
# ---------------------------------------------------------------------------


def crop_and_flip(image, crop):
    """Crops one padded image; under `vmap` far cheaper than gathers or masks."""
    size = image.shape[0] - 2 * PAD
    row, column = crop[:2].astype(jnp.int32)
    image = lax.dynamic_slice(image, (row, column, 0), (size, size, 3))
    return jnp.where(crop[2] == 1, image[:, ::-1], image)


def normalise(x):
    """The network's input from uint8 pixels; those of digits are divided by 16."""
    if x.ndim == 2:
        return x / np.float32(16)
    return (x / np.float32(255) - CIFAR10_MEAN) / CIFAR10_STD
