"""A configuration of train.cifar10_fast that runs in seconds, and its images."""

import numpy as np

from train.recipes.cifar10_fast import Config

# Adam with a small eps makes large updates of rounding errors.
TINY = Config(
    train_size=100, eval_size=60, width=0.1, epochs=2.4, batch_size=20, unsure=7,
    eps=1e-2, target=20.0, seeds=2,
)  # fmt: skip


def pictures(n, seed=0):
    """Random images whose brightness depends on the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, n, dtype=np.int32)
    x = rng.integers(0, 56, (n, 32, 32, 3)) + 20 * y[:, None, None, None]
    return x.astype(np.uint8), y
