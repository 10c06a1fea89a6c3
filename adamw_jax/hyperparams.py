"""Hyperparameters in the state, scheduled by one counter."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
        >>> from adamw_jax import clip_by_global_norm, current_hyperparams, one_cycle
        >>> from adamw_jax import scale_by_adam, scale_by_learning_rate
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
        if name in BETAS and isinstance(x, jax.Array) and _is_narrow(x):
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
        _check_state(state, names)
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


def _check_state(state: Any, names: list[str]) -> None:
    if not isinstance(state, HyperparamsState):
        raise TypeError(
            "the state must be that of tx.init (update takes gradients, state and "
            f"parameters), got a {type(state).__name__}: from_optax_state converts a "
            "state of Optax"
        )
    if sorted(state.hyperparams) != names:
        raise ValueError(
            f"the state must hold {', '.join(names)}, got that of another optimizer "
            f"with {', '.join(sorted(state.hyperparams))}"
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


# One program, because outside of `jit` each operation costs as much as a dispatch.
@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def values_in_force(scheduled, hyperparams, last_values, names, follows):
    """The values of this step, and the next hyperparams and last_values."""
    columns = []
    for new, old, last, name, follow in zip(
        scheduled, hyperparams, last_values, names, follows, strict=True
    ):
        new = jnp.asarray(new, compute_dtype(last.dtype))
        edited = _is_edited(old, last)
        if follow:  # an edit by hand holds until the array changes
            same = new.astype(last.dtype)
            edited &= (same == last) | (jnp.isnan(same) & jnp.isnan(last))
        hold = is_overridden(last) | edited
        value = jnp.where(hold, _widen(name, old, new.dtype), new)
        stays = is_overridden(last) if follow else hold
        # The dtypes of the state that was passed, for lax.scan.
        next_last = jnp.where(stays, OVERRIDDEN, new).astype(last.dtype)
        columns.append((value, value.astype(last.dtype), next_last))
    return tuple(zip(*columns, strict=True))


# Not NaN, which a schedule may return by mistake at one step. The mean of two states of
# which one is overridden is overridden.
OVERRIDDEN = -math.inf


def is_overridden(last_value: Any) -> Any:
    """Whether an override stands against the number or schedule of the optimizer."""
    return jnp.isneginf(last_value)


BETAS = ("b1", "b2", "momentum")


def _widen(name: str, value: jax.Array, dtype: Any) -> jax.Array:
    """Casts a stored value, undoing that bfloat16 rounds a beta of .999 to 1."""
    wide = value.astype(dtype)
    if name in BETAS and _is_narrow(value):
        wide = jnp.minimum(wide, 1 - float(jnp.finfo(value.dtype).epsneg))
    return wide


def _is_narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def _is_edited(value: jax.Array, last: jax.Array) -> jax.Array:
    """Whether a value differs from what its schedule gave; NaN equals NaN.

    A compiler may compute a schedule twice, once for each of the two, with different
    last bits.
    """
    tolerance = 8 * float(max(jnp.finfo(x.dtype).eps for x in (value, last)))
    dtype = compute_dtype(last.dtype)
    value, last = value.astype(dtype), last.astype(dtype)
    close = jnp.abs(value - last) <= tolerance * jnp.abs(last)
    return ~(close | (value == last) | (jnp.isnan(value) & jnp.isnan(last)))
