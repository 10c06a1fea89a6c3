"""torchvision's ResNets up to the last feature map, and fast.ai's head.

Modules have torchvision's names, so a path joined by dots is the name of a weight;
`train.models.pretrained` reads and writes them. Under `jax.jit` with batches split over
devices, batch norm uses the statistics of the global batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.models.conv import global_max

# ---------------------------------------------------------------------------
# the body
# ---------------------------------------------------------------------------


def _conv(n_in, n_out, size, stride, dtype, rngs):
    return nnx.Conv(
        n_in,
        n_out,
        (size, size),
        stride,
        padding=size // 2,  # "SAME" pads the other side when the stride is 2
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.variance_scaling(2, "fan_out", "normal"),
        rngs=rngs,
    )


def no_promotion(arrays, /, *, dtype=None, inexact=True):
    return arrays


def _norm(channels, dtype, rngs, scale_init=nnx.initializers.ones):
    return nnx.BatchNorm(
        channels,
        momentum=0.9,  # PyTorch's 0.1
        epsilon=1e-5,
        dtype=dtype,
        # Flax would round scales and running statistics to bfloat16 before use.
        promote_dtype=no_promotion,
        scale_init=scale_init,
        rngs=rngs,
    )


def _maximum(a, b):
    # The gradient of jnp.maximum tests which operand *equals* the result. XLA may
    # recompute the operands with other rounding, and then neither does.
    return jnp.where(a >= b, a, b)


def max_pool(x):
    """3 x 3 maximum at stride 2 of the output of a ReLU, padded with zeros.

    Takes the maximum over rows, then over columns. On a CPU the gradient of
    `nnx.max_pool` takes a fifth of a small network's time; this one takes next to none.
    Ties may send the gradient to another element than in PyTorch. They are zeros, whose
    gradient ReLU stops, apart from a few that rounding to bfloat16 creates.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = _maximum(_maximum(x[:, :-2:2], x[:, 1:-1:2]), x[:, 2::2])
    return _maximum(_maximum(x[:, :, :-2:2], x[:, :, 1:-1:2]), x[:, :, 2::2])


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, n_in, n_mid, stride, dtype, rngs):
        self.conv1 = _conv(n_in, n_mid, 3, stride, dtype, rngs)
        self.bn1 = _norm(n_mid, dtype, rngs)
        self.conv2 = _conv(n_mid, n_mid, 3, 1, dtype, rngs)
        self.bn2 = _norm(n_mid, dtype, rngs)
        self.downsample = _downsample(n_in, n_mid, stride, dtype, rngs)

    def __call__(self, x, *, train: bool):
        y = nnx.relu(self.bn1(self.conv1(x), not train))
        y = self.bn2(self.conv2(y), not train)
        return nnx.relu(y + _shortcut(self.downsample, x, train))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions.

    The second has the stride, as in torchvision ("ResNet v1.5"); in the paper it is the
    first.
    """

    expansion = 4

    def __init__(self, n_in, n_mid, stride, dtype, rngs):
        self.conv1 = _conv(n_in, n_mid, 1, 1, dtype, rngs)
        self.bn1 = _norm(n_mid, dtype, rngs)
        self.conv2 = _conv(n_mid, n_mid, 3, stride, dtype, rngs)
        self.bn2 = _norm(n_mid, dtype, rngs)
        self.conv3 = _conv(n_mid, 4 * n_mid, 1, 1, dtype, rngs)
        self.bn3 = _norm(4 * n_mid, dtype, rngs)
        self.downsample = _downsample(n_in, 4 * n_mid, stride, dtype, rngs)

    def __call__(self, x, *, train: bool):
        y = nnx.relu(self.bn1(self.conv1(x), not train))
        y = nnx.relu(self.bn2(self.conv2(y), not train))
        y = self.bn3(self.conv3(y), not train)
        return nnx.relu(y + _shortcut(self.downsample, x, train))


def _downsample(n_in, n_out, stride, dtype, rngs):
    if n_in == n_out and stride == 1:
        return nnx.data(None)
    conv, norm = _conv(n_in, n_out, 1, stride, dtype, rngs), _norm(n_out, dtype, rngs)
    return nnx.List([conv, norm])


def _shortcut(downsample, x, train):
    if downsample is None:
        return x
    conv, norm = downsample
    return norm(conv(x), not train)


LAYERS = {  # block, number of blocks at each resolution
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nnx.Module):
    """Maps NHWC images to feature maps of 1/32 of their size with `features` channels.

    Args:
        architecture: one of `LAYERS`.
        width: channels of the first convolution; torchvision's is 64.
        dtype: dtype of activations; parameters and statistics are float32.
        rngs: for the weights, which follow torchvision's distribution.
    """

    def __init__(
        self,
        architecture: str = "resnet50",
        width: int = 64,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if architecture not in LAYERS:
            raise ValueError(
                f"architecture must be one of {', '.join(LAYERS)}, got {architecture!r}"
            )
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width!r}")
        block, counts = LAYERS[architecture]
        self.conv1 = _conv(3, width, 7, 2, dtype, rngs)
        self.bn1 = _norm(width, dtype, rngs)
        n_in, layers = width, []
        for i, count in enumerate(counts):
            blocks: list[nnx.Module] = []
            for j in range(count):
                stride = 2 if i and not j else 1
                blocks.append(block(n_in, width * 2**i, stride, dtype, rngs))
                n_in = width * 2**i * block.expansion
            layers.append(nnx.List(blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.features = n_in

    def __call__(self, x, *, train: bool, key: jax.Array | None = None):
        """With train=False, batch norm uses its running statistics unchanged.

        The key is for bodies that draw random numbers, which this one does not.
        """
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), not train)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = block(x, train=train)
        return x


# ---------------------------------------------------------------------------
# the head
# ---------------------------------------------------------------------------


class Head(nnx.Module):
    """fast.ai's head: maximum and mean over the feature maps, then two linear layers.

    Computes in float32 at least, which costs next to nothing. The layers are in the
    attribute `name`, that of the body's classifier in PyTorch, and their indices are
    those of `nn.Sequential`.

    Source: fastai 0.7, `conv_learner.py` and `layers.py`.
    """

    fc: Any  # unless `name` is another

    def __init__(
        self, features: int, classes: int, *, name: str = "fc", rngs: nnx.Rngs
    ):
        self.name = name
        layers = nnx.List(
            [
                _norm(2 * features, None, rngs, jax.random.uniform),  # PyTorch 0.4's
                nnx.Dropout(0.25),
                _linear(2 * features, 512, rngs),
                nnx.relu,
                _norm(512, None, rngs, jax.random.uniform),
                nnx.Dropout(0.5),
                _linear(512, classes, rngs),
            ]
        )
        setattr(self, name, layers)

    def __call__(self, maps, *, train: bool, key: jax.Array | None = None):
        """The key is for dropout; only training needs it."""
        keys: Any = (None, None)
        if train:
            if key is None:
                raise ValueError("key must be a jax.random.key in training, got None")
            keys = jax.random.split(key)
        norm1, dropout1, linear1, relu, norm2, dropout2, linear2 = getattr(
            self, self.name
        )
        maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
        x = jnp.concatenate([global_max(maps), maps.mean((1, 2))], axis=1)
        x = dropout1(norm1(x, not train), deterministic=not train, rngs=keys[0])
        x = relu(linear1(x))
        x = dropout2(norm2(x, not train), deterministic=not train, rngs=keys[1])
        return linear2(x)


def _linear(n_in, n_out, rngs):
    init = nnx.initializers.variance_scaling(2, "fan_in", "normal")
    return nnx.Linear(n_in, n_out, kernel_init=init, rngs=rngs)
