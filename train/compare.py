"""AdamW against Adam + L2, and the other optimizers of fast.ai's article.

    python -m train.compare                                    # digits, half a minute
    python -m train.compare --dataset cifar10 --data-dir DIR   # see --help

Compares SGD with momentum, Adam + L2, AdamW, AMSGrad + L2 and AMSGrad with decoupled
decay, all with 1cycle. Learning rate and decay are tuned for each on a grid, by
accuracy on validation images. Each tuned optimizer is then trained with fresh seeds and
evaluated once on test images. A seed determines the initial weights, the order of the
images and the label noise. One compiled program trains all runs, a chunk at a time.

The default task is scikit-learn's digits with 400 training images, a tenth of them
mislabelled, and a small MLP. With clean labels (`--label-noise 0`) this network hardly
overfits, and Adam with the best L2 coefficient is no better than without. With noise,
either form of decay is worth about a point, and the best decay lies inside the grid.
The task was chosen for that, not for which optimizer wins.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamw_jax import Phases, adam, adamw, amsgrad, one_cycle, sgd
from train.data import batches
from train.data import cifar10 as data
from train.evals import comparison, statistics
from train.models.small import CNN, MLP
from train.plots.comparison import plot_test
from train.plots.grids import plot_tuning
from train.references import loop as torch_loop
from train.run import devices, record
from train.run.progress import progress

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes five optimizers and compares them. --dataset changes the other defaults."""

    dataset: Literal["digits", "cifar10"] = "digits"
    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int = 400  # training images
    eval_size: int | None = None  # validation and test images, each; None: the rest
    label_noise: float = 0.1  # share of the training images with a wrong label

    width: int = 128  # hidden units, or channels of the first convolution
    epochs: int = 40
    batch_size: int = 50
    evaluate_every: int = 4  # epochs between two points of a curve
    target: float = 90.0  # accuracy in %; the page reports when it is reached

    grid: int = 8  # learning rates, and decays, in the grid of each optimizer
    tune_seeds: int = 6  # runs per cell of the grid
    seeds: int = 40  # runs of each tuned optimizer on the test images

    chunk: int = 64  # runs per call of the program, rounded up to fill the devices
    torch: bool = True  # also time a PyTorch loop on one run of each optimizer
    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: made from data set and date
    overwrite: bool = False  # replace the results of an earlier run of that name


DEFAULTS = {
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
TUNE_SEED, TEST_SEED = 1000, 2000  # the first seeds of tuning and test


def check(c: Config) -> None:
    divisors = [n for n in range(1, c.epochs + 1) if c.epochs % n == 0]
    rules = {
        "dataset": (c.dataset in DEFAULTS, f"one of {', '.join(DEFAULTS)}"),
        "data_dir": (c.dataset != "digits" or c.data_dir is None, "None for digits"),
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
    for option, (valid, allowed) in rules.items():
        if not valid:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")


# ---------------------------------------------------------------------------
# data, model, optimizer
# ---------------------------------------------------------------------------


def load(config: Config) -> data.Splits:
    if config.dataset == "digits":
        return data.load_digits(config.train_size, config.eval_size)
    return data.load_cifar10(config.data_dir, config.train_size, config.eval_size)


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
# step and loop: a run is a pure function, and one program trains many runs
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


def compile_program(config: Config, mesh: Mesh, tables, images) -> tuple[Any, int]:
    """The compiled program, and the number of runs that one call trains."""
    chunk = -(-config.chunk // mesh.size) * mesh.size
    vectorized = config.dataset == "digits" and mesh.devices[0].platform != "cpu"
    runs = select_runs(tables, *np.zeros((3, chunk), int))
    program = build_program(config, mesh, vectorized)
    return program.lower(np.int32(0), runs, images).compile(), chunk


def train_all(program, chunk, advance, name, lr, decay, seed, tables, images):
    """Trains any number of runs of one optimizer, a chunk at a time.

    Args:
        program: as compiled for `chunk` runs.
        chunk: runs per call.
        advance: called with the number of runs finished, to show progress.
        name: of the optimizer.
        lr: (runs,) peak learning rates.
        decay: (runs,) decays.
        seed: (runs,) indices into the tables.
        tables: of all seeds.
        images: training images, evaluation images and their labels.

    Returns:
        (runs, points, 2) accuracies and losses, see `train`.
    """
    index, curves = np.int32(list(OPTIMIZERS).index(name)), []
    for first in range(0, len(lr), chunk):
        rows = np.arange(first, min(first + chunk, len(lr)))
        filled = np.resize(rows, chunk)  # the last chunk repeats runs to fill it
        runs = select_runs(tables, seed[filled], lr[filled], decay[filled])
        curves.append(np.asarray(program(index, runs, images))[: len(rows)])
        advance(len(rows), comparison.NAMES[name].short)
    return np.concatenate(curves)


# ---------------------------------------------------------------------------
# the comparison
# ---------------------------------------------------------------------------


def tune(config: Config, name: str, train_runs, tables, images) -> dict[str, Any]:
    """Trains the grid of one optimizer, judged on the validation images."""
    began, (rates, decays) = time.perf_counter(), GRIDS[config.dataset][name]
    lr, decay = (np.geomspace(*ends, config.grid) for ends in (rates, decays))
    cells = (config.grid, config.grid, config.tune_seeds)
    i, j, seed = np.indices(cells).reshape(3, -1)
    curves = train_runs(name, lr[i], decay[j], seed, tables, images)
    tuned = statistics.summarize_grid(lr, decay, curves[:, -1, 0].reshape(cells))
    return tuned | {"seconds_per_run": (time.perf_counter() - began) / len(i)}


def test(
    config: Config, name: str, tuned: dict[str, Any], train_runs, tables, images
) -> dict[str, Any]:
    """Trains one tuned optimizer with fresh seeds, judged on the test images."""
    seed = np.arange(config.seeds)
    lr, decay = (np.full(config.seeds, tuned[key]) for key in ("lr", "decay"))
    curves = train_runs(name, lr, decay, seed, tables, images)
    epochs = np.arange(0, config.epochs, config.evaluate_every) + config.evaluate_every
    return statistics.summarize_test(curves, epochs, config.target)


def time_torch(config: Config, tuning, tested, tables, splits) -> dict[str, Any]:
    """Trains the first test run of each optimizer in PyTorch, if it is installed."""
    if not (config.torch and torch_loop.is_available()):
        return {}
    cycle, samples = make_schedule(config), {}
    train_x, test_x = map(
        batches.normalise, (batches.padded(splits.train.x), splits.test.x)
    )
    for name, tuned in tuning.items():
        run = select_runs(tables, 0, tuned["lr"], tuned["decay"])
        sample = torch_loop.time_run(name, run, cycle, train_x, test_x, splits.test.y)
        sample["accuracy_here"] = tested[name]["accuracy"][0][-1]
        samples[name] = sample
    return samples


def write_report(config: Config, results: dict[str, Any], folder: Path) -> str:
    """Writes numbers, page and pictures; returns the page."""
    tuning, tested = results["tuning"], results["test"]
    difference = statistics.paired_difference(tested["adamw"], tested["adam-l2"])
    results = results | {"adamw_minus_adam_l2": difference}
    results["finding"] = comparison.finding(results)
    page = comparison.page(vars(config), results)
    record.write_json(folder / "results.json", results)
    (folder / "results.md").write_text(page, encoding="utf-8")
    plot_tuning(tuning, folder / "heatmap.png")
    plot_test(tested, make_schedule(config), config.target, folder / "curves.png")
    return page


def main(config: Config) -> Path:
    """Tunes, tests, times and reports; returns the folder with the results."""
    started = time.perf_counter()
    check(config)
    splits = load(config)
    config = dataclasses.replace(config, eval_size=len(splits.test.y))
    environment = record.environment()
    total = len(OPTIMIZERS) * (config.grid**2 * config.tune_seeds + config.seeds)
    print(f"{comparison.task(vars(config))}\n{total} runs on {environment['devices']}.")

    # data, on all devices
    mesh = Mesh(np.array(jax.devices()), ("runs",))
    tune_tables, test_tables = (
        draw_tables(config, splits.train.y, range(first, first + count))
        for first, count in ((TUNE_SEED, config.tune_seeds), (TEST_SEED, config.seeds))
    )
    train_x = batches.padded(splits.train.x)
    tune_images, test_images = (
        jax.device_put(
            (train_x, *batches.in_batches(images)), NamedSharding(mesh, PartitionSpec())
        )
        for images in (splits.validation, splits.test)
    )

    # one program for all runs
    folder = record.new_folder(config, f"compare-{config.dataset}")
    record.write_json(folder / "config.json", vars(config) | environment)
    began = time.perf_counter()
    program, chunk = compile_program(config, mesh, tune_tables, tune_images)
    compiled = time.perf_counter()
    print(f"Compiled in {compiled - began:.1f} s.", flush=True)

    # tune all, then test all
    tuning, tested = {}, {}
    with progress(total, "runs") as advance:
        train_runs = functools.partial(train_all, program, chunk, advance)
        for name in OPTIMIZERS:
            tuning[name] = tune(config, name, train_runs, tune_tables, tune_images)
        for name, tuned in tuning.items():
            tested[name] = test(
                config, name, tuned, train_runs, test_tables, test_images
            )
    speed = {
        "devices": environment["devices"],
        "compile_seconds": compiled - began,
        "runs": total,
        "seconds": time.perf_counter() - compiled,
        "torch": time_torch(config, tuning, tested, test_tables, splits),
    }

    results = {"tuning": tuning, "test": tested, "speed": speed}
    page = write_report(config, results, folder)
    print(f"Wrote {folder} after {time.perf_counter() - started:.0f} s.\n\n{page}")
    return folder


def parse_args(args: Sequence[str] | None = None) -> Config:
    import tyro

    dataset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dataset.add_argument("--dataset", choices=DEFAULTS, default="digits")
    defaults = DEFAULTS[dataset.parse_known_args(args)[0].dataset]
    return tyro.cli(Config, default=defaults, args=args)


if __name__ == "__main__":
    devices.use_all_cores()
    main(parse_args())
