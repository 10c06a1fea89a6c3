"""The small networks of `train.compare` and `train.low_memory`, in Flax NNX."""

import itertools

import jax.numpy as jnp
from flax import nnx

from train.models.conv import conv, max_pool


class MLP(nnx.Module):
    """One hidden layer: pixels -> width -> classes."""

    def __init__(self, width: int, pixels=64, classes=10, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(pixels, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):  # (batch, pixels)
        return self.head(nnx.relu(self.hidden(x)))


class CNN(nnx.Module):
    """Three blocks of convolution, max pool, batch norm, ReLU; then average pooling.

    The first convolution has stride 2 in place of the pool, because a CPU would spend
    most of its time on activations of full resolution.
    """

    def __init__(self, width: int, classes=10, *, rngs: nnx.Rngs):
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nnx.List(
            nnx.Conv(
                *(inputs, outputs, (3, 3)),
                strides=2 if inputs == 3 else 1,
                use_bias=False,
                conv_general_dilated=conv,
                rngs=rngs,
            )
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs) for outputs in widths[1:]
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x):  # (batch, height, width, 3)
        for i, (conv3, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv3(x)
            x = max_pool(x) if i else x
            x = nnx.relu(norm(x))
        return self.head(jnp.mean(x, axis=(1, 2)))
