"""Which scheduler of PyTorch a state is of, and the ramps of its learning rate."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..schedules.phases import Phase, Phases

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
# What other states have too. Private keys that are in neither, such as _step_count and
# _last_lr, differ between versions and change no rate.
_SHARED_KEYS = {"base_lrs", "last_epoch", "verbose", "use_beta1", "anneal_func"}
_ENDLESS = ["StepLR", "ExponentialLR", "CosineAnnealingLR"]
_ENDLESS += ["CosineAnnealingWarmRestarts"]
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


def find_kind(state: Mapping[str, Any]) -> str:
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
            raise ValueError(f"scheduler_state_dict is that of a {reason}")
    raise ValueError(
        "scheduler_state_dict must be that of a scheduler of PyTorch, got "
        f"{', '.join(map(str, state)) or 'an empty one'}"
    )


def find_endless(state: Mapping[str, Any]) -> str | None:
    """The name of the scheduler that never ends, if there is one."""
    if (kind := find_kind(state)) == "SequentialLR":
        return find_endless(state["_schedulers"][-1])
    return kind if kind in _ENDLESS else None


def check_clock(state: Mapping[str, Any], step: int, ahead: int = 0) -> None:
    """Raises unless the running scheduler of a SequentialLR is at its own step.

    When PyTorch makes a SequentialLR, it steps one within it once more. So the
    milestones of that one come one step early, and those of one within it two.
    """
    milestones = state["_milestones"]
    if sorted(milestones) != list(milestones):
        raise ValueError(f"the milestones must be in order, got {milestones}")
    now = step + ahead
    i = bisect_right(milestones, now)
    running = state["_schedulers"][i]
    if i == 0 and find_kind(running) == "SequentialLR":
        check_clock(running, step, ahead + 1)
        return
    expected = step - max(milestones[i - 1] - ahead, 0) if i else step
    if state["last_epoch"] != now or running["last_epoch"] != expected:
        raise ValueError(
            f"scheduler {i} of the SequentialLR, a {find_kind(running)}, must be at "
            f"step {expected} of its own, got {running['last_epoch']}: it was stepped "
            "by hand, or is nested in a way of older versions of PyTorch"
        )


# ---------------------------------------------------------------------------
# ramps, in steps of the scheduler
# ---------------------------------------------------------------------------


class Ramp(NamedTuple):
    """A phase that only drives the learning rate; the last one may be for ever."""

    steps: float
    value: Any


def iterate_ramps(
    state: Mapping[str, Any], base: float, ahead: int = 0
) -> Iterator[Ramp]:
    """The ramps of any scheduler but OneCycleLR, as long as they go."""
    kind = find_kind(state)
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
                yield Ramp(int(milestone) - begin, base)
                begin = int(milestone)
            base *= float(state["gamma"]) ** milestones[milestone]
        yield Ramp(math.inf, base)
    elif kind == "ConstantLR":
        factor = float(state["factor"])
        if factor == 0:
            raise ValueError("factor must be > 0: PyTorch divides by it at total_iters")
        yield Ramp(_whole(state, "total_iters"), base * factor)
        yield Ramp(math.inf, base)
    elif kind == "LinearLR":
        end = base * float(state["end_factor"])
        ramp = (base * float(state["start_factor"]), end)
        yield Ramp(_whole(state, "total_iters"), ramp)
        yield Ramp(math.inf, end)
    elif kind == "PolynomialLR":
        power = float(state["power"])
        end = base if power == 0 else 0.0
        yield Ramp(_whole(state, "total_iters"), (base, end, "polynomial", power))
        yield Ramp(math.inf, end)
    elif kind == "CosineAnnealingLR":
        low, length = float(state["eta_min"]), _positive(state, "T_max")
        while True:
            yield Ramp(length, (base, low, "cosine"))
            yield Ramp(length, (low, base, "cosine"))
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


def _steps(rate: float, gamma: float, size: int) -> Iterator[Ramp]:
    if size == 1:
        yield from _exponential(rate, gamma)
        return
    while rate and gamma != 1:
        yield Ramp(size, rate)
        rate *= gamma  # as PyTorch does; it underflows to 0
    yield Ramp(math.inf, rate)


def _exponential(rate: float, gamma: float) -> Iterator[Ramp]:
    """As far as the rate is a normal number, or to the last step that phases have."""
    if gamma > 0 and gamma != 1 and rate > 0:
        end = 1e-300 if gamma < 1 else 1e300
        length = int(math.log(end / rate) / math.log(gamma))
        length = max(1, min(length, 2**30))
        yield Ramp(length, (rate, rate * gamma**length, "exponential"))
        rate = 0.0 if gamma < 1 else rate * gamma**length
    elif gamma != 1:
        yield Ramp(1, rate)
        rate *= gamma
    yield Ramp(math.inf, rate)


def _restarts(state: Mapping[str, Any], base: float) -> Iterator[Ramp]:
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
        yield Ramp(length, (base, float(state["eta_min"]), "cosine"))
        length *= int(state["T_mult"])


def _sequential(state: Mapping[str, Any], base: float, ahead: int) -> Iterator[Ramp]:
    """Each scheduler starts again from the base rate at its milestone."""
    begin = 0
    ends = [max(milestone - ahead, 0) for milestone in state["_milestones"]]
    for i, scheduler in enumerate(state["_schedulers"]):
        if i and find_kind(scheduler) == "SequentialLR":
            raise ValueError(
                "a SequentialLR in another must be its first scheduler: PyTorch cannot "
                "start it at a milestone"
            )
        end = ends[i] if i < len(ends) else math.inf
        yield from _cut(iterate_ramps(scheduler, base, ahead + 1), end - begin)
        begin = end


def _cut(ramps: Iterator[Ramp], steps: float) -> Iterator[Ramp]:
    """The ramps of the first steps."""
    for ramp in ramps:
        if steps <= ramp.steps:
            if steps > 0:
                yield from _shorten(ramp, steps)
            return
        yield ramp
        steps -= ramp.steps


def _shorten(ramp: Ramp, steps: float) -> Iterable[Ramp]:
    """The beginning of a ramp; one step at a time, if that is no ramp."""
    if steps == ramp.steps or not isinstance(ramp.value, tuple):
        return [ramp._replace(steps=steps)]
    start, end, *kind = ramp.value
    if not kind:
        return [Ramp(steps, (start, start + (end - start) * (steps / ramp.steps)))]
    if _is_exponential(ramp):
        new_end = start * (end / start) ** (steps / ramp.steps)
        return [Ramp(steps, (start, new_end, *kind))]
    check_count(steps)
    rates = join([ramp]).schedule("learning_rate")(np.arange(steps))
    return [Ramp(1, rate) for rate in rates]


def take(ramps: Iterator[Ramp], steps: float) -> list[Ramp]:
    """The ramps that cover the steps; the last one may go on after them."""
    taken: list[Ramp] = []
    for ramp in ramps:
        check_count(len(taken) + 1)
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


def _is_exponential(ramp: Ramp) -> bool:
    return isinstance(ramp.value, tuple) and "exponential" in ramp.value


def check_count(phases: float) -> None:
    """Raises for more phases than are handled in seconds."""
    if phases > _MOST_PHASES:
        raise ValueError(
            f"the schedule needs more than {_MOST_PHASES} phases: pass a function of "
            "the step to the optimizer"
        )


def join(ramps: list[Ramp]) -> Phases:
    """The phases of the ramps, one after the other."""
    for ramp in ramps[:-1]:
        if ramp.steps % 1:
            raise ValueError(
                "the lengths in a scheduler must be whole, unless the run ends within "
                f"the first: got {ramp.steps!r}"
            )
    return Phases([Phase(steps=r.steps, learning_rate=r.value) for r in ramps])
