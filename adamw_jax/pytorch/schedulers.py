"""Phases that continue a scheduler of PyTorch, read from its state."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..schedules.cycles import phases_until
from ..schedules.phases import Phase, Phases
from .names import is_sgd

# What a state has beside the base class's values: a state does not name its class.
_OWN_KEYS = {
    "StepLR": {"step_size", "gamma"},
    "MultiStepLR": {"milestones", "gamma"},
    "ConstantLR": {"factor", "total_iters"},
    "LinearLR": {"start_factor", "end_factor", "total_iters"},
    "ExponentialLR": {"gamma"},
    "PolynomialLR": {"total_iters", "power"},
    "CosineAnnealingLR": {"T_max", "eta_min"},
    "CosineAnnealingWarmRestarts": {"T_0", "T_i", "T_mult", "eta_min", "T_cur"},
    "SequentialLR": {"_milestones", "_schedulers"},
    "OneCycleLR": {"total_steps", "_schedule_phases", "cycle_momentum"},
}
# PyTorch 1.0 to 2.13; private ones that are not here change no rate.
_SHARED_KEYS = {"base_lrs", "last_epoch", "verbose", "use_beta1", "anneal_func"}
_ENDLESS = (
    *("StepLR", "ExponentialLR"),
    *("CosineAnnealingLR", "CosineAnnealingWarmRestarts"),
)
# Schedulers that are refused: a key that only they have, and the way out.
_REFUSED = {
    "lr_lambdas": (
        "LambdaLR or MultiplicativeLR, which do not store their functions: pass a "
        "schedule to the optimizer, such as lambda step: base_lr * lr_lambda(step), "
        "with jax.numpy"
    ),
    "num_bad_epochs": (
        "ReduceLROnPlateau, which follows a metric: continue with the learning rate of "
        "the groups, and lower it with override_hyperparams"
    ),
    "max_lrs": (
        "CyclicLR, which may scale its cycles by a function that is not stored: build "
        "its cycles as Phases"
    ),
    "anneal_epochs": "SWALR: build its annealing as Phases",
    "step_size_up": "OneCycleLR in PyTorch before 1.8: use one_cycle_torch",
    "_schedulers": (
        "ChainedScheduler, whose schedulers act on each other: pass the product of "
        "their factors to the optimizer as a schedule"
    ),
}
_MOST_PHASES = 10_000


def phases_from_torch_scheduler(
    scheduler_state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    *,
    group: int | None = None,
    steps: int | None = None,
    updates_per_step: int = 1,
) -> Phases:
    """Reads the :class:`Phases` of a group from the state of a PyTorch scheduler.

    At every step they have the learning rate that PyTorch's scheduler would set, and
    for `OneCycleLR` with `cycle_momentum` its momentum. PyTorch multiplies the rate of
    the step before; phases compute each from its step. The two differ by rounding, in
    100,000 steps by less than 1e-10 of the base rate.

    * `OneCycleLR` with all options, of PyTorch 1.8 and later;
    * `CosineAnnealingLR`, which rises again after `T_max`, and
      `CosineAnnealingWarmRestarts`, stepped without an epoch;
    * `StepLR`, `MultiStepLR`, `ConstantLR`, `LinearLR`, `PolynomialLR` and
      `ExponentialLR`;
    * `SequentialLR` of all but the first, also nested.

    All others are refused by name. A state does not name its class, which is found by
    its keys; then the rate in the group must be the one that the phases have at
    `last_epoch`. A rate that was changed by hand, by another scheduler or by a subclass
    is refused.

    After its total_steps, where PyTorch's `OneCycleLR` raises, and after `steps`, the
    last values persist.

    Args:
        scheduler_state_dict: `scheduler.state_dict()`, or the scheduler. Its
            `last_epoch` is the `step` of :func:`from_torch_state_dict`, if the
            scheduler was stepped once per update.
        param_groups: `optimizer.state_dict()["param_groups"]`, saved with it.
        group: index of the group. None: the first with parameters and a learning rate
            above 0, if the learning rates of the others stay in a constant ratio to it.
            Otherwise :func:`optimizer_from_torch_state_dict` needs the phases of each.
        steps: updates in the whole run, those done included. Needed for a scheduler
            that never ends (`StepLR`, `ExponentialLR` and the two cosines, also as the
            last of a `SequentialLR`).
        updates_per_step: updates for each `scheduler.step()`, for example the number of
            batches of a scheduler that is stepped once per epoch.

    Returns:
        Phases that begin at step 0 and set learning_rate, and b1 if PyTorch cycles it.

    Raises:
        ValueError: the state is that of another scheduler; its rate is not in the
            group; there is no group, and the groups have no constant ratio; a
            `OneCycleLR` is at its end; there are no steps, or too few; or the schedule
            needs more than 10,000 phases.

    Example:
        >>> scheduler = {"T_max": 100, "eta_min": 1e-4, "base_lrs": [0.1, 0.01],
        ...              "last_epoch": 0, "_step_count": 1}
        >>> groups = [{"lr": 0.1, "initial_lr": 0.1}, {"lr": 0.01, "initial_lr": 0.01}]
        >>> print(phases_from_torch_scheduler(scheduler, groups, group=0, steps=100))
        steps  learning_rate
        0-99   0.1 -> 0.0001 cosine
        >>> print(phases_from_torch_scheduler(scheduler, groups, group=1, steps=150))
        steps    learning_rate
        0-99     0.01 -> 0.0001 cosine
        100-199  0.0001 -> 0.01 cosine

    Source: PyTorch 2.13, `torch/optim/lr_scheduler.py`.
    """
    state = _as_state(scheduler_state_dict)
    _check_groups(param_groups)
    for name, value in (("steps", steps), ("updates_per_step", updates_per_step)):
        if value is not None and (int(value) != value or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    kind, done = _kind(state), int(state["last_epoch"])
    if kind == "SequentialLR":
        _check_clock(state, done)
    last = math.inf if steps is None else math.ceil(steps / updates_per_step)
    if done >= last:
        raise ValueError(
            f"steps must be more than the {done * updates_per_step} done, got {steps!r}"
        )
    if last == math.inf and (endless := _endless(state)):
        raise ValueError(
            "steps, the number of updates in the whole run, must be given, because "
            f"{endless} never ends"
        )

    def read(i):
        if kind == "OneCycleLR":
            phases = _one_cycle(state, param_groups[i])
        else:
            base = _base_rate(state, i, len(param_groups))
            phases = _join(_take(_ramps(state, base), last))
        _check_rate(kind, phases.at(done), param_groups[i], done)
        return phases

    if group is None:
        phases = read(first_learning(param_groups))
        for i, other in enumerate(param_groups):
            if len(other.get("params", (0,))):
                _check_ratio(kind, phases, read(i), done)
    elif 0 <= group < len(param_groups):
        phases = read(group)
    else:
        raise ValueError(
            f"group must be in [0, {len(param_groups)}), the number of the groups, got "
            f"{group!r}"
        )
    if updates_per_step == 1:
        return phases
    return _hold(phases, int(updates_per_step), int(min(last, phases.total_steps)))


def first_learning(groups: Sequence[Mapping[str, Any]]) -> int:
    """The index of the first group with parameters and a learning rate above 0."""

    def learns(group):
        rates = (group.get(key) for key in ("lr", "initial_lr", "max_lr"))
        return len(group.get("params", (0,))) and any(
            float(rate) > 0 for rate in rates if rate is not None
        )

    return next((i for i, group in enumerate(groups) if learns(group)), 0)


# ---------------------------------------------------------------------------
# which scheduler it is, and where
# ---------------------------------------------------------------------------


def _as_state(scheduler: Any) -> Mapping[str, Any]:
    if not isinstance(scheduler, Mapping) and hasattr(scheduler, "state_dict"):
        scheduler = scheduler.state_dict()
    if not isinstance(scheduler, Mapping):
        raise ValueError(
            "scheduler_state_dict must be scheduler.state_dict(), got a "
            f"{type(scheduler).__name__}"
        )
    return scheduler


def _check_groups(groups: Any) -> None:
    if (
        not isinstance(groups, Sequence)
        or not groups
        or not all(isinstance(group, Mapping) and "lr" in group for group in groups)
    ):
        raise ValueError(
            "param_groups must be the list optimizer.state_dict()['param_groups'], got "
            f"{'an empty list' if groups == [] else type(groups).__name__}"
        )


def _kind(state: Mapping[str, Any]) -> str:
    """The class of the scheduler that the state is of."""
    private = set().union(*_OWN_KEYS.values())
    own = {
        key
        for key in state
        if key not in _SHARED_KEYS and (key in private or not key.startswith("_"))
    }
    for kind, keys in _OWN_KEYS.items():
        if own == keys and "last_epoch" in state:
            return kind
    for key, reason in _REFUSED.items():
        if key in own:
            raise ValueError(f"the scheduler is not supported, {reason}")
    raise ValueError(
        "scheduler_state_dict must be that of a scheduler of PyTorch, got "
        f"{', '.join(map(str, state)) or 'an empty one'}"
    )


def _endless(state: Mapping[str, Any]) -> str | None:
    """The name of the scheduler that never ends, if there is one."""
    if (kind := _kind(state)) == "SequentialLR":
        return _endless(state["_schedulers"][-1])
    return kind if kind in _ENDLESS else None


def _base_rate(state: Mapping[str, Any], group: int, groups: int) -> float:
    """The learning rate from which the scheduler started in a group."""
    while "_schedulers" in state:
        state = state["_schedulers"][0]
    rates = state["base_lrs"]
    if len(rates) != groups:
        raise ValueError(
            f"param_groups must be the {len(rates)} that the scheduler drives, got "
            f"{groups}"
        )
    return float(rates[group])


def _check_clock(state: Mapping[str, Any], step: int, ahead: int = 0) -> None:
    """Raises unless the running scheduler of a SequentialLR is at its own step.

    PyTorch steps a SequentialLR within another once more, when that is made, so that
    its milestones come one step early, and those within it two.
    """
    milestones = state["_milestones"]
    if sorted(milestones) != list(milestones):
        raise ValueError(f"the milestones must be in order, got {milestones}")
    now = step + ahead
    i = bisect_right(milestones, now)
    running = state["_schedulers"][i]
    if i == 0 and _kind(running) == "SequentialLR":
        _check_clock(running, step, ahead + 1)
        return
    expected = step - max(milestones[i - 1] - ahead, 0) if i else step
    if state["last_epoch"] != now or running["last_epoch"] != expected:
        raise ValueError(
            f"scheduler {i} of the SequentialLR, a {_kind(running)}, must be at step "
            f"{expected} of its own, got {running['last_epoch']}: it was stepped by "
            "hand, or is nested in a way of older versions of PyTorch"
        )


def _check_rate(
    kind: str, values: dict[str, float], group: Mapping[str, Any], step: int
) -> None:
    """Raises if the group does not have the values of the schedule."""
    now = {"learning_rate": float(group["lr"])}
    if "b1" in values:
        now["b1"] = float(group["momentum"] if is_sgd(group) else group["betas"][0])
    # PyTorch's chain of products rounds at every step, to float32 if it is a tensor.
    relative = 1e-3 if hasattr(group["lr"], "dtype") else 1e-5
    scale = max(float(group.get("initial_lr", 0.0)), values["learning_rate"])
    for name, expected in values.items():
        if not math.isclose(
            now[name], expected, rel_tol=relative, abs_tol=1e-9 * scale
        ):
            raise ValueError(
                f"the {name} of the group is {now[name]:g}, but that of {kind} at step "
                f"{step} is {expected:g}: it was changed by hand or by another "
                "scheduler, or was saved at another step; build the schedule yourself"
            )


def _check_ratio(kind: str, phases: Phases, other: Phases, step: int) -> None:
    """Raises unless the rates of two groups stay in one ratio, and b1 is the same."""
    end = max(phases.total_steps, other.total_steps)
    steps = np.linspace(step, end, 257).astype(int)
    for name in phases.names:
        first, second = (p.schedule(name)(steps) for p in (phases, other))
        peaks = first.max(), second.max()
        ratio = peaks[1] / peaks[0] if name == "learning_rate" and peaks[0] else 1.0
        if not np.allclose(second, ratio * first, rtol=1e-9, atol=1e-12 * peaks[1]):
            raise ValueError(
                f"the {name} of one group does not give those of the others under this "
                f"{kind}: read the phases of each group with group=..., and pass the "
                "list to optimizer_from_torch_state_dict"
            )


# ---------------------------------------------------------------------------
# ramps, in steps of the scheduler
# ---------------------------------------------------------------------------


class _Ramp(NamedTuple):
    """A phase that only drives the learning rate; the last one may be for ever."""

    steps: float
    value: Any


def _ramps(state: Mapping[str, Any], base: float, ahead: int = 0) -> Iterator[_Ramp]:
    """The ramps of any scheduler but OneCycleLR, as long as they go."""
    kind = _kind(state)
    if kind == "SequentialLR":
        yield from _sequential(state, base, ahead)
    elif kind == "StepLR":
        yield from _steps(base, float(state["gamma"]), _whole(state, "step_size"))
    elif kind == "ExponentialLR":
        yield from _exponential(base, float(state["gamma"]))
    elif kind == "MultiStepLR":
        begin = 0
        milestones = state["milestones"]  # how often by step, since PyTorch 1.0
        for milestone in sorted(milestones, key=int):
            if int(milestone) > begin:
                yield _Ramp(int(milestone) - begin, base)
                begin = int(milestone)
            base *= float(state["gamma"]) ** milestones[milestone]
        yield _Ramp(math.inf, base)
    elif kind == "ConstantLR":
        factor = float(state["factor"])
        if factor == 0:
            raise ValueError("factor must be > 0: PyTorch divides by it at total_iters")
        yield _Ramp(_whole(state, "total_iters"), base * factor)
        yield _Ramp(math.inf, base)
    elif kind == "LinearLR":
        end = base * float(state["end_factor"])
        ramp = (base * float(state["start_factor"]), end)
        yield _Ramp(_whole(state, "total_iters"), ramp)
        yield _Ramp(math.inf, end)
    elif kind == "PolynomialLR":
        power = float(state["power"])
        end = base if power == 0 else 0.0
        yield _Ramp(_whole(state, "total_iters"), (base, end, "polynomial", power))
        yield _Ramp(math.inf, end)
    elif kind == "CosineAnnealingLR":
        low, length = float(state["eta_min"]), _positive(state, "T_max")
        for _ in itertools.count():
            yield _Ramp(length, (base, low, "cosine"))
            yield _Ramp(length, (low, base, "cosine"))
    elif kind == "CosineAnnealingWarmRestarts":
        yield from _restarts(state, base)
    else:
        raise ValueError(f"{kind} in a SequentialLR is not supported")


def _positive(state: Mapping[str, Any], key: str) -> float:
    value = float(state[key])
    if not 0 < value < math.inf:
        raise ValueError(f"{key} of the scheduler must be > 0, got {state[key]!r}")
    return value


def _whole(state: Mapping[str, Any], key: str) -> int:
    value = _positive(state, key)
    if value % 1:
        raise ValueError(f"{key} of the scheduler must be whole, got {state[key]!r}")
    return int(value)


def _steps(rate: float, gamma: float, size: int) -> Iterator[_Ramp]:
    if size == 1:
        yield from _exponential(rate, gamma)
        return
    while rate and gamma != 1:
        yield _Ramp(size, rate)
        rate *= gamma  # as PyTorch does; it underflows to 0
    yield _Ramp(math.inf, rate)


def _exponential(rate: float, gamma: float) -> Iterator[_Ramp]:
    """As far as the rate is a normal number, or to the last step that phases have."""
    if gamma > 0 and gamma != 1 and rate > 0:
        end = 1e-300 if gamma < 1 else 1e300
        length = int(math.log(end / rate) / math.log(gamma))
        length = max(1, min(length, 2**30))
        yield _Ramp(length, (rate, rate * gamma**length, "exponential"))
        rate = 0.0 if gamma < 1 else rate * gamma**length
    elif gamma != 1:
        yield _Ramp(1, rate)
        rate *= gamma
    yield _Ramp(math.inf, rate)


def _restarts(state: Mapping[str, Any], base: float) -> Iterator[_Ramp]:
    if state["T_cur"] % 1 or (
        isinstance(state["T_cur"], float) and state["T_mult"] == 1
    ):
        raise ValueError(
            "CosineAnnealingWarmRestarts was stepped by fractions of an epoch "
            f"(T_cur={state['T_cur']!r}): use cosine_restarts with epochs and "
            "steps_per_epoch"
        )
    length = _whole(state, "T_0")
    while True:
        yield _Ramp(length, (base, float(state["eta_min"]), "cosine"))
        length *= int(state["T_mult"])


def _sequential(state: Mapping[str, Any], base: float, ahead: int) -> Iterator[_Ramp]:
    """Each scheduler starts again from the base rate at its milestone."""
    begin = 0
    ends = [max(milestone - ahead, 0) for milestone in state["_milestones"]]
    for i, scheduler in enumerate(state["_schedulers"]):
        if i and _kind(scheduler) == "SequentialLR":
            raise ValueError(
                "a SequentialLR in another must be its first scheduler: PyTorch cannot "
                "start it at a milestone"
            )
        end = ends[i] if i < len(ends) else math.inf
        yield from _cut(_ramps(scheduler, base, ahead + 1), end - begin)
        begin = end


def _cut(ramps: Iterator[_Ramp], steps: float) -> Iterator[_Ramp]:
    """The ramps of the first steps."""
    for ramp in ramps:
        if steps <= ramp.steps:
            if steps > 0:
                yield from _shorten(ramp, steps)
            return
        yield ramp
        steps -= ramp.steps


def _shorten(ramp: _Ramp, steps: float) -> Iterable[_Ramp]:
    """The beginning of a ramp; one step at a time, if that is no ramp."""
    if steps == ramp.steps or not isinstance(ramp.value, tuple):
        return [ramp._replace(steps=steps)]
    start, end, *kind = ramp.value
    if not kind:
        return [_Ramp(steps, (start, start + (end - start) * (steps / ramp.steps)))]
    if _is_exponential(ramp):
        new_end = start * (end / start) ** (steps / ramp.steps)
        return [_Ramp(steps, (start, new_end, *kind))]
    _check_count(steps)
    rates = _join([ramp]).schedule("learning_rate")(np.arange(steps))
    return [_Ramp(1, rate) for rate in rates]


def _take(ramps: Iterator[_Ramp], steps: float) -> list[_Ramp]:
    """The ramps that cover the steps; the last one may go on after them."""
    taken: list[_Ramp] = []
    for ramp in ramps:
        _check_count(len(taken) + 1)
        if ramp.steps == math.inf:
            taken.append(ramp._replace(steps=1 if steps == math.inf else steps))
            break
        if ramp.steps > steps and _is_exponential(ramp):
            (ramp,) = _shorten(ramp, steps)
        taken.append(ramp)
        steps -= ramp.steps
        if steps <= 0:
            break
    return taken


def _is_exponential(ramp: _Ramp) -> bool:
    return isinstance(ramp.value, tuple) and "exponential" in ramp.value


def _check_count(phases: float) -> None:
    if phases > _MOST_PHASES:
        raise ValueError(
            f"the schedule needs more than {_MOST_PHASES} phases: pass a function of "
            "the step to the optimizer"
        )


def _join(ramps: list[_Ramp]) -> Phases:
    for ramp in ramps[:-1]:
        if ramp.steps % 1:
            raise ValueError(
                "the lengths in a scheduler must be whole, unless the run ends within "
                f"the first: got {ramp.steps!r}"
            )
    return Phases([Phase(steps=r.steps, learning_rate=r.value) for r in ramps])


def _hold(phases: Phases, updates: int, steps: int) -> Phases:
    """Each of the values of the first steps for several updates."""
    values = [phases.schedule(name)(np.arange(steps)) for name in phases.names]
    runs = [
        (list(run), dict(zip(phases.names, row, strict=True)))
        for row, run in itertools.groupby(zip(*values, strict=True))
    ]
    _check_count(len(runs))
    return Phases([Phase(steps=updates * len(run), **row) for run, row in runs])


def _one_cycle(state: Mapping[str, Any], group: Mapping[str, Any]) -> Phases:
    """The rates and momenta are in the group, under names that the state has."""
    total = int(state["total_steps"])
    if state["last_epoch"] >= total:
        raise ValueError(
            f"the OneCycleLR has done its {total} steps, after which PyTorch's raises: "
            "give the optimizer another learning rate"
        )
    if "max_lr" not in group:
        raise ValueError(
            "param_groups must be those that the OneCycleLR drives, which have max_lr, "
            f"got {', '.join(map(str, group))}"
        )
    # Up to PyTorch 2.2 a function, which has the name of the method.
    anneal = state.get("_anneal_func_type") or getattr(
        state.get("anneal_func"), "__name__", ""
    ).removeprefix("_annealing_")
    if anneal not in ("cos", "linear"):
        raise ValueError(
            "the OneCycleLR does not say how it anneals: set scheduler_state_dict["
            "'_anneal_func_type'] to 'cos' or 'linear'"
        )
    kind = "cosine" if anneal == "cos" else "linear"

    def ramp(phase, key):
        return *(
            float(group[phase[f"{side}_{key}"]]) for side in ("start", "end")
        ), kind

    ends, ramps = [], []
    for phase in state["_schedule_phases"]:
        ends.append(float(phase["end_step"]))
        ramps.append({"learning_rate": ramp(phase, "lr")})
        if state["cycle_momentum"]:
            ramps[-1]["b1"] = ramp(phase, "momentum")
        if ends[-1] >= total - 1:
            break
    return phases_until(ends, ramps)
