"""A learning rate for the article's networks, by the range test of its authors.

    python -m train.lr_find cifar10 --data-dir DIR    # one epoch; see --help
    python -m train.lr_find language_model            # on Python's documentation
    python -m train.lr_find language_model --model qrnn --data-dir DIR    # WikiText-2

Trains while the learning rate grows from step to step, until the loss diverges, and
writes the curve, its picture and a suggestion. `adamw_jax.lr_finder.find` does this for
any loss function.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adamw_jax import adam, adamw, amsgrad, clip_by_global_norm, lr_finder, sgd
from train.data import batches, chunks, cifar10, text
from train.models.wide_resnet import WideResNet
from train.recipes import language_model as recipe
from train.recipes.check import check_options
from train.recipes.optimizer import make_optimizer
from train.run import devices
from train.run.command import run_command
from train.run.environment import environment
from train.run.folder import new_folder
from train.run.log import write_json
from train.run.output import Output

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cifar10(Output):
    """The WideResNet of train.cifar10."""

    dataset: str = dataclasses.field(default="cifar10", init=False)
    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets

    blocks: int = 3  # of each of the three stages; 3 and 96: the article's WRN-22
    width: int = 96  # channels of the first stage
    batch_size: int = 128

    optimizer: Literal["adamw", "adam-l2", "amsgradw", "amsgrad-l2", "sgd"] = "adamw"
    weight_decay: float | None = None  # None: adamw .1, sgd 1e-4, the L2s 1e-6
    first: float = 1e-5  # learning rate of the first step
    last: float = 10.0  # learning rate that would follow the last step
    steps: int | None = None  # None: one epoch
    # weight of the past in the moving average of the loss; None: no lag
    smoothing: float | None = None
    seed: int = 0  # of the initial weights, the order of the images and the crops


@dataclasses.dataclass(frozen=True)
class LanguageModel(Output):
    """The network of train.language_model, with its recipes' dropout."""

    dataset: str = dataclasses.field(default="language_model", init=False)
    data_dir: Path | None = None  # WikiText-2, or text; None: Python's documentation

    model: Literal["lstm", "qrnn"] = "lstm"
    # None: as in train.language_model, small without --data-dir
    embedding: int | None = None  # width of the embedding and of the last layer
    width: int | None = None  # of the other layers
    layers: int | None = None
    batch_size: int | None = None  # columns of the text
    bptt: int | None = None  # tokens of a column in each step

    optimizer: Literal["adamw", "adam-l2", "amsgradw", "amsgrad-l2", "sgd"] = "adam-l2"
    weight_decay: float | None = None  # None: adamw .03, the L2s and sgd about 1e-6
    first: float = 1e-4  # learning rate of the first step
    last: float = 10.0  # rate that would follow the last step; for sgd try 1000
    steps: int = 300  # one epoch of WikiText-2 has 297
    # weight of the past in the moving average of the loss; None: no lag
    smoothing: float | None = None
    seed: int = 0  # of the initial weights and of dropout


# The article's betas, with b1 and momentum as 1cycle starts them. Decays: AdamW's from
# the article's script, Adam's its best L2 coefficient, SGD's from its notebook.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda rate, decay=0.1: adamw(rate, 0.95, 0.99, weight_decay=decay),
    "adam-l2": lambda rate, decay=1e-6: adam(rate, 0.95, 0.99, l2=decay),
    "amsgradw": lambda rate, decay=0.1: amsgrad(rate, 0.95, 0.99, weight_decay=decay),
    "amsgrad-l2": lambda rate, decay=1e-6: amsgrad(rate, 0.95, 0.99, l2=decay),
    "sgd": lambda rate, decay=1e-4: sgd(rate, 0.95, l2=decay),
}


def check(c: Cifar10 | LanguageModel) -> None:
    decay = c.weight_decay
    rules = {
        "optimizer": (c.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
        "weight_decay": (decay is None or 0 <= decay < math.inf, "None or at least 0"),
    }
    if isinstance(c, Cifar10):
        for option in ("blocks", "width", "batch_size"):
            rules[option] = (getattr(c, option) >= 1, "at least 1")
    else:
        rules["model"] = (c.model in ("lstm", "qrnn"), "lstm or qrnn")
    check_options(c, rules)


# ---------------------------------------------------------------------------
# data and model
# ---------------------------------------------------------------------------


class Task(NamedTuple):
    """Arguments of `lr_finder.find`, and what the report says about them."""

    loss_fn: Callable[..., Any]
    params: Any
    batches: Iterable[Any]
    state: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    steps: int
    title: str
    settings: dict[str, Any]  # besides the command's, for config.json


def cifar10_task(config: Cifar10) -> Task:
    images, _ = cifar10.read_cifar10(config.data_dir)
    per_epoch = len(images.y) // config.batch_size
    if per_epoch == 0:
        raise ValueError(
            f"batch_size must be in [1, {len(images.y)}], got {config.batch_size}"
        )
    steps = per_epoch if config.steps is None else config.steps
    lr_finder.check_range(config.first, config.last, steps, config.smoothing)

    # data: shuffled, with the article's crops and flips
    rng = np.random.default_rng(config.seed)
    epochs = -(-steps // per_epoch)
    order = batches.order(rng, len(images.y), config.batch_size, epochs)
    crops = batches.crops_and_flips(rng, order.shape)
    train_batches = (
        {"x": batches.padded(images.x[i]), "y": images.y[i], "crops": crop}
        for i, crop in zip(order, crops, strict=True)
    )

    # model
    net = WideResNet(config.blocks, config.width, rngs=nnx.Rngs(config.seed))
    net = nnx.view(net, use_running_average=False)
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, batch):
        net = nnx.merge(graphdef, params, stats, copy=True)
        x = jax.vmap(batches.crop_and_flip)(batch["x"], batch["crops"])
        logits = net(batches.normalise(x))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return loss.mean(), nnx.state(net, nnx.BatchStat)

    optimizer = OPTIMIZERS[config.optimizer]
    if config.weight_decay is not None:
        optimizer = functools.partial(optimizer, decay=config.weight_decay)
    sizes = f"{config.blocks} blocks a stage, width {config.width}"
    title = f"WideResNet of {sizes}, {config.optimizer}:\n"
    title += f"up to {steps} steps of {config.batch_size}"
    return Task(loss_fn, params, train_batches, stats, optimizer, steps, title, {})


def language_model_settings(config: LanguageModel) -> recipe.Config:
    """The recipe of the optimizer, with the options that are not None."""
    name = "salesforce" if config.optimizer == "sgd" else config.optimizer
    defaults = recipe.defaults(config.model, name, small=config.data_dir is None)
    options = ("embedding", "width", "layers", "batch_size", "bptt")
    changes = {option: getattr(config, option) for option in options}
    if config.weight_decay is not None:
        decay = "weight_decay" if config.optimizer.endswith("w") else "l2"
        changes[decay] = config.weight_decay
    changes = {key: value for key, value in changes.items() if value is not None}
    args = {}  # Salesforce's SGD has no momentum
    if config.optimizer != "sgd":
        args = {"b1": defaults.b1[0], "b2": defaults.b2}  # b1 as the schedule starts it
    return dataclasses.replace(defaults, optimizer_args=args, **changes)


def language_model_task(config: LanguageModel) -> Task:
    settings = language_model_settings(config)
    recipe.check(settings)
    lr_finder.check_range(config.first, config.last, config.steps, config.smoothing)

    # data: chunks of one length in the order of the text, repeated
    corpus = text.load(config.data_dir)
    columns, bptt = chunks.columns(corpus.train, settings.batch_size), settings.bptt
    if not 1 <= bptt < len(columns):
        raise ValueError(
            f"bptt must be in [1, {len(columns) - 1}] with "
            f"batch_size={settings.batch_size}, got {bptt}"
        )
    starts = range(0, len(columns) - bptt, bptt)
    chunk_batches = (
        {
            "x": columns[start : start + bptt],
            "y": columns[start + 1 : start + 1 + bptt],
            "first": np.array(start == 0),
        }
        for start in itertools.cycle(starts)
    )

    # model
    net = recipe.make_network(settings, len(corpus.vocabulary), config.seed)
    graphdef, params = nnx.split(net, nnx.Param)
    hidden = net.initial_state(settings.batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    def loss_fn(params, state, batch):
        hidden, key = state
        hidden = jax.tree.map(lambda h: jnp.where(batch["first"], 0, h), hidden)
        key, dropout_key = jax.random.split(key)
        net = nnx.merge(graphdef, params)
        loss, (_, hidden) = recipe.loss_fn(
            settings, net, hidden, batch["x"], batch["y"], bptt, dropout_key
        )
        return loss, (hidden, key)

    def optimizer(schedule):
        clip = clip_by_global_norm(settings.clip, eps=1e-6)  # as PyTorch's
        return optax.chain(clip, make_optimizer(settings, schedule))

    sizes = (
        f"{settings.layers} layers, widths {settings.embedding} and {settings.width}"
    )
    title = f"AWD-{settings.model.upper()} of {sizes}, {config.optimizer}:\n"
    title += f"up to {config.steps} steps of {settings.batch_size} x {bptt} tokens"
    return Task(
        loss_fn,
        params,
        chunk_batches,
        (hidden, key),
        optimizer,
        config.steps,
        title,
        {"settings": vars(settings)},
    )


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def main(config: Cifar10 | LanguageModel) -> Path:
    """Finds a learning rate for the article's network; returns the folder."""
    start = time.perf_counter()
    check(config)
    if isinstance(config, Cifar10):
        task = cifar10_task(config)
    else:
        task = language_model_task(config)
    env = environment()
    folder = new_folder(config, f"lr-find-{config.dataset}")
    settings = dataclasses.asdict(config) | task.settings
    write_json(folder / "config.json", settings | env)
    print(f"{config.dataset}, {task.title}, on {env['devices']}.", flush=True)
    devices.print_compiling(str(folder))
    curve = lr_finder.find(
        task.loss_fn,
        task.params,
        task.batches,
        task.state,
        optimizer=task.optimizer,
        first=config.first,
        last=config.last,
        steps=task.steps,
        smoothing=config.smoothing,
    )
    outcome = report(curve, folder)
    print(f"Wrote {folder} after {time.perf_counter() - start:.0f} s.\n\n{outcome}")
    return folder


def report(curve: lr_finder.Curve, folder: Path) -> str:
    """Writes the curve, its suggestion and its picture; returns a sentence."""
    results: dict[str, Any] = {"suggestion": None, "steepest": None}
    if (reason := curve.why_not()) is None:
        results = {"suggestion": curve.suggestion, "steepest": curve.steepest}
        sentence = (
            f"Suggested learning rate: {curve.suggestion:.2g}, a tenth of the rate at "
            f"the minimum of the loss. The loss falls fastest at {curve.steepest:.2g}."
        )
    else:
        sentence = f"No learning rate to suggest: {reason}."
    for key, value in curve._asdict().items():
        results[key] = value.tolist() if isinstance(value, np.ndarray) else value
    write_json(folder / "lr_find.json", results)
    curve.plot().savefig(folder / "lr_find.png")
    return sentence


def parse_args(args: list[str]) -> Cifar10 | LanguageModel:
    import tyro

    return tyro.cli(
        Annotated[Cifar10, tyro.conf.subcommand("cifar10")]
        | Annotated[LanguageModel, tyro.conf.subcommand("language-model")],
        prog="python -m train.lr_find",
        description="Finds a learning rate for one of the article's networks.",
        args=args,
    )


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
