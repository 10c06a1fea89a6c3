"""A CIFAR-10 of eighty images, and a network that learns it in seconds."""

import numpy as np

from train.data.splits import Images
from train.recipes.cifar10 import Config

TINY = Config(
    blocks=1, width=4, epochs=5, batch_size=16, learning_rate=1e-2, name="run"
)
TRAIN, TEST = 60, 20  # images: three batches of 16 and one of 12


def images(seed, size):
    """Ten classes that differ in colour, so that something can be learned."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(size) % 10).astype(np.int32)
    colours = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 3))
    x = colours[y] + rng.normal(0, 30, (size, 32, 32, 3))
    return Images(x.clip(0, 255).astype(np.uint8), y)


def read_cifar10(data_dir=None):
    """Instead of `train.data.cifar10.read_cifar10`."""
    del data_dir
    return images(1, TRAIN), images(2, TEST)
