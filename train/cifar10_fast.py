"""The shortest time to 94 % on CIFAR-10 that AdamW can do.

    python -m train.cifar10_fast --data-dir DIR --seeds 200 --name adamw   # see --help

A small network behind a whitening layer, trained with 1cycle, label smoothing and
alternating flips; several views of the test images that it is least sure of. A whole
run is one compiled program of the seed and the raw images, evaluation is a second one.
Every seed goes through the same two.

The clock. Before it starts, both programs are compiled and run once, and the images lie
on the device as uint8. Training seconds are from the seed to the trained network:
initial weights, whitening, orders, padding, all the steps. Evaluation seconds are from
there to the accuracy. The time of a run is their sum. Beside it stands the time from a
cold start: from the first line of `main` to the first accuracy, with reading the files
and compilation.

Whether this network gets to 94 %, and when, has not been measured yet. Its settings
were chosen on a CPU, by a PyTorch prototype that is not kept, a quarter or half as
wide, from single runs of 5 epochs on 40,000 training images that were judged on the
other 10,000: a starting point, no result.

The ideas are those of Page, "How to train your ResNet", 2018-19; tysam-code,
hlb-CIFAR10, 2023; Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024,
https://arxiv.org/abs/2404.00498; and hiverge, cifar10-speedrun, 2025, from whom is the
evaluation. All of those train with SGD or Muon.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
import time
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
from train.data import cifar10 as data
from train.models.conv import conv, global_max, max_pool
from train.plots import curves
from train.run import devices, record

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network on CIFAR-10 as fast as it can, once per seed."""

    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int = 50_000  # training images, the first ones
    eval_size: int = 10_000  # test images, the first ones
    width: float = 1.0  # times the 64, 256 and 256 channels of the three blocks

    epochs: float = 10.0  # fractions are allowed
    batch_size: int = 512  # the images that do not fill the last one are left out
    learning_rate: float = 0.01  # at the peak
    weight_decay: float = 0.6  # of the kernels
    b1: tuple[float, float] = (0.9, 0.7)  # at both ends, and at the peak
    b2: float = 0.99  # of AdamW, throughout
    eps: float = 1e-8  # of AdamW
    warm_up: float = 0.3  # share of the steps up to the peak
    label_smoothing: float = 0.2  # share of the target that all classes divide
    translate: int = 2  # pixels by which training images are moved, at most

    unsure: int = 2000  # test images that are also seen shifted
    target: float = 94.0  # accuracy in % of which it is reported how often it is met
    seeds: int = 10  # runs
    first_seed: int = 0  # of as many in a row

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; that of an earlier run goes on with it
    overwrite: bool = False  # remove the earlier run of that name


def check(c: Config) -> None:
    rules = {
        "train_size": (c.train_size >= 1, "at least 1"),
        "eval_size": (c.eval_size >= 1, "at least 1"),
        "width": (0.1 <= c.width < math.inf, "at least 0.1"),
        "epochs": (0 < c.epochs < math.inf, "above 0"),
        "batch_size": (1 <= c.batch_size <= c.train_size, f"in [1, {c.train_size}]"),
        "learning_rate": (0 < c.learning_rate < math.inf, "above 0"),
        "warm_up": (0 < c.warm_up < 1, "in (0, 1)"),
        "label_smoothing": (0 <= c.label_smoothing < 1, "in [0, 1)"),
        "translate": (0 <= c.translate < SIZE, f"in [0, {SIZE - 1}]"),
        "unsure": (1 <= c.unsure <= c.eval_size, f"in [1, {c.eval_size}]"),
        "target": (0 < c.target < 100, "in (0, 100) %"),
        "seeds": (c.seeds >= 2, "at least 2"),
        "first_seed": (0 <= c.first_seed < 2**31, "in [0, 2**31)"),
    }
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")
    optimizer(c)  # which knows what its hyperparameters may be


# ---------------------------------------------------------------------------
# data: what is random in a run, and how a step sees the images
# ---------------------------------------------------------------------------

SIZE = 32  # of an image


def steps_of(config: Config) -> tuple[int, int]:
    """Steps per epoch, the images that do not fill a batch left out, and of a run."""
    per_epoch = config.train_size // config.batch_size
    return per_epoch, math.ceil(round(config.epochs * per_epoch, 6))


def draw(config: Config, key) -> dict[str, jax.Array]:
    """What each step does with which images: tables of (steps, batch_size, ...).

    An image is flipped in every second epoch, half of the images in the even ones: in
    two epochs the network sees each image both ways. Drawn anew in each epoch, the
    second of the two would be the same view again half of the time.
    """
    per_epoch, steps = steps_of(config)
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
    """Those of the padded images, cut at row and column `shift`, some of them flipped.

    One gather, instead of a kernel each for the batch, the crop and the flip.
    """
    cells = jnp.arange(SIZE)
    rows = shift[:, :1] + cells
    columns = shift[:, 1:] + jnp.where(flip[:, None], cells[::-1], cells)
    return images[order[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------

WHITENING_IMAGES = 5000  # are enough for a covariance of 12 x 12
WHITENING_EPS = 5e-4  # added to its eigenvalues: the last directions are noise


def patches(x):
    """(n, h, w, 3) -> (n, h - 1, w - 1, 12): the four pixels of every 2 x 2 patch."""
    rows = (x[:, :-1], x[:, 1:])
    return jnp.concatenate([p for r in rows for p in (r[:, :, :-1], r[:, :, 1:])], -1)


def whitening(x):
    """(12, 24): after it the patches' channels are uncorrelated, of variance 1.

    Twice, with both signs: the activation behind it drops half of either. It is not
    trained, only a bias is.
    """
    flat = patches(x).reshape(-1, 12)
    exactly = lax.Precision.HIGHEST  # not the GPU's TF32
    covariance = jnp.matmul(flat.T, flat, precision=exactly) / len(flat)
    values, vectors = jnp.linalg.eigh(covariance)
    kernel = vectors / jnp.sqrt(values + WHITENING_EPS)
    return jnp.concatenate([kernel, -kernel], -1)


# U(+-1/sqrt(fan in)), PyTorch's default
uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def part_identity(key, shape, dtype=jnp.float32):
    """`uniform`, but the first outputs are the inputs."""
    height, width, inputs, outputs = shape
    same = min(inputs, outputs)
    kernel = uniform(key, shape, dtype).at[..., :same].set(0)
    identity = jnp.eye(inputs, same, dtype=dtype)
    return kernel.at[height // 2, width // 2, :, :same].set(identity)


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
        """Logits of normalised images; `kernel` whitens."""
        x = patches(x.astype(self.dtype)) @ kernel.astype(self.dtype)
        x = nnx.gelu(x + self.whitening_bias.astype(self.dtype))
        for i, (conv3, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv3(x)
            if i % 2 == 0:
                even = x.shape[1] // 2 * 2
                x = max_pool(x[:, :even, :even])
            x = nnx.gelu(norm(x))
        return self.head(global_max(x)).astype(jnp.float32) / 3


def modes(config: Config, dtype) -> tuple[Any, Any]:
    """The graphdefs of the network, to train and to evaluate."""
    net = nnx.eval_shape(lambda: Net(config.width, dtype, rngs=nnx.Rngs(0)))
    training, evaluation = (nnx.view(net, use_running_average=m) for m in (False, True))
    return nnx.graphdef(training), nnx.graphdef(evaluation)


# ---------------------------------------------------------------------------
# optimizer
# ---------------------------------------------------------------------------


def cycle_of(config: Config) -> Phases:
    """1cycle with an early peak: the rate up and down to 1 %, b1 down and up."""
    _, steps = steps_of(config)
    peak, (high, low) = config.learning_rate, config.b1
    up, down = config.warm_up * steps, (1 - config.warm_up) * steps
    rise = Phase(steps=up, learning_rate=(peak / 10, peak), b1=(high, low))
    fall = Phase(steps=down, learning_rate=(peak, peak / 100), b1=(low, high))
    return Phases((rise, fall))


def optimizer(config: Config) -> optax.GradientTransformation:
    return adamw(
        cycle_of(config),
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=no_decay_on_bias_and_norm,
    )


# ---------------------------------------------------------------------------
# step and loop: a run is one program, its evaluation another
# ---------------------------------------------------------------------------


class Trained(NamedTuple):
    params: Any
    stats: Any
    kernel: jax.Array  # that whitens


def train(config: Config, dtype, seed, images, labels) -> tuple[Trained, jax.Array]:
    """One whole run, from uint8 images; also the loss of each step."""
    net_key, draw_key = jax.random.split(jax.random.key(seed))
    train_def, _ = modes(config, dtype)
    net = Net(config.width, dtype, rngs=nnx.Rngs(net_key))
    _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    kernel = whitening(batches.normalise(images[:WHITENING_IMAGES]))
    tx = optimizer(config)
    images = padded(images, config.translate)

    def loss_of(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        targets = optax.smooth_labels(jax.nn.one_hot(y, 10), config.label_smoothing)
        loss = optax.softmax_cross_entropy(net(x, kernel), targets).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x, y = batches.normalise(view(images, **batch)), labels[batch["order"]]
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (apply_updates(params, updates), stats, opt), loss

    carry = params, stats, tx.init(params)
    (params, stats, _), losses = lax.scan(step, carry, draw(config, draw_key))
    return Trained(params, stats, kernel), losses


def evaluate(config: Config, dtype, trained: Trained, images, labels):
    """Accuracies in %: of the plain images, with their mirror images, with shifts."""
    _, eval_def = modes(config, dtype)
    net = nnx.merge(eval_def, trained.params, trained.stats)

    def logits(images):  # in batches: all at once would fill the memory
        size = max(size for size in range(1, 2001) if len(images) % size == 0)
        parts = images.reshape(-1, size, *images.shape[1:])
        parts = lax.map(lambda x: net(batches.normalise(x), trained.kernel), parts)
        return parts.reshape(len(images), -1)

    by_views = votes(logits, images, config.unsure)
    return [100 * jnp.mean(vote.argmax(-1) == labels) for vote in by_views]


def votes(logits, images, unsure: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of the plain images, the mean with the mirrored ones, and with shifts.

    The shifts, by a pixel to the upper left and to the lower right, plain and mirrored,
    are half of the last vote, but only where it may matter: for the `unsure` images
    whose two best classes are closest. That number is fixed, for a program has one
    shape.
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


CORNERS = ((0, 0), (2, 2))  # of the shifted views in images padded by a pixel


# ---------------------------------------------------------------------------
# the runs and the report
# ---------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Trains once per seed; returns the folder with the results."""
    started = time.perf_counter()
    check(config)
    train_set, test_set = data.read_cifar10(config.data_dir)
    for option, there in (("train_size", train_set.y), ("eval_size", test_set.y)):
        if getattr(config, option) > len(there):
            raise ValueError(
                f"{option} must be in [1, {len(there)}], got {getattr(config, option)}"
            )
    train_set = jax.device_put(tuple(a[: config.train_size] for a in train_set))
    test_set = jax.device_put(tuple(a[: config.eval_size] for a in test_set))
    dtype = devices.compute_dtype("auto")  # the parameters are float32 anywhere
    environment = record.environment()
    free = ("data_dir", "seeds", "first_seed", "target", "out", "name", "overwrite")
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = record.open_folder(config, "cifar10_fast", f"cifar10-fast-{now}", free)
    before = json.loads((folder / "config.json").read_text())["devices"]
    if before != environment["devices"]:
        raise ValueError(
            f"name: {folder} has times of {before}, this is {environment['devices']}. "
            "Choose another --name"
        )
    log = folder / "metrics.jsonl"
    runs = record.read_lines(log)
    wanted = range(config.first_seed, config.first_seed + config.seeds)
    seeds = [seed for seed in wanted if seed not in {run["seed"] for run in runs}]
    if not seeds:
        raise ValueError(
            f"name: {folder} has all of these seeds. Choose another --name or others"
        )
    per_epoch, steps = steps_of(config)
    print(f"{steps} steps of {config.batch_size} images on {environment['devices']}.")
    print(cycle_of(config), flush=True)

    # both programs, and a run that does not count
    began = time.perf_counter()
    seed = np.uint32(seeds[0])
    lowered = jax.jit(functools.partial(train, config, dtype)).lower(seed, *train_set)
    train_program = lowered.compile()
    trained, _ = lowered.out_info
    evaluate_program = jax.jit(functools.partial(evaluate, config, dtype))
    evaluate_program = evaluate_program.lower(trained, *test_set).compile()
    compiled = time.perf_counter()
    trained, _ = train_program(seed, *train_set)
    jax.block_until_ready(evaluate_program(trained, *test_set))
    cold = time.perf_counter() - started
    print(f"Cold start to the first accuracy: {cold:.1f} s.", flush=True)

    losses = []
    for seed in seeds:
        start = time.perf_counter()
        trained, losses = train_program(np.uint32(seed), *train_set)
        jax.block_until_ready(trained)
        middle = time.perf_counter()
        accuracies = jax.block_until_ready(evaluate_program(trained, *test_set))
        end = time.perf_counter()
        plain, mirrored, final = map(float, accuracies)
        run = {
            "seed": seed,
            "accuracy": final,
            "plain": plain,  # from the images as they are
            "mirrored": mirrored,  # and their mirror images
            "loss": float(losses[-per_epoch:].mean()),  # of the last epoch
            "train_seconds": middle - start,
            "evaluate_seconds": end - middle,
            "seconds": end - start,
        }
        runs.append(run)
        record.append_line(log, run)
        print(
            f"seed {seed}: {final:.2f} % (plain {plain:.2f}, mirrored {mirrored:.2f}) "
            f"in {run['train_seconds']:.3f} + {run['evaluate_seconds']:.3f} s",
            flush=True,
        )

    # report
    columns = ("accuracy", "plain", "mirrored", "loss", *TIMES)
    results: dict[str, Any] = {c: statistics([run[c] for run in runs]) for c in columns}
    reached = np.mean([run["accuracy"] >= config.target for run in runs])
    results |= {"share_at_target": float(reached), "cold_seconds": cold}
    results["compile_seconds"] = compiled - began
    record.write_json(folder / "results.json", results)
    picture = folder / "curves.png"
    curves.plot_seeds(runs, losses, cycle_of(config), config.target, picture)
    print(report(config, results), f"Wrote {folder}.", sep="\n")
    return folder


TIMES = ("seconds", "train_seconds", "evaluate_seconds")


def statistics(values: list[float]) -> dict[str, float]:
    n, std = len(values), float(np.std(values, ddof=1))
    mean, error = float(np.mean(values)), std / math.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "standard_error": error}


def report(config: Config, results: dict[str, Any]) -> str:
    lines = []
    for key, unit in (("accuracy", "%"), *((key, "s") for key in TIMES)):
        n, mean, std, error = results[key].values()
        spread = f"n = {n}, std {std:.3f}, standard error {error:.3f}"
        lines.append(f"{key}: {mean:.3f} {unit} ({spread})")
    lines.append(f"share at {config.target:g} %: {results['share_at_target']:.3f}")
    lines.append(
        f"cold start to the first accuracy: {results['cold_seconds']:.1f} s, of it "
        f"compilation: {results['compile_seconds']:.1f} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    # A compiler that remembers an earlier run does not start from cold.
    jax.config.update("jax_enable_compilation_cache", False)
    main(tyro.cli(Config))
