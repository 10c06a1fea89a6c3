"""Optimizers and phases that continue from a PyTorch checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from .._checks import is_static
from .._tree import ScalarOrSchedule, is_none, path_string
from ..fused.adamw import adamw
from ..hyperparams import with_hyperparams
from ..masks import mask_by
from ..optimizers import adam, amsgrad, sgd
from ..schedules.cycles import one_cycle_torch
from ..schedules.phases import Phases
from ..transforms.bias_correction import BiasCorrection
from ..transforms.chain import chain
from ..transforms.decay import add_l2_gradient
from ..transforms.groups import freeze_leaves, scale_by_group
from ..transforms.scaling import scale_by_learning_rate
from .eight_bit import decode_bitsandbytes
from .names import (
    Layout,
    Parameter,
    Problems,
    Rename,
    flax_layout,
    get_betas,
    is_sgd,
    leaf_paths,
    rate_ratio,
    step_count,
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
    r"""Builds the optimizer that continues PyTorch's Adam, AdamW, AMSGrad or SGD.

    Parameter groups translate as follows:

    ========================================  ==========================================
    groups with equal options                 one :func:`adam`, :func:`adamw`, ...
    different `lr`                            the learning rate of the first group, with
                                              the ratios in :func:`scale_by_group`
    `weight_decay=0` in some groups           the optimizer's `mask`
    different `betas`, ..., nonzero decays    `optax.partition`, one optimizer for each
    nonzero decays, SGD without momentum      one optimizer, with the ratios of the
                                              decays to that of the first group
    different step counts                     likewise, so that each keeps its own count
    parameters in no group                    :func:`freeze_leaves`
    ========================================  ==========================================

    A parameter in a group that never had a gradient starts with its first one. If it
    had none because it should stay frozen, build the optimizer yourself, with
    :func:`freeze_leaves`, and fill its state with :func:`from_torch_state_dict`.

    The ratio of the learning rates is that of the checkpoint, and stays. Groups whose
    scheduler has not kept it (`eta_min` above 0, a function for each group: lr /
    initial_lr differs) are refused. A checkpoint from the first step of such a
    scheduler does not show it.

    `foreach`, `fused`, `capturable` and `differentiable` select implementations of the
    same update and are ignored. `dampening` is supported if it equals the momentum and
    all buffers exist: `sgd(dampened=True)`.

    Args:
        state_dict: `optimizer.state_dict()`, also of bitsandbytes' Adam and AdamW, both
            of which decouple the decay.
        params: the parameters to train.
        learning_rate: the learning rate of the first group from now on: a number, a
            schedule of the step, or :class:`Phases`, such as
            :func:`phases_from_torch_scheduler` returns. Phases also drive b1, b2 and
            the decay if they set them, and are assumed to have driven b1 so far. None:
            the learning rate of the group, unless a scheduler drove it.
        decoupled: True for AdamW, False for Adam with L2. None: read from the groups,
            in which older versions of PyTorch did not store it.
        bias_correction: `"torch"` continues exactly as PyTorch would. For `"exact"` see
            :func:`from_torch_state_dict`.
        names: PyTorch's parameter names in the order of the groups; None: read from the
            dict. This and the following are described at :func:`from_torch_state_dict`.
        rename: from PyTorch's names to paths, as a function or a dict.
        layout: converts arrays; the default knows Flax's kernels.
        step: number of updates done; None: the highest count of PyTorch. SGD needs it.

    Returns:
        The transformation and its state.

    Raises:
        ValueError: as for :func:`from_torch_state_dict`; or a scheduler drove the
            groups and there is no learning_rate, or has changed the ratio of their
            learning rates; or the dampening is not supported.

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
    state_dict = decode_bitsandbytes(state_dict)
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems)
    problems.raise_if_any()
    groups = [group for group in state_dict["param_groups"] if len(group["params"])]
    if not groups:
        raise ValueError("state_dict must have parameters in its groups, got none")
    scheduled = _hyperparams_from(learning_rate, groups)

    # Leaves that differ only in learning rate, or in whether they decay, share one.
    kinds = {
        path: _Kind(
            _make_options(parameter.group, decoupled, "b1" in scheduled),
            step_count(path, parameter, problems),
        )
        for path, parameter in table.items()
    }
    problems.raise_if_any()
    decays = {
        path: float(parameter.group["weight_decay"])
        for path, parameter in table.items()
    }
    for kind in set(kinds.values()):
        paths = [path for path in table if kinds[path] == kind]
        if len({decays[path] for path in paths} - {0.0}) > 1:
            if "weight_decay" in scheduled:
                raise ValueError(
                    "learning_rate must be phases without weight_decay, which differs "
                    "between the groups"
                )
            if _has_no_momentum(kind.options, scheduled):
                continue
            for path in paths:
                kinds[path] = kind._replace(weight_decay=decays[path])
    labels = {kind: str(i) for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    by_label, rates = {}, {}
    for kind, label in labels.items():
        paths = [path for path in table if kinds[path] == kind]
        first = next(g for g in groups if any(table[p].group is g for p in paths))
        ratio = rate_ratio(first, groups[0])
        values = dict(scheduled)
        if learning_rate is None:
            values["learning_rate"] = float(first["lr"])
        elif ratio != 1:
            values["learning_rate"] = _scale(scheduled["learning_rate"], ratio)
        if isinstance(kind.options, _SgdOptions) and kind.options.dampened:
            _check_buffers(table, paths)
        by_label[label] = _build(
            kind.options,
            values,
            {path: decays[path] for path in paths},
            bias_correction,
        )
        for path in paths:
            rates[path] = rate_ratio(table[path].group, first)

    def by_path(values):
        # Also for a None gradient, whose parameter has a label.
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: values.get(path_string(path)), tree, is_leaf=is_none
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
        b1=scheduled.get("b1"),
        b2=scheduled.get("b2"),
    )
    return tx, state


def phases_from_torch_scheduler(
    scheduler_state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
) -> Phases:
    """Reads the :class:`Phases` of the first group from the state of a `OneCycleLR`.

    Other schedulers store functions, or not enough to rebuild their schedule: build it
    yourself.

    Args:
        scheduler_state_dict: `scheduler.state_dict()`. Its `last_epoch` is the `step`
            of :func:`from_torch_state_dict`, if the scheduler was stepped once per
            update.
        param_groups: `optimizer.state_dict()["param_groups"]`, where the scheduler
            stores its rates and momenta.

    Returns:
        The phases of :func:`one_cycle_torch`.

    Raises:
        ValueError: the state is that of another scheduler.

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
            f"that it drives, got {', '.join(map(str, scheduler_state_dict))}"
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
# the optimizer of a kind of groups
# ---------------------------------------------------------------------------


class _AdamOptions(NamedTuple):
    """Options of PyTorch's Adam or AdamW that all leaves of one optimizer share."""

    decoupled: bool
    b1: float
    b2: float
    eps: float
    amsgrad: bool
    maximize: bool


class _SgdOptions(NamedTuple):
    """Options of PyTorch's SGD that all leaves of one optimizer share."""

    momentum: float
    nesterov: bool
    dampened: bool
    maximize: bool


class _Kind(NamedTuple):
    """Leaves of the same kind are trained by one optimizer."""

    options: _AdamOptions | _SgdOptions
    count: int
    weight_decay: float | None = None  # set if leaves with these options differ in it


def _hyperparams_from(
    learning_rate: Any, groups: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """The hyperparameters that the argument sets, each a number or a schedule."""
    if learning_rate is None:
        if any("initial_lr" in group for group in groups):
            raise ValueError(
                "learning_rate must be given, because a scheduler drove this optimizer "
                "(its groups have initial_lr); see phases_from_torch_scheduler"
            )
        return {}
    if not isinstance(learning_rate, Phases):
        return {"learning_rate": learning_rate}
    schedules = {name: learning_rate.schedule(name) for name in learning_rate.names}
    if "learning_rate" not in schedules:
        raise ValueError(
            "learning_rate was set to phases that do not set it; they set "
            f"{', '.join(learning_rate.names)}"
        )
    momenta = {
        float(group["momentum"]) if is_sgd(group) else get_betas(group)[0]
        for group in groups
    }
    if "b1" in schedules and len(momenta) > 1:
        raise ValueError(
            "learning_rate must be phases without b1, which differs between the "
            f"groups: {', '.join(map(str, sorted(momenta)))}"
        )
    return schedules


def _scale(value: Any, factor: float) -> Any:
    return (lambda step: factor * value(step)) if callable(value) else factor * value


def _make_options(
    group: Mapping[str, Any], decoupled: bool | None, drives_b1: bool
) -> _AdamOptions | _SgdOptions:
    maximize = bool(group.get("maximize", False))
    if is_sgd(group):
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if dampening and momentum and (dampening != momentum or drives_b1):
            raise ValueError(
                "dampening must be 0 or equal to a constant momentum "
                f"(sgd(dampened=True)), got dampening={dampening} with "
                f"momentum={momentum}"
            )
        return _SgdOptions(
            momentum,
            nesterov=bool(group["nesterov"]),
            dampened=bool(dampening and momentum),
            maximize=maximize,
        )
    if decoupled is None:
        decoupled = group.get("decoupled_weight_decay")
        if decoupled is None and float(group["weight_decay"]):
            raise ValueError(
                "decoupled must be given, because older versions of PyTorch did not "
                "store whether groups are of Adam or AdamW"
            )
    b1, b2 = get_betas(group)
    return _AdamOptions(
        bool(decoupled), b1, b2, float(group["eps"]), bool(group["amsgrad"]), maximize
    )


def _build(
    options: _AdamOptions | _SgdOptions,
    values: dict[str, Any],
    decays: dict[str, float],
    bias_correction: BiasCorrection,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one kind of leaves; `values` take precedence over options.

    `decays` has the decay of each leaf, by path.
    """
    learning_rate, mask = values["learning_rate"], None
    nonzero = {decay for decay in decays.values() if decay}
    if len(nonzero) > 1:
        return _sgd_with_decays(learning_rate, decays, options.maximize)
    if 0.0 in decays.values() and (nonzero or "weight_decay" in values):
        mask = mask_by(lambda path, _: decays[path] > 0)
    decay = values.get("weight_decay", max(nonzero, default=0.0))
    l2 = None if is_static(decay) and decay == 0 else decay  # no link for no decay
    if isinstance(options, _SgdOptions):
        return sgd(
            learning_rate,
            values.get("b1", options.momentum or None),
            nesterov=options.nesterov,
            dampened=options.dampened,
            l2=l2,
            mask=mask,
            maximize=options.maximize,
        )
    common: dict[str, Any] = {
        "b1": values.get("b1", options.b1),
        "b2": values.get("b2", options.b2),
        "eps": options.eps,
        "mask": mask,
        "maximize": options.maximize,
        "bias_correction": bias_correction,
    }
    if options.amsgrad:
        common["weight_decay" if options.decoupled else "l2"] = l2
        return amsgrad(learning_rate, **common)
    if options.decoupled:
        return adamw(learning_rate, weight_decay=decay, **common)
    return adam(learning_rate, l2=l2, **common)


def _has_no_momentum(
    options: _AdamOptions | _SgdOptions, scheduled: dict[str, Any]
) -> bool:
    is_sgd = isinstance(options, _SgdOptions)
    return is_sgd and options.momentum == 0 and "b1" not in scheduled


def _sgd_with_decays(
    learning_rate: Any, decays: dict[str, float], maximize: bool
) -> optax.GradientTransformationExtraArgs:
    """SGD without momentum, in one state although the decays differ.

    Its state has no leaves, so those of one optimizer for each decay could not be told
    apart by :func:`adamw_jax.to_torch_state_dict`. The hyperparameter is the decay of
    the first group that has one, and the ratios to it are fixed.
    """
    first = next(decay for decay in decays.values() if decay)

    def factory(learning_rate, weight_decay):
        links = [optax.scale(-1.0)] if maximize else []
        for decay in sorted(set(decays.values()) - {0.0}):
            mask = mask_by(lambda path, _, decay=decay: decays[path] == decay)
            links.append(add_l2_gradient(weight_decay * (decay / first), mask))
        return chain(*links, scale_by_learning_rate(learning_rate))

    return with_hyperparams(factory, learning_rate=learning_rate, weight_decay=first)


def _check_buffers(table: dict[str, Parameter], paths: list[str]) -> None:
    """Raises if a buffer is missing: PyTorch does not dampen its first gradient."""
    for path in paths:
        if table[path].state.get("momentum_buffer") is None:
            raise ValueError(
                "dampening is not supported before the first update: leaf "
                f"{path} has no momentum_buffer yet"
            )
