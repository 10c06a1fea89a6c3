"""Conversion of optimizer states and parameters from and to PyTorch's state dicts.

PyTorch numbers parameters in the order of the optimizer's groups; here leaves have
paths. Each function takes the names that belong to the numbers, a `rename` from these
names to paths, and a `layout` that converts arrays. All mismatches, on either side, are
listed in one error. Only functions that make tensors import PyTorch.
"""

import collections
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._tree import broadcast, find_states, path_string
from ..hyperparams import HyperparamsState
from ..schedules.phases import Phases
from ..transforms.bias_correction import LogProduct
from ..transforms.moments import ScaleByAdamState, ScaleByAmsgradState
from ..transforms.momentum import TraceState
from ..transforms.rounding import StochasticRoundingState
from ..transforms.scaling import ScheduleState
from .eight_bit import decode_bitsandbytes, decode_blocks, encode_blocks
from .names import (
    Layout,
    Parameter,
    Problems,
    Rename,
    convert_layout,
    find_leaves,
    flax_layout,
    get_betas,
    is_sgd,
    leaf_paths,
    put_array,
    put_number,
    rate_ratio,
    step_count,
    to_array,
    to_tensor,
    torch_parameters,
)

# From the moments of the states below, Optax's included, to their names in PyTorch.
_SLOTS = {
    "mu": "exp_avg",
    "nu": "exp_avg_sq",
    "nu_max": "max_exp_avg_sq",
    "trace": "momentum_buffer",
}
_MOMENTS = (
    ScaleByAdamState,
    ScaleByAmsgradState,
    TraceState,
    optax.ScaleByAdamState,
    optax.TraceState,
)
_COUNTERS = (ScheduleState, StochasticRoundingState, optax.ScaleByScheduleState)
_KNOWN = (HyperparamsState, *_MOMENTS, *_COUNTERS)
_PARTS = (HyperparamsState, optax.transforms.PartitionState)


def from_torch_state_dict(
    state_dict: Mapping[str, Any],
    state: optax.OptState,
    params: optax.Params,
    *,
    names: Sequence[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    step: int | None = None,
    b1: Any = None,
    b2: Any = None,
    labels: Any = None,
) -> optax.OptState:
    r"""Fills an optimizer state from that of `torch.optim`'s Adam, AdamW or SGD.

    The moments are copied bit for bit. Conventions that bite:

    * **Bias correction.** PyTorch stores only the number of steps and corrects with
      $1 - \beta_1^t$ for the current $\beta_1$. `bias_correction="torch"` does
      the same. `"exact"` needs the product of all betas so far, which no checkpoint
      of PyTorch has. It is computed from `b1` and `b2` if they are passed here, and
      otherwise is the current beta of the group to the power t. For constant betas all
      three are equal. For cycled betas the last one differs until $\prod \beta_1$ has
      vanished, after some 50 steps.
    * **Step counts.** PyTorch counts per parameter, so one that had no gradient lags
      behind. Here an Adam state has one count, and leaves of one state with different
      counts are an error. Two states in an `optax.partition` may differ;
      :func:`optimizer_from_torch_state_dict` builds such an optimizer. The same holds
      for a leaf whose gradient is None after the conversion; see :func:`scale_by_adam`.
    * **Hyperparameters** are those of the optimizer that made `state`. Until its first
      update, `current_hyperparams` returns those of the checkpoint.
    * `nu_max` must be that of `convention="torch"` or `"paper"`, not `"optax"`.

    Args:
        state_dict: `optimizer.state_dict()`, of tensors or arrays, on any device; also
            that of bitsandbytes' Adam and AdamW, whose moments are decoded to float32.
        state: the state of an optimizer of this package, of a chain with one,
            `freeze_leaves`, `scale_by_group` or Optax's clipping, or of `optax.adamw`
            or `optax.sgd`; for example `tx.init(params)`. :func:`quantize_moments`
            around it rounds the moments to the nearest code. Other states with arrays
            (`optax.MultiSteps`, `optax.inject_hyperparams`) are refused: fill the state
            of their inner optimizer and insert it.
        params: the parameters that `state` was made for.
        names: PyTorch's parameter names in the order of the optimizer's groups,
            `[name for name, _ in net.named_parameters()]` for a single group; or the
            paths of the leaves in that order. None: read from the dict, if PyTorch's
            optimizer was built from `net.named_parameters()`.
        rename: from such a name to the path of the leaf, or to the name that PyTorch
            would give that leaf, as a function or a dict. Names that are not in a dict
            are used unchanged. Then `conv1.weight` matches `conv1/weight`,
            `conv1/kernel`, `conv1/scale` or `conv1/embedding`.
        layout: converts arrays. The default knows Flax's kernels.
        step: number of updates done, from which schedules continue. None: the highest
            count of PyTorch. SGD stores no count, so it needs this argument.
        b1: its value in the steps done, for `"exact"`: a number, a schedule of the
            step, :class:`Phases`, or an array.
        b2: likewise.
        labels: those passed to `optax.partition`, a tree or a function from params to
            one. Needed only if several of its optimizers are SGD without momentum,
            whose states do not say which leaves they train.

    Returns:
        The new state, whose arrays share no memory with the tensors. Parameters without
        a state in PyTorch get zeros.

    Raises:
        ValueError: all mismatches in one message, with the paths of the leaves: a
            parameter without a leaf or a leaf without a parameter; moments that are
            missing, or for which the state has no place; shapes; dtypes that would lose
            bits; step counts that differ or are missing. Or the dict of another
            optimizer, which may differ only by an option in its groups; or no step.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from adamw_jax import adamw
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False,
        ...          "weight_decay": 0.01, "params": [0]}
        >>> moments = {"step": 7.0, "exp_avg": np.ones((3, 2)),
        ...            "exp_avg_sq": np.ones((3, 2))}
        >>> checkpoint = {"state": {0: moments}, "param_groups": [group]}
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3))}}
        >>> state = from_torch_state_dict(
        ...     checkpoint, adamw(1e-3).init(params), params, names=["fc.weight"])
        >>> adam_state = state.inner_state[0]
        >>> print(adam_state.count, adam_state.mu["fc"]["kernel"].shape)
        7 (2, 3)

    Source: PyTorch 2.13, `torch/optim/{optimizer,adam,sgd}.py`.
    """
    state_dict = decode_bitsandbytes(state_dict)
    original, state = state, decode_blocks(state)
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems)
    arrays, counts = {}, {}
    for path, parameter in table.items():
        arrays[path] = {
            key: convert_layout(layout, path, to_array(value), "from_torch", problems)
            for key, value in parameter.state.items()
            if key != "step" and value is not None
        }
        counts[path] = step_count(path, parameter, problems)
    if step is None:
        if any(is_sgd(parameter.group) for parameter in table.values()):
            raise ValueError(
                "step must be given, because PyTorch's SGD does not store the number "
                "of updates done, from which schedules continue"
            )
        step = max(counts.values(), default=0)
    elif step < 0 or int(step) != step:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")

    used: set[tuple[str, str]] = set()
    trained = _trained_groups(state, params, table, labels)
    groups = {id(node): node_groups for node, node_groups in trained}

    def fill(node):
        if isinstance(node, _COUNTERS):
            field = "step" if isinstance(node, ScheduleState) else "count"
            return node._replace(**{field: put_number(getattr(node, field), step)})
        if isinstance(node, HyperparamsState):
            new = node._replace(
                step=put_number(node.step, step),
                inner_state=_map_states(fill, node.inner_state),
            )
            return _fill_hyperparams(new, groups[id(node)])
        slots = {slot: key for slot, key in _SLOTS.items() if hasattr(node, slot)}
        paths = _slot_paths(node)
        new = {}
        for slot, key in slots.items():

            def leaf(path, old, key=key):
                path = path_string(path)
                used.add((path, key))
                if path not in table:
                    problems.add(f"leaf {path}", "no parameter has this name")
                    return old
                if problem := _contradiction(table[path].group, node):
                    problems.add(f"leaf {path}", problem)
                if key in arrays[path]:
                    return put_array(path, key, old, arrays[path][key], problems)
                if arrays[path]:
                    problems.add(f"leaf {path}", f"there is no {key}")
                return put_array(path, key, old, np.zeros(old.shape), problems)

            new[slot] = jax.tree_util.tree_map_with_path(leaf, getattr(node, slot))
        if "count" in node._fields:  # every tuple has a method count
            count = _common_count({p: counts.get(p, 0) for p in paths}, problems)
            new["count"] = put_number(node.count, count)
            for i, (name, beta) in enumerate((("b1", b1), ("b2", b2))):
                old = getattr(node, f"log_{name}", None)
                if old is not None:
                    betas = {get_betas(table[p].group)[i] for p in paths if p in table}
                    new[f"log_{name}"] = _log_product(
                        name, old, count, beta, betas, problems
                    )
        elif getattr(node, "step", None) is not None:
            new["step"] = put_number(node.step, step)
        return node._replace(**new)

    filled = _map_states(fill, state, problems)
    for path, parameter in table.items():
        for key in arrays[path]:
            if (path, key) not in used:
                problems.add(
                    f"leaf {path}",
                    f"PyTorch has {key} of {parameter.name}, for which the state has "
                    "no place (another optimizer, or a frozen leaf)",
                )
    problems.raise_if_any()
    return encode_blocks(filled, original, step)


def to_torch_state_dict(
    state: optax.OptState,
    params: optax.Params,
    param_groups: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    labels: Any = None,
    tx: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """Makes the dict that `load_state_dict` of `torch.optim`'s optimizers accepts.

    The moments are copied bit for bit, to tensors of their own dtype; `load_state_dict`
    casts them to that of PyTorch's parameters. Those of :func:`quantize_moments` become
    float32, of which :func:`encode_bitsandbytes` makes bitsandbytes' state. `step` is a
    float32 scalar, as PyTorch stores it. The groups are copies of `param_groups` with
    the hyperparameters of the state: `lr`, `betas` or `momentum`, `weight_decay`. A
    state has one learning rate, which is that of the first group it trains; the other
    groups keep their ratio to it. The same holds for the decay, and a decay of 0 stays
    0. A value that equals the group's up to the state's float32 is left as it is.

    **Schedules.** PyTorch's groups hold the values that the next step uses. A state
    holds those of the last update, which is the same for constants. Pass `tx` if a
    schedule or phases drive any of them: the groups then get the values of the next
    update, as PyTorch's have after `scheduler.step()`. Groups that a PyTorch scheduler
    drives need it.

    `eps`, `nesterov`, `maximize`, `dampening` and `decoupled_weight_decay` are not in a
    state and stay as in `param_groups`; for `sgd(dampened=True)` set `dampening` to the
    momentum there.

    The state of a scheduler is not included. PyTorch's `scheduler.load_state_dict`
    needs its `last_epoch`, the number of updates done.

    Args:
        state: an optimizer state that :func:`from_torch_state_dict` can fill.
        params: the parameters that it was made for.
        param_groups: `optimizer.state_dict()["param_groups"]` of the PyTorch optimizer
            that will continue, or those of the checkpoint that it started from.
        names: PyTorch's parameter names in the order of the groups; None: read from the
            groups. This and the following are described at
            :func:`from_torch_state_dict`.
        rename: from PyTorch's names to paths, as a function or a dict.
        layout: converts arrays; the default knows Flax's kernels.
        labels: as for :func:`from_torch_state_dict`.
        tx: the optimizer that `state` is of, for the values of the next update: it
            updates a copy of the state once, with zero gradients.

    Returns:
        `{"state": {number: {...}}, "param_groups": [...]}`, with tensors (needs
        PyTorch). Before the first update an Adam state has no entries, as in PyTorch.

    Raises:
        ValueError: all mismatches in one message: a leaf with moments but without a
            name; two states for one leaf; groups of another optimizer, or whose
            `amsgrad` or `momentum` contradicts the moments; or no state with
            hyperparameters trains a group. Or a scheduler drives the groups and there
            is no tx, or has changed the ratio of their learning rates.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3))}}
        >>> tx = adamw(1e-3)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False,
        ...          "weight_decay": 1e-4, "params": [0]}
        >>> dumped = to_torch_state_dict(  # doctest: +SKIP
        ...     state, params, [group], names=["fc.weight"])
        >>> dumped["state"][0]["exp_avg"].shape  # doctest: +SKIP
        torch.Size([3, 2])
    """
    problems = Problems("the state does not fit PyTorch's optimizer:")
    groups = [dict(group) for group in param_groups]
    state_dict = {"state": {}, "param_groups": groups}
    table = torch_parameters(state_dict, params, names, rename, problems)
    entries: dict[str, dict[str, Any]] = {}

    def read(node):
        if isinstance(node, HyperparamsState):
            _map_states(read, node.inner_state)
        if not isinstance(node, _MOMENTS):
            return node
        count = None
        if "count" in node._fields:  # every tuple has a method count
            count = int(jax.tree.leaves(node.count)[0])
        for slot, key in _SLOTS.items():
            leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot, None))
            for path, leaf in leaves:
                path = path_string(path)
                if path not in table:
                    problems.add(f"leaf {path}", "has moments, but no parameter")
                    continue
                if problem := _contradiction(table[path].group, node):
                    problems.add(f"leaf {path}", problem)
                entry = entries.setdefault(path, {})
                if key in entry:
                    problems.add(f"leaf {path}", f"the state has {slot} twice")
                if count == 0:
                    continue
                if count is not None:
                    entry["step"] = to_tensor(np.asarray(count, np.float32))
                array = np.asarray(leaf)
                entry[key] = to_tensor(
                    convert_layout(layout, path, array, "to_torch", problems)
                )
        return node

    _map_states(read, decode_blocks(state), problems)
    following = state
    if tx is None:
        scheduled = any("initial_lr" in group for group in groups)
        if scheduled and find_states(state, HyperparamsState):
            raise ValueError(
                "tx must be given, because a scheduler drives the groups (they have "
                "initial_lr), and the state holds the values of the last update only"
            )
    else:  # after an update a state holds the values that it used
        zeros = jax.tree.map(jnp.zeros_like, params)
        _, following = tx.update(zeros, state, params)
    trained = _trained_groups(decode_blocks(following), params, table, labels)
    updated = [_update_group(group, trained, problems) for group in groups]
    problems.raise_if_any()
    by_number = {table[path].number: entry for path, entry in entries.items() if entry}
    return {"state": dict(sorted(by_number.items())), "param_groups": updated}


def params_from_torch_state_dict(
    state_dict: Mapping[str, Any],
    params: Any,
    *,
    rename: Rename = None,
    layout: Layout = flax_layout,
) -> Any:
    """Converts `net.state_dict()` to a tree of parameters and batch statistics.

    Leaves are found as by :func:`from_torch_state_dict`. PyTorch's `running_mean` and
    `running_var` match leaves named `mean` and `var`; `num_batches_tracked` is ignored.

    Args:
        state_dict: from name to tensor or array.
        params: the tree to fill, of arrays or `ShapeDtypeStruct`.
        rename: from PyTorch's names to paths, as for :func:`from_torch_state_dict`.
        layout: converts arrays; the default knows Flax's kernels.

    Returns:
        A tree like params, whose arrays share no memory with the tensors.

    Raises:
        ValueError: all mismatches in one message, with the paths of the leaves.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> weights = {"fc.weight": np.arange(6.0).reshape(3, 2), "fc.bias": np.ones(3)}
        >>> print(params_from_torch_state_dict(weights, params)["fc"]["kernel"])
        [[0. 2. 4.]
         [1. 3. 5.]]
    """
    problems = Problems("PyTorch's parameters do not fit:")
    names = [name for name in state_dict if not name.endswith("num_batches_tracked")]
    found = find_leaves(names, rename, leaf_paths(params), problems)
    by_path = {path: name for name, path in found.items()}

    def leaf(path, old):
        path = path_string(path)
        if path not in by_path:
            problems.add(f"leaf {path}", "no parameter has this name")
            return old
        name = by_path[path]
        array = convert_layout(
            layout, path, to_array(state_dict[name]), "from_torch", problems
        )
        return put_array(path, name, old, array, problems)

    filled = jax.tree_util.tree_map_with_path(leaf, params)
    problems.raise_if_any()
    return filled


def params_to_torch_state_dict(
    params: Any,
    names: Sequence[str],
    *,
    rename: Rename = None,
    layout: Layout = flax_layout,
) -> dict[str, Any]:
    """Makes the dict of tensors that `net.load_state_dict` accepts.

    Args:
        params: the tree of parameters, with or without batch statistics.
        names: names of PyTorch's parameters and buffers, `list(net.state_dict())`.
            Those that end in `num_batches_tracked` are ignored: pass `strict=False` to
            `load_state_dict`.
        rename: from PyTorch's names to paths, as for :func:`from_torch_state_dict`.
        layout: converts arrays; the default knows Flax's kernels.

    Returns:
        A dict from name to tensor (needs PyTorch).

    Raises:
        ValueError: all mismatches in one message.
    """
    problems = Problems("the parameters do not fit PyTorch's:")
    leaves = {
        path_string(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = [name for name in names if not name.endswith("num_batches_tracked")]
    found = find_leaves(names, rename, set(leaves), problems)
    for path in sorted(set(leaves) - set(found.values())):
        problems.add(f"leaf {path}", "no parameter has this name")
    tensors = {
        name: to_tensor(
            convert_layout(layout, path, np.asarray(leaves[path]), "to_torch", problems)
        )
        for name, path in found.items()
    }
    problems.raise_if_any()
    return tensors


# ---------------------------------------------------------------------------
# states
# ---------------------------------------------------------------------------


def _map_states(
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


def _slot_paths(state: Any) -> dict[str, None]:
    """The paths of the leaves whose moments a state has, in order."""
    paths: dict[str, None] = {}

    def read(node):
        if isinstance(node, HyperparamsState):
            _map_states(read, node.inner_state)
        for slot in _SLOTS:
            leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot, None))
            paths.update({path_string(path): None for path, _ in leaves})
        return node

    _map_states(read, state)
    return paths


class _Trained(NamedTuple):
    """A state with hyperparameters and the groups that it trains, in their order."""

    node: HyperparamsState
    groups: list[Mapping[str, Any]]


def _trained_groups(
    state: Any, params: Any, table: dict[str, Parameter], labels: Any
) -> list[_Trained]:
    """All states with hyperparameters, each with the groups that it trains.

    Moments have the paths of the leaves. A state without moments, of SGD without
    momentum, trains the leaves with its label in `optax.partition`; without labels, all
    that no other state trains, if it is the only one.
    """
    nodes = _labelled_states(state)
    paths = [set(_slot_paths(node.inner_state)) for node, _ in nodes]
    unknown = [
        i
        for i, (node, _) in enumerate(nodes)
        if not find_states(node.inner_state, lambda x: isinstance(x, _MOMENTS))
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


def _common_count(counts: dict[str, int], problems: Problems) -> int:
    """The most frequent step count; every leaf with another one is a problem."""
    frequency = collections.Counter(counts.values())
    common = max(frequency, key=lambda count: (frequency[count], count), default=0)
    for path, count in counts.items():
        if count != common:
            problems.add(
                f"leaf {path}",
                f"has done {count} steps, most others {common}, but this optimizer has "
                "one count: freeze the leaf, give it its own optimizer with "
                "optax.partition, or use optimizer_from_torch_state_dict",
            )
    return common


def _log_product(
    name: str, old: LogProduct, count: int, beta: Any, betas: set, problems: Problems
) -> LogProduct:
    """The logarithm of the product of the betas in the steps done."""
    if beta is None:
        if len(betas) > 1:
            problems.add(name, f"differs between the groups of one optimizer: {betas}")
        beta = min(betas, default=0.0)
    if isinstance(beta, Phases):
        beta = beta.schedule(name)
    if callable(beta):
        beta = beta(np.arange(count))
    beta = np.asarray(beta, np.float64)
    if beta.ndim > 1 or (beta.ndim == 1 and len(beta) < count):
        raise ValueError(
            f"{name} must be a number or one for each of the {count} steps done, got "
            f"the shape {beta.shape}"
        )
    values = beta[:count] if beta.ndim else beta
    if not np.all((values >= 0) & (values < 1)):
        raise ValueError(f"{name} must be in [0, 1) in the steps done, got {beta}")
    dtype = np.dtype(jax.tree.leaves(old.total)[0].dtype)
    # Clipped as in an update, so that the logarithm of 0 is finite.
    logs = np.log1p(-np.minimum(1 - values, 1 - float(jnp.finfo(dtype).epsneg)))
    exact = math.fsum(logs) if beta.ndim else count * float(logs)
    total = float(np.asarray(exact, dtype))
    return LogProduct(put_number(old.total, total), put_number(old.lost, total - exact))


# ---------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------


def _contradiction(group: Mapping[str, Any], node: Any) -> str | None:
    """Why moments contradict the group of their parameter; None if they do not."""
    if hasattr(node, "trace") != is_sgd(group):
        kinds = ("Adam", "SGD") if is_sgd(group) else ("SGD", "Adam")
        return f"the state is of {kinds[0]}, PyTorch's group of {kinds[1]}"
    if hasattr(node, "mu") and hasattr(node, "nu_max") != bool(group["amsgrad"]):
        has = "has" if hasattr(node, "nu_max") else "has no"
        return f"the state {has} nu_max, but PyTorch's amsgrad is {group['amsgrad']}"
    return None


def _fill_hyperparams(
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
        if name in values and not jax.tree.leaves(node.overridden[i])[0]:
            new[name] = put_number(new[name], values[name])
            last[i] = put_number(last[i], values[name])
    return node._replace(hyperparams=new, last_values=tuple(last))


def _update_group(
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
