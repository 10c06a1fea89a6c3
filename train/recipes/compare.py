"""The comparison of Adam + L2 with AdamW: tasks, networks, optimizers, grids, one run.

A run is a pure function, and one program trains many runs.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from adamw_jax import Phases, adam, adamw, amsgrad, one_cycle, sgd
from train.data import batches
from train.models.small import CNN, MLP
from train.recipes.check import Rules, check_options

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """A task, and how much of it is tried."""

    dataset: Literal["digits", "cifar10"] = "digits"
    train_size: int = 400  # training images
    eval_size: int | None = None  # validation and test images, each; None: the rest
    label_noise: float = 0.1  # share of the training images with a wrong label

    width: int = 128  # hidden units, or channels of the first convolution
    epochs: int = 40
    batch_size: int = 50
    evaluate_every: int = 4  # epochs between two points of a curve
    target: float = 90.0  # accuracy in %; the page says when it is reached

    grid: int = 8  # learning rates, and decays, in the grid of each optimizer
    tune_seeds: int = 6  # runs per cell of the grid
    seeds: int = 40  # runs of each tuned optimizer on the test images
    chunk: int = 64  # runs per call of the program, rounded up to fill the devices


RECIPES = {
    "digits": Config(),
    "cifar10": Config(
        "cifar10", train_size=5000, eval_size=5000, label_noise=0.0, width=16,
        epochs=20, evaluate_every=2, target=60.0, grid=4, tune_seeds=1, seeds=8,
        chunk=1,
    ),
}  # fmt: skip

# ((lowest, highest learning rate), (lowest, highest decay)), spaced geometrically
GRIDS = {
    "digits": {
        "sgd": ((1e-3, 10**0.5), (1e-4, 10**-0.5)),
        "adam-l2": ((10**-3.5, 1.0), (1e-4, 10**-0.5)),
        "adamw": ((10**-3.5, 1.0), (10**-2.5, 10.0)),
        "amsgrad-l2": ((10**-3.5, 1.0), (1e-4, 10**-0.5)),
        "amsgradw": ((10**-3.5, 1.0), (10**-2.5, 10.0)),
    },
    "cifar10": {
        "sgd": ((10**-1.5, 1.0), (1e-5, 1e-2)),
        "adam-l2": ((10**-2.5, 0.1), (1e-5, 1e-2)),
        "adamw": ((10**-2.5, 0.1), (1e-3, 1.0)),
        "amsgrad-l2": ((10**-2.5, 0.1), (1e-5, 1e-2)),
        "amsgradw": ((10**-2.5, 0.1), (1e-3, 1.0)),
    },
}


def check(c: Config) -> None:
    divisors = [n for n in range(1, c.epochs + 1) if c.epochs % n == 0]
    rules: Rules = {
        "dataset": (c.dataset in RECIPES, f"one of {', '.join(RECIPES)}"),
        "train_size": (c.train_size >= 1, "at least 1"),
        "label_noise": (0 <= c.label_noise < 1, "in [0, 1)"),
        "width": (c.width >= 1, "at least 1"),
        "epochs": (c.epochs >= 1, "at least 1"),
        "batch_size": (1 <= c.batch_size <= c.train_size, f"in [1, {c.train_size}]"),
        "evaluate_every": (c.evaluate_every in divisors, f"one of {divisors}"),
        "target": (0 < c.target < 100, "in (0, 100) %"),
        "grid": (c.grid >= 2, "at least 2"),
        "tune_seeds": (c.tune_seeds >= 1, "at least 1"),
        "seeds": (c.seeds >= 2, "at least 2"),
        "chunk": (c.chunk >= 1, "at least 1"),
    }
    check_options(c, rules)


# ---------------------------------------------------------------------------
# data, model, optimizer
# ---------------------------------------------------------------------------


def make_network(config: Config, seed: int) -> nnx.Module:
    network = MLP if config.dataset == "digits" else CNN
    return network(config.width, rngs=nnx.Rngs(seed))


def draw_tables(config: Config, labels: np.ndarray, seeds: range) -> dict[str, Any]:
    """All that is random in a run; the first axis of each table is the seed."""

    def draw(seed):
        rng, net = np.random.default_rng(seed), make_network(config, seed)
        _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
        order = batches.order(rng, len(labels), config.batch_size, config.epochs)
        noisy = batches.with_label_noise(rng, labels, config.label_noise)
        tables = {"params": params, "stats": stats, "labels": noisy, "order": order}
        if config.dataset == "cifar10":
            tables["crops"] = batches.crops_and_flips(rng, order.shape)
        return tables

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(draw, seeds))


def select_runs(tables: dict[str, Any], seed, lr, decay) -> dict[str, Any]:
    """Runs with these learning rates, decays and seeds, as indices into the tables."""
    selected = jax.tree.map(lambda table: table[seed], tables)
    return selected | {"lr": np.float32(lr), "decay": np.float32(decay)}


def make_schedule(config: Config) -> Phases:
    """The article's 1cycle with a peak of 1, which each optimizer scales.

    Learning rate: peak / 10 -> peak -> peak / 10 -> peak / 1000; b1: .95 -> .85 -> .95.
    """
    steps_per_epoch = config.train_size // config.batch_size
    return one_cycle(1.0, epochs=config.epochs, steps_per_epoch=steps_per_epoch)


# b2 = .99 as in the article. All parameters decay, biases too.
OPTIMIZERS = {
    "sgd": lambda rate, b1, decay: sgd(rate, b1, l2=decay),
    "adam-l2": lambda rate, b1, decay: adam(rate, b1, 0.99, l2=decay),
    "adamw": lambda rate, b1, decay: adamw(rate, b1, 0.99, weight_decay=decay),
    "amsgrad-l2": lambda rate, b1, decay: amsgrad(rate, b1, 0.99, l2=decay),
    "amsgradw": lambda rate, b1, decay: amsgrad(rate, b1, 0.99, weight_decay=decay),
}


# ---------------------------------------------------------------------------
# a run, and the program of many runs
# ---------------------------------------------------------------------------


def train(name: str, config: Config, train_x, eval_x, eval_y, run: dict[str, Any]):
    """Trains one network.

    Args:
        name: of the optimizer.
        config: of the comparison.
        train_x: (images, ...) training images, padded for the crops.
        eval_x: (batches, images, ...) evaluation images.
        eval_y: (batches, images) their labels.
        run: its learning rate, its decay and the tables of its seed.

    Returns:
        (points, 2): every `evaluate_every` epochs the accuracy in % on the evaluation
        images, and the mean training loss since the last point.
    """
    cycle = make_schedule(config)
    shape, b1 = cycle.schedule("learning_rate"), cycle.schedule("b1")
    tx = OPTIMIZERS[name](lambda step: run["lr"] * shape(step), b1, run["decay"])
    net = nnx.eval_shape(lambda: make_network(config, 0))
    train_def, eval_def = (
        nnx.graphdef(nnx.view(net, use_running_average=mode, raise_if_not_found=False))
        for mode in (False, True)
    )

    def loss_fn(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x, y = train_x[batch["order"]], run["labels"][batch["order"]]
        if "crops" in batch:
            x = jax.vmap(batches.crop_and_flip)(x, batch["crops"])
        x = batches.normalise(x)
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), loss

    def segment(carry, steps):
        carry, losses = lax.scan(step, carry, steps)
        net = nnx.merge(eval_def, *carry[:2])
        guesses = lax.map(lambda x: net(batches.normalise(x)).argmax(-1), eval_x)
        return carry, jnp.stack([100 * jnp.mean(guesses == eval_y), losses.mean()])

    points = config.epochs // config.evaluate_every
    steps = {key: run[key] for key in ("order", "crops") if key in run}
    steps = jax.tree.map(lambda t: t.reshape(points, -1, *t.shape[1:]), steps)
    carry = run["params"], run["stats"], tx.init(run["params"])
    return lax.scan(segment, carry, steps)[1]


def build_program(config: Config, mesh: Mesh, vectorized: bool) -> Any:
    """(index of the optimizer, runs, images) -> (runs, points, 2).

    The runs are sharded over the devices. A device trains its share at once (by `vmap`)
    or, unless vectorized, one after the other: a CPU core multiplies small matrices
    faster than stacks of them, and vectorized convolutions become grouped ones, which
    are slow on any device.
    """

    def train_shard(name, runs, images):
        train_one = functools.partial(train, name, config, *images)
        return jax.vmap(train_one)(runs) if vectorized else lax.map(train_one, runs)

    def program(index, runs, images):
        branches = [functools.partial(train_shard, name) for name in OPTIMIZERS]
        return lax.switch(index, branches, runs, images)

    replicated, sharded = PartitionSpec(), PartitionSpec("runs")
    specs = {"in_specs": (replicated, sharded, replicated), "out_specs": sharded}
    return jax.jit(jax.shard_map(program, mesh=mesh, **specs, check_vma=False))
