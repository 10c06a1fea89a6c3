"""Which groups of PyTorch an optimizer state trains, and their hyperparameters."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from .._tree import broadcast, find_states, path_string
from ..hyperparams import HyperparamsState, ScaleByGroupState, is_overridden
from ..transforms.moments import ScaleByAdamState, ScaleByAmsgradState
from ..transforms.momentum import TraceState
from ..transforms.rounding import StochasticRoundingState
from .arrays import put_number
from .groups import Parameter, get_betas, is_sgd, rate_ratio
from .problems import Problems

# From the moments of the states below, Optax's included, to their names in PyTorch.
SLOTS = {
    "mu": "exp_avg",
    "nu": "exp_avg_sq",
    "nu_max": "max_exp_avg_sq",
    "trace": "momentum_buffer",
}
MOMENTS = (
    ScaleByAdamState,
    ScaleByAmsgradState,
    TraceState,
    optax.ScaleByAdamState,
    optax.TraceState,
)
COUNTERS = (StochasticRoundingState, optax.ScaleByScheduleState)
_KNOWN = (HyperparamsState, ScaleByGroupState, *MOMENTS, *COUNTERS)
_PARTS = (HyperparamsState, optax.transforms.PartitionState)


# ---------------------------------------------------------------------------
# states
# ---------------------------------------------------------------------------


def map_states(
    f: Callable[[Any], Any], state: Any, problems: Problems | None = None
) -> Any:
    """Maps over the supported states; an array in any other state is a problem."""

    def apply(path, node):
        if isinstance(node, _KNOWN):
            return f(node)
        if problems is not None:
            problems.add(
                f"state {path_string(path)}",
                "is of a transformation that PyTorch does not have; convert the state "
                "of its inner transformation",
            )
        return node

    return jax.tree_util.tree_map_with_path(
        apply, state, is_leaf=lambda x: isinstance(x, _KNOWN)
    )


def slot_paths(state: Any) -> dict[str, None]:
    """The paths of the leaves whose moments a state has, in order."""
    paths: dict[str, None] = {}

    def read(node):
        if isinstance(node, HyperparamsState):
            map_states(read, node.inner_state)
        for slot in SLOTS:
            leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot, None))
            paths.update({path_string(path): None for path, _ in leaves})
        return node

    map_states(read, state)
    return paths


class _Trained(NamedTuple):
    """A state with hyperparameters and the groups that it trains, in their order."""

    node: HyperparamsState
    groups: list[Mapping[str, Any]]


def trained_groups(
    state: Any, params: Any, table: dict[str, Parameter], labels: Any
) -> list[_Trained]:
    """All states with hyperparameters, each with the groups that it trains.

    Moments have the paths of the leaves. A state without moments, of SGD without
    momentum, trains the leaves with its label in `optax.partition`; without labels, all
    that no other state trains, if it is the only one.
    """
    nodes = _labelled_states(state)
    paths = [set(slot_paths(node.inner_state)) for node, _ in nodes]
    unknown = [
        i
        for i, (node, _) in enumerate(nodes)
        if not find_states(node.inner_state, lambda x: isinstance(x, MOMENTS))
    ]
    if labels is not None:
        tree = broadcast("labels", labels, params)
        by_path = {
            path_string(path): label
            for path, label in jax.tree_util.tree_leaves_with_path(tree)
        }
        for i in unknown:
            paths[i] = {path for path in by_path if by_path[path] == nodes[i][1]}
    elif len(unknown) == 1:
        paths[unknown[0]] = set(table).difference(*paths)
    trained = []
    for (node, _), of_node in zip(nodes, paths, strict=True):
        groups: list[Mapping[str, Any]] = []
        for path, parameter in table.items():
            if path in of_node and not any(parameter.group is g for g in groups):
                groups.append(parameter.group)
        trained.append(_Trained(node, groups))
    return trained


def _labelled_states(state: Any, label: Any = None) -> list[tuple]:
    """All states with hyperparameters, each with its label in `optax.partition`."""
    found: list[tuple] = []
    for node in find_states(state, lambda x: isinstance(x, _PARTS)):
        if isinstance(node, HyperparamsState):
            found.append((node, label))
        else:
            for key, inner_state in node.inner_states.items():
                found += _labelled_states(inner_state, key)
    return found


def contradiction(group: Mapping[str, Any], node: Any) -> str | None:
    """Why moments contradict the group of their parameter; None if they do not."""
    if hasattr(node, "trace") != is_sgd(group):
        kinds = ("Adam", "SGD") if is_sgd(group) else ("SGD", "Adam")
        return f"the state is of {kinds[0]}, PyTorch's group of {kinds[1]}"
    if hasattr(node, "mu") and hasattr(node, "nu_max") != bool(group["amsgrad"]):
        has = "has" if hasattr(node, "nu_max") else "has no"
        return f"the state {has} nu_max, but PyTorch's amsgrad is {group['amsgrad']}"
    return None


def fill_hyperparams(
    node: HyperparamsState, groups: list[Mapping[str, Any]]
) -> HyperparamsState:
    """Fills in the hyperparameters of PyTorch, for `current_hyperparams`."""
    if not groups:
        return node
    decays = [float(group["weight_decay"]) for group in groups]
    values = {
        "learning_rate": float(groups[0]["lr"]),
        "weight_decay": next((decay for decay in decays if decay), 0.0),
    }
    if is_sgd(groups[0]):
        values["momentum"] = float(groups[0]["momentum"])
    else:
        values["b1"], values["b2"] = get_betas(groups[0])
    new, last = dict(node.hyperparams), list(node.last_values)
    for i, name in enumerate(sorted(new)):
        if name in values and not is_overridden(jax.tree.leaves(last[i])[0]):
            new[name] = put_number(new[name], values[name])
            last[i] = put_number(last[i], values[name])
    return node._replace(hyperparams=new, last_values=tuple(last))


def update_group(
    group: Mapping[str, Any],
    all_trained: list[_Trained],
    problems: Problems,
) -> dict[str, Any]:
    """A copy of the group with the hyperparameters of the state."""
    new = copy.deepcopy(dict(group))
    found = [x for x in all_trained if any(group is other for other in x.groups)]
    if not found:
        if len(all_trained) > 1 and len(group["params"]):
            problems.add(
                f"group of {group['params']}",
                "no state has moments of it, and several have hyperparameters: pass "
                "the labels of optax.partition",
            )
        return new
    node, trained = found[0]
    dtype = jax.tree.leaves(node.last_values)[0].dtype
    values = {k: float(jax.tree.leaves(v)[0]) for k, v in node.hyperparams.items()}

    def keep_if_equal(torch_value, value):
        return torch_value if np.asarray(float(torch_value), dtype) == value else value

    def scale(torch_value, torch_base, value):
        if np.asarray(float(torch_base), dtype) == value:
            return torch_value
        return value * (float(torch_value) / float(torch_base))

    if "learning_rate" in values:
        rate = values["learning_rate"]
        if np.asarray(float(trained[0]["lr"]), dtype) != rate:
            new["lr"] = rate * rate_ratio(group, trained[0])
    if "weight_decay" in values:
        decays = [g["weight_decay"] for g in trained if float(g["weight_decay"])]
        if decays:
            new["weight_decay"] = scale(
                group["weight_decay"], decays[0], values["weight_decay"]
            )
        elif values["weight_decay"]:
            problems.add(
                f"group of {group['params']}",
                f"the state has weight_decay {values['weight_decay']:g}, which is 0 in "
                "all of PyTorch's groups",
            )
    if "momentum" in values:
        new["momentum"] = keep_if_equal(group.get("momentum", 0.0), values["momentum"])
    if "betas" in group:
        new["betas"] = tuple(
            keep_if_equal(beta, values.get(name, float(beta)))
            for beta, name in zip(group["betas"], ("b1", "b2"), strict=True)
        )
    return new
