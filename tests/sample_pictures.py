"""Synthetic photographs for the tests of pictures."""

import numpy as np
from PIL import Image


def make_picture(width, height, seed=0):
    """Smooth colours, a few sharp edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0.5, 3, (3, 3))]
    levels = 128 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
    levels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 100)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
