"""Optimizers and phases that continue from a PyTorch checkpoint."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from .._checks import is_static
from .._tree import find_states, is_none, path_string
from ..fused.adamw import adamw
from ..hyperparams import HyperparamsState, with_hyperparams
from ..masks import mask_by
from ..optimizers import LearningRate, adam, amsgrad, sgd
from ..schedules.phases import Phases
from ..transforms.bias_correction import BiasCorrection
from ..transforms.chain import chain
from ..transforms.decay import add_l2_gradient
from ..transforms.groups import freeze_leaves, scale_by_group
from ..transforms.scaling import scale_by_learning_rate
from .arrays import Layout, flax_layout
from .checkpoint import as_optimizer_state_dict
from .eight_bit import decode_bitsandbytes
from .groups import Parameter, get_betas, is_sgd, rate_ratio, step_count
from .names import Patterns, Rename, leaf_paths, torch_parameters
from .problems import Problems
from .schedulers import first_learning
from .state import from_torch_state_dict


def optimizer_from_torch_state_dict(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    *,
    learning_rate: LearningRate | Sequence[LearningRate] | None = None,
    decoupled: bool | None = None,
    bias_correction: BiasCorrection = "torch",
    names: Iterable[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    step: int | None = None,
    skip: Patterns = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    r"""Builds the optimizer that continues PyTorch's Adam, AdamW, AMSGrad or SGD.

    Parameter groups translate as follows:

    ========================================  ==========================================
    groups with equal options                 one :func:`adam`, :func:`adamw`, ...
    different `lr`                            the learning rate of the first group, with
                                              the ratios in :func:`scale_by_group`
    `weight_decay=0` in some groups           the optimizer's `mask`
    different `betas`, ..., nonzero decays    `optax.partition`, one optimizer for each
    different step counts                     likewise, so that each keeps its own count
    one `learning_rate` for each group        likewise
    `lr` 0 in the first groups                likewise, at the rate 0
    nonzero decays, SGD without momentum      one optimizer, with the ratios of the
                                              decays to that of the first group
    parameters in no group                    :func:`freeze_leaves`
    ========================================  ==========================================

    A parameter in a group that never had a gradient starts with its first one. If it
    had none because it should stay frozen, build the optimizer yourself, with
    :func:`freeze_leaves`, and fill its state with :func:`from_torch_state_dict`.

    With one `learning_rate`, the ratio of the groups' rates is that of the checkpoint,
    and stays. Groups whose scheduler has not kept it (`eta_min` above 0, a function for
    each group: lr / initial_lr differs) are refused; pass a list, with one for each
    group. At the first step of such a scheduler the groups do not show it, but
    :func:`phases_from_torch_scheduler` does. `ReduceLROnPlateau` leaves no trace in
    them, so a run that it drove continues at its last rates.

    `foreach`, `fused`, `capturable` and `differentiable` select implementations of the
    same update and are ignored. `dampening` is supported if it equals the momentum and
    all buffers exist: `sgd(dampened=True)`.

    Args:
        state_dict: `optimizer.state_dict()`, also of bitsandbytes' Adam and AdamW, both
            of which decouple the decay.
        params: the parameters to train.
        learning_rate: the learning rate from now on of the first group that has
            parameters and a rate above 0: a number, a schedule of the step, or
            :class:`Phases`, such as :func:`phases_from_torch_scheduler` returns. Phases
            also drive b1, b2 and the decay if they set them, and are assumed to have
            driven b1 so far. Or a list with one for each of PyTorch's groups, each at
            its own rate. None: the learning rates of the groups, unless a scheduler
            drove them.
        decoupled: True for AdamW, False for Adam with L2. None: read from the groups,
            in which older versions of PyTorch did not store it.
        bias_correction: `"torch"` continues exactly as PyTorch would. For `"exact"` see
            :func:`from_torch_state_dict`.
        names: PyTorch's parameter names in the order of the groups; None: read from the
            dict. This and the following are described at :func:`from_torch_state_dict`.
        rename: from PyTorch's names to paths, as a function or a dict.
        layout: converts arrays; the default knows Flax's kernels.
        step: number of updates done; None: the highest count of PyTorch. SGD needs it.
        skip: what not to read; another head is trained as one that had no gradient yet.

    Returns:
        The transformation and its state.

    Raises:
        ValueError: as for :func:`from_torch_state_dict`; or a scheduler drove the
            groups and there is no learning_rate, or has changed the ratio of their
            learning rates and there is only one; or the dampening is not supported.

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
    state_dict = decode_bitsandbytes(as_optimizer_state_dict(state_dict))
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems, skip)
    problems.raise_if_any()
    groups = [group for group in state_dict["param_groups"] if len(group["params"])]
    if not groups:
        raise ValueError("state_dict must have parameters in its groups, got none")
    drives = _drives(learning_rate, state_dict["param_groups"])

    decays = {
        path: float(parameter.group["weight_decay"])
        for path, parameter in table.items()
    }
    kinds = _make_kinds(table, drives, decays, decoupled, problems)
    labels = {kind: str(i) for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    by_label, rates = {}, {}
    for kind, label in labels.items():
        paths = [path for path in table if kinds[path] == kind]
        first = next(g for g in groups if any(table[p].group is g for p in paths))
        drive = drives[id(first)]
        values = dict(drive.values)
        if learning_rate is None:
            values["learning_rate"] = float(first["lr"])
        elif drive.ratio != 1:
            values["learning_rate"] = _scale(values["learning_rate"], drive.ratio)
        if isinstance(kind.options, _SgdOptions) and kind.options.dampened:
            _check_buffers(table, paths)
        by_label[label] = _build(
            kind.options,
            values,
            {path: decays[path] for path in paths},
            bias_correction,
        )
        for path in paths:
            group = table[path].group
            rates[path] = 1.0 if drive.own else rate_ratio(group, first)

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
        b1=_common_beta("b1", drives, kinds, bias_correction),
        b2=_common_beta("b2", drives, kinds, bias_correction),
        skip=skip,
    )
    if step is None and isinstance(learning_rate, Phases):
        _check_goes_on(learning_rate, groups[first_learning(groups)], state)
    return tx, state


def _check_goes_on(phases: Phases, group: Mapping[str, Any], state: Any) -> None:
    """Raises if phases do not give the rate at which a scheduler left the group."""
    if "initial_lr" not in group or "learning_rate" not in phases.names:
        return
    step = int(find_states(state, HyperparamsState)[0].step)
    # Saved after the step of the scheduler, or before it.
    rates = [phases.at(k)["learning_rate"] for k in (step, max(step - 1, 0))]
    rate = float(group["lr"])
    if not any(math.isclose(rate, x, rel_tol=1e-4, abs_tol=1e-12) for x in rates):
        raise ValueError(
            f"the phases give the learning rate {rates[0]:g} at step {step}, that of "
            f"Adam, but PyTorch's group has {rate:g}: pass step=last_epoch if the "
            "scheduler is at another step, or updates_per_step to "
            "phases_from_torch_scheduler if it steps once an epoch"
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
    drive: int  # the number of a `_Drive`; -1 for the rate 0
    weight_decay: float | None = None  # set if leaves with these options differ in it


class _Drive(NamedTuple):
    """What drives a group. Groups with the same number can share one optimizer."""

    number: int
    values: dict[str, Any]  # each a number or a schedule, that of the first group
    ratio: float  # of the learning rate to it
    own: bool = False  # the values are those of this group


def _make_kinds(
    table: dict[str, Parameter],
    drives: dict[int, _Drive],
    decays: dict[str, float],
    decoupled: bool | None,
    problems: Problems,
) -> dict[str, _Kind]:
    """The kind of each leaf.

    Leaves that differ only in learning rate, or in whether they decay, share one.
    """
    kinds = {}
    for path, parameter in table.items():
        drive = drives[id(parameter.group)]
        kinds[path] = _Kind(
            _make_options(parameter.group, decoupled, "b1" in drive.values),
            step_count(path, parameter, problems),
            drive.number,
        )
    problems.raise_if_any()
    for kind in set(kinds.values()):
        paths = [path for path in table if kinds[path] == kind]
        still = [path for path in paths if drives[id(table[path].group)].ratio == 0]
        if paths[0] in still and still != paths:
            # The rates of the others have no ratio to that of the first group.
            for path in still:
                kinds[path] = kind._replace(drive=-1)
    for kind in set(kinds.values()):
        paths = [path for path in table if kinds[path] == kind]
        if len({decays[path] for path in paths} - {0.0}) > 1:
            values = drives[id(table[paths[0]].group)].values
            if "weight_decay" in values:
                raise ValueError(
                    "learning_rate must be phases without weight_decay, which differs "
                    "between the groups"
                )
            if _has_no_momentum(kind.options, values):
                continue
            for path in paths:
                kinds[path] = kind._replace(weight_decay=decays[path])
    return kinds


def _drives(
    learning_rate: Any, groups: Sequence[Mapping[str, Any]]
) -> dict[int, _Drive]:
    """By id of a group with parameters, what drives it."""
    trained = [group for group in groups if len(group["params"])]
    if not isinstance(learning_rate, Sequence):
        values = _hyperparams_from(learning_rate, trained)
        first = trained[first_learning(trained)]
        return {
            id(group): _Drive(0, values, rate_ratio(group, first)) for group in trained
        }
    if len(learning_rate) != len(groups):
        raise ValueError(
            "learning_rate must be one for all groups or one for each of the "
            f"{len(groups)}, got {len(learning_rate)}"
        )
    distinct: list[tuple[Any, list[Mapping[str, Any]]]] = []
    for group, rate in zip(groups, learning_rate, strict=True):
        if not len(group["params"]):
            continue
        sharing = next((x[1] for x in distinct if _is_same(x[0], rate)), None)
        if sharing is None:
            distinct.append((rate, sharing := []))
        sharing.append(group)
    drives = {}
    for number, (rate, sharing) in enumerate(distinct):
        if rate is None:
            raise ValueError("learning_rate must not be None for some of the groups")
        values = _hyperparams_from(rate, sharing)
        drives |= {
            id(group): _Drive(number, values, 1.0, own=True) for group in sharing
        }
    return drives


def _is_same(rate: Any, other: Any) -> bool:
    data = (int, float, Phases)
    return rate is other or (
        isinstance(rate, data) and isinstance(other, data) and rate == other
    )


def _common_beta(
    name: str,
    drives: dict[int, _Drive],
    kinds: dict[str, _Kind],
    bias_correction: BiasCorrection,
) -> Any:
    """The beta that was driven so far; None if none was.

    Only the exact correction needs it, and the state has one count for all groups.
    """
    betas = [drive.values[name] for drive in drives.values() if name in drive.values]
    if not betas or bias_correction != "exact":
        return None
    steps = np.arange(max(kind.count for kind in kinds.values()))
    if len(betas) < len(drives) or any(
        not np.array_equal(beta(steps), betas[0](steps)) for beta in betas
    ):
        raise ValueError(
            f"bias_correction must be 'torch', because the phases of the groups differ "
            f"in {name}"
        )
    return betas[0]


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
    keys = ("base_momentum", "max_momentum")  # of a scheduler that cycles it
    momenta = {
        (
            float(group["momentum"]) if is_sgd(group) else get_betas(group)[0],
            *(float(group[key]) for key in keys if key in group),
        )
        for group in groups
    }
    if "b1" in schedules and len(momenta) > 1:
        values = ", ".join(
            f"{now} ({' to '.join(map(str, ends))})" if ends else str(now)
            for now, *ends in sorted(momenta)
        )
        raise ValueError(
            "learning_rate must be phases without b1, which differs between the "
            f"groups: {values}"
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
        links = [scale_by_learning_rate(1.0)] if maximize else []
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
