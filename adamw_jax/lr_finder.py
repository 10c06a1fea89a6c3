"""The learning-rate range test for any loss function."""

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .apply import apply_updates
from .optimizers import adamw
from .schedules.cycles import range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIP = 10  # first steps: their average is too noisy for a minimum or a suggestion
SPAN = 20  # times the average's length is the test's, unless `smoothing` is given
MIN_STEPS = 20
DIVERGED = 4.0  # times the lowest smoothed loss
PROGRESS_SECONDS = 5.0


class Curve(NamedTuple):
    """The losses of a range test, one point per step before the loss diverged.

    Attributes:
        learning_rates: of each step.
        losses: of each batch, before the step is taken.
        smoothed: exponential average of the losses, of both directions or of the past.
        diverged_at: learning rate of the step whose smoothed loss diverged; None if the
            loss did not diverge.
        skip: first steps that count for no minimum and no suggestion.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged_at: float | None
    skip: int = SKIP

    @property
    def suggestion(self) -> float:
        """A tenth of the learning rate at which the smoothed loss reaches its minimum.

        fast.ai's convention: one order of magnitude below the minimum, where the loss
        still improves. Adam's minimum is often wide and flat, so that noise decides
        where its lowest point is; the minimum counts as reached at the first point that
        is 95 % of the way down.

        Raises:
            ValueError: if the curve has no such minimum; see `why_not`.
        """
        return float(self.learning_rates[self._minimum()] / 10)

    @property
    def steepest(self) -> float:
        """The learning rate around which the smoothed loss falls fastest.

        fastai 1.0 suggests the steepest single step, where noise decides. This is the
        middle of the decade of learning rates with the largest fall.

        Raises:
            ValueError: as `suggestion` does.
        """
        curve = self.smoothed[self.skip : self._minimum() + 1]
        rates = self.learning_rates[self.skip :]
        per_decade = 1 / np.log10(rates[1] / rates[0])
        decade = max(1, min(round(per_decade), len(curve) - 1))
        first = (curve[:-decade] - curve[decade:]).argmax()
        return float(np.sqrt(rates[first] * rates[first + decade]))

    def why_not(self) -> str | None:
        """Returns why the curve suggests no learning rate, or None if it does."""
        points = len(self.smoothed)
        if points <= self.skip + 1:
            return f"the loss diverged after {points} steps: choose a lower first rate"
        lowest = self.skip + self.smoothed[self.skip :].argmin()
        if lowest == self.skip:
            return "the loss never fell: choose a lower first rate or more steps"
        if lowest == points - 1 and self.diverged_at is None:
            return "the loss fell to the end: choose a higher last rate"
        return None

    def plot(self) -> "Figure":
        """Draws the curve and its suggestion; needs matplotlib.

        The first steps, which count for nothing, are left out, as in fastai; losses far
        above the first are cut off. A notebook shows the returned figure after
        %matplotlib inline.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
        ax = figure.subplots()
        skip = self.skip if len(self.losses) > self.skip + 1 else 0
        rates, losses, smoothed = np.stack(self[:3])[:, skip:]
        ax.plot(rates, losses, ".", color="#7f7f7f", alpha=0.5, ms=4, label="batch")
        ax.plot(rates, smoothed, color="#00798c", lw=2, label="smoothed")
        ax.set_xscale("log")
        reason = self.why_not()
        if reason is None:
            low, high = losses.min(), losses[: max(1, len(losses) // 4)].max()
            ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
            minimum = self._minimum()
            marks = {"markersize": 8, "color": "#d1495b", "ls": ""}
            label = f"minimum, {self.learning_rates[minimum]:.2g}"
            at = self.learning_rates[minimum], self.smoothed[minimum]
            ax.plot(*at, "v", label=label, **marks)
            for name, style in (("suggestion", "-"), ("steepest", ":")):
                rate = getattr(self, name)
                label = f"{name}, {rate:.2g}"
                ax.axvline(rate, color="#d1495b", ls=style, label=label)
        else:
            ax.set_title(f"No learning rate to suggest: {reason}.", fontsize=10)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("training loss")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def _minimum(self) -> int:
        if reason := self.why_not():
            raise ValueError(f"no learning rate to suggest: {reason}")
        curve = self.smoothed[self.skip :]
        fall = curve[0] - curve.min()
        return self.skip + int((curve <= curve.min() + fall / 20).argmax())


def check_range(
    first: float, last: float, steps: int, smoothing: float | None = None
) -> None:
    """Raises a ValueError that names the argument of `find` that is out of range."""
    rules = {
        "first": (first, 0 < first < math.inf, "above 0"),
        "last": (last, first < last < math.inf, f"above first={first!r}"),
        "steps": (steps, steps >= MIN_STEPS, f"at least {MIN_STEPS}"),
        "smoothing": (
            smoothing,
            smoothing is None or 0 <= smoothing < 1,
            "None or in [0, 1)",
        ),
    }
    for name, (value, valid, allowed) in rules.items():
        if not valid:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def default_optimizer(learning_rate: Any) -> optax.GradientTransformation:
    """AdamW with the betas and the weight decay of the article's CIFAR-10."""
    return adamw(learning_rate, 0.95, 0.99, weight_decay=0.1)


def find(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    state: Any = None,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation] = default_optimizer,
    first: float = 1e-5,
    last: float = 10.0,
    steps: int | None = None,
    smoothing: float | None = None,
) -> Curve:
    """Trains with a growing learning rate until the loss diverges.

    Step k = 0, 1, ... of n has the learning rate and the average of past losses

        rate_k = first (last / first)^(k / n)
        past_k = average_k / (1 - smoothing^(k + 1)),
        average_k = smoothing average_(k-1) + (1 - smoothing) loss_k

    The loss has diverged when this average is not finite or exceeds four times its
    lowest value after the first eleven steps (the first tenth of a test of less than
    100). (If that is negative: when it exceeds it by three times its magnitude.) The
    test then ends early. Prints a line of progress every five seconds.

    An average of the past lags behind: a minimum seems to be at a higher learning rate
    than it is, and in a short test at a far higher one. By default the curve is
    therefore averaged again in both directions when the test has ended, which has no
    lag:

        smoothed_k = sum_j smoothing^|k - j| loss_j / sum_j smoothing^|k - j|

    with 1 / (1 - smoothing) = n / 20 steps, at least 2. There a loss counts no more
    than the highest of the first steps, so that the rise at the end does not reach
    back. With a number for `smoothing` the curve is that of the past, as in fastai.

    Convention: as in fastai 0.7, the suggestion is a tenth of the learning rate at the
    minimum of the smoothed loss. fastai 1.0 and PyTorch Lightning suggest the point of
    steepest descent instead; `Curve` has both.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> import adamw_jax as aj
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(200, 16, 4)).astype("float32")
        >>> y = x.sum(-1) + rng.normal(size=(200, 16)).astype("float32")
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> batches = list(zip(x, y))
        >>> curve = aj.lr_finder.find(
        ...     loss_fn, {"w": jnp.zeros(4)}, batches, optimizer=aj.sgd, first=1e-4
        ... )
        >>> print(f"{curve.suggestion:.0e}")
        6e-03

    A Flax network with batch norm and dropout has a state as well::

        graphdef, params, state = nnx.split(net, nnx.Param, ...)

        def loss_fn(params, state, batch):
            net = nnx.merge(graphdef, params, state, copy=True)
            loss = jnp.mean((net(batch["x"]) - batch["y"]) ** 2)
            return loss, nnx.split(net, nnx.Param, ...)[2]

        curve = aj.lr_finder.find(loss_fn, params, batches, state)
        curve.plot()

    Args:
        loss_fn: (params, batch) -> loss, or with a state (params, state, batch) ->
            (loss, state). Runs under `jax.jit`.
        params: parameters, any tree; they and the state are left unchanged.
        batches: any iterable of batches of one shape; the first `steps` are used.
        state: everything but the parameters that a step changes, such as the statistics
            of batch norm or the keys of dropout.
        optimizer: makes a gradient transformation from a learning-rate schedule, such
            as `adamw`. By default AdamW with the article's betas and weight decay.
        first: learning rate of the first step.
        last: learning rate that would follow the last step.
        steps: length of the test; None: one pass over `batches`, as in fastai.
        smoothing: None: no lag, and a length that suits the number of steps. Or the
            weight of the past in fastai's moving average (there 0.98), which lags
            behind by up to 1 / (1 - smoothing) steps.

    Returns:
        The curve, with `suggestion`, `steepest` and `plot()`.

    Raises:
        ValueError: if an argument is out of range or `batches` end before `steps`.

    Warns:
        UserWarning: if the average lags behind by more than a factor of ten of the
            learning rate.

    Source: fastai 0.7, `LR_Finder` in `sgdr.py`; Smith, "Cyclical learning rates for
    training neural networks", 2017, section 3.3, https://arxiv.org/abs/1506.01186.
    """
    if steps is None:
        if not isinstance(batches, Sized):
            raise ValueError("steps must be given for batches without a length")
        steps = len(batches)
    check_range(first, last, steps, smoothing)
    if not callable(optimizer):
        raise ValueError(
            "optimizer must be a function that makes a gradient transformation from a "
            f"schedule, such as adamw, got {optimizer!r}"
        )
    past, skip = smoothing, SKIP
    if past is None:
        past, skip = 1 - 1 / max(2, steps / SPAN), min(SKIP, steps // 10)
    else:
        _warn_of_lag(first, last, steps, past)
    schedule = range_test(first, last, steps=steps).schedule("learning_rate")
    tx = optimizer(schedule)
    step = _make_step(loss_fn, tx, stateful=state is not None)
    # copies, because the step donates its carry
    carry = jax.tree.map(jnp.copy, (params, state, tx.init(params)))
    rates, losses, smoothed = schedule(np.arange(steps)), [], []
    average, lowest, diverged_at, printed = 0.0, math.inf, None, time.perf_counter()
    for k, batch in enumerate(itertools.islice(batches, steps)):
        carry, loss = step(carry, batch)
        loss = float(loss)
        average = past * average + (1 - past) * loss
        corrected = average / (1 - past ** (k + 1))
        limit = lowest + (DIVERGED - 1) * abs(lowest)
        if not math.isfinite(corrected) or corrected > limit:
            diverged_at = float(rates[k])
            break
        if k > skip:
            lowest = min(lowest, corrected)
        losses.append(loss)
        smoothed.append(corrected)
        if time.perf_counter() - printed > PROGRESS_SECONDS:
            printed = time.perf_counter()
            line = f"step {k + 1} of {steps}, learning rate {rates[k]:.2g}"
            print(f"  {line}, smoothed loss {corrected:.4g}", flush=True)
    points = len(losses)
    if diverged_at is None and points < steps:
        raise ValueError(
            f"steps must be at most the number of batches, {points}, got {steps}; "
            "itertools.cycle(batches) repeats them"
        )
    losses, smoothed = np.array(losses), np.array(smoothed)
    if smoothing is None:
        limit = losses[: skip + 1].max(initial=-np.inf)
        smoothed = _smooth(np.minimum(losses, limit), past)
    return Curve(rates[:points], losses, smoothed, diverged_at, skip)


def _smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential average in both directions, so without lag."""

    def past(values):
        sums = itertools.accumulate(values, lambda total, x: weight * total + x)
        return np.array(list(sums))

    def both(values):
        return past(values) + past(values[::-1])[::-1] - values

    return both(values) / both(np.ones(len(values)))


def _make_step(loss_fn, tx, stateful: bool):
    def loss_and_state(params, state, batch):
        if stateful:
            return loss_fn(params, state, batch)
        return loss_fn(params, batch), None

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, state, opt = carry
        (loss, state), grads = jax.value_and_grad(loss_and_state, has_aux=True)(
            params, state, batch
        )
        updates, opt = tx.update(grads, opt, params)
        return (apply_updates(params, updates), state, opt), loss

    return step


def _warn_of_lag(first: float, last: float, steps: int, smoothing: float) -> None:
    lag = math.log10(last / first) / steps / (1 - smoothing)
    if lag > 1:
        warnings.warn(
            f"with steps={steps} and smoothing={smoothing} the smoothed loss lags "
            f"behind by up to {lag:.1f} powers of ten of the learning rate, and the "
            "suggestion with it: take more steps or less smoothing",
            stacklevel=3,
        )
