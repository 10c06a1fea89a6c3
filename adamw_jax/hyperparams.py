"""Hyperparameters in the state: one counter drives them, users read and change them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_scalar
from ._transformation import Transformation, step_with_factor
from ._tree import ScalarOrSchedule, compute_dtype, find_states, increment, scalar_dtype
from .apply import describe_step
from .schedules.phases import Phases


class HyperparamsState(NamedTuple):
    """The values in force, that is those that the next update will use."""

    step: jax.Array  # int32 []: updates done; the one counter of all schedules
    hyperparams: dict[str, jax.Array]  # float32 [] each (float64 with float64 params)
    # Both by sorted name; tuples, so that optax.tree.get finds each name once.
    last_values: tuple[jax.Array, ...]  # the same as the last update stored them
    overridden: tuple[jax.Array, ...]  # int32 [] each: 1 ignores the schedule
    inner_state: optax.OptState


def with_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    **hyperparams: ScalarOrSchedule | Phases,
) -> Transformation:
    """Keeps the hyperparameters of a transformation in its state.

    All schedules are read at one step counter. The state holds the values in force:
    read them with :func:`current_hyperparams`, change them with
    :func:`override_hyperparams`, both also inside `jit`; a new value is data and does
    not retrace. A value that was changed in the state, by that function or by hand,
    holds. Otherwise the number or schedule given here decides, also when the
    transformation was built anew around an old state, with another learning rate.

    A beta that is kept in the state is a float32 number, to which moments and bias
    correction both keep: the first update is exact, and .999 acts as .99900001.

    Unlike `optax.inject_hyperparams`: values are float32 whatever the parameters'
    dtype (a b2 of .999 is 1 in bfloat16); only what is named here is a
    hyperparameter, so a callable mask in the factory is never taken for a schedule;
    one counter instead of one per schedule; an override of a scheduled value holds.

    Args:
        factory: called with the current values by keyword while tracing; builds the
            transformation. What else it needs it closes over.
        **hyperparams: each a number, a traced scalar, a schedule (from the number of
            updates done, int32, to a value), or :class:`Phases`. Phases, given for
            any one name, drive every hyperparameter that they set, in place of the
            value given for it here; `b1` drives `momentum` where there is no b1.

    Returns:
        A transformation; additional arguments of `update` reach the inner one. It has
        a `step` if the inner one has.

    Raises:
        ValueError: phases that set a hyperparameter which is not named here, or do not
            set the one they were given for; what the factory raises, at once.

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
    if not hyperparams:
        raise ValueError("with_hyperparams needs at least one hyperparameter, got none")
    schedules = _resolve_phases(hyperparams)
    names = sorted(schedules)
    # The factory sees the first values now, so bad arguments are refused at once.
    example = factory(**{name: _first_value(x) for name, x in schedules.items()})

    def scheduled_values(step, dtype):
        """Copies, so that the state can be donated."""

        def value(schedule):
            return jnp.array(schedule(step) if callable(schedule) else schedule, dtype)

        return {name: value(schedules[name]) for name in names}

    def copies(values):  # so that both can be donated
        return tuple(jnp.copy(values[name]) for name in names)

    def init(params):
        step = jnp.zeros([], jnp.int32)
        values = scheduled_values(step, scalar_dtype(params))
        overridden = tuple(jnp.zeros([], jnp.int32) for _ in names)
        inner_state = factory(**values).init(params)
        return HyperparamsState(step, values, copies(values), overridden, inner_state)

    def before(state):
        """The inner transformation of this step, and what completes the new state."""
        (dtype,) = {compute_dtype(x.dtype) for x in state.last_values}
        stored = {k: jnp.asarray(v, dtype) for k, v in state.hyperparams.items()}
        flags = zip(names, state.last_values, state.overridden, strict=True)
        overridden = tuple(
            flag | _differ(stored[name], last) for name, last, flag in flags
        )

        def current_values(step):
            values = scheduled_values(step, dtype)
            return {
                name: jnp.where(flag != 0, stored[name], values[name])
                for name, flag in zip(names, overridden, strict=True)
            }

        def after(inner_state):
            step = increment(state.step)
            values = current_values(step)
            return HyperparamsState(
                step, values, copies(values), overridden, inner_state
            )

        # Read again, since the optimizer may have been built anew around the state.
        return factory(**current_values(state.step)), after

    def update(updates, state, params=None, **extra_args):
        inner, after = before(state)
        updates, inner_state = optax.with_extra_args_support(inner).update(
            updates, state.inner_state, params, **extra_args
        )
        return updates, after(inner_state)

    def step(grads, state, params, *, factor=None, **extra_args):
        inner, after = before(state)
        params, inner_state = step_with_factor(
            inner, grads, state.inner_state, params, factor, **extra_args
        )
        return params, after(inner_state)

    def factor(grads, state):
        inner, after = before(state)
        scale, inner_state = cast(Transformation, inner).factor(
            grads, state.inner_state
        )
        return scale, after(inner_state)

    can = {"step": step, "factor": factor}
    return Transformation(
        init,
        update,
        factory=factory,
        hyperparams=schedules,
        describe_step=functools.partial(describe_step, example),
        **{name: can[name] for name in can if hasattr(example, name)},
    )


def _resolve_phases(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """Replaces phases by their schedule for each hyperparameter that they set."""
    schedules = dict(hyperparams)
    given = {k: v for k, v in hyperparams.items() if isinstance(v, Phases)}
    if any(phases is not next(iter(given.values())) for phases in given.values()):
        raise ValueError(f"{' and '.join(given)} were given different phases")
    for given_for, phases in given.items():
        for name in phases.names:
            target = scheduled_name(name, schedules)
            if target not in schedules:
                raise ValueError(
                    f"the phases set {name}, which is not a hyperparameter here; "
                    f"there are {', '.join(sorted(schedules))}"
                )
            schedules[target] = phases.schedule(name)
        if isinstance(schedules[given_for], Phases):
            raise ValueError(f"{given_for} was given phases that do not set it")
    return schedules


def scheduled_name(name: str, hyperparams: dict[str, Any]) -> str:
    """What phases call b1 is the momentum of SGD."""
    takes_momentum = "b1" not in hyperparams and "momentum" in hyperparams
    return "momentum" if name == "b1" and takes_momentum else name


def _first_value(schedule: Any) -> Any:
    """The value at step 0, as a number where it is one, so that it can be checked."""
    if callable(schedule):
        with jax.ensure_compile_time_eval():
            schedule = schedule(jnp.zeros([], jnp.int32))
    if isinstance(schedule, jax.Array) and not isinstance(schedule, jax.core.Tracer):
        return np.asarray(schedule)[()]
    return schedule


def current_hyperparams(state: optax.OptState) -> dict[str, jax.Array]:
    """The hyperparameters that the next update will use.

    Read before an update, they are the values of that update. Works inside `jit`, and
    on any state that contains the optimizer's: of a chain, of `optax.partition`.

    Args:
        state: an optimizer state.

    Returns:
        From name to scalar: float32, or float64 for float64 parameters.

    Raises:
        ValueError: the state holds none, or those of several optimizers; take the
            one you mean out of the state.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw
        >>> state = adamw(1e-3, weight_decay=0.1).init(jnp.zeros(2))
        >>> [f"{k}={v:.3f}" for k, v in current_hyperparams(state).items()]
        ['b1=0.900', 'b2=0.999', 'learning_rate=0.001', 'weight_decay=0.100']
    """
    found = find_states(state, HyperparamsState)
    if len(found) != 1:
        raise ValueError(
            f"the state holds the hyperparameters of {len(found)} optimizers, not 1"
        )
    # Out of the Variables of nnx.Optimizer, if it holds the state.
    return {k: jax.tree.leaves(v)[0] for k, v in found[0].hyperparams.items()}


def override_hyperparams(
    state: optax.OptState, **values: float | jax.Array | None
) -> optax.OptState:
    """A state in which hyperparameters have new values, from the next update on.

    The value holds, also where a schedule or phases drive the hyperparameter, until it
    is overridden again or released with None: then the next update uses again what
    the schedule says at its step.

    Args:
        state: as for :func:`current_hyperparams`.
        **values: by name: a number or a traced scalar, or None to release. For a state
            made by `jax.vmap` also an array with a value for each member.

    Returns:
        The new state; nothing is retraced.

    Raises:
        ValueError: an unknown name, a negative or NaN value, b1 or b2 not in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw, one_cycle
        >>> tx = adamw(one_cycle(1e-2, steps=10))
        >>> state = override_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.5)
        >>> _, state = tx.update(jnp.ones(2), state, jnp.zeros(2))
        >>> float(current_hyperparams(state)["learning_rate"])
        0.5
    """
    current_hyperparams(state)  # exactly one, or a clear error

    def override(node):
        if not isinstance(node, HyperparamsState):
            return node
        new, names = dict(node.hyperparams), sorted(node.hyperparams)
        last, overridden = list(node.last_values), list(node.overridden)
        for name, value in values.items():
            if name not in new:
                raise ValueError(f"no hyperparameter {name}; there are {names}")
            i = names.index(name)
            if value is not None:
                _check_override(name, value, new[name])
                new[name], last[i] = _fill(new[name], value), _fill(last[i], value)
            overridden[i] = _fill(overridden[i], value is not None)
        return node._replace(
            hyperparams=new, last_values=tuple(last), overridden=tuple(overridden)
        )

    return jax.tree.map(
        override, state, is_leaf=lambda x: isinstance(x, HyperparamsState)
    )


def _check_override(name: str, value: Any, old: Any) -> None:
    shape = np.shape(jax.tree.leaves(old)[0])
    if shape and np.shape(value) == shape:
        return  # one value for each member of a state that vmap made
    check_scalar(name, value, below=1 if name in ("b1", "b2", "momentum") else math.inf)


def _fill(old: Any, value: Any) -> Any:
    """The value in the place of another; also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).at[...].set(jnp.asarray(value, x.dtype)), old
    )


def _differ(value: jax.Array, last: jax.Array) -> jax.Array:
    """int32: whether a value was changed by hand. A NaN is no change of a NaN."""
    return ((value != last) & ~(jnp.isnan(value) & jnp.isnan(last))).astype(jnp.int32)
