"""Conversion of optimizer states from and to PyTorch's state dicts.

PyTorch numbers parameters in the order of the optimizer's groups; here leaves have
paths. Each function takes the names that belong to the numbers, a `rename` from these
names to paths, and a `layout` that converts arrays. All mismatches, on either side, are
listed in one error. Only functions that make tensors import PyTorch.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._tree import find_states, path_string
from ..hyperparams import HyperparamsState, ScaleByGroupState, is_overridden
from ..schedules.phases import Phases
from ..transforms.bias_correction import LogProduct
from .arrays import (
    Layout,
    convert_layout,
    flax_layout,
    put_array,
    put_number,
    to_array,
    to_tensor,
)
from .checkpoint import as_optimizer_state_dict
from .eight_bit import decode_bitsandbytes, decode_blocks, encode_blocks
from .groups import Parameter, get_betas, is_sgd, step_count
from .names import Patterns, Rename, torch_parameters
from .problems import Problems
from .trained import (
    COUNTERS,
    MOMENTS,
    SLOTS,
    contradiction,
    fill_hyperparams,
    map_states,
    slot_paths,
    trained_groups,
    update_group,
)


def from_torch_state_dict(
    state_dict: Mapping[str, Any],
    state: optax.OptState,
    params: optax.Params,
    *,
    names: Iterable[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    step: int | None = None,
    b1: Any = None,
    b2: Any = None,
    labels: Any = None,
    skip: Patterns = None,
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
            paths of the leaves in that order. For a single group `net.state_dict()`
            will do, which is in the checkpoint: batch norm's buffers and copies of tied
            weights in it are left out. None: read from the dict, which has names if
            PyTorch's optimizer was built from `net.named_parameters()`, or if it is
            that of FSDP or of torch.distributed.checkpoint.
        rename: from such a name to the path of the leaf, or to the name that PyTorch
            would give that leaf, as a function or a dict. Names that are not in a dict
            are used unchanged. Then `conv1.weight` matches `conv1/weight`,
            `conv1/kernel`, `conv1/scale` or `conv1/embedding`, and `0.weight` also
            `layers/0/kernel`. Prefixes are removed as by
            :func:`params_from_torch_state_dict`, and rename gets what is left.
        layout: converts arrays. The default knows Flax's kernels.
        step: number of updates done, from which schedules continue. None: the highest
            count of PyTorch. SGD stores no count, so it needs this argument.
        b1: its value in the steps done, for `"exact"`: a number, a schedule of the
            step, :class:`Phases`, or an array.
        b2: likewise.
        labels: those passed to `optax.partition`, a tree or a function from params to
            one. Needed only if several of its optimizers are SGD without momentum,
            whose states do not say which leaves they train.
        skip: regular expressions, as for :func:`params_from_torch_state_dict`, of what
            not to read. A parameter without a leaf is left out. One with a leaf, such
            as another head, stays in its group and has no state, as before its first
            gradient.

    Returns:
        The new state, whose arrays share no memory with the tensors. Parameters without
        a state in PyTorch get zeros.

    Raises:
        ValueError: all mismatches in one message, with the paths of the leaves: a
            parameter without a leaf or a leaf without a parameter; moments that are
            missing, or for which the state has no place; shapes; dtypes that would lose
            bits; step counts that differ or are missing. Or names in another order than
            the moments; the dict of another optimizer, which may differ only by an
            option in its groups; no dict of an optimizer; or no step.

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
    state_dict = decode_bitsandbytes(as_optimizer_state_dict(state_dict))
    original, state = state, decode_blocks(state)
    problems = Problems("PyTorch's optimizer state does not fit:")
    table = torch_parameters(state_dict, params, names, rename, problems, skip)
    arrays, counts = {}, {}
    for path, parameter in table.items():
        arrays[path] = read_parameter_state(path, parameter, layout, problems)
        counts[path] = step_count(path, parameter, problems)
    if names is not None:
        _check_order(table, arrays, params, problems)
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
    trained = trained_groups(state, params, table, labels)
    groups = {id(node): node_groups for node, node_groups in trained}

    def fill(node):
        if isinstance(node, COUNTERS):
            return node._replace(count=put_number(node.count, step))
        if isinstance(node, HyperparamsState):
            new = node._replace(
                step=put_number(node.step, step),
                inner_state=map_states(fill, node.inner_state),
            )
            return fill_hyperparams(new, groups[id(node)])
        slots = {slot: key for slot, key in SLOTS.items() if hasattr(node, slot)}
        paths = slot_paths(node)
        new = {}
        for slot, key in slots.items():

            def leaf(path, old, key=key):
                path = path_string(path)
                used.add((path, key))
                if path not in table:
                    problems.add(f"leaf {path}", "no parameter has this name")
                    return old
                if problem := contradiction(table[path].group, node):
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

    filled = map_states(fill, state, problems)
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
    names: Iterable[str] | None = None,
    rename: Rename = None,
    layout: Layout = flax_layout,
    labels: Any = None,
    tx: optax.GradientTransformation | None = None,
    skip: Patterns = None,
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
        skip: as for :func:`from_torch_state_dict`; parameters without a leaf have no
            state in PyTorch then.

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
    if isinstance(param_groups, Mapping):
        raise TypeError(
            "param_groups must be optimizer.state_dict()['param_groups'], got a dict "
            f"with {', '.join(map(str, param_groups))}"
        )
    groups = [dict(group) for group in param_groups]
    state_dict = {"state": {}, "param_groups": groups}
    table = torch_parameters(state_dict, params, names, rename, problems, skip)
    entries: dict[str, dict[str, Any]] = {}

    def read(node):
        if isinstance(node, HyperparamsState):
            map_states(read, node.inner_state)
        if isinstance(node, ScaleByGroupState):
            _check_multipliers(node, problems)
        if not isinstance(node, MOMENTS):
            return node
        count = None
        if "count" in node._fields:  # every tuple has a method count
            count = int(jax.tree.leaves(node.count)[0])
        for slot, key in SLOTS.items():
            leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot, None))
            for path, leaf in leaves:
                path = path_string(path)
                if path not in table:
                    problems.add(f"leaf {path}", "has moments, but no parameter")
                    continue
                if problem := contradiction(table[path].group, node):
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

    map_states(read, decode_blocks(state), problems)
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
    trained = trained_groups(decode_blocks(following), params, table, labels)
    updated = [update_group(group, trained, problems) for group in groups]
    problems.raise_if_any()
    states = {
        parameter.number: entries[path]
        for path, parameter in table.items()
        if entries.get(path)
    }
    return {"state": states, "param_groups": updated}


def _check_multipliers(node: ScaleByGroupState, problems: Problems) -> None:
    """Notes the multipliers that PyTorch's groups do not have."""
    for label, last in zip(sorted(node.multipliers), node.last_values, strict=True):
        if is_overridden(jax.tree.leaves(last)[0]):
            problems.add(
                f"multiplier {label}",
                "is overridden, which PyTorch's groups would not show: release it with "
                "override_hyperparams, or set the learning rates of the groups",
            )


# ---------------------------------------------------------------------------
# the state of a parameter
# ---------------------------------------------------------------------------


def read_parameter_state(
    path: str, parameter: Parameter, layout: Layout, problems: Problems
) -> dict[str, np.ndarray]:
    """The moments of a parameter, by PyTorch's names, in the layout of its leaf."""
    arrays = {}
    for key, value in parameter.state.items():
        if key == "step" or value is None:
            continue
        try:
            array = to_array(value)
        except ValueError as error:
            problems.add(f"leaf {path}", f"{key} {error}")
            continue
        arrays[key] = convert_layout(layout, path, array, "from_torch", problems)
    return arrays


def _check_order(
    table: dict[str, Parameter],
    arrays: dict[str, dict[str, np.ndarray]],
    params: Any,
    problems: Problems,
) -> None:
    """Raises if the moments would fit the leaves in another order of the names."""
    leaves = {
        path_string(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    # Sorted, because a layout permutes the axes of some leaves and not of others.
    shapes = {
        path: (arrays[path][key].shape, leaves[path])
        for path in table
        for key in list(SLOTS.values())[::-1]
        if key in arrays[path]
    }
    moments, expected = (
        [tuple(sorted(pair[i])) for pair in shapes.values()] for i in (0, 1)
    )
    if moments == expected:
        return
    path, (shape, _) = next(
        item
        for item, one, other in zip(shapes.items(), moments, expected, strict=True)
        if one != other
    )
    where = (
        f"the moments at the place of {table[path].name} have shape {shape}, the leaf "
        f"{path} {leaves[path]}"
    )
    if sorted(moments) == sorted(expected):
        order = ""
        if moments == sorted(expected, key=lambda shape: len(shape) < 2):
            order = (
                "; they fit with the vectors last, as in groups with and without decay:"
                " sorted(names, key=lambda name: net.get_parameter(name).ndim < 2)"
            )
        raise ValueError(
            "names must be in the order of PyTorch's groups, the names of the first "
            f"group first, which is another order: {where}{order}"
        )
    problems.hint(f"Are names in the order of PyTorch's groups? Now {where}")


# ---------------------------------------------------------------------------
# counts and products
# ---------------------------------------------------------------------------


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
