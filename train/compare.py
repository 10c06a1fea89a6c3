"""AdamW against Adam + L2, and the rest of the article's comparison, at your desk.

    python -m train.compare                                    # digits, half a minute
    python -m train.compare --dataset cifar10 --data-dir DIR   # see --help

SGD with momentum, Adam + L2, AdamW, AMSGrad + L2 and AMSGrad + decay, all with 1cycle,
each with its own learning rate and decay: the best of a grid, judged on validation
images. Each is then trained with fresh seeds and judged, once, on test images. A seed
stands for the initial weights, the order of the images and the wrong labels. All the
runs go through one compiled program, a chunk at a time.

The default task is scikit-learn's digits, with 400 training images of which a tenth are
labelled wrongly, and a small MLP. With clean labels that network hardly overfits: Adam
with the best L2 coefficient is no better than without. With a tenth of them wrong,
decay in either form is worth about a point, and the best one is inside the grid. The
task was chosen by that, not by who wins it; the other is `--label-noise 0`.
"""

import argparse
import dataclasses
import functools
import time
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
from train.data import batches, digits
from train.data import cifar10 as data
from train.evals import statistics as analysis
from train.models import small as models
from train.plots import pictures as plots
from train.references import loop as torch_loop
from train.run import devices, record, report

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
    label_noise: float = 0.1  # share of the training labels that are made wrong

    width: int = 128  # hidden units, or channels of the first convolution
    epochs: int = 40
    batch_size: int = 50
    evaluate_every: int = 4  # epochs from one point of a curve to the next
    target: float = 90.0  # accuracy in % of which it is reported when it was reached

    grid: int = 8  # learning rates, and decays, to be tried for each optimizer
    tune_seeds: int = 6  # runs per cell of the grid
    seeds: int = 40  # runs of each tuned optimizer, for the test images

    chunk: int = 64  # runs per call of the program, rounded up to fill the devices
    torch: bool = True  # also time a PyTorch loop, on a sample of the runs
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

# ((lowest, highest learning rate), (lowest, highest decay)), geometric in between
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
TUNE_SEED, TEST_SEED = 1000, 2000  # the first of each kind


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
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")


# ---------------------------------------------------------------------------
# data, model, optimizer
# ---------------------------------------------------------------------------


def network(config: Config, seed: int) -> nnx.Module:
    kind = models.MLP if config.dataset == "digits" else models.CNN
    return kind(config.width, rngs=nnx.Rngs(seed))


def tables(config: Config, labels: np.ndarray, seeds: range) -> dict[str, Any]:
    """Everything that is random in a run, with an entry for every seed."""

    def table(seed):
        rng, net = np.random.default_rng(seed), network(config, seed)
        _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
        order = batches.order(rng, len(labels), config.batch_size, config.epochs)
        noisy = batches.with_label_noise(rng, labels, config.label_noise)
        table = {"params": params, "stats": stats, "labels": noisy, "order": order}
        if config.dataset == "cifar10":
            table["crops"] = batches.crops_and_flips(rng, order.shape)
        return table

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(table, seeds))


def members(tables: dict[str, Any], seed, lr, decay) -> dict[str, Any]:
    """The runs with these seeds, which are indices into the tables."""
    chosen = jax.tree.map(lambda table: table[seed], tables)
    return chosen | {"lr": np.float32(lr), "decay": np.float32(decay)}


def cycle_of(config: Config) -> Phases:
    """The article's 1cycle with a peak of 1, for every optimizer to scale.

    rate / 10 -> rate -> rate / 10 -> rate / 1000, b1 .95 -> .85 -> .95.
    """
    steps_per_epoch = config.train_size // config.batch_size
    return one_cycle(1.0, epochs=config.epochs, steps_per_epoch=steps_per_epoch)


# b2 = .99 as in the article; every parameter decays, biases too.
OPTIMIZERS = {
    "sgd": lambda rate, b1, decay: sgd(rate, b1, l2=decay),
    "adam-l2": lambda rate, b1, decay: adam(rate, b1, 0.99, l2=decay),
    "adamw": lambda rate, b1, decay: adamw(rate, b1, 0.99, weight_decay=decay),
    "amsgrad-l2": lambda rate, b1, decay: amsgrad(rate, b1, 0.99, l2=decay),
    "amsgradw": lambda rate, b1, decay: amsgrad(rate, b1, 0.99, weight_decay=decay),
}


# ---------------------------------------------------------------------------
# step and loop: a run is a pure function, many of them are one program
# ---------------------------------------------------------------------------


def train(name: str, config: Config, train_x, eval_x, eval_y, member: dict):
    """One whole run; `member` holds lr, decay and the tables of its seed.

    Returns (points, 2): every `evaluate_every` epochs the accuracy in % on the
    evaluation images, and the mean training loss since the last time.
    """
    cycle = cycle_of(config)
    shape, b1 = cycle.schedule("learning_rate"), cycle.schedule("b1")
    tx = OPTIMIZERS[name](lambda step: member["lr"] * shape(step), b1, member["decay"])
    net = nnx.eval_shape(lambda: network(config, 0))
    train_def, eval_def = (
        nnx.graphdef(nnx.view(net, use_running_average=mode, raise_if_not_found=False))
        for mode in (False, True)
    )

    def loss_of(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x, y = train_x[batch["order"]], member["labels"][batch["order"]]
        if "crops" in batch:
            x = jax.vmap(batches.crop_and_flip)(x, batch["crops"])
        x = batches.normalise(x)
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), loss

    def stretch(carry, steps):
        carry, losses = lax.scan(step, carry, steps)
        net = nnx.merge(eval_def, *carry[:2])
        guesses = lax.map(lambda x: net(batches.normalise(x)).argmax(-1), eval_x)
        return carry, jnp.stack([100 * jnp.mean(guesses == eval_y), losses.mean()])

    points = config.epochs // config.evaluate_every
    steps = {key: member[key] for key in ("order", "crops") if key in member}
    steps = jax.tree.map(lambda t: t.reshape(points, -1, *t.shape[1:]), steps)
    carry = member["params"], member["stats"], tx.init(member["params"])
    return lax.scan(stretch, carry, steps)[1]


def build_program(config: Config, mesh: Mesh, side_by_side: bool) -> Any:
    """(index of the optimizer, members, images) -> (members, points, 2).

    The members are spread over the devices. A device trains its share side by side, or
    one by one: a CPU core is faster with small matrices than with stacks of them, and
    convolutions side by side become grouped ones, which are slow anywhere.
    """

    def train_share(name, members, images):
        run = functools.partial(train, name, config, *images)
        return jax.vmap(run)(members) if side_by_side else lax.map(run, members)

    def program(index, members, images):
        branches = [functools.partial(train_share, name) for name in OPTIMIZERS]
        return lax.switch(index, branches, members, images)

    whole, share = PartitionSpec(), PartitionSpec("members")
    specs = {"in_specs": (whole, share, whole), "out_specs": share, "check_vma": False}
    return jax.jit(jax.shard_map(program, mesh=mesh, **specs))


def train_all(program, chunk, advance, name, lr, decay, seed, tables, images):
    """Any number of runs of one optimizer, a chunk at a time -> (runs, points, 2).

    `lr`, `decay` and `seed`, an index into the tables, have an entry per run.
    """
    index, curves = np.int32(list(OPTIMIZERS).index(name)), []
    for first in range(0, len(lr), chunk):
        runs = np.arange(first, min(first + chunk, len(lr)))
        rows = np.resize(runs, chunk)  # the program has one size: repeats fill it
        chosen = members(tables, seed[rows], lr[rows], decay[rows])
        curves.append(np.asarray(program(index, chosen, images))[: len(runs)])
        advance(name, len(runs))
    return np.concatenate(curves)


# ---------------------------------------------------------------------------
# the comparison
# ---------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Tunes, tests, times and reports; returns the folder with the results."""
    started = time.perf_counter()
    check(config)
    if config.dataset == "digits":
        splits = digits.load_digits(config.train_size, config.eval_size)
    else:
        splits = data.load_cifar10(config.data_dir, config.train_size, config.eval_size)
    config = dataclasses.replace(config, eval_size=len(splits.test.y))
    cycle = cycle_of(config)
    environment = record.environment()
    total = len(OPTIMIZERS) * (config.grid**2 * config.tune_seeds + config.seeds)
    print(f"{report.task(vars(config))}\n{total} runs on {environment['devices']}.")

    # one program for all of them
    mesh = Mesh(np.array(jax.devices()), ("members",))
    side_by_side = config.dataset == "digits" and mesh.devices[0].platform != "cpu"
    chunk = -(-config.chunk // mesh.size) * mesh.size
    tune_tables, test_tables = (
        tables(config, splits.train.y, range(first, first + count))
        for first, count in ((TUNE_SEED, config.tune_seeds), (TEST_SEED, config.seeds))
    )
    train_x = batches.padded(splits.train.x)
    everywhere = NamedSharding(mesh, PartitionSpec())
    to_tune, to_test = (
        jax.device_put((train_x, *batches.in_batches(images)), everywhere)
        for images in (splits.validation, splits.test)
    )
    folder = record.new_folder(config, f"compare-{config.dataset}")
    record.write_json(folder / "config.json", vars(config) | environment)
    example = members(tune_tables, *np.zeros((3, chunk), int))
    began = time.perf_counter()
    program = build_program(config, mesh, side_by_side)
    program = program.lower(np.int32(0), example, to_tune).compile()
    speed: dict[str, Any] = {"devices": environment["devices"]}
    speed["compile_seconds"] = time.perf_counter() - began
    print(f"Compiled in {speed['compile_seconds']:.1f} s.", flush=True)
    run = functools.partial(train_all, program, chunk, report.progress(total))

    # tune, on the validation images
    tuning, began = {}, time.perf_counter()
    for name in OPTIMIZERS:
        since, ends = time.perf_counter(), GRIDS[config.dataset][name]
        lrs, decays = (np.geomspace(*end, config.grid) for end in ends)
        cells = (config.grid, config.grid, config.tune_seeds)
        i, j, seed = np.indices(cells).reshape(3, -1)
        curves = run(name, lrs[i], decays[j], seed, tune_tables, to_tune)
        tuning[name] = analysis.tuned(lrs, decays, curves[:, -1, 0].reshape(cells))
        tuning[name]["seconds_per_run"] = (time.perf_counter() - since) / len(i)

    # test, once, with fresh seeds
    test, seed = {}, np.arange(config.seeds)
    epochs = np.arange(0, config.epochs, config.evaluate_every) + config.evaluate_every
    for name, best in tuning.items():
        lr, decay = np.full(len(seed), best["lr"]), np.full(len(seed), best["decay"])
        curves = run(name, lr, decay, seed, test_tables, to_test)
        test[name] = analysis.tested(curves, epochs, config.target)
    speed |= {"runs": total, "seconds": time.perf_counter() - began}

    # one of those runs of each optimizer, in PyTorch
    speed["torch"] = {}
    if config.torch and torch_loop.is_available():
        x, test_x = (batches.normalise(x) for x in (train_x, splits.test.x))
        for name, best in tuning.items():
            member = members(test_tables, 0, best["lr"], best["decay"])
            sample = torch_loop.time_run(name, member, cycle, x, test_x, splits.test.y)
            sample["accuracy_here"] = test[name]["accuracy"][0][-1]
            speed["torch"][name] = sample

    # report
    results: dict[str, Any] = {"tuning": tuning, "test": test, "speed": speed}
    results["adamw_minus_adam_l2"] = analysis.paired(test["adamw"], test["adam-l2"])
    results["finding"] = report.finding(results)
    text = report.text(vars(config), results)
    record.write_json(folder / "results.json", results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    plots.heatmap(tuning, folder / "heatmap.png")
    plots.curves(test, cycle, config.target, folder / "curves.png")
    print(f"Wrote {folder} after {time.perf_counter() - started:.0f} s.\n\n{text}")
    return folder


if __name__ == "__main__":
    import tyro

    devices.use_all_cores()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=DEFAULTS, default="digits")
    main(tyro.cli(Config, default=DEFAULTS[first.parse_known_args()[0].dataset]))
