"""Phases: plain data that drives learning rate, betas and weight decay."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_choice, check_scalar
from .._foreign import PHASE, explain_names

Rule = Literal["fastai", "torch"]
KINDS = ("constant", "linear", "cosine", "exponential", "polynomial")
HYPERPARAMS = ("learning_rate", "b1", "b2", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training and how each hyperparameter changes in it.

    Each hyperparameter is a number, or a tuple `(start, end)`, `(start, end, kind)` or
    `(start, end, "polynomial", power)`. With t the elapsed fraction of the phase:

    =============== =================================================
    `"linear"`      start + (end - start) t; the default of a pair
    `"cosine"`      end + (start - end) (1 + cos(pi t)) / 2
    `"exponential"` start (end / start)^t
    `"polynomial"`  end + (start - end) (1 - t)^power
    `"constant"`    start
    =============== =================================================

    Args:
        steps: duration in steps, which may be fractional. Set either steps or epochs.
        epochs: duration in epochs, which may be fractional.
        learning_rate: >= 0.
        b1: in [0, 1); for SGD, the momentum.
        b2: in [0, 1).
        weight_decay: >= 0.

    Raises:
        TypeError, ValueError: neither or both of steps and epochs are set, or not
            positive; a value is out of range; the kind is unknown; or a tuple has
            another form.

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
            value = to_python(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "a phase needs either steps or epochs, got "
                f"steps={self.steps!r}, epochs={self.epochs!r}"
            )
        unit = "steps" if self.epochs is None else "epochs"
        duration = getattr(self, unit)
        check_scalar(unit, duration)
        if duration == 0:
            raise ValueError(f"{unit} must be > 0, got {duration!r}")
        for name in HYPERPARAMS:
            if getattr(self, name) is not None:
                _check_ramp(name, getattr(self, name))

    def __repr__(self):
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        text = ", ".join(f"{name}={v!r}" for name, v in fields if v is not None)
        return f"Phase({text})"


Phase.__init__ = explain_names(PHASE)(Phase.__init__)


def to_python(name: str, value: Any) -> Any:
    """Converts to Python numbers and tuples of them, which JSON and repr preserve."""
    if isinstance(value, list | tuple):
        return tuple(to_python(name, v) for v in value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is a traced value, but phases are plain data; scale one of their "
            "schedules instead: lambda t: rate * phases.schedule('learning_rate')(t)"
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
    start, end, kind, power = _make_ramp(value)
    check_scalar(f"{name} (start)", start, below=below)
    check_scalar(f"{name} (end)", end, below=below)
    check_choice(f"{name} (kind)", kind, KINDS)
    if len(value) == 4 and kind != "polynomial":
        raise ValueError(f"{name}: only 'polynomial' takes a power, got {value!r}")
    check_scalar(f"{name} (power)", power)
    if kind == "exponential" and (start == 0 or end == 0):
        raise ValueError(f"{name}: exponential cannot start or end at 0, got {value!r}")


class Ramp(NamedTuple):
    """How one hyperparameter changes in one phase."""

    start: float
    end: float
    kind: str
    power: float


def _make_ramp(value: Any) -> Ramp:
    """The ramp of a number or tuple in a phase."""
    if not isinstance(value, tuple):
        return Ramp(float(value), float(value), "constant", 1.0)
    return Ramp(*value, *("linear", 1.0)[len(value) - 2 :])


@dataclasses.dataclass(frozen=True)
class Phases:
    """A list of phases that one step counter drives.

    Steps count from 0: the value at step k is that of the (k+1)-th update. After the
    last phase its end values persist. Pass it to an optimizer as `learning_rate`; it
    then drives every hyperparameter that it sets. It is plain data, which can be
    printed, compared, plotted and saved as JSON.

    Phases that set the learning rate only are also an Optax schedule: they can be
    called, and passed to Optax's optimizers. Others refuse a call, because Optax would
    silently drop what else they drive. There, pass `phases.schedule("learning_rate")`
    as the rate, and the other schedules to `optax.inject_hyperparams`.

    Two rules define where one phase ends and the next begins:

    * `"fastai"`: a phase begins at the first whole step at or after the (fractional)
      sum of the durations before it, and t = k / duration at its k-th step. **Its end
      value is never used**: the next phase begins there.
    * `"torch"`: time is continuous. t counts from the fractional boundary, and a step
      on a boundary has the end value of the phase before it.

    Args:
        phases: at least one; all must set the same hyperparameters.
        steps_per_epoch: needed if a phase is in epochs; may be fractional.
        rule: `"fastai"` or `"torch"`.
        begin: where the first phase begins, in steps; <= 0.

    Raises:
        TypeError, ValueError: there are no phases; they set different hyperparameters
            or none; or epochs come without steps_per_epoch.

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
            object.__setattr__(self, name, to_python(name, getattr(self, name)))
        if not self.phases:
            raise ValueError("phases must hold at least one Phase, got none")
        check_choice("rule", self.rule, ("fastai", "torch"))
        if not -math.inf < self.begin <= 0:
            raise ValueError(f"begin must be finite and <= 0, got {self.begin!r}")
        if self.steps_per_epoch is not None:
            check_scalar("steps_per_epoch", self.steps_per_epoch)
            if self.steps_per_epoch == 0:
                raise ValueError(
                    f"steps_per_epoch must be > 0, got {self.steps_per_epoch!r}"
                )
        elif any(phase.epochs is not None for phase in self.phases):
            raise ValueError("phases in epochs need steps_per_epoch")
        for i, phase in enumerate(self.phases):
            if not isinstance(phase, Phase):
                raise TypeError(f"phases[{i}] must be a Phase, got {phase!r}")
            if (names := _hyperparam_names(phase)) != self.names:
                raise ValueError(
                    f"all phases must set the same hyperparameters: phases[0] sets "
                    f"{self.names}, phases[{i}] {names}"
                )
        if not self.names:
            raise ValueError(f"phases must set at least one of {HYPERPARAMS}")
        if self.boundaries[-1] >= 2**31:
            raise ValueError(
                "phases must end before step 2**31, got "
                f"{self.boundaries[-1]:.3g} steps"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters that the phases set."""
        return _hyperparam_names(self.phases[0])

    @functools.cached_property
    def durations(self) -> tuple[float, ...]:
        """The duration of each phase in steps, possibly fractional."""
        per_epoch = self.steps_per_epoch or math.nan  # is set if a phase is in epochs
        return tuple(
            float(phase.steps)
            if phase.steps is not None
            else (phase.epochs or math.nan) * per_epoch
            for phase in self.phases
        )

    @functools.cached_property
    def boundaries(self) -> tuple[float, ...]:
        """Where each phase begins and the last one ends, in steps."""
        durations = self.durations
        ends = [
            self.begin + math.fsum(durations[: i + 1]) for i in range(len(durations))
        ]
        if self.rule == "fastai":
            # Rounded first, so that 7038.000000000001 does not become 7039.
            *ends, last = [math.ceil(round(end, 6)) for end in ends]
            # A phase has at least one step, because fastai looks for its end after one.
            for i, end in enumerate(ends):
                ends[i] = max(end, ends[i - 1] + 1 if i else 1)
            ends = [min(end, last) for end in ends] + [last]
        return (self.begin, *ends)

    @property
    def total_steps(self) -> int:
        """The number of updates until the last phase ends."""
        return int(self._first_steps[-1])

    @functools.cached_property
    def _first_steps(self) -> np.ndarray:
        """The first whole step of each phase, and the first one after all phases."""
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
            A function of an int32 scalar or array, which runs under `jit`. For a Python
            number it computes in float64 on the host.

        Raises:
            ValueError: the phases do not set this hyperparameter.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from adamw_jax import one_cycle
            >>> lr = one_cycle(3e-3, steps=100).schedule("learning_rate")
            >>> print(f"{jax.jit(lr)(jnp.int32(46)):.6f}")
            0.002985
        """
        check_choice("name", name, self.names)

        def value(step):
            return self._value(name, step, jnp if isinstance(step, jax.Array) else np)

        return value

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step, of phases that set nothing else.

        Args:
            step: as for the schedules of :meth:`schedule`.

        Returns:
            The learning rate.

        Raises:
            TypeError: the phases set another hyperparameter.

        Example:
            >>> import optax
            >>> from adamw_jax import cosine_restarts
            >>> phases = cosine_restarts(1e-3, cycles=1, steps=100)
            >>> tx = optax.adamw(phases)
            >>> print(f"{phases(50):.4f}")
            0.0005
        """
        self.check_called_for("learning_rate")
        return self.schedule("learning_rate")(step)

    def check_called_for(self, name: str) -> None:
        """Raises a TypeError if a call would not give all that the phases drive.

        Args:
            name: the argument for which they were passed as a schedule.
        """
        if not self.names == (name,) == ("learning_rate",):
            way = "the schedule of one of these, phases.schedule(name)"
            if name in self.names:
                way = f"phases.schedule({name!r})"
            raise TypeError(
                f"{name} must be one schedule, got phases that set "
                f"{' and '.join(self.names)}: pass {way}, or the phases as "
                "learning_rate to an optimizer of adamw_jax"
            )

    def _value(self, name: str, step: Any, xp: Any) -> Any:
        tables = self._tables[name]
        kinds = tuple(ramp.kind for ramp in self._ramps[name])
        if xp is np:
            return _interpolate(np, kinds, step, tables)
        return _interpolate_in_jax(kinds, step, tables)

    @functools.cached_property
    def _ramps(self) -> dict[str, list[Ramp]]:
        return {
            name: [_make_ramp(getattr(phase, name)) for phase in self.phases]
            for name in self.names
        }

    @functools.cached_property
    def _tables(self) -> dict[str, dict[str, np.ndarray]]:
        """What :func:`_interpolate` looks up: a number for each phase."""
        begins = np.array(self.boundaries[:-1])
        whole = np.floor(begins)
        common = {
            "first_step": self._first_steps[1:-1],
            "begin": whole.astype(np.int32),
            "begin_fraction": begins - whole,
            "duration": np.array(self.durations),
        }

        def numbers(ramps):
            logs = [
                math.log(ramp.end / ramp.start) if ramp.kind == "exponential" else 0.0
                for ramp in ramps
            ]
            return {
                "start": np.array([float(ramp.start) for ramp in ramps]),
                "end": np.array([float(ramp.end) for ramp in ramps]),
                "power": np.array([float(ramp.power) for ramp in ramps]),
                "log_ratio": np.array(logs),
            }

        return {name: common | numbers(ramps) for name, ramps in self._ramps.items()}

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
        """Reads the text of `to_json`; raises ValueError or TypeError for any other."""
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("phases"), list):
            raise ValueError(f"text must be the JSON of phases, got {text[:80]!r}")
        phases = tuple(Phase(**phase) for phase in data.pop("phases"))
        return cls(phases, **data)

    def __str__(self):
        first = self._first_steps
        rows = [("steps", *self.names)]
        for i, phase in enumerate(self.phases):
            cells = [_format_ramp(getattr(phase, name)) for name in self.names]
            last = first[i + 1] - 1
            steps = f"{first[i]}-{last}" if last >= first[i] else "none"
            rows.append((steps, *cells))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def plot(self, axes: Any = None) -> Any:
        """Plots each hyperparameter that changes over the steps (needs matplotlib).

        Those that are constant are in the title, except where all are: then each has an
        axes.

        Args:
            axes: one matplotlib axes per hyperparameter, or one for each that changes;
                None: those of a new figure.

        Returns:
            The axes.

        Raises:
            ValueError: the number of axes is neither.
        """
        steps = np.arange(self.total_steps)
        values = {name: self._value(name, steps, np) for name in self.names}
        constants = [name for name in self.names if np.ptp(values[name]) == 0]
        names = [name for name in self.names if name not in constants] or self.names
        if axes is None:
            import matplotlib.pyplot as plt

            size = (6, 1 + 1.6 * len(names))
            figure, axes = plt.subplots(
                len(names), sharex=True, squeeze=False, figsize=size
            )
            axes = axes[:, 0]
            figure.set_layout_engine("constrained")
        if len(axes) == len(self.names):
            names = self.names
        elif len(axes) != len(names):
            raise ValueError(
                f"axes must be {len(names)}, one for each of {', '.join(names)}, got "
                f"{len(axes)}"
            )
        for ax, name in zip(axes, names, strict=True):
            ax.plot(steps, values[name])
            ax.set_ylabel(name)
            ax.yaxis.set_major_formatter("{x:g}")
            # no axis runs past what is possible
            low, high = ax.get_ylim()
            one = high if name in ("learning_rate", "weight_decay") else min(high, 1)
            ax.set_ylim(max(low, 0), one)
        if held := [f"{n} {values[n][0]:g}" for n in constants if n not in names]:
            axes[0].set_title(f"constant: {', '.join(held)}", fontsize="medium")
        axes[-1].set_xlabel("step")
        return axes


def _hyperparam_names(phase: Phase) -> tuple[str, ...]:
    """The hyperparameters that a phase sets."""
    return tuple(name for name in HYPERPARAMS if getattr(phase, name) is not None)


def _format_ramp(value: Any) -> str:
    start, end, kind, power = _make_ramp(value)
    if kind == "constant":
        return f"{start:g}"
    suffix = f"^{power:g}" if kind == "polynomial" else ""
    return f"{start:g} -> {end:g} {kind}{suffix}"


def _interpolate(
    xp: Any, kinds: tuple[str, ...], step: Any, tables: dict[str, np.ndarray]
) -> Any:
    """Computes one value per kind of ramp and takes the parameters from tables.

    The size of the program does not grow with the number of phases.
    """
    step = xp.asarray(step)
    first_step = tables["first_step"].reshape((1,) * step.ndim + (-1,))
    index = (step[..., None] >= first_step).sum(-1)
    dtype = float if xp is np else jnp.result_type(float)

    def look_up(name):
        return xp.asarray(tables[name], dtype)[index]

    # Whole steps are subtracted as integers, which is exact far into a run.
    whole_steps = (step - xp.asarray(tables["begin"])[index]).astype(dtype)
    duration = look_up("duration")
    elapsed = xp.clip(whole_steps - look_up("begin_fraction"), 0, duration)
    # Both fractions, because 1 - t loses digits near the end of a long phase.
    t, rest = elapsed / duration, (duration - elapsed) / duration
    start, end = look_up("start"), look_up("end")
    value = start
    for kind in sorted(set(kinds)):
        if kind == "linear":
            new = start * rest + end * t
        elif kind == "cosine":
            half = math.pi / 2
            new = start * xp.sin(half * rest) ** 2 + end * xp.sin(half * t) ** 2
        elif kind == "polynomial":
            fade = rest ** look_up("power")
            new = start * fade + end * (1 - fade)
        elif kind == "exponential":
            new = start * xp.exp(look_up("log_ratio") * t)
        else:
            continue
        value = xp.where(xp.asarray([k == kind for k in kinds])[index], new, value)
    return value


# One program outside of jit, too, where each operation would be a dispatch.
_interpolate_in_jax = jax.jit(
    functools.partial(_interpolate, jnp), static_argnums=0, inline=True
)
