"""Hyperparameters in a state: read and override them, also by group."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_scalar
from ._tree import is_variable
from .hyperparams import BETAS, OVERRIDDEN, HyperparamsState, ScaleByGroupState


def current_hyperparams(
    state: optax.OptState, /, *, group: Any = None
) -> dict[str, jax.Array]:
    """Reads the hyperparameters in force: those that the last update used.

    Before the first update these are the values of step 0, and after
    :func:`override_hyperparams` the new ones. So read the state that an update returns
    to log the values of that update. Works inside `jit`, and on anything that contains
    the optimizer's state: that of a chain or of `optax.partition`, an `nnx.Optimizer`,
    a `TrainState`.

    Args:
        state: an optimizer state.
        group: one of :func:`hyperparam_groups`, if there are several optimizers, or
            one of :func:`scale_by_group`. None: the one optimizer.

    Returns:
        A dict from name to scalar, float32 (float64 for float64 parameters). For a
        group of :func:`scale_by_group` they are those of the optimizer in front of it,
        with the `learning_rate` of the group, and the `multiplier`; if there are
        several optimizers in front of it, the multiplier alone.

    Raises:
        ValueError: the state holds the hyperparameters of no optimizer, or of several
            and `group` is None; or there is no such group.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import adamw, sgd
        >>> state = adamw(1e-3, weight_decay=0.1).init(jnp.zeros(2))
        >>> [f"{k}={v:.3f}" for k, v in current_hyperparams(state).items()]
        ['b1=0.900', 'b2=0.999', 'learning_rate=0.001', 'weight_decay=0.100']
        >>> tx = optax.partition({"body": sgd(0.5), "head": sgd(1.0)}, {
        ...     "layer": "body", "out": "head"})
        >>> state = tx.init({"layer": jnp.zeros(2), "out": jnp.zeros(2)})
        >>> print(current_hyperparams(state, group="body")["learning_rate"])
        0.5
    """
    parts = _find_parts(_optimizer_state(state))
    part = _select(parts, group)
    if part.label is None:
        return _read(part.node.hyperparams)
    multiplier = _read(part.node.multipliers)[part.label]
    scaled = [p for p in parts if p.label is None and _acts_before(p.path, part.path)]
    values = _read(scaled[0].node.hyperparams) if len(scaled) == 1 else {}
    if "learning_rate" in values:
        rate = values["learning_rate"]
        values["learning_rate"] = multiplier.astype(rate.dtype) * rate
    return values | {"multiplier": multiplier}


def hyperparam_groups(state: optax.OptState, /) -> tuple[str, ...]:
    """The groups that :func:`current_hyperparams` can read, by name.

    A group is an optimizer with a label in `optax.partition` or a name in
    `optax.named_chain` (in nested ones `outer/inner`), or one of several optimizers,
    named by its position in a chain; and each group of :func:`scale_by_group`. Where
    these names are not unique, they have the position in front.

    Args:
        state: as for :func:`current_hyperparams`.

    Returns:
        The names; none for one optimizer that has no label.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import adamw, scale_by_group
        >>> tx = optax.chain(
        ...     adamw(3e-3),
        ...     scale_by_group({"body": 0.1, "head": 1.0}, {"a": "body", "b": "head"}))
        >>> state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
        >>> for group in hyperparam_groups(state):
        ...     rate = current_hyperparams(state, group=group)["learning_rate"]
        ...     print(f"{group} {rate:.4f}")
        body 0.0003
        head 0.0030
    """
    parts = _find_parts(_optimizer_state(state))
    return tuple(part.name for part in parts if part.name)


def override_hyperparams(
    state: optax.OptState,
    /,
    *,
    group: Any = None,
    **values: float | jax.Array | None,
) -> optax.OptState:
    """Sets hyperparameters in the state, from the next update on.

    The new value stays in force, also against a schedule or phases, until it is
    overridden again or released with None. After a release the next update takes the
    value of the schedule at its step.

    An `nnx.Optimizer` is changed in place, and returned. All else is left as it is, and
    a new state is returned.

    Args:
        state: as for :func:`current_hyperparams`.
        group: as for :func:`current_hyperparams`. A group of :func:`scale_by_group` has
            one value of its own, the `multiplier`.
        **values: by name, a number or a traced scalar, or None to release the override.
            For a state made by `jax.vmap`, also an array with one value per member.

    Returns:
        The new state; nothing is retraced.

    Raises:
        ValueError: an unknown name, a negative or NaN value, b1 or b2 not in [0, 1); or
            as for :func:`current_hyperparams`.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw, one_cycle
        >>> tx = adamw(one_cycle(1e-2, steps=10))
        >>> state = override_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.5)
        >>> _, state = tx.update(jnp.ones(2), state, jnp.zeros(2))
        >>> float(current_hyperparams(state)["learning_rate"])
        0.5
    """
    optimizer_state = _optimizer_state(state)
    part = _select(_find_parts(optimizer_state), group)
    if part.label is None:
        new = _override(part.node, "hyperparams", values)
    else:
        if unknown := sorted(values.keys() - {"multiplier"}):
            raise ValueError(
                f"group {part.name} of scale_by_group has a multiplier only, which "
                f"multiplies the learning rate of all groups; got {', '.join(unknown)}"
            )
        by_label = {part.label: values["multiplier"]} if values else {}
        new = _override(part.node, "multipliers", by_label)
    if optimizer_state is state:
        return _replace_at(state, part.path, new)
    variables = jax.tree.leaves(_own_values(part.node), is_leaf=is_variable)
    if all(map(is_variable, variables)):
        # Not replaced: functions that were compiled around them would not see new ones.
        for variable, leaf in zip(
            variables, jax.tree.leaves(_own_values(new)), strict=True
        ):
            variable[...] = leaf
    else:
        cast(Any, state).opt_state = _replace_at(optimizer_state, part.path, new)
    return state


class _Part(NamedTuple):
    """An optimizer, or with a label one group of scale_by_group, in a state."""

    name: str
    path: tuple[Any, ...]
    node: Any  # HyperparamsState or ScaleByGroupState
    label: Any = None


def _find_parts(state: Any) -> list[_Part]:
    """All parts, with names by which they can be told apart."""
    parts: list[_Part] = []

    def find(tree, path, kinds):
        for below, node in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, kinds)
        ):
            where = (*path, *below)
            if isinstance(node, ScaleByGroupState):
                parts.extend(_Part("", where, node, x) for x in node.multipliers)
            elif isinstance(node, HyperparamsState):
                parts.append(_Part("", where, node))
                inner = (*where, jax.tree_util.GetAttrKey("inner_state"))
                find(node.inner_state, inner, ScaleByGroupState)

    find(state, (), (HyperparamsState, ScaleByGroupState))
    dict_key, position, attribute = (
        getattr(jax.tree_util, f"{name}Key") for name in ("Dict", "Sequence", "GetAttr")
    )
    names = [""] * len(parts)
    one_optimizer = sum(part.label is None for part in parts) == 1
    for keys in ((dict_key,), (dict_key, position), (dict_key, position, attribute)):
        candidates = [_join_keys(part, keys) for part in parts]
        for i, name in enumerate(candidates):
            # Only a label names an optimizer that is the only one.
            needs_name = parts[i].label is not None or not one_optimizer
            wanted = not names[i] and (needs_name or keys == (dict_key,))
            if wanted and candidates.count(name) == 1:
                names[i] = name
    return [part._replace(name=x) for part, x in zip(parts, names, strict=True)]


def _join_keys(part: _Part, keys: tuple[type, ...]) -> str:
    used = [key for key in part.path if isinstance(key, keys)]
    names = [jax.tree_util.keystr((key,), simple=True) for key in used]
    return "/".join(names if part.label is None else [*names, str(part.label)])


def _select(parts: list[_Part], group: Any) -> _Part:
    """The part with this name, or the one optimizer if it is None."""
    names = [part.name for part in parts if part.name]
    listed = ", ".join(names) or "none"
    if group is not None:
        found = [part for part in parts if part.name and part.name == str(group)]
        if not found:
            raise ValueError(f"there is no group {group!r}; the groups are: {listed}")
        return found[0]
    optimizers = [part for part in parts if part.label is None]
    if len(optimizers) != 1:
        hint = f"; pass a group, one of {listed}" if names else ""
        raise ValueError(
            "the state must hold the hyperparameters of one optimizer, got those of "
            f"{len(optimizers)} optimizers{hint}"
        )
    return optimizers[0]


def _acts_before(optimizer: tuple, group: tuple) -> bool:
    """Whether the updates of the optimizer pass through the group, by their paths."""
    for one, other in zip(optimizer, group, strict=False):
        if one != other:
            kind = jax.tree_util.SequenceKey
            both = isinstance(one, kind) and isinstance(other, kind)
            return both and one.idx < other.idx
    return len(optimizer) < len(group)  # it contains the group


def _optimizer_state(state: Any) -> Any:
    """The state that an object such as nnx.Optimizer holds, if it can be assigned to.

    A frozen dataclass such as Flax's TrainState is a tree like any other.
    """
    parameters = getattr(type(state), "__dataclass_params__", None)
    if isinstance(state, tuple) or (parameters is not None and parameters.frozen):
        return state
    return getattr(state, "opt_state", state)


def _own_values(node: Any) -> Any:
    return node._replace(**{k: () for k in ("inner_state",) if k in node._fields})


def _replace_at(tree: Any, path: tuple, new: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda p, x: new if p == path else x,
        tree,
        is_leaf=lambda p, _: p == path,
        is_leaf_takes_path=True,
    )


def _read(values: dict[Any, Any]) -> dict[Any, jax.Array]:
    # Unwraps the Variables in which nnx.Optimizer keeps a state.
    return {k: jnp.asarray(jax.tree.leaves(v)[0]) for k, v in values.items()}


def _override(node: Any, field: str, values: dict[Any, Any]) -> Any:
    new = dict(getattr(node, field))
    names, last = sorted(new), list(node.last_values)
    for name, value in values.items():
        if name not in new:
            raise ValueError(
                f"no hyperparameter {name}; the state holds {', '.join(names)}"
            )
        i = names.index(name)
        if value is not None:
            is_multiplier = field == "multipliers"
            _check_override("multiplier" if is_multiplier else name, value, new[name])
            new[name] = _fill_like(new[name], value)
        # Equal after a release: a difference would be an edit by hand.
        released = jax.tree.leaves(new[name])[0]
        last[i] = _fill_like(last[i], released if value is None else OVERRIDDEN)
    return node._replace(**{field: new}, last_values=tuple(last))


def _check_override(name: str, value: Any, old: Any) -> None:
    shape = np.shape(jax.tree.leaves(old)[0])
    if shape and np.shape(value) == shape:
        return  # one value per member of a state made by vmap
    check_scalar(name, value, below=1 if name in BETAS else math.inf)


def _fill_like(old: Any, value: Any) -> Any:
    """Fills arrays like the old ones, also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).at[...].set(jnp.asarray(value, x.dtype)), old
    )
