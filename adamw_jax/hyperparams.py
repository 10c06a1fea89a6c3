"""Hyperparameters in the state: scheduled by one counter, read and overridden there."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_scalar
from ._dtypes import compute_dtype, scalar_dtype
from ._transformation import Transformation, keep_state_dtypes, step_with_factor
from ._tree import ScalarOrSchedule, increment, schedule_step
from .apply import describe_step
from .schedules.phases import Phases


class HyperparamsState(NamedTuple):
    """The hyperparameters in force, by name: those that the last update used.

    Before the first update they are those of step 0. All fields but the last are
    scalars, so that a state can be averaged and its rule of sharding can go by rank.
    """

    step: jax.Array  # int32 []: updates done; the one counter of all schedules
    hyperparams: dict[str, jax.Array]  # float32 [] each (float64 with float64 params)
    # By sorted name, so that optax.tree.get finds each name once: what the numbers and
    # schedules gave to the last update. A difference to hyperparams is an edit by hand;
    # -inf is an override, which stands until it is released.
    last_values: tuple[jax.Array, ...]
    inner_state: optax.OptState


class ScaleByGroupState(NamedTuple):
    """The multipliers in force, by label: those that the last update used."""

    multipliers: dict[Any, jax.Array]  # float32 [] each (float64 with float64 params)
    last_values: tuple[jax.Array, ...]  # as in HyperparamsState


def with_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    **hyperparams: ScalarOrSchedule | Phases,
) -> Transformation:
    """Keeps the hyperparameters of a transformation in its state.

    Every schedule is evaluated once per update, at the step of that update, and all at
    one counter. As in `optax.inject_hyperparams`, the state then holds the values that
    the update used; before the first update it holds those of step 0. Read them with
    :func:`current_hyperparams`, change them with :func:`override_hyperparams`, also
    inside `jit`: a new value is data and does not retrace. A value that was changed in
    the state, by that function or by hand, takes precedence. Otherwise the number or
    schedule passed here decides, also if the transformation was rebuilt around an old
    state, with another learning rate.

    An array, traced or not, is a number that may differ each time the transformation is
    built. A change of it also replaces a value that was changed by hand; only
    :func:`override_hyperparams` holds against it.

    A beta in the state is a float32 number, which moments and bias correction both use:
    the first update is exact, and .999 acts as .99900001.

    Differences from `optax.inject_hyperparams`:

    * values are float32 whatever the dtype of the parameters (in bfloat16 a b2 of .999
      is 1);
    * only the arguments named here are hyperparameters, so a callable mask in the
      factory is never mistaken for a schedule;
    * there is one counter, not one per schedule;
    * an override of a scheduled value stays in force.

    The named optimizers (:func:`adamw_jax.adamw` and so on) are built with this
    function, so they do not need `optax.inject_hyperparams`. Code that expects its
    state can still wrap them; edit the outer `hyperparams` then, which the inner state
    follows. Pass `static_args="mask"` with a callable mask, `base_learning_rate` with
    `decay_scale="schedule"`, and `hyperparam_dtype=jnp.float32` with bfloat16
    parameters. Phases cannot be wrapped.

    Args:
        factory: builds the transformation. It is called at trace time with the current
            values by keyword; other arguments belong in its closure.
        **hyperparams: each a number, a traced scalar, a schedule (from the number of
            updates done, int32, to a value), or :class:`Phases`. Phases, passed under
            any one name, drive every hyperparameter that they set and replace the value
            passed for it. Their `b1` drives `momentum` if there is no b1.

    Returns:
        A transformation that passes extra arguments of `update` on to the inner one. It
        has a `step` if the inner one has.

    Raises:
        ValueError: the phases set a hyperparameter that is not named here, or do not
            set the one under which they were passed. Errors of the factory are raised
            at once.
        TypeError: b1, b2 or momentum is an array narrower than float32.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import clip_by_global_norm, one_cycle, scale_by_adam
        >>> from adamw_jax import scale_by_learning_rate
        >>> tx = with_hyperparams(
        ...     lambda learning_rate, b1: optax.chain(
        ...         clip_by_global_norm(0.12),
        ...         scale_by_adam(b1, b2=0.99),
        ...         scale_by_learning_rate(learning_rate)),
        ...     learning_rate=one_cycle(3e-3, steps=1000), b1=0.9)
        >>> state = tx.init(jnp.zeros(3))
        >>> {k: f"{v:.5f}" for k, v in current_hyperparams(state).items()}
        {'b1': '0.95000', 'learning_rate': '0.00030'}
    """
    if not hyperparams or "group" in hyperparams:
        raise ValueError(
            "with_hyperparams needs at least one hyperparameter, and none can be "
            f"called group, got {', '.join(hyperparams) or 'none'}"
        )
    schedules = _resolve_phases(hyperparams)
    names = sorted(schedules)
    # Called with the values of step 0, so that bad arguments are refused at once.
    example = factory(**{name: _first_value(x) for name, x in schedules.items()})
    for name, x in schedules.items():
        if name in _BETAS and isinstance(x, jax.Array) and _is_narrow(x):
            raise TypeError(
                f"{name} must be a float32 or float64 array, got {x.dtype}, in which "
                ".999 is 1; to optax.inject_hyperparams pass hyperparam_dtype"
            )
    # Arrays may be other ones when the transformation is built again.
    follows = tuple(isinstance(schedules[name], jax.Array) for name in names)

    def scheduled_values(step):
        values = (schedules[name] for name in names)
        return tuple(x(step) if callable(x) else x for x in values)

    def init(params):
        step, dtype = jnp.zeros([], jnp.int32), scalar_dtype(params)
        # Copies, so that the state can be donated.
        last = tuple(jnp.array(x, dtype) for x in scheduled_values(step))
        values = dict(zip(names, map(jnp.copy, last), strict=True))
        inner_state = factory(**values).init(params)
        return HyperparamsState(step, values, last, inner_state)

    def begin(state):
        """Returns the inner transformation of this step and what ends the step."""
        # Evaluated here: the optimizer may have been rebuilt around the state.
        values, stored, last = values_in_force(
            scheduled_values(schedule_step(state.step)),
            tuple(jnp.asarray(state.hyperparams[name]) for name in names),
            state.last_values,
            tuple(names),
            follows,
        )

        def finish(inner_state):
            return HyperparamsState(
                increment(state.step),
                dict(zip(names, stored, strict=True)),
                last,
                inner_state,
            )

        return factory(**dict(zip(names, values, strict=True))), finish

    def update(updates, state, params=None, **extra_args):
        inner, finish = begin(state)
        updates, inner_state = keep_state_dtypes(inner).update(
            updates, state.inner_state, params, **extra_args
        )
        return updates, finish(inner_state)

    def step(grads, state, params, *, factor=None, **extra_args):
        inner, finish = begin(state)
        params, inner_state = step_with_factor(
            inner, grads, state.inner_state, params, factor, **extra_args
        )
        return params, finish(inner_state)

    def factor(grads, state):
        inner, finish = begin(state)
        scale, inner_state = cast(Transformation, inner).factor(
            grads, state.inner_state
        )
        return scale, finish(inner_state)

    methods = {"step": step, "factor": factor}
    return Transformation(
        init,
        update,
        factory=factory,
        hyperparams=schedules,
        wide_updates=getattr(example, "wide_updates", False),
        describe_step=functools.partial(describe_step, example),
        **{name: f for name, f in methods.items() if hasattr(example, name)},
    )


def _resolve_phases(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """Replaces phases by their schedule for each hyperparameter that they set."""
    schedules = dict(hyperparams)
    by_argument = {k: v for k, v in hyperparams.items() if isinstance(v, Phases)}
    if len({id(phases) for phases in by_argument.values()}) > 1:
        raise ValueError(
            f"{' and '.join(by_argument)} must be the same Phases, got different phases"
        )
    for argument, phases in by_argument.items():
        for name in phases.names:
            target = hyperparam_name(name, schedules)
            if target not in schedules:
                raise ValueError(
                    f"the phases set {name}, which is not a hyperparameter here; the "
                    f"hyperparameters are {', '.join(sorted(schedules))}"
                )
            schedules[target] = phases.schedule(name)
        if isinstance(schedules[argument], Phases):
            raise ValueError(
                f"{argument} was set to phases that do not set it; they set "
                f"{', '.join(phases.names)}"
            )
    return schedules


def hyperparam_name(name: str, hyperparams: dict[str, Any]) -> str:
    """The hyperparameter that phases call `name`: their b1 is the momentum of SGD."""
    has_momentum = "b1" not in hyperparams and "momentum" in hyperparams
    return "momentum" if name == "b1" and has_momentum else name


def _first_value(schedule: Any) -> Any:
    """The value at step 0, as a concrete number if possible, so that it is checked."""
    if callable(schedule):
        with jax.ensure_compile_time_eval():
            schedule = schedule(jnp.zeros([], jnp.int32))
    if isinstance(schedule, jax.Array) and not isinstance(schedule, jax.core.Tracer):
        return np.asarray(schedule)[()]
    return schedule


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
    variables = jax.tree.leaves(_own_values(part.node), is_leaf=_is_variable)
    if all(map(_is_variable, variables)):
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


def _is_variable(x: Any) -> bool:
    return hasattr(type(x), "raw_value")  # of nnx


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
        last[i] = _fill_like(last[i], released if value is None else _OVERRIDDEN)
    return node._replace(**{field: new}, last_values=tuple(last))


def _check_override(name: str, value: Any, old: Any) -> None:
    shape = np.shape(jax.tree.leaves(old)[0])
    if shape and np.shape(value) == shape:
        return  # one value per member of a state made by vmap
    check_scalar(name, value, below=1 if name in _BETAS else math.inf)


def _fill_like(old: Any, value: Any) -> Any:
    """Fills arrays like the old ones, also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).at[...].set(jnp.asarray(value, x.dtype)), old
    )


# One program, because outside of `jit` each operation costs as much as a dispatch.
@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def values_in_force(scheduled, hyperparams, last_values, names, follows):
    """The values of this step, and the next hyperparams and last_values."""
    columns = []
    for new, old, last, name, follow in zip(
        scheduled, hyperparams, last_values, names, follows, strict=True
    ):
        new = jnp.asarray(new, compute_dtype(last.dtype))
        edited = _differ(old.astype(new.dtype), last.astype(new.dtype))
        if follow:  # an edit by hand holds until the array changes
            edited &= ~_differ(new.astype(last.dtype), last)
        hold = is_overridden(last) | edited
        value = jnp.where(hold, _widen(name, old, new.dtype), new)
        stays = is_overridden(last) if follow else hold
        # The dtypes of the state that was passed, for lax.scan.
        next_last = jnp.where(stays, _OVERRIDDEN, new).astype(last.dtype)
        columns.append((value, value.astype(last.dtype), next_last))
    return tuple(zip(*columns, strict=True))


# Not NaN, which a schedule may return by mistake at one step. The mean of two states of
# which one is overridden is overridden.
_OVERRIDDEN = -math.inf


def is_overridden(last_value: Any) -> Any:
    """Whether an override stands against the number or schedule of the optimizer."""
    return jnp.isneginf(last_value)


_BETAS = ("b1", "b2", "momentum")


def _widen(name: str, value: jax.Array, dtype: Any) -> jax.Array:
    """Casts a stored value, undoing that bfloat16 rounds a beta of .999 to 1."""
    wide = value.astype(dtype)
    if name in _BETAS and _is_narrow(value):
        wide = jnp.minimum(wide, 1 - float(jnp.finfo(value.dtype).epsneg))
    return wide


def _is_narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def _differ(value: jax.Array, other: jax.Array) -> jax.Array:
    """Whether two scalars differ; NaN equals NaN."""
    return (value != other) & ~(jnp.isnan(value) & jnp.isnan(other))
