"""PyTorch's optimizer state in and out: what began in one goes on in the other.

PyTorch numbers the parameters in the order of the optimizer's groups; here leaves have
paths. Each function takes the names that belong to the numbers, a `rename` from those
names to paths, and a `layout` from PyTorch's arrays to ours. Whatever does not fit, on
either side, is listed in one error. Nothing here needs PyTorch until tensors are made.
"""

import collections
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._tree import path_string
from ..hyperparams import HyperparamsState
from ..schedules.phases import Phases
from ..transforms.bias_correction import LogProduct
from ..transforms.moments import ScaleByAdamState, ScaleByAmsgradState
from ..transforms.momentum import TraceState
from ..transforms.rounding import StochasticRoundingState
from ..transforms.scaling import ScheduleState
from .names import (
    Layout,
    Parameter,
    Problems,
    Rename,
    betas_of,
    find_leaves,
    flax_layout,
    is_sgd,
    leaf_paths,
    put_array,
    put_number,
    rate_ratio,
    to_array,
    to_count,
    to_tensor,
    torch_parameters,
    turn,
)

# The states that are filled, Optax's among them, and what PyTorch calls their moments.
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
) -> optax.OptState:
    r"""Fills an optimizer state with that of `torch.optim`'s Adam, AdamW or SGD.

    The moments come over bit for bit. Conventions that bite:

    * **Bias correction.** PyTorch stores the number of steps only and corrects with
      $1 - \beta_1^t$ for the current $\beta_1$. An optimizer with
      `bias_correction="torch"` goes on with exactly that. `"exact"` needs the product
      of all betas so far, which no checkpoint of PyTorch has: it is taken from `b1` and
      `b2` if they are given here, else it is the group's current beta to the power t.
      For constant betas all three are the same; for cycled ones the last differs until
      $\prod \beta_1$ has vanished, that is for some 50 steps.
    * **Step counts.** PyTorch counts for each parameter, and one that had no gradient
      is behind. Here each Adam state has one count: leaves of one state with different
      counts are refused by name. Two states of an `optax.partition` may differ;
      :func:`optimizer_from_torch_state_dict` makes such an optimizer.
    * **Hyperparameters** are those of the optimizer that made `state`. Until its first
      update, `current_hyperparams` reads what the checkpoint had in force.
    * `nu_max` is that of `convention="torch"` (or `"paper"`), not of `"optax"`.

    Args:
        state_dict: `optimizer.state_dict()`, of tensors or arrays, on any device.
        state: of one of the optimizers here, or of a chain with one, `freeze_leaves`,
            `scale_by_group` or Optax's clipping; also of `optax.adamw` or `optax.sgd`.
            For example `tx.init(params)`. Other states with arrays in them
            (`optax.MultiSteps`, `optax.inject_hyperparams`) are refused: fill the
            state of the inner optimizer, and put it there.
        params: the tree that `state` was made for.
        names: PyTorch's parameter names in the order of the optimizer's groups,
            `[name for name, _ in net.named_parameters()]` for a single group; or our
            paths in that order. None: the dict has them, since its optimizer was made
            from `net.named_parameters()`.
        rename: from such a name to our path or to PyTorch's name of it, as a function
            or a dict; a name that the dict lacks stays. Afterwards `conv1.weight` finds
            `conv1/weight`, `conv1/kernel`, `conv1/scale` or `conv1/embedding`.
        layout: how arrays are turned. The default knows Flax's kernels.
        step: updates done, which schedules go on from. None: the highest of PyTorch's
            counts; SGD stores none, so there it must be given.
        b1: what it was in the steps done, for `"exact"`: a number, a schedule of the
            step, :class:`Phases`, or an array.
        b2: the same.

    Returns:
        The new state, of arrays that share no memory with the tensors. Parameters
        without any state in PyTorch get zeros.

    Raises:
        ValueError: all that does not fit, in one message with the paths of the leaves:
            a parameter without a leaf, a leaf without a parameter, moments that the
            state has no place for or that are missing, shapes, dtypes that would lose
            bits, step counts; another optimizer's dict; no step.

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
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems)
    arrays, counts = {}, {}
    for path, there in table.items():
        arrays[path] = {
            key: turn(layout, path, to_array(value), "from_torch", problems)
            for key, value in there.state.items()
            if key != "step" and value is not None
        }
        counts[path] = to_count(path, there.state.get("step", 0), problems)
    if step is None:
        if any(is_sgd(there.group) for there in table.values()):
            raise ValueError(
                "step must be given: PyTorch's SGD does not store how many updates it "
                "has done, and schedules go on from there"
            )
        step = max(counts.values(), default=0)
    elif step < 0 or int(step) != step:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")

    taken: set[tuple[str, str]] = set()

    def fill(node):
        if isinstance(node, _COUNTERS):
            field = "step" if isinstance(node, ScheduleState) else "count"
            return node._replace(**{field: put_number(getattr(node, field), step)})
        if isinstance(node, HyperparamsState):
            node = node._replace(
                step=put_number(node.step, step),
                inner_state=_map_states(fill, node.inner_state),
            )
            return _with_values(node, _groups_of(node, state, table))
        slots = {slot: key for slot, key in _SLOTS.items() if hasattr(node, slot)}
        paths = _slot_paths(node)
        new = {}
        for slot, key in slots.items():

            def leaf(path, old, key=key):
                path = path_string(path)
                taken.add((path, key))
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
        if "count" in node._fields:  # tuples have a method of this name
            count = _common_count({p: counts.get(p, 0) for p in paths}, problems)
            new["count"] = put_number(node.count, count)
            for name, i, given in (("log_b1", 0, b1), ("log_b2", 1, b2)):
                if getattr(node, name, None) is not None:
                    betas = {betas_of(table[p].group)[i] for p in paths if p in table}
                    new[name] = _log_product(
                        name[-2:], getattr(node, name), count, given, betas, problems
                    )
        elif getattr(node, "step", None) is not None:
            new["step"] = put_number(node.step, step)
        return node._replace(**new)

    filled = _map_states(fill, state, problems)
    for path, there in table.items():
        for key in arrays[path]:
            if (path, key) not in taken:
                problems.add(
                    f"leaf {path}",
                    f"PyTorch has {key} of {there.name}, for which the state has no "
                    "place (another optimizer, or a frozen leaf)",
                )
    problems.raise_if_any()
    return filled


def to_torch_state_dict(
    state: optax.OptState,
    params: optax.Params,
    param_groups: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
) -> dict[str, Any]:
    """The dict that `torch.optim`'s `optimizer.load_state_dict` takes, from a state.

    The moments go over bit for bit, as tensors of the dtype that they have here;
    `load_state_dict` casts them to that of PyTorch's parameters. `step` is a float32
    scalar, as PyTorch stores it. The groups are those that are given, with all their
    keys, but with the hyperparameters that the next update here would use: `lr`,
    `betas` or `momentum`, `weight_decay`. A state has one learning rate: that of the
    first group it trains, and the others keep their ratio to it; so does the decay,
    whose zeros stay. What is the same number up to the state's float32 is not touched.

    What a state does not know is the groups' own affair: `eps`, `nesterov`, `maximize`,
    `dampening` (the momentum for `sgd(dampened=True)`), `decoupled_weight_decay`.

    A scheduler's own state is not in here: PyTorch's `scheduler.load_state_dict` needs
    its `last_epoch`, the number of updates done.

    Args:
        state: of an optimizer, as :func:`from_torch_state_dict` fills it.
        params: the tree that it was made for.
        param_groups: `optimizer.state_dict()["param_groups"]` of the optimizer in
            PyTorch that will go on, or those of the checkpoint that it began with.
        names: see :func:`from_torch_state_dict`, also for the following.
        rename: see there.
        layout: see there.

    Returns:
        `{"state": {number: {...}}, "param_groups": [...]}`. Before the first update an
        Adam state has no entries, as in PyTorch. Needs PyTorch.

    Raises:
        ValueError: all that does not fit, in one message: a leaf with moments that has
            no name, two states for one leaf, groups of another optimizer, or with an
            `amsgrad` or `momentum` that contradicts the moments.

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
    given = {"state": {}, "param_groups": groups}
    table = torch_parameters(given, params, names, rename, problems)
    entries: dict[str, dict[str, Any]] = {}

    def read(node):
        if isinstance(node, HyperparamsState):
            _map_states(read, node.inner_state)
        if not isinstance(node, _MOMENTS):
            return node
        count = None
        if "count" in node._fields:  # tuples have a method of this name
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
                    problems.add(f"leaf {path}", f"{slot} is there twice")
                if count == 0:
                    continue
                if count is not None:
                    entry["step"] = to_tensor(np.asarray(count, np.float32))
                array = np.asarray(leaf)
                entry[key] = to_tensor(turn(layout, path, array, "to_torch", problems))
        return node

    _map_states(read, state, problems)
    updated = [_group_in_force(group, state, table, problems) for group in groups]
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
    """A tree of parameters, and of batch statistics, from `net.state_dict()`.

    With the mapping of :func:`from_torch_state_dict`, since moments without the weights
    that they belong to are of no use. PyTorch's `running_mean` and `running_var` find
    leaves named `mean` and `var`; `num_batches_tracked` is left out.

    Args:
        state_dict: from name to tensor or array.
        params: the tree to be filled, of arrays or `ShapeDtypeStruct`.
        rename: see :func:`from_torch_state_dict`.
        layout: see there.

    Returns:
        A tree like params, of arrays that share no memory with the tensors.

    Raises:
        ValueError: all that does not fit, in one message with the paths of the leaves.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> there = {"fc.weight": np.arange(6.0).reshape(3, 2), "fc.bias": np.ones(3)}
        >>> print(params_from_torch_state_dict(there, params)["fc"]["kernel"])
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
        array = turn(layout, path, to_array(state_dict[name]), "from_torch", problems)
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
    """From PyTorch's names to tensors: what `net.load_state_dict` takes.

    Args:
        params: the tree of parameters, with batch statistics or without.
        names: of PyTorch's parameters and buffers, `list(net.state_dict())`. Those that
            end in `num_batches_tracked` are left out: pass `strict=False` there.
        rename: see :func:`from_torch_state_dict`.
        layout: see there.

    Returns:
        A dict of tensors. Needs PyTorch.

    Raises:
        ValueError: all that does not fit, in one message.
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
            turn(layout, path, np.asarray(leaves[path]), "to_torch", problems)
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
    """Maps over the states that are known here; an array in any other is a problem."""

    def apply(path, node):
        if isinstance(node, _KNOWN):
            return f(node)
        if problems is not None:
            problems.add(
                f"state {path_string(path)}",
                "is of a transformation that PyTorch does not have. Convert the state "
                "of the one inside of it",
            )
        return node

    return jax.tree_util.tree_map_with_path(
        apply, state, is_leaf=lambda x: isinstance(x, _KNOWN)
    )


def _slot_paths(state: Any) -> dict[str, None]:
    """The leaves that a state has moments of, in order."""
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


def _hyperparams_states(state: Any) -> list[HyperparamsState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, HyperparamsState))
    return [leaf for leaf in leaves if isinstance(leaf, HyperparamsState)]


def _groups_of(
    node: HyperparamsState, root: Any, table: dict[str, Parameter]
) -> list[Mapping[str, Any]]:
    """The groups that a state trains, in PyTorch's order."""
    paths: Any = _slot_paths(node.inner_state)
    if not paths and len(_hyperparams_states(root)) == 1:
        paths = table  # SGD without momentum
    groups: list[Mapping[str, Any]] = []
    for path, there in table.items():
        if path in paths and not any(there.group is group for group in groups):
            groups.append(there.group)
    return groups


def _common_count(counts: dict[str, int], problems: Problems) -> int:
    often = collections.Counter(counts.values())
    common = max(often, key=lambda count: (often[count], count), default=0)
    for path, count in counts.items():
        if count != common:
            problems.add(
                f"leaf {path}",
                f"has done {count} steps, most of the others {common}. This optimizer "
                "has one count for all: freeze the leaf, give it an optimizer of its "
                "own (optax.partition), or use optimizer_from_torch_state_dict",
            )
    return common


def _log_product(
    name: str, old: LogProduct, count: int, given: Any, betas: set, problems: Problems
) -> LogProduct:
    """The logarithm of the product of the betas in the steps done."""
    if given is None:
        if len(betas) > 1:
            problems.add(name, f"differs between the groups of one optimizer: {betas}")
        given = min(betas, default=0.0)
    if isinstance(given, Phases):
        given = given.schedule(name)
    if callable(given):
        given = given(np.arange(count))
    given = np.asarray(given, np.float64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) < count):
        raise ValueError(
            f"{name} must be a number or one for each of the {count} steps done, got "
            f"the shape {given.shape}"
        )
    values = given[:count] if given.ndim else given
    if not np.all((values >= 0) & (values < 1)):
        raise ValueError(f"{name} must be in [0, 1) in the steps done, got {given}")
    dtype = np.dtype(jax.tree.leaves(old.total)[0].dtype)
    # As in an update: not quite the logarithm of 0.
    logs = np.log1p(-np.minimum(1 - values, 1 - float(jnp.finfo(dtype).epsneg)))
    exact = math.fsum(logs) if given.ndim else count * float(logs)
    total = float(np.asarray(exact, dtype))
    return LogProduct(put_number(old.total, total), put_number(old.lost, total - exact))


# ---------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------


def _contradiction(group: Mapping[str, Any], node: Any) -> str | None:
    """Why the moments cannot be those of an optimizer with such a group."""
    if hasattr(node, "trace") != is_sgd(group):
        kinds = ("Adam", "SGD") if is_sgd(group) else ("SGD", "Adam")
        return f"the state is of {kinds[0]}, PyTorch's group of {kinds[1]}"
    if hasattr(node, "mu") and hasattr(node, "nu_max") != bool(group["amsgrad"]):
        here = "has" if hasattr(node, "nu_max") else "has no"
        return f"the state {here} nu_max, but PyTorch's amsgrad is {group['amsgrad']}"
    return None


def _with_values(
    node: HyperparamsState, groups: list[Mapping[str, Any]]
) -> HyperparamsState:
    """With the hyperparameters that PyTorch had in force, for those who read them."""
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
        values["b1"], values["b2"] = betas_of(groups[0])
    new, last = dict(node.hyperparams), list(node.last_values)
    for i, name in enumerate(sorted(new)):
        if name in values and not jax.tree.leaves(node.overridden[i])[0]:
            new[name] = put_number(new[name], values[name])
            last[i] = put_number(last[i], values[name])
    return node._replace(hyperparams=new, last_values=tuple(last))


def _group_in_force(
    group: Mapping[str, Any],
    state: Any,
    table: dict[str, Parameter],
    problems: Problems,
) -> dict[str, Any]:
    """A copy of the group with the values that the state has for it."""
    new = copy.deepcopy(dict(group))
    nodes = _hyperparams_states(state)
    mine = [
        node
        for node in nodes
        if any(group is other for other in _groups_of(node, state, table))
    ]
    if not mine:
        if len(nodes) > 1 and len(group["params"]):
            problems.add(
                f"group of {group['params']}",
                "no state has moments of it, and several have hyperparameters",
            )
        return new
    node, trained = mine[0], _groups_of(mine[0], state, table)
    dtype = jax.tree.leaves(node.last_values)[0].dtype
    values = {k: float(jax.tree.leaves(v)[0]) for k, v in node.hyperparams.items()}

    def in_force(there, here):
        return there if np.asarray(float(there), dtype) == here else here

    def scaled(there, base, here):
        if np.asarray(float(base), dtype) == here:
            return there
        return here * (float(there) / float(base))

    if "learning_rate" in values:
        rate = values["learning_rate"]
        if np.asarray(float(trained[0]["lr"]), dtype) != rate:
            new["lr"] = rate * rate_ratio(group, trained[0])
    if "weight_decay" in values:
        decays = [g["weight_decay"] for g in trained if float(g["weight_decay"])]
        if decays:
            new["weight_decay"] = scaled(
                group["weight_decay"], decays[0], values["weight_decay"]
            )
        elif values["weight_decay"]:
            problems.add(
                f"group of {group['params']}",
                f"the state has the weight_decay {values['weight_decay']:g}, which is "
                "0 in all of PyTorch's groups",
            )
    if "momentum" in values:
        new["momentum"] = in_force(group.get("momentum", 0.0), values["momentum"])
    if "betas" in group:
        new["betas"] = tuple(
            in_force(there, values.get(name, float(there)))
            for there, name in zip(group["betas"], ("b1", "b2"), strict=True)
        )
    return new
