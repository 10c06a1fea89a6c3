"""The article's wide residual network for images of 32 x 32, and smaller ones."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.models.conv import conv

STEM = 16  # channels before the first stage


def _uniform(fan_in):
    """PyTorch's default for convolutions and linear layers: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return functools.partial(jax.random.uniform, minval=-bound, maxval=bound)


def _conv(n_in, n_out, size, stride, dtype, rngs):
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        stride,
        padding=size // 2,  # not "SAME", which pads the other side at a stride of 2
        use_bias=False,
        dtype=dtype,
        kernel_init=_uniform(size * size * n_in),
        conv_general_dilated=conv,
        rngs=rngs,
    )


def _norm(channels, dtype, axis_name, rngs, *, random_scale):
    """Batch norm, statistics in float32; PyTorch 0.4 drew its scales from U(0, 1)."""
    return nnx.BatchNorm(
        channels,
        momentum=0.9,  # PyTorch's 0.1
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        scale_init=jax.random.uniform if random_scale else nnx.initializers.ones,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Pre-activated, with the branch scaled by 0.2.

    The shortcut starts from the activated tensor, not from the input: without a change
    of channels it is `relu(norm(x))`.
    """

    def __init__(self, n_in, n_out, stride, dtype, axis_name, rngs):
        self.norm1 = _norm(n_in, dtype, axis_name, rngs, random_scale=True)
        self.conv1 = _conv(n_in, n_out, 3, stride, dtype, rngs)
        self.norm2 = _norm(n_out, dtype, axis_name, rngs, random_scale=False)
        self.conv2 = _conv(n_out, n_out, 3, 1, dtype, rngs)
        self.shortcut = nnx.data(
            _conv(n_in, n_out, 1, stride, dtype, rngs) if n_in != n_out else None
        )

    def __call__(self, x):
        x = nnx.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        branch = self.conv2(nnx.relu(self.norm2(self.conv1(x))))
        return 0.2 * branch + shortcut


class WideResNet(nnx.Module):
    """Three stages of `blocks` blocks, at strides 1, 2, 2 and width, 2 and 4 x width.

    The default is the article's WRN-22: 9,658,458 parameters, 2.8 GFLOP per image in
    the forward pass. Takes NHWC images, returns float32 logits.

    Source: fastai 0.7, `models/cifar10/wideresnet.py`.
    """

    def __init__(
        self,
        blocks: int = 3,
        width: int = 96,
        classes: int = 10,
        *,
        dtype: Any = jnp.float32,  # of the activations; parameters are float32
        axis_name: str | None = None,  # mesh axis that batches are split over
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(3, STEM, 3, 1, dtype, rngs)
        sizes = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nnx.List(
            Block(n_in, n_out, 1 + (i in (blocks, 2 * blocks)), dtype, axis_name, rngs)
            for i, (n_in, n_out) in enumerate(
                zip([STEM, *sizes[:-1]], sizes, strict=True)
            )
        )
        self.norm = _norm(sizes[-1], dtype, axis_name, rngs, random_scale=True)
        self.head = nnx.Linear(
            sizes[-1],
            classes,
            kernel_init=_uniform(sizes[-1]),
            bias_init=_uniform(sizes[-1]),
            rngs=rngs,
        )

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x))
        wide = jnp.promote_types(x.dtype, jnp.float32)  # a mean of bfloat16 is coarse
        return self.head(jnp.mean(x, (1, 2), wide))
