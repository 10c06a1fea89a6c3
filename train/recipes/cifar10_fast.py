"""The shortest CIFAR-10 run of AdamW: a small network behind a whitening layer.

1cycle, label smoothing and alternating flips; a second look, from several views, at the
test images that the network is least sure of. A whole run is one compiled program of
the seed and the raw images; evaluation is a second one. Every seed goes through the
same two.

The ideas are those of Page, "How to train your ResNet", 2018-19; tysam-code,
hlb-CIFAR10, 2023; Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024,
https://arxiv.org/abs/2404.00498; and hiverge, cifar10-speedrun, 2025, which the
evaluation is from. All of those train with SGD or Muon.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from adamw_jax import (
    Phase,
    Phases,
    adamw,
    apply_updates,
    no_decay_on_bias_and_norm,
)
from train.data import batches
from train.models.conv import conv, global_max, max_pool
from train.recipes.check import check_options
from train.run.output import Output

SIZE = 32  # pixels of a side of an image

# ---------------------------------------------------------------------------
# configuration
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Trains a network on CIFAR-10 as fast as it can, once per seed."""

    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int = 50_000  # training images, the first ones
    eval_size: int = 10_000  # test images, the first ones
    width: float = 1.0  # multiplies the 64, 256 and 256 channels of the blocks

    epochs: float = 10.0  # fractions are allowed
    batch_size: int = 512  # the last partial batch of an epoch is left out
    learning_rate: float = 0.01  # at the peak
    weight_decay: float = 0.6  # of the kernels
    b1: tuple[float, float] = (0.9, 0.7)  # at both ends, and at the peak
    b2: float = 0.99  # of AdamW, throughout
    eps: float = 1e-8  # of AdamW
    warm_up: float = 0.3  # share of the steps up to the peak
    label_smoothing: float = 0.2  # share of the target that is spread over all classes
    translate: int = 2  # largest shift of training images, in pixels

    unsure: int = 2000  # test images that are also seen shifted
    target: float = 94.0  # accuracy in %; the share of runs that reach it is reported
    seeds: int = 10  # runs
    first_seed: int = 0  # of consecutive seeds


def check(config: Config) -> None:
    """Raises a ValueError for options that are out of range."""
    n, m = config.train_size, config.eval_size
    check_options(
        config,
        {
            "train_size": (n >= 1, "at least 1"),
            "eval_size": (m >= 1, "at least 1"),
            "width": (0.1 <= config.width < math.inf, "at least 0.1"),
            "epochs": (0 < config.epochs < math.inf, "above 0"),
            "batch_size": (1 <= config.batch_size <= n, f"in [1, {n}]"),
            "learning_rate": (0 < config.learning_rate < math.inf, "above 0"),
            "warm_up": (0 < config.warm_up < 1, "in (0, 1)"),
            "label_smoothing": (0 <= config.label_smoothing < 1, "in [0, 1)"),
            "translate": (0 <= config.translate < SIZE, f"in [0, {SIZE - 1}]"),
            "unsure": (1 <= config.unsure <= m, f"in [1, {m}]"),
            "target": (0 < config.target < 100, "in (0, 100) %"),
            "seeds": (config.seeds >= 2, "at least 2"),
            "first_seed": (0 <= config.first_seed < 2**31, "in [0, 2**31)"),
        },
    )
    make_optimizer(config)  # checks its own hyperparameters


# ---------------------------------------------------------------------------
# data: the random numbers of a run, and the images of a step
# ---------------------------------------------------------------------------


def count_steps(config: Config) -> tuple[int, int]:
    """The steps of an epoch, without the last partial batch, and of a run."""
    per_epoch = config.train_size // config.batch_size
    return per_epoch, math.ceil(round(config.epochs * per_epoch, 6))


def draw_tables(config: Config, key) -> dict[str, jax.Array]:
    """The images of each step, their shift and flip: tables (steps, batch_size, ...).

    An image is flipped in every second epoch, half of the images in the even ones, so
    that in two epochs the network sees each image both ways. If flips were drawn anew
    in each epoch, the second view would equal the first half of the time.
    """
    per_epoch, steps = count_steps(config)
    epochs = -(-steps // per_epoch)
    order_key, shift_key, flip_key = jax.random.split(key, 3)

    orders = jax.vmap(jax.random.permutation, (0, None))(
        jax.random.split(order_key, epochs), jnp.arange(config.train_size)
    )
    order = orders[:, : per_epoch * config.batch_size]
    order = order.reshape(-1, config.batch_size)[:steps]

    first = jax.random.bernoulli(flip_key, shape=(config.train_size,))
    odd = (np.arange(steps) // per_epoch % 2 == 1)[:, None]
    shift = jax.random.randint(
        shift_key, (*order.shape, 2), 0, 2 * config.translate + 1
    )
    return {"order": order, "shift": shift, "flip": first[order] ^ odd}


def padded(images, pixels: int):
    """Mirrored at the edges."""
    edge = (pixels, pixels)
    return jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")


def view(images, order, shift, flip):
    """Selects padded images, crops them at row and column `shift`, and flips some.

    One gather instead of a kernel each for the batch, the crop and the flip.
    """
    cells = jnp.arange(SIZE)
    rows = shift[:, :1] + cells
    columns = shift[:, 1:] + jnp.where(flip[:, None], cells[::-1], cells)
    return images[order[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---------------------------------------------------------------------------
# network
# ---------------------------------------------------------------------------

WHITENING_IMAGES = 5000  # are enough for a covariance of 12 x 12
WHITENING_EPS = 5e-4  # added to its eigenvalues: the last directions are noise


def patches(x):
    """(n, h, w, 3) -> (n, h - 1, w - 1, 12): the four pixels of every 2 x 2 patch."""
    rows = (x[:, :-1], x[:, 1:])
    return jnp.concatenate([p for r in rows for p in (r[:, :, :-1], r[:, :, 1:])], -1)


def whitening(x):
    """(12, 24): makes the channels of patches uncorrelated, with variance 1.

    Twice, with both signs, since the activation after it drops half of each. Only a
    bias is trained.
    """
    flat = patches(x).reshape(-1, 12)
    highest = lax.Precision.HIGHEST  # not the GPU's TF32
    covariance = jnp.matmul(flat.T, flat, precision=highest) / len(flat)
    values, vectors = jnp.linalg.eigh(covariance)
    kernel = vectors / jnp.sqrt(values + WHITENING_EPS)
    return jnp.concatenate([kernel, -kernel], -1)


# U(+-1/sqrt(fan in)), PyTorch's default
uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def part_identity(key, shape, dtype=jnp.float32):
    """`uniform`, except that the first outputs are the inputs."""
    height, width, inputs, outputs = shape
    n = min(inputs, outputs)
    kernel = uniform(key, shape, dtype).at[..., :n].set(0)
    identity = jnp.eye(inputs, n, dtype=dtype)
    return kernel.at[height // 2, width // 2, :, :n].set(identity)


class Net(nnx.Module):
    """Three blocks of two convolutions: 31 -> 15 -> 7 -> 3 pixels, 2 M parameters."""

    def __init__(self, width: float, dtype, *, rngs: nnx.Rngs):
        widths = [24, *(round(width * channels) for channels in (64, 256, 256))]
        sizes = [
            size
            for inputs, outputs in itertools.pairwise(widths)
            for size in ((inputs, outputs), (outputs, outputs))
        ]
        self.convs = nnx.List(
            nnx.Conv(
                *(inputs, outputs, (3, 3)),
                use_bias=False,
                dtype=dtype,
                kernel_init=part_identity,
                conv_general_dilated=conv,
                rngs=rngs,
            )
            for inputs, outputs in sizes
        )
        self.norms = nnx.List(
            nnx.BatchNorm(
                outputs, momentum=0.6, use_scale=False, dtype=dtype, rngs=rngs
            )
            for _, outputs in sizes
        )
        self.head = nnx.Linear(
            *(widths[-1], 10),
            use_bias=False,
            dtype=dtype,
            kernel_init=uniform,
            rngs=rngs,
        )
        self.whitening_bias = nnx.Param(jnp.zeros(24))
        self.dtype = dtype

    def __call__(self, x, kernel):
        """The logits of normalised images; `kernel` is that of the whitening layer."""
        x = patches(x.astype(self.dtype)) @ kernel.astype(self.dtype)
        x = nnx.gelu(x + self.whitening_bias.astype(self.dtype))
        for i, (conv3, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv3(x)
            if i % 2 == 0:
                even = x.shape[1] // 2 * 2
                x = max_pool(x[:, :even, :even])
            x = nnx.gelu(norm(x))
        return self.head(global_max(x)).astype(jnp.float32) / 3


def graphdefs(config: Config, dtype) -> tuple[Any, Any]:
    """The graphdefs of the network in training and in evaluation mode."""
    net = nnx.eval_shape(lambda: Net(config.width, dtype, rngs=nnx.Rngs(0)))
    training, evaluation = (nnx.view(net, use_running_average=m) for m in (False, True))
    return nnx.graphdef(training), nnx.graphdef(evaluation)


# ---------------------------------------------------------------------------
# optimizer
# ---------------------------------------------------------------------------


def make_schedule(config: Config) -> Phases:
    """1cycle with an early peak: the rate up and down to 1 %, b1 down and up."""
    _, steps = count_steps(config)
    peak, (high, low) = config.learning_rate, config.b1
    up, down = config.warm_up * steps, (1 - config.warm_up) * steps
    rise = Phase(steps=up, learning_rate=(peak / 10, peak), b1=(high, low))
    fall = Phase(steps=down, learning_rate=(peak, peak / 100), b1=(low, high))
    return Phases((rise, fall))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return adamw(
        make_schedule(config),
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=no_decay_on_bias_and_norm,
    )


# ---------------------------------------------------------------------------
# programs: a run, and its evaluation
# ---------------------------------------------------------------------------


class Trained(NamedTuple):
    params: Any
    stats: Any
    kernel: jax.Array  # of the whitening layer


def train(config: Config, dtype, seed, images, labels) -> tuple[Trained, jax.Array]:
    """A run, from uint8 images to the trained network and the loss of each step."""
    net_key, draw_key = jax.random.split(jax.random.key(seed))
    train_def, _ = graphdefs(config, dtype)
    net = Net(config.width, dtype, rngs=nnx.Rngs(net_key))
    _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    kernel = whitening(batches.normalise(images[:WHITENING_IMAGES]))
    tx = make_optimizer(config)
    images = padded(images, config.translate)

    def loss_fn(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        targets = optax.smooth_labels(jax.nn.one_hot(y, 10), config.label_smoothing)
        loss = optax.softmax_cross_entropy(net(x, kernel), targets).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x, y = batches.normalise(view(images, **batch)), labels[batch["order"]]
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (apply_updates(params, updates), stats, opt), loss

    carry = params, stats, tx.init(params)
    (params, stats, _), losses = lax.scan(step, carry, draw_tables(config, draw_key))
    return Trained(params, stats, kernel), losses


def evaluate(config: Config, dtype, trained: Trained, images, labels):
    """Accuracies in %: of plain images, with mirrored ones, and with shifted ones."""
    _, eval_def = graphdefs(config, dtype)
    net = nnx.merge(eval_def, trained.params, trained.stats)

    def logits(images):  # in batches, since all at once would fill the memory
        size = max(size for size in range(1, 2001) if len(images) % size == 0)
        parts = images.reshape(-1, size, *images.shape[1:])
        parts = lax.map(lambda x: net(batches.normalise(x), trained.kernel), parts)
        return parts.reshape(len(images), -1)

    return [
        100 * jnp.mean(vote.argmax(-1) == labels)
        for vote in votes(logits, images, config.unsure)
    ]


CORNERS = ((0, 0), (2, 2))  # of the shifted views in images padded by a pixel


def votes(logits, images, unsure: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logits of plain images, their mean with mirrored ones, and with shifted ones.

    The shifts, by a pixel to the upper left and to the lower right, plain and mirrored,
    are half of the last vote, but only of the `unsure` images whose two best classes
    are closest. Their number is fixed, because a program has fixed shapes.
    """

    def with_mirrored(images):
        return logits(jnp.concatenate([images, images[:, :, ::-1]]))

    plain, mirrored = jnp.split(with_mirrored(images), 2)
    both = (plain + mirrored) / 2

    best = lax.top_k(jax.nn.softmax(both), 2)[0]
    _, chosen = lax.top_k(best[:, 1] - best[:, 0], unsure)
    edges = padded(images[chosen], 1)
    corners = jnp.concatenate([edges[:, i:, j:][:, :SIZE, :SIZE] for i, j in CORNERS])
    shifted = with_mirrored(corners).reshape(2 * len(CORNERS), unsure, -1).mean(0)
    return plain, both, both.at[chosen].set((both[chosen] + shifted) / 2)
