"""A learning rate to start from: the range test of the article's authors.

    python -m train.lr_find cifar10 --data-dir DIR    # one epoch; see --help
    python -m train.lr_find language_model            # of Python's documentation
    python -m train.lr_find language_model --model qrnn --data-dir DIR    # WikiText-2

Trains while the learning rate grows from step to step, until the loss diverges, and
writes the curve, its picture and a suggestion. `find` does it for any loss function:

    from train import (lr_find)

    graphdef, params, state = nnx.split(net, nnx.Param, ...)  # ...: batch norm, keys

    def loss_fn(params, state, batch):
        net = nnx.merge(graphdef, params, state, copy=True)
        loss = ((net(batch["x"]) - batch["y"]) ** 2).mean()
        return loss, nnx.split(net, nnx.Param, ...)[2]

    found = lr_find.find(loss_fn, params, batches, state)
    found.suggestion  # a learning rate
    found.plot()  # a matplotlib figure; a notebook shows it after %matplotlib inline

Source: fastai 0.7, `LR_Finder` in `sgdr.py`; Smith, "Cyclical learning rates for
training neural networks", 2017, section 3.3, https://arxiv.org/abs/1506.01186.
"""

import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adamw_jax import (
    adam,
    adamw,
    amsgrad,
    apply_updates,
    clip_by_global_norm,
    range_test,
    sgd,
)
from train import language_model
from train.data import batches, text
from train.data import cifar10 as data
from train.models.wide_resnet import WideResNet
from train.plots import pictures as plots
from train.recipes.optimizer import make_optimizer
from train.run import devices, record

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cifar10:
    """The WideResNet of train.cifar10."""

    dataset: str = dataclasses.field(default="cifar10", init=False)
    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets

    blocks: int = 3  # of each of the three stages; 3 and 96: the article's WRN-22
    width: int = 96  # channels of the first stage
    batch_size: int = 128

    optimizer: Literal["adamw", "adam-l2", "amsgradw", "amsgrad-l2", "sgd"] = "adamw"
    weight_decay: float | None = None  # None: adamw .1, sgd 1e-4, the L2s 1e-6
    first: float = 1e-5  # learning rate of the first step
    last: float = 10.0  # learning rate that would follow on the last step
    steps: int | None = None  # None: one epoch
    smoothing: float = 0.98  # share of the old in the moving average of the loss
    seed: int = 0  # of the initial weights, the order of the images and the crops

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: made from data set and date
    overwrite: bool = False  # replace the results of an earlier run of that name


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The network of train.language_model, with the dropout of its recipes."""

    dataset: str = dataclasses.field(default="language_model", init=False)
    data_dir: Path | None = None  # WikiText-2, or text; None: Python's documentation

    model: Literal["lstm", "qrnn"] = "lstm"
    # None: as in train.language_model, small without data_dir
    embedding: int | None = None  # width of the embedding and of the last layer
    width: int | None = None  # of the other layers
    layers: int | None = None
    batch_size: int | None = None  # columns of the text
    bptt: int | None = None  # tokens of a column in a step, always as many

    optimizer: Literal["adamw", "adam-l2", "amsgradw", "amsgrad-l2", "sgd"] = "adam-l2"
    weight_decay: float | None = None  # None: adamw .03, the L2s and sgd about 1e-6
    first: float = 1e-4  # learning rate of the first step
    last: float = 10.0  # rate that would follow on the last step; for sgd say 1000
    steps: int = 300  # one epoch of WikiText-2 has 297
    smoothing: float = 0.95  # share of the old in the moving average of the loss
    seed: int = 0  # of the initial weights and of dropout

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: made from data set and date
    overwrite: bool = False  # replace the results of an earlier run of that name


# The article's betas, b1 and momentum as 1cycle starts them. Decays: AdamW's is that of
# the article's script, Adam's its best L2 coefficient, SGD's that of its notebook.
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
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")


# ---------------------------------------------------------------------------
# the range test of any loss function
# ---------------------------------------------------------------------------

SKIP = 10  # first steps, too few for an average: neither a best loss nor a suggestion
FEWEST = 20  # steps, so that a curve is left


class Found(NamedTuple):
    """A curve with a point per step. The step that diverged is not one of them."""

    learning_rates: np.ndarray
    losses: np.ndarray  # of the batch, before the step is taken
    smoothed: np.ndarray  # moving average of the losses, without its bias to 0
    diverged_at: float | None  # learning rate; None: it did not diverge

    @property
    def suggestion(self) -> float:
        """A tenth of the learning rate at which the smoothed loss gets to its minimum.

        The authors read the rate off the picture; fast.ai's "How do you find a good
        learning rate" goes back from the minimum by one order of magnitude, to where
        the loss still improves. Adam's minimum is often wide and flat, and noise says
        where in it the lowest point is: what counts here is the first point that is
        19/20 of the way down.

        Raises:
            ValueError: the curve has no such minimum; it says why.
        """
        return float(self.learning_rates[self._bottom()] / 10)

    @property
    def steepest(self) -> float:
        """The learning rate around which the smoothed loss falls fastest.

        fastai 1.0 suggests it, from single steps, where noise decides; this is the
        middle of the decade with the largest fall. Raises as `suggestion` does.
        """
        curve = self.smoothed[SKIP : self._bottom() + 1]
        per_decade = 1 / np.log10(self.learning_rates[1] / self.learning_rates[0])
        decade = max(1, min(round(per_decade), len(curve) - 1))
        fall = curve[:-decade] - curve[decade:]
        return float(self.learning_rates[SKIP + fall.argmax() + decade // 2])

    def why_not(self) -> str | None:
        """Why the curve suggests nothing; None if it does."""
        points = len(self.smoothed)
        if points <= SKIP + 1:
            return f"the loss diverged after {points} steps: choose a lower first rate"
        lowest = SKIP + self.smoothed[SKIP:].argmin()
        if lowest == SKIP:
            return "the loss never fell: choose a lower first rate or more steps"
        if lowest == points - 1 and self.diverged_at is None:
            return "the loss fell to the end: choose a higher last rate"
        return None

    def plot(self) -> Any:
        """A matplotlib figure of the curve, with the suggestion."""
        return plots.learning_rates(self)

    def _bottom(self) -> int:
        if reason := self.why_not():
            raise ValueError(f"no learning rate to suggest: {reason}")
        curve = self.smoothed[SKIP:]
        down = curve[0] - curve.min()
        return SKIP + int((curve <= curve.min() + down / 20).argmax())


def check_ramp(first: float, last: float, steps: int, smoothing: float) -> None:
    rules = {
        "first": (first, 0 < first < math.inf, "above 0"),
        "last": (last, first < last < math.inf, f"above first={first!r}"),
        "steps": (steps, steps >= FEWEST, f"at least {FEWEST}"),
        "smoothing": (smoothing, 0 <= smoothing < 1, "in [0, 1)"),
    }
    for name, (value, good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def find(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    state: Any = None,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation] = OPTIMIZERS["adamw"],
    first: float = 1e-5,
    last: float = 10.0,
    steps: int | None = None,
    smoothing: float = 0.98,
) -> Found:
    """Trains while the learning rate grows, until the loss diverges.

    The rate of step k is first * (last / first) ** (k / steps). The test ends early
    when the smoothed loss is not finite or four times the lowest one after the first
    ten steps. (Where a loss is negative: when it is above by three times the size of
    the lowest.) Prints a line every five seconds.

    Args:
        loss_fn: (params, batch) -> loss. With a state: (params, state, batch) ->
            (loss, state). Runs under `jit`.
        params: any tree; it and the state are left as they are.
        batches: of one shape; any iterable, of which one pass over `steps` is made.
        state: what a step changes beside the parameters, such as the statistics of
            batch norm or the keys of dropout.
        optimizer: from a schedule of the learning rate to a transformation, such as
            `adamw`; by default AdamW with the article's betas and decay.
        first: learning rate of the first step.
        last: learning rate that would follow on the last step.
        steps: length of the test; None: all the batches, one epoch as in fastai.
        smoothing: share of the old in the moving average. The average lags behind by
            up to 1 / (1 - smoothing) steps, so few steps need less: it warns.

    Returns:
        The curve, with `suggestion`, `steepest` and `plot()`.

    Raises:
        ValueError: an argument out of range; batches that end before `steps`.
    """
    if steps is None:
        if not isinstance(batches, Sized):
            raise ValueError("steps must be given: these batches have no length")
        steps = len(batches)
    check_ramp(first, last, steps, smoothing)
    if not callable(optimizer):
        raise ValueError(
            "optimizer must be a function from a schedule to a transformation, such as "
            f"adamw, got {optimizer!r}"
        )
    lag = math.log10(last / first) / steps / (1 - smoothing)
    if lag > 1:
        warnings.warn(
            f"with steps={steps} and smoothing={smoothing} the average lags behind by "
            f"up to {lag:.1f} powers of ten of the learning rate, and the suggestion "
            "with it: take more steps or less smoothing",
            stacklevel=2,
        )
    schedule = range_test(first, last, steps=steps).schedule("learning_rate")
    tx = optimizer(schedule)

    def loss_of(params, state, batch):
        if state is None:
            return loss_fn(params, batch), None
        return loss_fn(params, state, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, state, opt = carry
        (loss, state), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, state, batch
        )
        updates, opt = tx.update(grads, opt, params)
        return (apply_updates(params, updates), state, opt), loss

    # copies, since a step gives up what it is given
    carry = jax.tree.map(jnp.copy, (params, state, tx.init(params)))
    rates, losses, smoothed = schedule(np.arange(steps)), [], []
    average, best, diverged_at, last_line = 0.0, math.inf, None, time.perf_counter()
    for k, batch in enumerate(itertools.islice(batches, steps)):
        carry, loss = step(carry, batch)
        average = smoothing * average + (1 - smoothing) * float(loss)
        smooth = average / (1 - smoothing ** (k + 1))
        if not math.isfinite(smooth) or smooth > best + 3 * abs(best):
            diverged_at = float(rates[k])
            break
        if k > SKIP:
            best = min(best, smooth)
        losses.append(float(loss))
        smoothed.append(smooth)
        if time.perf_counter() - last_line > 5:
            last_line = time.perf_counter()
            line = f"step {k + 1} of {steps}, learning rate {rates[k]:.2g}"
            print(f"  {line}, smoothed loss {smooth:.4g}", flush=True)
    points = len(losses)
    if diverged_at is None and points < steps:
        raise ValueError(
            f"steps must be at most the number of batches, {points}, got {steps}; "
            "itertools.cycle(batches) repeats them"
        )
    return Found(rates[:points], np.array(losses), np.array(smoothed), diverged_at)


# ---------------------------------------------------------------------------
# data and model
# ---------------------------------------------------------------------------


class Task(NamedTuple):
    """Most of what `find` takes."""

    loss_fn: Callable[..., Any]
    params: Any
    batches: Iterable[Any]
    state: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    steps: int
    title: str
    settings: dict[str, Any]  # beside those of the command, for config.json


def cifar10_task(config: Cifar10) -> Task:
    images, _ = data.read_cifar10(config.data_dir)
    per_epoch = len(images.y) // config.batch_size
    if per_epoch == 0:
        raise ValueError(
            f"batch_size must be in [1, {len(images.y)}], got {config.batch_size}"
        )
    steps = per_epoch if config.steps is None else config.steps
    check_ramp(config.first, config.last, steps, config.smoothing)

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


def language_model_settings(config: LanguageModel) -> language_model.Config:
    """The recipe of that optimizer, with the sizes that are given."""
    recipe = "salesforce" if config.optimizer == "sgd" else config.optimizer
    settings = language_model.defaults(config.model, recipe, config.data_dir is None)
    sizes = ("embedding", "width", "layers", "batch_size", "bptt")
    given = {size: getattr(config, size) for size in sizes}
    given = {size: value for size, value in given.items() if value is not None}
    if config.weight_decay is not None:
        decay = "weight_decay" if config.optimizer.endswith("w") else "l2"
        given[decay] = config.weight_decay
    args = {}  # Salesforce's SGD has no momentum
    if config.optimizer != "sgd":
        args = {"b1": settings.b1[0], "b2": settings.b2}  # b1 as the schedule starts it
    return dataclasses.replace(
        settings, data_dir=config.data_dir, optimizer_args=args, **given
    )


def language_model_task(config: LanguageModel) -> Task:
    settings = language_model_settings(config)
    language_model.check(settings)
    check_ramp(config.first, config.last, config.steps, config.smoothing)

    # data: chunks of one length in the order of the text, again and again
    corpus = language_model.read(settings)
    columns, bptt = text.columns(corpus.train, settings.batch_size), settings.bptt
    if not 1 <= bptt < len(columns):
        raise ValueError(
            f"bptt must be in [1, {len(columns) - 1}] with "
            f"batch_size={settings.batch_size}, got {bptt}"
        )
    starts = range(0, len(columns) - bptt, bptt)
    chunks = (
        {
            "x": columns[start : start + bptt],
            "y": columns[start + 1 : start + 1 + bptt],
            "first": np.array(start == 0),
        }
        for start in itertools.cycle(starts)
    )

    # model
    net = language_model.network(settings, len(corpus.vocabulary), config.seed)
    graphdef, params = nnx.split(net, nnx.Param)
    hidden = net.initial_state(settings.batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    def loss_fn(params, state, batch):
        hidden, key = state
        hidden = jax.tree.map(lambda h: jnp.where(batch["first"], 0, h), hidden)
        key, now = jax.random.split(key)
        net = nnx.merge(graphdef, params)
        loss, (_, hidden) = language_model.loss_of(
            settings, net, hidden, batch["x"], batch["y"], bptt, now
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
        chunks,
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
    started = time.perf_counter()
    check(config)
    if isinstance(config, Cifar10):
        task = cifar10_task(config)
    else:
        task = language_model_task(config)
    environment = record.environment()
    folder = record.new_folder(config, f"lr-find-{config.dataset}")
    settings = dataclasses.asdict(config) | task.settings
    record.write_json(folder / "config.json", settings | environment)
    print(f"{config.dataset}, {task.title}, on {environment['devices']}.", flush=True)
    found = find(
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

    # report
    results: dict[str, Any] = {"suggestion": None, "steepest": None}
    if (reason := found.why_not()) is None:
        results = {"suggestion": found.suggestion, "steepest": found.steepest}
        outcome = (
            f"Suggested learning rate: {found.suggestion:.2g}, a tenth of that with "
            f"which the loss gets to its minimum. It falls fastest at "
            f"{found.steepest:.2g}."
        )
    else:
        outcome = f"No learning rate to suggest: {reason}."
    for key, value in found._asdict().items():
        results[key] = value.tolist() if isinstance(value, np.ndarray) else value
    record.write_json(folder / "lr_find.json", results)
    found.plot().savefig(folder / "lr_find.png")
    print(f"Wrote {folder} after {time.perf_counter() - started:.0f} s.\n\n{outcome}")
    return folder


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    main(tyro.cli(Cifar10 | LanguageModel))
