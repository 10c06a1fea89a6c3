"""CIFAR-10 by the article's recipe: a wide residual network, 94 % in 30 epochs.

    python -m train.cifar10 --data-dir DIR                          # AdamW, 30 epochs
    python -m train.cifar10 --data-dir DIR --recipe adamw-18-tta --seeds 5
    python -m train.cifar10 --data-dir DIR --blocks 1 --width 16 --epochs 8   # a laptop
    python -m train.cifar10 --data-dir DIR --optimizer optax.lion --learning-rate 3e-4

Everything is in runs/NAME: config.json, metrics.jsonl, curves.png, checkpoints/,
results.json. Killed at any moment, the same command, without --overwrite, goes on from
the last epoch that was saved and ends with the same bits. (On a GPU that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true, which is slower.)

The images stay on the device. An epoch is one program: shuffling, crops and flips, and
all its steps, the last of which has the 80 images that are left over. Batches are split
over all devices; batch norm takes its statistics over the whole batch. Seconds of
training are those of the epochs, without evaluation and checkpoints.

Where this is not the article's code: the running variance of batch norm is the biased
one (PyTorch's is n / (n - 1) times that), beta1's bias correction is exact (PyTorch's
is not under a cycle), and on GPU and TPU activations are bfloat16.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamw_jax import Phases, apply_updates, one_cycle
from train.data import batches
from train.data import cifar10 as data
from train.data.splits import Images
from train.models import tta
from train.models.wide_resnet import WideResNet
from train.plots import pictures as plots
from train.recipes.optimizer import (
    ADAMS,
    OURS,
    check_optimizer,
    learning_rate_only,
    make_optimizer,
    optimizer_rules,
)
from train.run import checkpoint, devices, record
from train.run.report import spread, summary

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains by a recipe of the article. --recipe changes the other defaults."""

    recipe: Literal[
        "adamw-30",
        "adamw-30-wd0.3",
        "adamw-18-tta",
        "adam-l2-30",
        "amsgrad-30",
        "amsgrad-l2-30",
        "sgd-30",
    ] = "adamw-30"
    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int | None = None  # the first so many training images; None: all

    blocks: int = 3  # of each of the three stages; 3 and 96: the article's WRN-22
    width: int = 96  # channels of the first stage
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations

    optimizer: str = "adamw"  # of adamw_jax, or by its import path: optax.lion
    learning_rate: float = 3e-3  # the peak of 1cycle
    weight_decay: float = 0.1  # decoupled, times the learning rate
    l2: float = 0.0  # added to the gradient
    b2: float = 0.99  # of our Adam, AdamW and AMSGrad; others: optimizer_args
    # more arguments of the optimizer, such as: eps 1e-6
    optimizer_args: dict[str, float] = dataclasses.field(default_factory=dict)
    div: float = 10.0  # peak over the first learning rate
    pct: float = 0.075  # share of the epochs in which the rate is annealed at the end
    b1: tuple[float, float] = (0.95, 0.85)  # high and low, of ours; momentum of SGD
    epochs: int = 30
    batch_size: int = 128  # the last batch of an epoch has what is left over
    tta: bool = False  # judge by test-time augmentation in the end

    seed: int = 0  # of the first run: weights, order, crops and flips
    seeds: int = 1  # runs
    tensorboard: bool = False  # also write events for TensorBoard
    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: cifar10-RECIPE
    overwrite: bool = False  # remove an earlier run of that name, also an unfinished


# What the article does not say is from its author's notebooks of the same weeks; there,
# neither AMSGrad nor SGD comes with hyperparameters of its own.
RECIPES = {
    "adamw-30": Config(),
    "adamw-30-wd0.3": Config("adamw-30-wd0.3", weight_decay=0.3),
    "adamw-18-tta": Config("adamw-18-tta", epochs=18, tta=True),
    "adam-l2-30": Config(
        "adam-l2-30", optimizer="adam", learning_rate=1e-3, weight_decay=0.0, l2=1e-6
    ),
    "amsgrad-30": Config("amsgrad-30", optimizer="amsgrad"),
    "amsgrad-l2-30": Config(
        "amsgrad-l2-30", optimizer="amsgrad", learning_rate=1e-3, weight_decay=0.0,
        l2=1e-6,
    ),
    "sgd-30": Config(
        "sgd-30", optimizer="sgd", learning_rate=0.5, weight_decay=0.0, l2=1e-4, div=20,
        pct=0.2,
    ),
}  # fmt: skip
ARTICLE = {  # test accuracy in %, and where it is said
    "adamw-30": "94.25 on average (the code's README; decay 0.1)",
    "adamw-30-wd0.3": "94 to 94.25 (the article; decay 0.3)",
    "adamw-18-tta": "93.98 on average (the article), 94 (the code's README)",
    "adam-l2-30": "93.96 on average (the article)",
    "amsgrad-30": "93.74 (the author's notebook; decay 1e-4)",
    "amsgrad-l2-30": "93.36 (the author's notebook; L2 1e-4)",
    "sgd-30": "94.18 (the author's notebook)",
}
TTA_PASSES = 4  # augmented ones, beside the plain one
# What may change from a run to its continuation.
FREE = ("data_dir", "seeds", "tensorboard", "out", "name", "overwrite")


def check(c: Config, train_size: int) -> None:
    rules = {
        "train_size": (
            1 <= (c.train_size or train_size) <= train_size,
            f"in [1, {train_size}]",
        ),
        "blocks": (c.blocks >= 1, "at least 1"),
        "width": (c.width >= 1, "at least 1"),
        "epochs": (c.epochs >= 1, "at least 1"),
        "batch_size": (
            2 <= c.batch_size <= (c.train_size or train_size),
            f"in [2, {c.train_size or train_size}]",
        ),
        **optimizer_rules(c),
        "seeds": (c.seeds >= 1, "at least 1"),
        "seed": (0 <= c.seed <= 2**31 - c.seeds, f"in [0, {2**31 - c.seeds}]"),
        "tensorboard": (
            not c.tensorboard or importlib.util.find_spec("tensorboardX"),
            "False, since tensorboardX is not installed: pip install tensorboardX",
        ),
    }
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")
    if c.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices that "
            f"it is split over, got {c.batch_size}"
        )


# ---------------------------------------------------------------------------
# model and optimizer
# ---------------------------------------------------------------------------


class State(NamedTuple):
    step: jax.Array  # int32 []
    params: Any
    stats: Any  # batch norm's running mean and variance
    opt: optax.OptState


def network(config: Config, seed) -> WideResNet:
    return WideResNet(
        config.blocks,
        config.width,
        dtype=devices.compute_dtype(config.dtype),
        axis_name="data",
        rngs=nnx.Rngs(jax.random.key(seed)),
    )


def cycle_of(config: Config, steps_per_epoch: int) -> Phases:
    """Rate, b1 and b2 at every step: up, down as long, and an annealing."""
    cycle = one_cycle(
        config.learning_rate,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        div=config.div,
        pct=config.pct,
        b1=config.b1,
        b2=config.b2 if config.optimizer in ADAMS else None,
    )
    return (
        cycle
        if config.optimizer in OURS
        else learning_rate_only(cycle, steps_per_epoch)
    )


# ---------------------------------------------------------------------------
# step, epoch, evaluation
# ---------------------------------------------------------------------------


def random_crops(key, shape: tuple[int, ...]):
    """(*shape, 3) uint8: row and column in 0..7, as in the article's code, and flip."""
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (*shape, 2), 0, 2 * batches.PAD, jnp.uint8)
    flips = jax.random.bernoulli(flip_key, 0.5, (*shape, 1)).astype(jnp.uint8)
    return jnp.concatenate([corners, flips], -1)


def draw_epoch(seed, epoch, train_size: int):
    """A new order of the images, and the crop and flip of each."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    order_key, crop_key = jax.random.split(key)
    order = jax.random.permutation(order_key, train_size)
    return order, random_crops(crop_key, (train_size,))


def in_steps(table, batch_size: int):
    """An epoch's table -> (steps, size, ...): the full batches, and what is left."""
    full = len(table) // batch_size * batch_size
    parts = table[:full].reshape(-1, batch_size, *table.shape[1:]), table[full:][None]
    return [part for part in parts if part.size]


class Programs(NamedTuple):
    cycle: Phases
    initial_state: Any  # seed -> state
    train_epoch: Any  # state, x, y, seed, epoch -> state, loss of each step
    evaluate: Any  # state, x, seed, augmented passes -> class probabilities


def build(config: Config, mesh: Mesh, train_size: int) -> Programs:
    """What is compiled, for images and labels that are on every device."""
    whole, split = PartitionSpec(), PartitionSpec(None, "data")
    share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    cycle = cycle_of(config, -(-train_size // config.batch_size))
    tx = make_optimizer(config, cycle)
    net = nnx.eval_shape(lambda: network(config, 0))
    train_def, eval_def = (
        nnx.graphdef(nnx.view(net, use_running_average=mode, raise_if_not_found=False))
        for mode in (False, True)
    )

    check_optimizer(config, tx, nnx.state(net, nnx.Param))

    def initial_state(seed):
        _, params, stats = nnx.split(network(config, seed), nnx.Param, nnx.BatchStat)
        return State(jnp.int32(0), params, stats, tx.init(params))

    def loss_of(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def train_steps(state, x, y, order, crops):
        """On one device, with its share of every batch."""

        def step(state, batch):
            order, crops = batch
            images = jax.vmap(batches.crop_and_flip)(x[order], crops)
            (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
                state.params, state.stats, batches.normalise(images), y[order]
            )
            loss, grads = lax.pmean((loss, grads), "data")
            updates, opt = tx.update(grads, state.opt, state.params)
            params = apply_updates(state.params, updates)
            return State(state.step + 1, params, stats, opt), loss

        return lax.scan(step, state, (order, crops))

    def train_epoch(state, x, y, seed, epoch):
        tables = draw_epoch(seed, epoch, train_size)
        parts = [in_steps(table, config.batch_size) for table in tables]
        losses = []
        for order, crops in zip(*parts, strict=True):
            spec = whole if order.shape[1] % mesh.size else split
            state, loss = share(
                train_steps,
                in_specs=(whole, whole, whole, spec, spec),
                out_specs=whole,
            )(state, x, y, order, crops)
            losses.append(loss)
        return state, jnp.concatenate(losses)

    def predict(state, x, crops):
        """On one device: (batches, size, ...) images -> class probabilities."""
        net = nnx.merge(eval_def, state.params, state.stats)

        def augment(x, crops):
            pad = (batches.PAD, batches.PAD)
            x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), mode="symmetric")
            return jax.vmap(batches.crop_and_flip)(x, crops)

        def batch(x_and_crops):
            x, crops = x_and_crops
            return tta.predict(lambda x: net(batches.normalise(x)), x, augment, crops)

        return lax.map(batch, (x, crops))

    def evaluate(state, x, seed, augmented):
        """(batches, size, ...) images; `augmented` passes beside the plain one."""
        key = jax.random.fold_in(jax.random.key(seed), config.epochs)
        crops = random_crops(key, (x.shape[0], augmented, x.shape[1]))
        divisible = x.shape[1] % mesh.size == 0
        spec = split if divisible else whole
        crop_spec = PartitionSpec(None, None, "data") if divisible else whole
        return share(predict, in_specs=(whole, spec, crop_spec), out_specs=spec)(
            state, x, crops
        )

    return Programs(cycle, initial_state, train_epoch, evaluate)


# ---------------------------------------------------------------------------
# loop
# ---------------------------------------------------------------------------


class Compiled(NamedTuple):
    initial_state: Any
    train_epoch: Any
    evaluate: Any  # with the augmented passes, which are 0, or what the recipe has
    evaluate_last: Any
    state: Any  # shapes, dtypes and places of a state


def compiled(programs: Programs, everywhere: NamedSharding, x, y, test_x, tta: bool):
    """The programs, ready to run on these images."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(programs.initial_state, number),
    )
    jit = functools.partial(jax.jit, out_shardings=everywhere)
    train_epoch = jit(programs.train_epoch, donate_argnums=0)
    plain, augmented = (
        jit(functools.partial(programs.evaluate, augmented=passes))
        for passes in (0, TTA_PASSES)
    )
    plain = plain.lower(state, test_x, number).compile()
    return Compiled(
        jit(programs.initial_state).lower(number).compile(),
        train_epoch.lower(state, x, y, number, number).compile(),
        plain,
        augmented.lower(state, test_x, number).compile() if tta else plain,
        state,
    )


def judge(probabilities, labels: np.ndarray) -> tuple[float, float]:
    """Cross-entropy and accuracy in %."""
    p = np.asarray(probabilities, np.float64).reshape(len(labels), -1)
    loss = -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-30)).mean()
    return float(loss), 100 * float((p.argmax(-1) == labels).mean())


def first_bad(losses: np.ndarray, test_loss: float, classes: int = 10) -> int | None:
    """The step of an epoch at which it stops to make sense, if it does.

    That is the first loss that is no number; or, where the mean is twice the loss of
    guessing, the first that is.
    """
    limit = 2 * np.log(classes)
    bad = ~np.isfinite(np.append(losses, test_loss))
    if not bad.any() and losses.mean() > limit:
        bad = losses > limit
    return min(int(bad.argmax()), len(losses) - 1) if bad.any() else None


def main(config: Config) -> dict[str, Any]:
    """Trains the seeds that are not done yet; returns what is in results.json."""
    train, test = data.read_cifar10(config.data_dir)
    check(config, len(train.y))
    size = config.train_size or len(train.y)
    dtype: Any = str(devices.compute_dtype(config.dtype))
    config = dataclasses.replace(config, train_size=size, dtype=dtype)
    train = Images(train.x[:size], train.y[:size])
    mesh = devices.data_mesh()
    programs = build(config, mesh, size)  # refuses a bad optimizer
    labels = hashlib.md5(train.y.tobytes(), usedforsecurity=False).hexdigest()
    name = f"cifar10-{config.recipe}"
    folder = record.open_folder(config, "cifar10", name, FREE, labels=labels)
    with record.alone(folder):
        waiting = [seed for seed in seeds_of(config) if not record.ended(folder, seed)]
        if waiting:
            train_seeds(config, programs, mesh, waiting, train, test, folder)
        else:
            print(f"{folder} is finished already; --overwrite begins again.")
        return report(config, programs.cycle, folder)


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def train_seeds(config, programs, mesh, seeds, train, test, folder):
    log, cycle = folder / "metrics.jsonl", programs.cycle
    steps = cycle.total_steps // config.epochs

    # to the devices; compile
    everywhere = NamedSharding(mesh, PartitionSpec())
    x, y = jax.device_put((batches.padded(train.x), train.y), everywhere)
    test_x = jax.device_put(batches.in_batches(test).x, everywhere)
    began = time.perf_counter()
    program = compiled(programs, everywhere, x, y, test_x, config.tta)
    start = record.append_start(folder, time.perf_counter() - began)
    parameters = sum(p.size for p in jax.tree.leaves(program.state.params))
    print(
        f"{folder}: {parameters:,} parameters, {len(y):,} images, "
        f"{cycle.total_steps:,} steps, on {start['devices']}, compiled in "
        f"{start['compile_seconds']:.1f} s\n{cycle}",
        flush=True,
    )

    epoch_seconds = []  # with everything, to know how long it will take
    for run, seed in enumerate(seeds):
        number = np.int32(seed)
        with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
            state = checkpoint.restore(checkpoints, program.state)
            if state is None:
                state = program.initial_state(number)
            first = int(state.step) // steps
            record.forget(log, seed, first * steps, first)
            events = config.tensorboard and record.event_writer(
                folder / "tensorboard" / str(seed), first * steps
            )
            for epoch in range(first, config.epochs):
                began = time.perf_counter()
                state, losses = program.train_epoch(
                    state, x, y, number, np.int32(epoch)
                )
                losses = np.asarray(losses)  # waits for the device
                seconds = time.perf_counter() - began
                test_loss, accuracy = judge(
                    program.evaluate(state, test_x, number), test.y
                )
                bad = first_bad(losses, test_loss)
                if bad is not None:
                    losses = (float(losses[bad]), test_loss)
                    stop(config, cycle, folder, seed, epoch * steps + bad, *losses)
                step = (epoch + 1) * steps
                line = {
                    **{"event": "epoch", "seed": seed, "epoch": epoch + 1},
                    **{"step": step, "loss": float(losses.mean())},
                    **{"test_loss": test_loss, "accuracy": accuracy},
                    **{k: float(v) for k, v in cycle.at(step - 1).items()},
                    **{"seconds": seconds, "images_per_second": len(y) / seconds},
                }
                record.append_line(log, line)
                checkpoint.save(checkpoints, step, state)
                if events:
                    for key in ("loss", "test_loss", "accuracy", *cycle.at(0)):
                        events.add_scalar(key, line[key], step)
                    events.flush()
                epoch_seconds.append(time.perf_counter() - began)
                left = (len(seeds) - run) * config.epochs - epoch - 1
                mean = sum(epoch_seconds) / len(epoch_seconds)
                print_progress(config, cycle, line, left * mean)
            if events:
                events.close()
            began = time.perf_counter()
            test_loss, accuracy = judge(
                program.evaluate_last(state, test_x, number), test.y
            )
            end = {"event": "end", "seed": seed, "passes": 1 + TTA_PASSES * config.tta}
            end |= {"test_loss": test_loss, "accuracy": accuracy}
            checkpoints.wait()
            record.append_line(log, end | {"seconds": time.perf_counter() - began})
        draw(config, cycle, folder)


def stop(config, cycle, folder, seed, step, loss, test_loss):
    """Ends a run that diverges, with what there is of it."""
    line = {"event": "diverged", "seed": seed, "step": step}
    record.append_line(folder / "metrics.jsonl", line | {"loss": loss})
    if any(record.ended(folder, seed) for seed in seeds_of(config)):
        report(config, cycle, folder)
    else:
        draw(config, cycle, folder)
    good = len(record.lines_of(folder, "epoch", seed))
    raise FloatingPointError(
        f"seed {seed} diverged at step {step}, where the learning rate was "
        f"{cycle.at(step)['learning_rate']:.3g}: loss {loss:.3g}, test loss after the "
        f"epoch {test_loss:.3g}. "
        + (
            f"The checkpoint of epoch {good} is kept in "
            f"{folder / 'checkpoints' / str(seed)}"
            if good
            else "No epoch was finished"
        )
    )


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(config: Config, cycle: Phases, line: dict, seconds_left: float):
    b1 = f" b1 {line['b1']:.3f}" if "b1" in line else ""
    print(
        f"seed {line['seed']} epoch {line['epoch']}/{config.epochs} "
        f"step {line['step']}/{cycle.total_steps} loss {line['loss']:.4f} "
        f"test {line['test_loss']:.4f} {line['accuracy']:.2f} % "
        f"lr {line['learning_rate']:.2e}{b1} {line['images_per_second']:,.0f} images/s "
        f"{datetime.timedelta(seconds=round(seconds_left))} left",
        flush=True,
    )


def draw(config: Config, cycle: Phases, folder: Path) -> None:
    lines = record.read_lines(folder / "metrics.jsonl")
    plots.training(lines, cycle, config.epochs, folder / "curves.png")


def report(config: Config, cycle: Phases, folder: Path) -> dict[str, Any]:
    """Writes results.json and curves.png from the log, and prints the final line."""
    starts = record.lines_of(folder, "start")
    runs = [
        end for seed in seeds_of(config) for end in record.lines_of(folder, "end", seed)
    ]
    for run in runs:
        epochs = record.lines_of(folder, "epoch", run["seed"])
        run["train_seconds"] = sum(line["seconds"] for line in epochs)
        run["plain_accuracy"] = epochs[-1]["accuracy"]
    accuracies = [run["accuracy"] for run in runs]
    n = len(runs)
    seconds = float(np.mean([run["train_seconds"] for run in runs]))
    recipe = RECIPES[config.recipe]
    left_out = (*FREE, "train_size", "seed", "dtype")
    changed = record.changed(config, recipe, left_out)
    if config.train_size != data.CIFAR10_SIZES["train"]:
        changed["train_size"] = config.train_size
    results = {
        "recipe": config.recipe,
        "changed": changed,  # what is not as in the recipe
        "n": n,
        "accuracy": summary(accuracies),
        "train_seconds": seconds,
        "compile_seconds": [start["compile_seconds"] for start in starts],
        "article": ARTICLE[config.recipe],
        "runs": runs,
        "dtype": config.dtype,
        "devices": " and ".join(sorted({start["devices"] for start in starts})),
    }
    record.write_json(folder / "results.json", results)
    draw(config, cycle, folder)
    each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    other = ", ".join(f"{key} {value}" for key, value in changed.items())
    print(
        f"{config.recipe}{f' with {other}' if other else ''}: "
        f"{spread(results['accuracy'])} % (n = {n}: {each})"
        f"{' with test-time augmentation' if config.tta else ''}, "
        f"{seconds:.1f} s of training each on {results['devices']}, after "
        f"{starts[-1]['compile_seconds']:.1f} s of compilation.\n"
        f"The article's: {ARTICLE[config.recipe]}.\nWrote {folder}.",
        flush=True,
    )
    return results


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default="adamw-30")
    config = tyro.cli(Config, default=RECIPES[first.parse_known_args()[0].recipe])
    devices.use_all_cores(config.batch_size)
    main(config)
