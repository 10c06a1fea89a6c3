"""Phases that continue a scheduler of PyTorch, read from its state."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..schedules.cycles import phases_until
from ..schedules.phases import Phase, Phases
from .groups import is_sgd
from .ramps import (
    check_clock,
    check_count,
    find_endless,
    find_kind,
    iterate_ramps,
    join,
    take,
)


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
    kind, done = find_kind(state), int(state["last_epoch"])
    if kind == "SequentialLR":
        check_clock(state, done)
    last = math.inf if steps is None else math.ceil(steps / updates_per_step)
    if done >= last:
        raise ValueError(
            f"steps must be more than the {done * updates_per_step} done, got {steps!r}"
        )
    if last == math.inf and (endless := find_endless(state)):
        raise ValueError(
            "steps, the number of updates in the whole run, must be given, because "
            f"{endless} never ends"
        )

    def read(i):
        if kind == "OneCycleLR":
            phases = _one_cycle(state, param_groups[i])
        else:
            base = _base_rate(state, i, len(param_groups))
            phases = join(take(iterate_ramps(state, base), last))
        _check_rate(kind, phases, param_groups[i], done)
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


def _check_rate(kind: str, phases: Phases, group: Mapping[str, Any], step: int) -> None:
    """Raises if the group does not have the values of the schedule."""
    values = phases.at(step)
    now = {"learning_rate": float(group["lr"])}
    if "b1" in values:
        now["b1"] = float(group["momentum"] if is_sgd(group) else group["betas"][0])
    # PyTorch's chain of products rounds at every step, to float32 if it is a tensor.
    relative = 1e-3 if hasattr(group["lr"], "dtype") else 1e-5
    peak = max(
        max(rate[:2]) if isinstance(rate, tuple) else rate
        for rate in (phase.learning_rate for phase in phases.phases)
    )
    for name, expected in values.items():
        if not math.isclose(now[name], expected, rel_tol=relative, abs_tol=1e-9 * peak):
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
            problem = (
                "the learning rates of the groups have no constant ratio"
                if name == "learning_rate"
                else f"{name} differs between the groups"
            )
            raise ValueError(
                f"{problem} under this {kind}: read the phases of each group, with "
                "group=..., and pass the list to optimizer_from_torch_state_dict"
            )


def _hold(phases: Phases, updates: int, steps: int) -> Phases:
    """Each of the values of the first steps for several updates."""
    values = [phases.schedule(name)(np.arange(steps)) for name in phases.names]
    runs = [
        (list(run), dict(zip(phases.names, row, strict=True)))
        for row, run in itertools.groupby(zip(*values, strict=True))
    ]
    check_count(len(runs))
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
    # Older versions of PyTorch store the function, which has the name of the method.
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
        start, end = (float(group[phase[f"{side}_{key}"]]) for side in ("start", "end"))
        return start, end, kind

    ends, ramps = [], []
    for phase in state["_schedule_phases"]:
        ends.append(float(phase["end_step"]))
        ramps.append({"learning_rate": ramp(phase, "lr")})
        if state["cycle_momentum"]:
            ramps[-1]["b1"] = ramp(phase, "momentum")
        if ends[-1] >= total - 1:
            break
    return phases_until(ends, ramps)
