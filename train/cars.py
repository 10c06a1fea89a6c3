"""Stanford Cars by the article's recipe: a ResNet-50, fine-tuned in two stages.

    python -m train.cars --data-dir DIR --weights FILE           # 20 + 40 epochs
    python -m train.cars --data-dir DIR --weights FILE --recipe adamw
    python -m train.cars --data-dir DIR --architecture resnet18  # from scratch
    python -m train.cars predict IMAGE... --model runs/NAME/model-0.safetensors

DIR is Stanford Cars as published, or any folder with a sub-folder of images for each
class; see train/images.py. FILE is a .pth or .safetensors with torchvision's names, as
torchvision and timm have them, or a model that this script has written. With it the
body is frozen at first, its batch norm in evaluation mode, and the head is trained
alone; then all is trained, with a ninth and a third of the learning rate in the first
and in the second half of the body. Without it all is trained from the start, at one
learning rate.

Everything is in runs/NAME: config.json, metrics.jsonl, curves.png, checkpoints/,
results.json, and for each seed predictions, a picture of the confusions, one of the
worst mistakes, and the model for torchvision. Killed at any moment, the same command,
without --overwrite, goes on from the last checkpoint.

Where this is not the article's code: the running variance of batch norm is the biased
one (PyTorch's is n / (n - 1) times that), beta1's bias correction is exact (PyTorch's
is not under a cycle), images are augmented as 8-bit integers, and on GPU and TPU
activations are bfloat16.
"""

import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from adamw_jax import (
    Phases,
    apply_updates,
    freeze,
    labels_by_path,
    mask_by_path,
    one_cycle,
    scale_by_group,
)
from train.data import pictures as images
from train.models import pretrained as weights
from train.models.resnet import LAYERS, Head, ResNet
from train.plots import confusion
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

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a ResNet on pictures."""

    data_dir: Path  # Stanford Cars as published, or a folder with one for each class
    # adam-l2: the article's; adamw: with decoupled decay
    recipe: Literal["adam-l2", "adamw"] = "adam-l2"
    weights: Path | None = None  # .pth or .safetensors of a ResNet; None: from scratch

    architecture: Architecture = "resnet50"
    width: int = 64  # channels behind the first convolution; 64: torchvision's
    size: int = 224  # pixels of a side of the images
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations

    # of adamw_jax, or by its import path: optax.lion; None: the recipe's
    optimizer: str | None = None
    frozen_epochs: int | None = None  # of the head alone; None: 20, from scratch 0
    frozen_learning_rate: float = 1e-2  # the peak of their 1cycle
    epochs: int = 40  # of all the network
    learning_rate: float = 3e-3  # the peak of their 1cycle, in the head
    # of that rate in conv1 to layer2, layer3 and layer4, head; None: 9 3 1, from
    # scratch 1 1 1
    divisors: tuple[float, float, float] | None = None
    weight_decay: float | None = None  # decoupled, times the rate; None: the recipe's
    l2: float | None = None  # added to the gradient; None: the recipe's
    b2: float = 0.99  # of our Adam, AdamW and AMSGrad; others: optimizer_args
    # more arguments of the optimizer, such as: eps 1e-6
    optimizer_args: dict[str, float] = dataclasses.field(default_factory=dict)
    div: float = 10.0  # peak over the first learning rate
    pct: float = 0.1  # share of the epochs in which the rate is annealed at the end
    b1: tuple[float, float] = (0.95, 0.85)  # high and low, of ours; momentum of SGD
    batch_size: int = 128  # the last batch of an epoch has what is left over

    seed: int = 0  # of the first run: head (or all weights), order, augmentation
    seeds: int = 1  # runs
    workers: int | None = None  # threads that read images; None: one for each core
    save_every: float = 300.0  # seconds between checkpoints inside of an epoch
    tensorboard: bool = False  # also write events for TensorBoard
    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: cars-RECIPE
    overwrite: bool = False  # remove an earlier run of that name, also an unfinished


@dataclasses.dataclass(frozen=True)
class Predict:
    """Prints the likeliest classes of images."""

    images: tuple[Path, ...]  # files
    model: Path | None = None  # written by this script; None: the newest in runs/
    top: int = 5  # classes to print
    views: int = 0  # augmented ones, the mean of which and the plain one is taken
    seed: int = 0  # of those views


# What the article does not say of AdamW here: the decay is that of its CIFAR-10.
RECIPES = {  # optimizer, weight_decay, l2
    "adam-l2": ("adam", 0.0, 1e-3),
    "adamw": ("adamw", 0.1, 0.0),
}
ARTICLE = "90 on average, 91 with test-time augmentation (the code's README)"
ARTICLE_IMAGES = (8144, 8041)
TTA_PASSES = 4  # augmented ones, beside the plain one
SHOW_SECONDS = 10.0  # between lines of progress inside of an epoch
BODY, HEAD = "^body/", "^head/"
GROUPS = {  # the article's three
    "early": "^body/(conv1|bn1|layer1|layer2)/",
    "late": "^body/(layer3|layer4)/",
    "head": HEAD,
}
# What may change from a run to its continuation.
FREE = ("data_dir", "weights", "seeds", "workers", "save_every", "tensorboard", "out")
FREE = (*FREE, "name", "overwrite")


def settled(config: Config) -> Config:
    """With what the recipe says, and what depends on whether there are weights."""
    if config.recipe not in RECIPES:
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, got {config.recipe!r}"
        )
    optimizer, decay, l2 = RECIPES[config.recipe]
    if config.optimizer not in (None, optimizer):  # decays are an optimizer's own
        optimizer, decay, l2 = config.optimizer, 0.0, 0.0
    frozen, divisors = (20, (9, 3, 1)) if config.weights else (0, (1, 1, 1))
    found: dict[str, Any] = {"optimizer": optimizer, "weight_decay": decay, "l2": l2}
    found |= {"frozen_epochs": frozen, "divisors": divisors}
    found = {k: v for k, v in found.items() if getattr(config, k) is None}
    found["dtype"] = str(devices.compute_dtype(config.dtype))
    return dataclasses.replace(config, **found)


def check(c: Any, train_size: int) -> None:  # of a settled configuration
    left = train_size % max(c.batch_size, 1)
    fewest = max(2, min(8, c.batch_size // 4))
    rules = {
        "architecture": (c.architecture in LAYERS, f"one of {', '.join(LAYERS)}"),
        "width": (c.width >= 1, "at least 1"),
        "size": (c.size >= 32, "at least 32"),
        "frozen_epochs": (
            c.frozen_epochs >= 0 and (c.weights is not None or not c.frozen_epochs),
            "at least 0, and 0 without weights, since there is nothing to keep",
        ),
        "epochs": (c.epochs >= 1, "at least 1"),
        "divisors": (min(c.divisors) > 0, "above 0"),
        "batch_size": (
            2 <= c.batch_size <= train_size and (not left or left >= fewest),
            f"in [2, {train_size}], and leave no last batch of fewer than {fewest} "
            f"images, of which batch norm's statistics would be poor: {left} are left",
        ),
        **optimizer_rules(c),
        "seeds": (c.seeds >= 1, "at least 1"),
        "seed": (0 <= c.seed <= 2**30 - c.seeds, f"in [0, {2**30 - c.seeds}]"),
        "workers": (c.workers is None or c.workers >= 0, "None or at least 0"),
        "save_every": (c.save_every > 0, "above 0"),
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
    step: jax.Array  # int32 [], of both stages together
    params: Any  # {"body": ..., "head": ...}
    stats: Any  # batch norm's running mean and variance, as well
    opt: optax.OptState
    loss: jax.Array  # float32 [], the sum over the images of the epoch so far


class Network(NamedTuple):
    body: Any  # graphdefs
    head: Any
    initial: Any  # key -> params, stats

    def logits(self, params, stats, pixels, *, frozen=False, train=False, key=None):
        """(n, size, size, 3) uint8 -> logits and the new running statistics."""
        body = nnx.merge(self.body, params["body"], stats["body"], copy=True)
        head = nnx.merge(self.head, params["head"], stats["head"], copy=True)
        maps = body(images.normalise(pixels), train=train and not frozen)
        logits = head(lax.stop_gradient(maps) if frozen else maps, train=train, key=key)
        new = {"body": body, "head": head}
        return logits, {name: nnx.state(new[name], nnx.BatchStat) for name in new}


def network(architecture: str, width: int, dtype: str, classes: int) -> Network:
    def modules(key):
        body_key, head_key = jax.random.split(key)
        body = ResNet(architecture, width, dtype=dtype, rngs=nnx.Rngs(body_key))
        return body, Head(body.features, classes, rngs=nnx.Rngs(head_key))

    def initial(key):
        params, stats = {}, {}
        for name, module in zip(("body", "head"), modules(key), strict=True):
            _, params[name], stats[name] = nnx.split(module, nnx.Param, nnx.BatchStat)
        return params, stats

    body, head = nnx.eval_shape(lambda: modules(jax.random.key(0)))
    return Network(nnx.graphdef(body), nnx.graphdef(head), initial)


class Stage(NamedTuple):
    name: str
    frozen: bool  # the body, its running statistics too
    cycle: Phases
    tx: optax.GradientTransformation
    first: int  # step, of both stages together
    last: int  # the step behind its last one


def steps_per_epoch(config: Config, train_size: int) -> int:
    return -(-train_size // config.batch_size)


def stages_of(config: Any, steps: int) -> list[Stage]:
    """The head alone, if at all, and all of the network, with a fresh optimizer."""
    groups = scale_by_group(
        dict(zip(GROUPS, (1 / d for d in config.divisors), strict=True)),
        labels_by_path(GROUPS),
    )
    stages, first = [], 0
    for name, frozen, epochs, rate in (
        ("frozen", True, config.frozen_epochs, config.frozen_learning_rate),
        ("all", False, config.epochs, config.learning_rate),
    ):
        if epochs:
            cycle = one_cycle(
                rate,
                epochs=epochs,
                steps_per_epoch=steps,
                div=config.div,
                pct=config.pct,
                b1=config.b1,
                b2=config.b2 if config.optimizer in ADAMS else None,
            )
            if config.optimizer not in OURS:
                cycle = learning_rate_only(cycle, steps)
            tx = make_optimizer(config, cycle)
            if frozen:
                tx = freeze(tx, mask_by_path(BODY))
            else:
                tx = optax.chain(tx, groups)
            last = first + epochs * steps
            stages.append(Stage(name, frozen, cycle, tx, first, last))
            first = last
    return stages


# ---------------------------------------------------------------------------
# step
# ---------------------------------------------------------------------------


class Programs(NamedTuple):
    network: Network
    stages: list[Stage]
    cycle: Phases  # of all stages, to look at
    initial: Any  # seed -> params, stats
    begin: Any  # stage, step, params, stats -> state
    train_step: Any  # stage, state, pixels, labels, seed -> state, loss
    predict: Any  # params, stats, pixels -> log-probabilities


def build(config: Config, train_size: int, classes: int) -> Programs:
    net = network(config.architecture, config.width, config.dtype, classes)
    steps = steps_per_epoch(config, train_size)
    stages = stages_of(config, steps)
    phases = [phase for stage in stages for phase in stage.cycle.phases]
    shapes = jax.eval_shape(net.initial, jax.random.key(0))[0]
    for stage in stages:
        check_optimizer(config, stage.tx, shapes)

    def keys(seed):  # of the weights, of dropout
        return jax.random.split(jax.random.key(seed))

    def initial(seed):
        return net.initial(keys(seed)[0])

    def begin(stage, step, params, stats):
        return State(step, params, stats, stage.tx.init(params), jnp.float32(0))

    def train_step(stage, state, pixels, labels, seed):
        key = jax.random.fold_in(keys(seed)[1], state.step)

        def loss_of(params):
            logits, stats = net.logits(
                *(params, state.stats, pixels),
                **{"frozen": stage.frozen, "train": True, "key": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), stats

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt = stage.tx.update(grads, state.opt, state.params)
        params = apply_updates(state.params, updates)
        so_far = jnp.where(state.step % steps == 0, 0, state.loss)
        so_far += loss * len(labels)
        return State(state.step + 1, params, stats, opt, so_far), loss

    def predict(params, stats, pixels):
        return jax.nn.log_softmax(net.logits(params, stats, pixels)[0])

    cycle = Phases(phases, steps)
    return Programs(net, stages, cycle, initial, begin, train_step, predict)


class Compiled(NamedTuple):
    initial: Any
    begin: list[Any]  # of each stage
    train_step: list[dict[int, Any]]  # of each stage, by the size of a batch
    predict: Any
    states: list[Any]  # of each stage: shapes, dtypes and places of a state


def everywhere() -> NamedSharding:
    return NamedSharding(devices.data_mesh(), PartitionSpec())


def batch_place(size: int) -> NamedSharding:
    """Split over the devices, if it can be."""
    mesh = devices.data_mesh()
    split = PartitionSpec("data" if size % mesh.size == 0 else None)
    return NamedSharding(mesh, split)


def compiled(programs: Programs, config: Config, train_size: int) -> Compiled:
    """The programs, ready to run."""
    whole = everywhere()
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    jit = functools.partial(jax.jit, out_shardings=whole)

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
        )

    def batch(size):
        shapes = ((size, config.size, config.size, 3), jnp.uint8), ((size,), jnp.int32)
        place = batch_place(size)
        return [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]

    weights = placed(jax.eval_shape(programs.initial, number))
    sizes = {config.batch_size, train_size % config.batch_size} - {0}
    begin, train_step, states = [], [], []
    for stage in programs.stages:
        start = functools.partial(programs.begin, stage)
        states.append(placed(jax.eval_shape(start, number, *weights)))
        begin.append(jit(start).lower(number, *weights).compile())
        step = jit(functools.partial(programs.train_step, stage), donate_argnums=0)
        train_step.append(
            {
                size: step.lower(states[-1], *batch(size), number).compile()
                for size in sizes
            }
        )
    predict = jit(programs.predict).lower(*weights, batch(config.batch_size)[0])
    return Compiled(
        jit(programs.initial).lower(number).compile(),
        begin,
        train_step,
        predict.compile(),
        states,
    )


def log_probabilities(config, program, state, files, seed=0, view=None):
    """(images, classes) float64; of the plain images, or of an augmented view."""
    size, parts = config.batch_size, []
    for batch in images.eval_batches(
        *(files, config.size, size),
        augment_seed=None if view is None else TTA_PASSES * seed + view,
        workers=config.workers,
    ):
        missing = size - len(batch["image"])  # in the last one
        pixels = np.pad(batch["image"], ((0, missing), (0, 0), (0, 0), (0, 0)))
        pixels = jax.device_put(pixels, batch_place(size))
        parts.append(program.predict(state.params, state.stats, pixels))
    return np.concatenate(parts)[: len(files.labels)].astype(np.float64)


def judge(log_probs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Cross-entropy and accuracy in %."""
    loss = -log_probs[np.arange(len(labels)), labels].mean()
    return float(loss), 100 * float((log_probs.argmax(-1) == labels).mean())


def mean_of_views(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    """The logarithm of the mean probability."""
    return np.logaddexp.reduce(list(log_probs)) - np.log(len(log_probs))


# ---------------------------------------------------------------------------
# loop
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Trains the seeds that are not done yet; returns what is in results.json."""
    config = settled(config)
    pictures = images.read(config.data_dir)
    size = len(pictures.train.labels)
    check(config, size)
    programs = build(config, size, len(pictures.classes))  # refuses a bad optimizer
    tensors = weights.read(config.weights)[0] if config.weights else {}
    if tensors:  # refuses those of another network
        print(f"{config.weights}: the body is taken, its classifier is not.")
        shapes = jax.eval_shape(programs.initial, 0)
        weights.load(tensors, *shapes, source=str(config.weights), head=False)
    folder = record.open_folder(
        config,
        *("cars", f"cars-{config.recipe}", FREE),
        data=fingerprint(pictures, config.data_dir),
        weights_md5=config.weights and md5(config.weights),
    )
    with record.alone(folder):
        waiting = [seed for seed in seeds_of(config) if not record.ended(folder, seed)]
        if waiting:
            train_seeds(config, programs, waiting, pictures, tensors, folder)
        else:
            print(f"{folder} is finished already; --overwrite begins again.")
        return report(config, programs.cycle, pictures, folder)


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.md5(usedforsecurity=False)
        ).hexdigest()


def fingerprint(pictures: images.Pictures, data_dir: Path) -> str:
    """Of the classes, the files' names and their labels."""
    lines = list(pictures.classes)
    for files in (pictures.train, pictures.valid):
        for path, label in zip(files.paths, files.labels, strict=True):
            lines.append(f"{label} {path.relative_to(data_dir).as_posix()}")
    text = "\n".join(lines).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def train_seeds(config, programs, seeds, pictures, tensors, folder):
    train = pictures.train
    began = time.perf_counter()
    program = compiled(programs, config, len(train.labels))
    start = record.append_start(folder, time.perf_counter() - began)
    parameters = sum(p.size for p in jax.tree.leaves(program.states[0].params))
    print(
        f"{folder}: {parameters:,} parameters, {len(train.labels):,} images of "
        f"{len(pictures.classes)} classes, {len(pictures.valid.labels):,} held out "
        f"({pictures.split}), {programs.cycle.total_steps:,} steps, on "
        f"{start['devices']}, compiled in {start['compile_seconds']:.1f} s\n"
        f"{programs.cycle}",
        flush=True,
    )
    for run, seed in enumerate(seeds):
        later = (len(seeds) - run - 1) * programs.cycle.total_steps
        state = train_seed(
            config, programs, program, pictures, tensors, folder, seed, later
        )
        finish(config, program, pictures, folder, seed, state)
        draw(config, programs.cycle, folder)


def train_seed(config, programs, program, pictures, tensors, folder, seed, later):
    """From the last checkpoint, if there is one, to the end; returns the state."""
    log, cycle, stages = folder / "metrics.jsonl", programs.cycle, programs.stages
    train, valid = pictures.train, pictures.valid
    steps = steps_per_epoch(config, len(train.labels))
    epochs, number = cycle.total_steps // steps, np.int32(seed)

    # where it was
    where = [folder / "checkpoints" / str(seed) / stage.name for stage in stages]
    begun = [i for i, path in enumerate(where) if path.exists()]
    begun = max((i for i in begun if checkpoint.latest(where[i])), default=None)
    if begun is None:
        params, stats = program.initial(number)
        if tensors:
            params, stats = weights.load(
                tensors, params, stats, source=str(config.weights), head=False
            )
            params, stats = jax.device_put((params, stats), everywhere())
        state, step = program.begin[0](np.int32(0), params, stats), 0
    else:
        with checkpoint.open_folder(where[begun]) as checkpoints:
            state = checkpoint.restore(checkpoints, program.states[begun])
        step = int(state.step)
    record.forget(log, seed, step, step // steps)
    events = config.tensorboard and record.event_writer(
        folder / "tensorboard" / str(seed), step
    )

    batches = images.train_batches(
        *(train, config.size, config.batch_size),
        **{"seed": seed, "epochs": epochs, "first_step": step},
        workers=config.workers,
    )
    began = shown = saved = time.perf_counter()
    start, waited, seen = (began, step), 0.0, 0  # of this epoch: seconds, images
    ahead = []  # losses of the last steps
    for i, stage in enumerate(stages):
        if step >= stage.last:
            continue
        if step == stage.first and i:  # a fresh optimizer
            state = program.begin[i](state.step, state.params, state.stats)
        with checkpoint.open_folder(where[i]) as checkpoints:
            while step < stage.last:
                # a step, while the next images are read and the last one is done
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                place = batch_place(len(batch["label"]))
                pixels, labels = jax.device_put((batch["image"], batch["label"]), place)
                if len(ahead) == 2:  # no more, for the memory that images take
                    ahead.pop(0).block_until_ready()
                state, loss = program.train_step[i][len(labels)](
                    state, pixels, labels, number
                )
                ahead.append(loss)
                step, seen = step + 1, seen + len(labels)
                now = time.perf_counter()
                speed = (step - start[1]) / (now - start[0])
                left = (later + stages[-1].last - step) / speed
                if step % steps:
                    if now - shown > SHOW_SECONDS:
                        shown = now
                        line = {"seed": seed, "epoch": step // steps + 1, "step": step}
                        so_far = step % steps * config.batch_size
                        line |= {"loss": float(state.loss) / so_far}
                        line |= rates_of(config, stage, step - 1)
                        print_progress(config, cycle, line, left)
                    if now - saved > config.save_every:
                        saved = now
                        checkpoint.save(checkpoints, step, state)
                    continue

                # the end of an epoch
                loss = float(state.loss) / len(train.labels)  # waits for the device
                seconds = time.perf_counter() - began
                valid_loss, accuracy = judge(
                    log_probabilities(config, program, state, valid), valid.labels
                )
                line = {"event": "epoch", "seed": seed, "stage": stage.name}
                line |= {"epoch": step // steps, "step": step, "loss": loss}
                line |= {"valid_loss": valid_loss, "accuracy": accuracy}
                line |= rates_of(config, stage, step - 1)
                line |= {
                    # as if no part of it had been before a restart
                    "seconds": seconds * len(train.labels) / seen,
                    "images_per_second": seen / seconds,
                    "share_waiting_for_images": waited / seconds,
                }
                if not np.isfinite([loss, valid_loss]).all():
                    stop(config, cycle, folder, line)
                record.append_line(log, line)
                checkpoint.save(checkpoints, step, state)
                if events:
                    for key in ("loss", "valid_loss", "accuracy", *cycle.at(0)):
                        events.add_scalar(key, line[key], step)
                    events.flush()
                print_progress(config, cycle, line, left)
                began = shown = saved = time.perf_counter()
                waited, seen = 0.0, 0
            checkpoints.wait()
    if events:
        events.close()
    return state


def rates_of(config: Any, stage: Stage, step: int) -> dict[str, Any]:
    """What drives a step, and the learning rate of each group."""
    values = {k: float(v) for k, v in stage.cycle.at(step - stage.first).items()}
    rate = values["learning_rate"]
    if stage.frozen:
        rates = {"head": rate}
    else:
        rates = {g: rate / d for g, d in zip(GROUPS, config.divisors, strict=True)}
    return values | {"learning_rates": rates}


def finish(config, program, pictures, folder, seed, state):
    """Judges a trained network, with views, and writes what is to be kept of it."""
    began, valid = time.perf_counter(), pictures.valid
    views = [log_probabilities(config, program, state, valid)]
    for view in range(TTA_PASSES):
        views.append(log_probabilities(config, program, state, valid, seed, view))
    plain, averaged = views[0], mean_of_views(views)
    line = {"event": "end", "seed": seed, "step": int(state.step)}
    line["loss"], line["accuracy"] = judge(averaged, valid.labels)
    line["passes"] = len(views)
    line["plain_loss"], line["plain_accuracy"] = judge(plain, valid.labels)
    probabilities, classes = np.exp(averaged), pictures.classes
    predictions = probabilities.argmax(-1)
    write_predictions(
        folder / f"predictions-{seed}.csv", probabilities, pictures, config.data_dir
    )
    confusion.confusion(
        valid.labels, predictions, classes, folder / f"confusion-{seed}.png"
    )
    confusion.mistakes(
        *(probabilities, valid.labels, classes),
        lambda i: images.plain_view(
            images.open_image(valid.paths[i], config.size), config.size
        ),
        folder / f"mistakes-{seed}.png",
    )
    line["most_confused"] = confusion.most_confused(valid.labels, predictions, classes)
    weights.write(
        folder / f"model-{seed}.safetensors",
        weights.tensors_of(state.params, state.stats, int(state.step)),
        {
            "format": "pt",
            "architecture": config.architecture,
            "width": str(config.width),
            "size": str(config.size),
            "classes": json.dumps(classes),
            "mean": json.dumps(images.MEAN.tolist()),  # of pixels in [0, 1]
            "std": json.dumps(images.STD.tolist()),
        },
    )
    seconds = time.perf_counter() - began
    record.append_line(folder / "metrics.jsonl", line | {"seconds": seconds})


def write_predictions(path: Path, probabilities, pictures, data_dir: Path) -> None:
    """A row for each image held out, completely or not at all."""
    draft, classes, files = path.with_suffix(".tmp"), pictures.classes, pictures.valid
    with draft.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "class", "prediction", "probability", "of the class"])
        for p, image, label in zip(
            probabilities, files.paths, files.labels, strict=True
        ):
            best = p.argmax()
            rows.writerow(
                [image.relative_to(data_dir).as_posix(), classes[label], classes[best]]
                + [f"{p[best]:.6f}", f"{p[label]:.6f}"]
            )
    draft.replace(path)


def stop(config, cycle, folder, line):
    """Ends a run that diverges, with what there is of it."""
    line = {key: line[key] for key in ("seed", "step", "loss")}
    record.append_line(folder / "metrics.jsonl", {"event": "diverged"} | line)
    draw(config, cycle, folder)
    raise FloatingPointError(
        f"seed {line['seed']} diverged in the epoch before step {line['step']}: its "
        f"loss is {line['loss']:.3g}. The checkpoints before it are kept in "
        f"{folder / 'checkpoints' / str(line['seed'])}"
    )


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(config: Config, cycle: Phases, line: dict, seconds_left: float):
    valid = ""
    if "valid_loss" in line:
        valid = f"valid {line['valid_loss']:.4f} {line['accuracy']:.2f} % "
        valid += f"{line['images_per_second']:,.0f} images/s "
        valid += f"({line['share_waiting_for_images']:.0%} waiting for them) "
    b1 = f"b1 {line['b1']:.3f} " if "b1" in line else ""
    epochs = (config.frozen_epochs or 0) + config.epochs
    print(
        f"seed {line['seed']} epoch {line['epoch']}/{epochs} step {line['step']}/"
        f"{cycle.total_steps} loss {line['loss']:.4f} {valid}"
        f"lr {line['learning_rate']:.2e} {b1}"
        f"{datetime.timedelta(seconds=round(seconds_left))} left",
        flush=True,
    )


def draw(config: Config, cycle: Phases, folder: Path) -> None:
    lines = record.read_lines(folder / "metrics.jsonl")
    epochs = (config.frozen_epochs or 0) + config.epochs
    plots.training(lines, cycle, epochs, folder / "curves.png", held_out="valid")


def report(config: Config, cycle: Phases, pictures, folder: Path) -> dict[str, Any]:
    """Writes results.json and curves.png from the log, and prints the final lines."""
    starts = record.lines_of(folder, "start")
    ends = [record.lines_of(folder, "end", seed) for seed in seeds_of(config)]
    runs = [end for lines in ends for end in lines]
    for run in runs:
        epochs = record.lines_of(folder, "epoch", run["seed"])
        run["train_seconds"] = sum(line["seconds"] for line in epochs)
        run["images_per_second"] = epochs[-1]["images_per_second"]
        run["share_waiting_for_images"] = epochs[-1]["share_waiting_for_images"]
    recipe = settled(
        Config(config.data_dir, recipe=config.recipe, weights=config.weights)
    )
    changed = record.changed(config, recipe, (*FREE, "seed", "dtype"))
    sizes = (len(pictures.train.labels), len(pictures.valid.labels))
    results: dict[str, Any] = {
        "recipe": config.recipe,
        "weights": config.weights and "/".join(config.weights.parts[-2:]),
        "changed": changed,  # what is not as in the recipe
        "images": sizes,
        "classes": len(pictures.classes),
        "split": pictures.split,
        "n": len(runs),
        "accuracy": summary([run["plain_accuracy"] for run in runs]),
        "tta_accuracy": summary([run["accuracy"] for run in runs]),
        "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
        "compile_seconds": [start["compile_seconds"] for start in starts],
        "dtype": config.dtype,
        "devices": " and ".join(sorted({start["devices"] for start in starts})),
        "runs": runs,
    }
    if sizes == ARTICLE_IMAGES and config.weights and not changed:
        results["article"] = ARTICLE
    record.write_json(folder / "results.json", results)
    draw(config, cycle, folder)
    other = "".join(f", {key} {value}" for key, value in changed.items())
    begun = f"from {config.weights.name}" if config.weights else "from scratch"
    print(
        f"{config.recipe} {begun}{other}: {spread(results['accuracy'])} % of the "
        f"images held out, {spread(results['tta_accuracy'])} % with test-time "
        f"augmentation (n = {len(runs)}), {results['train_seconds']:.1f} s of training "
        f"each on {results['devices']}, after {starts[-1]['compile_seconds']:.1f} s of "
        "compilation."
    )
    for pair in runs[0]["most_confused"][:3] if runs else ():
        print(
            f"  {pair['is']} taken for {pair['taken for']}: {pair['times']} of "
            f"{pair['of']}"
        )
    if "article" in results:
        print(f"The article's: {ARTICLE}.")
    print(f"Wrote {folder}.", flush=True)
    return results


# ---------------------------------------------------------------------------
# predictions
# ---------------------------------------------------------------------------


class Model(NamedTuple):
    classes: tuple[str, ...]
    size: int
    predict: Any  # (n, size, size, 3) uint8 -> log-probabilities


def load(path: Path) -> Model:
    """A model-SEED.safetensors of this script.

    Raises:
        ValueError: the file is something else, or damaged.
    """
    tensors, told = weights.read(path)
    try:
        classes = tuple(json.loads(told["classes"]))
        architecture, width = told["architecture"], int(told["width"])
        size = int(told["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {path} was not written by train.cars: its metadata have no {error}"
        ) from error
    net = network(architecture, width, "float32", len(classes))
    shapes = jax.eval_shape(net.initial, jax.random.key(0))
    params, stats = weights.load(tensors, *shapes, source=str(path), head=True)

    @jax.jit
    def log_probs(params, stats, pixels):
        return jax.nn.log_softmax(net.logits(params, stats, pixels)[0])

    return Model(classes, size, functools.partial(log_probs, params, stats))


def newest_model(out: Path = Config.out) -> Path:
    paths = sorted(out.glob("*/model-*.safetensors"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise ValueError(
            f"model: there is none in {out}; train.cars makes one, or pass --model FILE"
        )
    return paths[-1]


def predict(config: Predict) -> dict[Path, np.ndarray]:
    """Prints the top classes of each image; returns the probabilities of all."""
    if not config.images:
        raise ValueError("images must be at least one file, got none")
    for option, least in (("top", 1), ("views", 0), ("seed", 0)):
        if (value := getattr(config, option)) < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    path = config.model or newest_model()
    model = load(path)
    print(f"{path}: {len(model.classes)} classes, {model.size} pixels")
    found, flaws = {}, []
    for image_path in config.images:
        try:
            image = images.open_image(image_path, model.size)
        except ValueError as error:  # the others are worth having all the same
            flaws.append(str(error))
            continue
        rng = np.random.default_rng(config.seed)
        views = [images.plain_view(image, model.size)]
        views += [
            images.train_view(image, rng, model.size) for _ in range(config.views)
        ]
        log_probs = np.asarray(model.predict(np.stack(views)), np.float64)
        probabilities = np.exp(mean_of_views(list(log_probs)))
        found[image_path] = probabilities
        print(image_path)
        for best in probabilities.argsort()[::-1][: config.top]:
            print(f"  {100 * probabilities[best]:6.2f} %  {model.classes[best]}")
    if flaws:
        raise ValueError(f"images that cannot be read: {'; '.join(flaws)}")
    return found


def predict_of(args: list[str]) -> Predict:
    """From the command line, where the images come first, without a name."""
    import tyro

    options = (tyro.conf.PositionalRequiredArgs,)
    prog = "python -m train.cars predict"
    return tyro.cli(Predict, args=args, prog=prog, config=options)


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    if sys.argv[1:2] == ["predict"]:
        predict(predict_of(sys.argv[2:]))
    else:
        config = tyro.cli(Config)
        devices.use_all_cores(config.batch_size)
        main(config)
