"""The optimizer that goes on where PyTorch's stopped: what becomes of its groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from .._tree import ScalarOrSchedule, path_string
from ..fused.adamw import adamw
from ..masks import mask_by
from ..optimizers import adam, amsgrad, sgd
from ..schedules.cycles import one_cycle_torch
from ..schedules.phases import Phases
from ..transforms.bias_correction import BiasCorrection
from ..transforms.chain import chain
from ..transforms.groups import freeze_leaves, scale_by_group
from .names import (
    Layout,
    Parameter,
    Problems,
    Rename,
    betas_of,
    flax_layout,
    is_sgd,
    leaf_paths,
    rate_ratio,
    to_count,
    torch_parameters,
)
from .state import from_torch_state_dict


def optimizer_from_torch_state_dict(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    *,
    learning_rate: ScalarOrSchedule | Phases | None = None,
    decoupled: bool | None = None,
    bias_correction: BiasCorrection = "torch",
    names: Sequence[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    step: int | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    r"""The optimizer that goes on where PyTorch's Adam, AdamW, AMSGrad or SGD stopped.

    What parameter groups become:

    =====================================  =============================================
    the same options                       one :func:`adam`, :func:`adamw`, ...
    another `lr`                           the learning rate is that of the first group,
                                           :func:`scale_by_group` has the ratio
    `weight_decay=0` in some               the optimizer's `mask`
    other `betas`, `eps`, ..., two decays  `optax.partition`, an optimizer for each
    other step counts                      the same, so that each keeps its own count
    parameters in no group                 :func:`freeze_leaves`
    =====================================  =============================================

    A parameter of a group that never had a gradient begins with its first one here. If
    it had none because it is not to be trained, build the optimizer yourself, with
    :func:`freeze_leaves`, and fill its state with :func:`from_torch_state_dict`.

    `foreach`, `fused`, `capturable` and `differentiable` are ways to compute the same
    update, and have no meaning here. `dampening` is possible if it equals the momentum
    and all buffers are there: `sgd(dampened=True)`.

    Args:
        state_dict: `optimizer.state_dict()`.
        params: the tree to be trained.
        learning_rate: that of the first group from here on: a number, a schedule of
            the step, or :class:`Phases`, which then also drive b1 (and are taken to
            have driven it so far), b2 and the decay if they set them; as
            :func:`phases_from_torch_scheduler` returns. None: goes on with the group's,
            unless a scheduler drove that.
        decoupled: AdamW, not Adam with L2. None: the groups say so, but
            not those that older versions of PyTorch have written.
        bias_correction: `"torch"` goes on as PyTorch would. See
            :func:`from_torch_state_dict` for `"exact"`.
        names: see :func:`from_torch_state_dict`, also for the following.
        rename: see there.
        layout: see there.
        step: see there.

    Returns:
        The transformation and its state.

    Raises:
        ValueError: as :func:`from_torch_state_dict`; a scheduler drove the groups and
            no learning rate was given; groups of another optimizer; dampening.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False,
        ...          "weight_decay": 0.01, "decoupled_weight_decay": True,
        ...          "maximize": False, "params": [0]}
        >>> moments = {"step": 7.0, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
        >>> checkpoint = {"state": {0: moments}, "param_groups": [group]}
        >>> params = {"scale": jnp.ones(2)}
        >>> tx, state = optimizer_from_torch_state_dict(
        ...     checkpoint, params, names=["scale"])
        >>> updates, state = tx.update({"scale": jnp.ones(2)}, state, params)
        >>> print(f"{updates['scale'][0]:.6f}")
        -0.000167
    """
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems)
    problems.raise_if_any()
    groups = [group for group in state_dict["param_groups"] if len(group["params"])]
    if not groups:
        raise ValueError("state_dict has no parameters in its groups")
    driven = _driven(learning_rate, groups)

    # One optimizer for the leaves that differ in rate and in zero decay only.
    kinds: dict[str, tuple] = {
        path: (
            _options(there.group, decoupled, "b1" in driven),
            to_count(path, there.state.get("step", 0), problems),
        )
        for path, there in table.items()
    }
    problems.raise_if_any()
    decays = {path: float(there.group["weight_decay"]) for path, there in table.items()}
    for kind in set(kinds.values()):
        mine = [path for path in table if kinds[path] == kind]
        if len({decays[path] for path in mine} - {0.0}) > 1:
            if "weight_decay" in driven:
                raise ValueError(
                    "learning_rate drives weight_decay, but the groups have several"
                )
            for path in mine:
                kinds[path] = (*kind, decays[path])
    labels = {kind: str(i) for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    by_label, rates = {}, {}
    for kind, label in labels.items():
        mine = [path for path in table if kinds[path] == kind]
        first = next(g for g in groups if any(table[p].group is g for p in mine))
        relative = rate_ratio(first, groups[0])
        values = dict(driven)
        if learning_rate is None:
            values["learning_rate"] = float(first["lr"])
        elif relative != 1:
            values["learning_rate"] = _scaled(driven["learning_rate"], relative)
        if kind[0][0] == "sgd" and kind[0][3]:  # dampened
            _check_buffers(table, mine)
        by_label[label] = _build(
            kind[0],
            values,
            max(decays[path] for path in mine),
            {path for path in mine if decays[path] > 0},
            len(mine),
            bias_correction,
        )
        for path in mine:
            rates[path] = rate_ratio(table[path].group, first)

    def by_path(values):
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: values[path_string(path)], tree
        )

    tx = optax.with_extra_args_support(next(iter(by_label.values())))
    if len(by_label) > 1:
        tx = optax.partition(
            by_label, by_path({path: labels[kind] for path, kind in kinds.items()})
        )
    if set(rates.values()) != {1.0}:
        tx = chain(
            tx,
            scale_by_group(
                {repr(rate): rate for rate in set(rates.values())},
                by_path({path: repr(rate) for path, rate in rates.items()}),
            ),
        )
    if set(table) != leaf_paths(params):
        tx = freeze_leaves(tx, mask_by(lambda path, _: path not in table))
    state = from_torch_state_dict(
        state_dict,
        tx.init(params),
        params,
        names=names,
        rename=rename,
        layout=layout,
        step=step,
        b1=driven.get("b1"),
        b2=driven.get("b2"),
    )
    return tx, state


def phases_from_torch_scheduler(
    scheduler_state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
) -> Phases:
    """The :class:`Phases` of a `OneCycleLR` in a checkpoint, for its first group.

    Other schedulers keep functions or too little of themselves in their state: build
    their schedule here as it was built there.

    Args:
        scheduler_state_dict: `scheduler.state_dict()`. Its `last_epoch` is the `step`
            of :func:`from_torch_state_dict`, if the scheduler was stepped once for
            each update.
        param_groups: `optimizer.state_dict()["param_groups"]`, where the scheduler
            keeps its rates and momenta.

    Returns:
        What :func:`one_cycle_torch` returns.

    Raises:
        ValueError: the state of another scheduler.

    Example:
        >>> scheduler = {"total_steps": 97, "_anneal_func_type": "cos",
        ...              "cycle_momentum": True,
        ...              "_schedule_phases": [{"end_step": 28.1}, {"end_step": 96}]}
        >>> group = {"initial_lr": 4e-4, "max_lr": 1e-2, "min_lr": 4e-8,
        ...          "max_momentum": 0.95, "base_momentum": 0.85}
        >>> phases = phases_from_torch_scheduler(scheduler, [group])
        >>> [f"{phases.at(k)['learning_rate']:.6f}" for k in (0, 28, 96)]
        ['0.000400', '0.010000', '0.000000']
    """
    group, torch_phases = param_groups[0], scheduler_state_dict.get("_schedule_phases")
    if torch_phases is None or "max_lr" not in group:
        raise ValueError(
            "scheduler_state_dict must be that of a OneCycleLR, and param_groups those "
            f"it drives; it has {', '.join(map(str, scheduler_state_dict))}"
        )
    total = scheduler_state_dict["total_steps"]
    cycled = scheduler_state_dict["cycle_momentum"]
    momenta = ("base_momentum", "max_momentum") if cycled else ()
    rates = {name: float(group[name]) for name in ("initial_lr", "max_lr", "min_lr")}
    return one_cycle_torch(
        rates["max_lr"],
        total,
        pct_start=(torch_phases[0]["end_step"] + 1) / total,
        anneal_strategy=scheduler_state_dict["_anneal_func_type"],
        cycle_momentum=cycled,
        div_factor=rates["max_lr"] / rates["initial_lr"],
        final_div_factor=rates["initial_lr"] / rates["min_lr"],
        three_phase=len(torch_phases) == 3,
        **{name: float(group[name]) for name in momenta},
    )


# ---------------------------------------------------------------------------
# the optimizer of a group
# ---------------------------------------------------------------------------


def _driven(learning_rate: Any, groups: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the caller drives, each as a number or a schedule."""
    if learning_rate is None:
        if any("initial_lr" in group for group in groups):
            raise ValueError(
                "learning_rate must be given: a scheduler drove this optimizer (its "
                "groups have initial_lr). See phases_from_torch_scheduler"
            )
        return {}
    if not isinstance(learning_rate, Phases):
        return {"learning_rate": learning_rate}
    driven = {name: learning_rate.schedule(name) for name in learning_rate.names}
    if "learning_rate" not in driven:
        raise ValueError("learning_rate was given phases that do not set it")
    momenta = {
        float(group["momentum"]) if is_sgd(group) else betas_of(group)[0]
        for group in groups
    }
    if "b1" in driven and len(momenta) > 1:
        raise ValueError(
            f"learning_rate drives b1, which differs between the groups: {momenta}"
        )
    return driven


def _scaled(value: Any, factor: float) -> Any:
    return (lambda step: factor * value(step)) if callable(value) else factor * value


def _options(
    group: Mapping[str, Any], decoupled: bool | None, b1_driven: bool
) -> tuple:
    """What one optimizer has one of, beside rate and decay."""
    maximize = bool(group.get("maximize", False))
    if is_sgd(group):
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if dampening and momentum and (dampening != momentum or b1_driven):
            raise ValueError(
                f"dampening={dampening} with momentum={momentum}: only dampening equal "
                "to a constant momentum can go on here (sgd(dampened=True))"
            )
        dampened = bool(dampening and momentum)
        return ("sgd", momentum, bool(group["nesterov"]), dampened, maximize)
    if decoupled is None:
        decoupled = group.get("decoupled_weight_decay")
        if decoupled is None and float(group["weight_decay"]):
            raise ValueError(
                "decoupled must be given: the groups do not say whether they are of "
                "Adam or AdamW (older versions of PyTorch did not write it)"
            )
    kind, eps = "adamw" if decoupled else "adam", float(group["eps"])
    return (kind, betas_of(group), eps, bool(group["amsgrad"]), maximize)


def _build(
    options: tuple,
    driven: dict[str, Any],
    decay: float,
    decayed: set[str],
    leaves: int,
    bias_correction: BiasCorrection,
) -> optax.GradientTransformationExtraArgs:
    mask = None
    if len(decayed) < leaves and (decayed or "weight_decay" in driven):
        mask = mask_by(lambda path, _: path in decayed)
    kind, momenta, *_, maximize = options
    rate, decay = driven["learning_rate"], driven.get("weight_decay", decay)
    if kind == "sgd":
        momentum = driven.get("b1", momenta or None)
        return sgd(
            rate,
            momentum,
            nesterov=options[2],
            dampened=options[3],
            l2=decay,
            mask=mask,
            maximize=maximize,
        )
    b1, b2 = driven.get("b1", momenta[0]), driven.get("b2", momenta[1])
    common: dict[str, Any] = {
        "b1": b1,
        "b2": b2,
        "eps": options[2],
        "mask": mask,
        "maximize": maximize,
        "bias_correction": bias_correction,
    }
    if options[3]:
        name = "weight_decay" if kind == "adamw" else "l2"
        return amsgrad(rate, **{name: decay}, **common)
    if kind == "adamw":
        return adamw(rate, weight_decay=decay, **common)
    return adam(rate, l2=decay, **common)


def _check_buffers(table: dict[str, Parameter], paths: list[str]) -> None:
    """PyTorch does not dampen the first gradient, which starts a buffer."""
    for path in paths:
        if table[path].state.get("momentum_buffer") is None:
            raise ValueError(f"dampening: leaf {path} has no momentum_buffer yet")
