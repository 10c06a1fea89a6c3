"""Phases: one list that drives learning rate, betas and weight decay, as plain data."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import check_choice, check_scalar

Rule = Literal["fastai", "torch"]
KINDS = ("constant", "linear", "cosine", "exponential", "polynomial")
HYPERPARAMS = ("learning_rate", "b1", "b2", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training and what each hyperparameter does in it.

    Each hyperparameter is a number, or a tuple `(start, end)`, `(start, end, kind)` or
    `(start, end, "polynomial", power)`. With t the fraction of the phase done:

    =============== =================================================
    `"linear"`      start + (end - start) t; the default of a pair
    `"cosine"`      end + (start - end) (1 + cos(pi t)) / 2
    `"exponential"` start (end / start)^t
    `"polynomial"`  end + (start - end) (1 - t)^power
    `"constant"`    start
    =============== =================================================

    Args:
        steps: duration in steps; fractions are allowed.
        epochs: duration in epochs, instead of steps.
        learning_rate: >= 0.
        b1: in [0, 1); the momentum of SGD.
        b2: in [0, 1).
        weight_decay: >= 0.

    Raises:
        TypeError, ValueError: no duration or two, a duration that is not positive, a
            value out of range, an unknown kind, a tuple of another form.

    Example:
        >>> Phase(steps=100, learning_rate=(1e-4, 1e-3, "cosine"), b1=0.9)
        Phase(steps=100, learning_rate=(0.0001, 0.001, 'cosine'), b1=0.9)
    """

    steps: float | None = None
    epochs: float | None = None
    learning_rate: Any = None
    b1: Any = None
    b2: Any = None
    weight_decay: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _plain(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "a phase lasts a number of steps or of epochs: "
                f"got steps={self.steps!r}, epochs={self.epochs!r}"
            )
        unit = "steps" if self.epochs is None else "epochs"
        duration = getattr(self, unit)
        check_scalar(unit, duration)
        if duration == 0:
            raise ValueError(f"{unit} must be > 0: a phase has a length")
        for name in HYPERPARAMS:
            if getattr(self, name) is not None:
                _check_ramp(name, getattr(self, name))

    def __repr__(self):
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        text = ", ".join(f"{name}={v!r}" for name, v in fields if v is not None)
        return f"Phase({text})"


def _plain(name: str, value: Any) -> Any:
    """Python numbers and tuples of them: what JSON and repr give back."""
    if isinstance(value, list | tuple):
        return tuple(_plain(name, v) for v in value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is a traced value, but phases are plain data: scale a schedule of "
            "theirs instead, as in lambda t: rate * phases.schedule('learning_rate')(t)"
        )
    return value.item() if isinstance(value, np.generic | jax.Array) else value


def _check_ramp(name: str, value: Any) -> None:
    below = 1.0 if name in ("b1", "b2") else math.inf
    if not isinstance(value, tuple):
        check_scalar(name, value, below=below)
        return
    if not 2 <= len(value) <= 4:
        raise ValueError(
            f"{name} must be a number or (start, end[, kind[, power]]), got {value!r}"
        )
    start, end, kind, power = _ramp(value)
    check_scalar(f"{name} (start)", start, below=below)
    check_scalar(f"{name} (end)", end, below=below)
    check_choice(f"{name} (kind)", kind, KINDS)
    if len(value) == 4 and kind != "polynomial":
        raise ValueError(f"{name}: only 'polynomial' takes a power, got {value!r}")
    check_scalar(f"{name} (power)", power)
    if kind == "exponential" and (start == 0 or end == 0):
        raise ValueError(f"{name}: an exponential cannot start or end at 0: {value!r}")


def _ramp(value: Any) -> tuple[Any, Any, Any, Any]:
    """(start, end, kind, power) of what stands in a phase."""
    if not isinstance(value, tuple):
        return float(value), float(value), "constant", 1.0
    start, end, kind, power = value + ("linear", 1.0)[len(value) - 2 :]
    return start, end, kind, power


@dataclasses.dataclass(frozen=True)
class Phases:
    """A list of phases, read at one step counter.

    Steps are counted from 0: the value at step k is that of the (k+1)-th update. After
    the last phase the end values hold. Give it to an optimizer as `learning_rate`; it
    then drives all the hyperparameters that it sets. It is plain data: print it,
    compare it, `to_json`, `plot`.

    Two rules say where phases meet, both exact:

    * `"fastai"`: a phase begins at a whole step, the first one at or behind the
      (fractional) sum of the durations before it, and t = k / duration at its k-th
      step. **Its end value is never used**: the next phase begins there.
    * `"torch"`: time is continuous; t counts from the fractional boundary, and a step
      that falls on a boundary has the end value of the phase before it.

    Args:
        phases: at least one; all set the same hyperparameters.
        steps_per_epoch: needed when a phase is in epochs; fractions are allowed.
        rule: `"fastai"` or `"torch"`.
        begin: the time, in steps, at which the first phase begins; <= 0.

    Raises:
        TypeError, ValueError: no phases, phases that do not set the same
            hyperparameters or set none, epochs without steps_per_epoch.

    Example:
        >>> phases = Phases([
        ...     Phase(epochs=1.5, learning_rate=(1e-4, 1e-3), b1=(0.95, 0.85)),
        ...     Phase(epochs=1, learning_rate=(1e-3, 0, "cosine"), b1=0.95),
        ... ], steps_per_epoch=3)
        >>> print(phases)
        steps  learning_rate           b1
        0-4    0.0001 -> 0.001 linear  0.95 -> 0.85 linear
        5-7    0.001 -> 0 cosine       0.95
        >>> phases.total_steps
        8
        >>> phases.at(5)
        {'learning_rate': 0.001, 'b1': 0.95}
        >>> Phases.from_json(phases.to_json()) == phases
        True

    Source: Gugger and Howard, `AdamW and Super-convergence is now the fastest way to
    train neural nets <https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html>`_,
    2018: its `TrainingPhase`.
    """

    phases: Sequence[Phase]
    steps_per_epoch: float | None = None
    rule: Rule = "fastai"
    begin: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "phases", tuple(self.phases))
        for name in ("steps_per_epoch", "begin"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if not self.phases:
            raise ValueError("phases must hold at least one Phase")
        check_choice("rule", self.rule, ("fastai", "torch"))
        if not -math.inf < self.begin <= 0:
            raise ValueError(f"begin must be finite and <= 0, got {self.begin!r}")
        if self.steps_per_epoch is not None:
            check_scalar("steps_per_epoch", self.steps_per_epoch)
            if self.steps_per_epoch == 0:
                raise ValueError("steps_per_epoch must be > 0")
        elif any(phase.epochs is not None for phase in self.phases):
            raise ValueError("phases in epochs need steps_per_epoch")
        for i, phase in enumerate(self.phases):
            if not isinstance(phase, Phase):
                raise TypeError(f"phases[{i}] must be a Phase, got {phase!r}")
            if (names := _names(phase)) != self.names:
                raise ValueError(
                    f"all phases must set the same hyperparameters: phases[0] sets "
                    f"{self.names}, phases[{i}] {names}"
                )
        if not self.names:
            raise ValueError(f"phases must set at least one of {HYPERPARAMS}")
        if self.boundaries[-1] >= 2**31:
            raise ValueError(
                f"{self.boundaries[-1]:.3g} steps are more than int32 holds"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters that the phases set."""
        return _names(self.phases[0])

    @functools.cached_property
    def durations(self) -> tuple[float, ...]:
        """Of each phase, in steps, with fractions."""
        per_epoch = self.steps_per_epoch or math.nan  # checked where it is needed
        return tuple(
            float(phase.steps)
            if phase.steps is not None
            else (phase.epochs or math.nan) * per_epoch
            for phase in self.phases
        )

    @functools.cached_property
    def boundaries(self) -> tuple[float, ...]:
        """Where each phase begins, and where the last one ends, in steps."""
        lengths = self.durations
        ends = [self.begin + math.fsum(lengths[: i + 1]) for i in range(len(lengths))]
        if self.rule == "fastai":
            # Rounded, so that 7038.000000000001 does not become a step more.
            *ends, last = [math.ceil(round(end, 6)) for end in ends]
            # The end of a phase is looked for behind a step: it has one at least.
            for i, end in enumerate(ends):
                ends[i] = max(end, ends[i - 1] + 1 if i else 1)
            ends = [min(end, last) for end in ends] + [last]
        return (self.begin, *ends)

    @property
    def total_steps(self) -> int:
        """The number of updates that the phases are made for."""
        return int(self._first_steps[-1])

    @functools.cached_property
    def _first_steps(self) -> np.ndarray:
        """The first whole step of each phase, and the one behind the last phase."""
        boundaries = np.round(self.boundaries, 6)
        if self.rule == "fastai":
            return np.ceil(boundaries).astype(np.int32)
        return np.maximum(np.floor(boundaries) + 1, 0).astype(np.int32) * (
            np.arange(len(boundaries)) > 0
        )

    def at(self, step: int) -> dict[str, float]:
        """The values at a step, in float64 on the host."""
        return {name: float(self._value(name, step, np)) for name in self.names}

    def schedule(self, name: str) -> Callable[[Any], Any]:
        """One hyperparameter as an Optax schedule, from step to value.

        Args:
            name: `"learning_rate"`, `"b1"`, `"b2"` or `"weight_decay"`.

        Returns:
            A function of an int32 scalar or array that runs under `jit`; float64 on
            the host for a Python number.

        Raises:
            ValueError: the phases do not set it.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> lr = one_cycle(3e-3, steps=100).schedule("learning_rate")
            >>> print(f"{jax.jit(lr)(jnp.int32(46)):.6f}")
            0.002985
        """
        check_choice("name", name, self.names)

        def value(step):
            traced = isinstance(step, jax.Array)
            return self._value(name, step, jnp if traced else np)

        return value

    def _value(self, name: str, step: Any, xp: Any) -> Any:
        """Looks the phase up in a table, so that its size does not grow with phases."""
        ramps = [_ramp(getattr(phase, name)) for phase in self.phases]
        kinds = [kind for _, _, kind, _ in ramps]
        begins = np.array(self.boundaries[:-1])
        step = xp.asarray(step)
        later = self._first_steps[1:-1].reshape((1,) * step.ndim + (-1,))
        index = (step[..., None] >= later).sum(-1)
        dtype = float if xp is np else jnp.result_type(float)

        def table(values):
            return xp.asarray(np.array(values), dtype)[index]

        # The whole part is subtracted in integers: exact far into a run.
        whole = xp.asarray(np.floor(begins).astype(np.int32))[index]
        elapsed = (step - whole).astype(dtype) - table(begins - np.floor(begins))
        duration = table(self.durations)
        elapsed = xp.clip(elapsed, 0, duration)
        # Both fractions, since 1 - t loses digits near the end of a long phase.
        t, rest = elapsed / duration, (duration - elapsed) / duration
        start, end = table([ramp[0] for ramp in ramps]), table([r[1] for r in ramps])
        value = start
        for kind in sorted(set(kinds)):
            if kind == "linear":
                new = start * rest + end * t
            elif kind == "cosine":
                half = math.pi / 2
                new = start * xp.sin(half * rest) ** 2 + end * xp.sin(half * t) ** 2
            elif kind == "polynomial":
                fade = rest ** table([power for *_, power in ramps])
                new = start * fade + end * (1 - fade)
            elif kind == "exponential":
                logs = [
                    math.log(end / start) if kind == "exponential" else 0.0
                    for start, end, kind, _ in ramps
                ]
                new = start * xp.exp(table(logs) * t)
            else:
                continue
            here = xp.asarray([k == kind for k in kinds])[index]
            value = xp.where(here, new, value)
        return value

    def to_json(self) -> str:
        """The phases as JSON text, for a log or a checkpoint."""
        data = dataclasses.asdict(self)
        data["phases"] = [
            {key: value for key, value in phase.items() if value is not None}
            for phase in data["phases"]
        ]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> "Phases":
        """Reads what `to_json` wrote; ValueError or TypeError on anything else."""
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("phases"), list):
            raise ValueError(f"not the JSON of phases: {text[:80]!r}")
        phases = tuple(Phase(**phase) for phase in data.pop("phases"))
        return cls(phases, **data)

    def __str__(self):
        first = self._first_steps
        rows = [("steps", *self.names)]
        for i, phase in enumerate(self.phases):
            cells = [_show(getattr(phase, name)) for name in self.names]
            last = first[i + 1] - 1
            steps = f"{first[i]}-{last}" if last >= first[i] else "none"
            rows.append((steps, *cells))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def plot(self, axes: Any = None) -> Any:
        """Draws each hyperparameter over the steps (needs matplotlib).

        Args:
            axes: as many matplotlib axes as hyperparameters; None: a new figure.

        Returns:
            The axes.
        """
        if axes is None:
            import matplotlib.pyplot as plt

            size = (6, 1 + 1.6 * len(self.names))
            figure, axes = plt.subplots(
                len(self.names), sharex=True, squeeze=False, figsize=size
            )
            axes = axes[:, 0]
            figure.set_layout_engine("constrained")
        steps = np.arange(self.total_steps)
        for ax, name in zip(axes, self.names, strict=True):
            ax.plot(steps, self._value(name, steps, np))
            ax.set_ylabel(name)
        axes[-1].set_xlabel("step")
        return axes


def _names(phase: Phase) -> tuple[str, ...]:
    return tuple(name for name in HYPERPARAMS if getattr(phase, name) is not None)


def _show(value: Any) -> str:
    start, end, kind, power = _ramp(value)
    if kind == "constant":
        return f"{start:g}"
    suffix = f"^{power:g}" if kind == "polynomial" else ""
    return f"{start:g} -> {end:g} {kind}{suffix}"


def _stretches(
    steps: float | None, epochs: float | None, steps_per_epoch: float | None
) -> Callable[[float], dict[str, float]]:
    """From a share of the run to the duration of a phase, in steps or in epochs."""
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"give steps or epochs: got steps={steps!r}, epochs={epochs!r}"
        )
    unit, length = ("epochs", epochs) if steps is None else ("steps", steps)
    assert length is not None
    if (unit == "epochs") == (steps_per_epoch is None):
        raise ValueError(f"{unit} with steps_per_epoch={steps_per_epoch!r}")
    check_scalar(unit, length)
    return lambda share: {unit: length * share}


def _positive(**values: Any) -> None:
    for name, value in values.items():
        check_scalar(name, _plain(name, value))
        if value == 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")


def one_cycle(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    div: float = 10.0,
    pct: float = 0.075,
    b1: tuple[float, float] = (0.95, 0.85),
    end: Literal["linear", "cosine"] = "linear",
    b2: float | None = None,
    weight_decay: float | None = None,
) -> Phases:
    """The article's 1cycle: up, down, and a short annealing.

    Over (1 - pct)/2 of the run the rate rises linearly from learning_rate/div while b1
    falls; over as much it falls again while b1 rises; over the last pct it goes on
    from learning_rate/div down to learning_rate/(100 div) linearly, or to 0 along a
    cosine, at the high b1.

    Args:
        learning_rate: the peak.
        steps: length of the run in steps.
        epochs: length in epochs, instead.
        steps_per_epoch: with epochs.
        div: peak over the first rate.
        pct: the share of the annealing, in (0, 1).
        b1: the high and the low value.
        end: of the annealing.
        b2: constant through the run; the article trains with .99. None: not driven.
        weight_decay: likewise.

    Returns:
        Three phases.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> phases = one_cycle(3e-3, epochs=30, steps_per_epoch=391)
        >>> print(phases)
        steps        learning_rate           b1
        0-5425       0.0003 -> 0.003 linear  0.95 -> 0.85 linear
        5426-10850   0.003 -> 0.0003 linear  0.85 -> 0.95 linear
        10851-11729  0.0003 -> 3e-06 linear  0.95

    Source: Gugger and Howard, 2018. Smith, `Super-Convergence
    <https://arxiv.org/abs/1708.07120>`_, 2018.
    """
    part = _stretches(steps, epochs, steps_per_epoch)
    _positive(learning_rate=learning_rate, div=div)
    check_choice("end", end, ("linear", "cosine"))
    if not 0 < pct < 1:
        raise ValueError(f"pct must be in (0, 1), got {pct!r}")
    low = learning_rate / div
    high_b1, low_b1 = b1
    last = (low, low / 100) if end == "linear" else (low, 0.0, "cosine")
    constant = {"b2": b2, "weight_decay": weight_decay}
    rise = {"learning_rate": (low, learning_rate), "b1": (high_b1, low_b1)}
    fall = {"learning_rate": (learning_rate, low), "b1": (low_b1, high_b1)}
    anneal = {"learning_rate": last, "b1": high_b1}
    half = part((1 - pct) / 2)
    return Phases(
        (
            Phase(**half, **rise, **constant),
            Phase(**half, **fall, **constant),
            Phase(**part(pct), **anneal, **constant),
        ),
        steps_per_epoch,
    )


def one_cycle_plateau(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    div: float = 10.0,
    pct: float = 1 / 12,
    b1: tuple[float, float] = (0.8, 0.7),
    b2: float | None = None,
    weight_decay: float | None = None,
) -> Phases:
    """The article's variant for language models: up, a plateau, down, an annealing.

    pct of the run rising linearly from learning_rate/div to the peak (b1 falling),
    (1 - 2 pct)/2 at the peak, as much falling back (b1 rising), and pct along a cosine
    to 0: with the defaults, 7.5, 37.5, 37.5 and 7.5 of 90 epochs.

    Args:
        learning_rate: the peak.
        steps: length of the run in steps.
        epochs: length in epochs, instead.
        steps_per_epoch: with epochs.
        div: peak over the first rate.
        pct: the share of the first and of the last phase, in (0, 1/2).
        b1: the high and the low value.
        b2: constant through the run; None: not driven.
        weight_decay: likewise.

    Returns:
        Four phases.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> print(one_cycle_plateau(5e-3, epochs=90, steps_per_epoch=297))
        steps        learning_rate           b1
        0-2227       0.0005 -> 0.005 linear  0.8 -> 0.7 linear
        2228-13364   0.005                   0.7
        13365-24502  0.005 -> 0.0005 linear  0.7 -> 0.8 linear
        24503-26729  0.0005 -> 0 cosine      0.8

    Source: Gugger and Howard, 2018 (the code of its language models).
    """
    part = _stretches(steps, epochs, steps_per_epoch)
    _positive(learning_rate=learning_rate, div=div)
    if not 0 < pct < 0.5:
        raise ValueError(f"pct must be in (0, 0.5), got {pct!r}")
    low = learning_rate / div
    high_b1, low_b1 = b1
    edge, middle = part(pct), part((1 - 2 * pct) / 2)
    constant = {"b2": b2, "weight_decay": weight_decay}
    rise = {"learning_rate": (low, learning_rate), "b1": (high_b1, low_b1)}
    fall = {"learning_rate": (learning_rate, low), "b1": (low_b1, high_b1)}
    anneal = {"learning_rate": (low, 0.0, "cosine"), "b1": high_b1}
    return Phases(
        (
            Phase(**edge, **rise, **constant),
            Phase(**middle, learning_rate=learning_rate, b1=low_b1, **constant),
            Phase(**middle, **fall, **constant),
            Phase(**edge, **anneal, **constant),
        ),
        steps_per_epoch,
    )


def one_cycle_torch(
    learning_rate: float,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Phases:
    """`torch.optim.lr_scheduler.OneCycleLR`, equal to it at every step.

    Its phases end at pct_start * total_steps - 1 and total_steps - 1, fractions
    included, so that the last of the total_steps updates has the final rate.

    Args:
        learning_rate: `max_lr`, the peak.
        total_steps: updates in the run, >= 2.
        pct_start: share of the rise, in (0, 1).
        anneal_strategy: `"cos"` or `"linear"`.
        cycle_momentum: drive b1 against the rate. False: b1 is not driven.
        base_momentum: b1 at the peak.
        max_momentum: b1 at both ends.
        div_factor: peak over the first rate.
        final_div_factor: first rate over the last.
        three_phase: a fall that mirrors the rise, then the annealing.

    Returns:
        Two or three phases, under the rule `"torch"`.

    Raises:
        ValueError: an argument out of range; pct_start * total_steps = 1, for which
            PyTorch divides by zero; three phases with pct_start > .5.

    Example:
        >>> phases = one_cycle_torch(1e-2, 97)
        >>> [f"{phases.at(k)['learning_rate']:.6f}" for k in (0, 28, 96)]
        ['0.000400', '0.010000', '0.000000']

    Source: PyTorch 2.13, `torch/optim/lr_scheduler.py`.
    """
    check_scalar("total_steps", total_steps)
    if total_steps < 2 or int(total_steps) != total_steps:
        raise ValueError(f"total_steps must be an integer >= 2, got {total_steps!r}")
    check_choice("anneal_strategy", anneal_strategy, ("cos", "linear"))
    _positive(
        learning_rate=learning_rate,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
    limit = 0.5 if three_phase else 1.0
    if not 0 < pct_start < 1 or pct_start > limit:
        raise ValueError(f"pct_start must be in (0, {limit:g}), got {pct_start!r}")
    kind = "cosine" if anneal_strategy == "cos" else "linear"
    first = learning_rate / div_factor
    last = first / final_div_factor
    rise = (first, learning_rate, max_momentum, base_momentum)
    if three_phase:
        ends = (
            float(pct_start * total_steps) - 1,
            float(2 * pct_start * total_steps) - 2,
            total_steps - 1.0,
        )
        fall = (learning_rate, first, base_momentum, max_momentum)
        ramps = (rise, fall, (first, last, max_momentum, max_momentum))
    else:
        ends = (float(pct_start * total_steps) - 1, total_steps - 1.0)
        ramps = (rise, (learning_rate, last, base_momentum, max_momentum))
    if 0.0 in ends:
        raise ValueError(
            "pct_start * total_steps = 1 leaves the first phase without a length"
        )
    # In a very short run PyTorch's phase can end before step 0: what counts is when
    # the one behind it began.
    phases, previous, begin = [], 0.0, 0.0
    for end, (lr0, lr1, b0, b1) in zip(ends, ramps, strict=True):
        if end < 0:
            previous = begin = end
            continue
        ramp = {"learning_rate": (lr0, lr1, kind)}
        if cycle_momentum:
            ramp["b1"] = (b0, b1, kind)
        phases.append(Phase(steps=end - previous, **ramp))
        previous = end
    return Phases(tuple(phases), rule="torch", begin=begin)


def cosine_restarts(
    learning_rate: float,
    *,
    cycles: int,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    mult: float = 1.0,
    final_learning_rate: float = 0.0,
    weight_decay: float | Sequence[float] | None = None,
) -> Phases:
    """Cosine annealing with warm restarts: SGDR, or AdamWR with Adam.

    Args:
        learning_rate: at every restart.
        cycles: how many, >= 1.
        steps: length of the first cycle in steps.
        epochs: length of the first cycle in epochs, instead.
        steps_per_epoch: with epochs.
        mult: each cycle is this many times as long as the one before.
        final_learning_rate: what the cosine of each cycle goes to.
        weight_decay: constant, or one for each cycle. AdamWR normalises it by the
            length of the cycle: see the example. None: not driven.

    Returns:
        One phase for each cycle.

    Raises:
        ValueError: an argument out of range, or not as many decays as cycles.

    Example:
        >>> from adamw_jax import normalized_weight_decay
        >>> decays = [normalized_weight_decay(0.025, 128, 50_000, t) for t in (10, 20)]
        >>> print(cosine_restarts(1e-3, cycles=2, epochs=10, steps_per_epoch=391,
        ...                       mult=2, weight_decay=decays))
        steps       learning_rate      weight_decay
        0-3909      0.001 -> 0 cosine  0.0004
        3910-11729  0.001 -> 0 cosine  0.000282843

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017, and
        `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_,
        2019 (AdamWR).
    """
    part = _stretches(steps, epochs, steps_per_epoch)
    _positive(learning_rate=learning_rate, cycles=cycles, mult=mult)
    if int(cycles) != cycles:
        raise ValueError(f"cycles must be an integer, got {cycles!r}")
    decays = weight_decay if isinstance(weight_decay, Sequence) else None
    if decays is not None and len(decays) != cycles:
        raise ValueError(f"{len(decays)} weight decays for {cycles} cycles")
    return Phases(
        tuple(
            Phase(
                **part(mult**i),
                learning_rate=(learning_rate, final_learning_rate, "cosine"),
                weight_decay=weight_decay if decays is None else decays[i],
            )
            for i in range(int(cycles))
        ),
        steps_per_epoch,
    )


def range_test(
    start: float = 1e-5,
    end: float = 10.0,
    *,
    steps: int = 100,
    kind: Literal["exponential", "linear"] = "exponential",
) -> Phases:
    """The learning-rate range test: a rate that grows until the loss diverges.

    Args:
        start: the first rate.
        end: reached behind the last step, as in fastai.
        steps: length of the test.
        kind: of the growth.

    Returns:
        One phase.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> [f"{range_test().at(k)['learning_rate']:.2e}" for k in (0, 50, 99)]
        ['1.00e-05', '1.00e-02', '8.71e+00']

    Source: Smith, `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_, 2017.
    """
    _positive(start=start, end=end, steps=steps)
    check_choice("kind", kind, ("exponential", "linear"))
    return Phases((Phase(steps=steps, learning_rate=(start, end, kind)),))
