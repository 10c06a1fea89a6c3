"""The learning rate, and rules with a scheduled scalar."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_factor, check_params
from .._transformation import Transformation
from .._tree import (
    ScalarOrSchedule,
    arrays_only,
    broadcast_factor,
    increment,
    map_leaves,
    schedule_step,
)
from ..masks import Mask, leaf_flags, resolve_mask


def scheduled(
    name: str,
    value: ScalarOrSchedule,
    rule: Callable[[jax.Array, jax.Array, Any], jax.Array],
    mask: Mask = None,
    *,
    needs_params: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> Transformation:
    """Replaces u by `rule(value, u, parameter)` at every leaf that the mask selects.

    The rule is a function of a module: what is compiled for it is found again.
    """

    def init(params: Any) -> Any:
        resolve_mask(mask, params)  # refuses a mask that does not match
        if callable(value):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if needs_params:
            check_params(params)
        current = value(schedule_step(state.count)) if callable(value) else value
        selected = None if mask is None else tuple(leaf_flags(mask, params, updates))
        params = arrays_only(params)
        return _apply_rule(
            updates, state, params, current, rule, selected, needs_params, name
        )

    return Transformation(init, update, arguments=arguments or {})


# One program outside of jit, too, where each operation would be a dispatch.
@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7), inline=True)
def _apply_rule(updates, state, params, value, rule, selected, needs_params, name):
    def leaf(i, u, p=None):
        if selected is not None and not selected[i]:
            return (u,)
        p = p if p is None else p.astype(u.dtype)
        factor = broadcast_factor(name, jnp.asarray(value, u.dtype), u)
        return (rule(factor, u, p),)

    trees = {"params": params} if needs_params else {}
    (updates,) = map_leaves(leaf, updates, trees, carried=0, params=params)
    if isinstance(state, optax.ScaleByScheduleState):
        state = optax.ScaleByScheduleState(increment(state.count))
    return updates, state


def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> Transformation:
    r"""$u \leftarrow -\eta_t u$: the last link of a chain that descends.

    Unlike Optax's, its scalar takes the dtype of each leaf, so a float64 schedule does
    not promote float32 updates.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, an array that broadcasts to
            each leaf, or a schedule of the step. None leaves the updates as they are:
            there is no change of sign either.
        flip_sign: False multiplies by $+\eta_t$. To maximise with a decay that still
            shrinks, use `maximize=True` of the optimizers instead.

    Returns:
        A transformation.

    Raises:
        TypeError, ValueError: learning_rate is not a finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_learning_rate(0.5)
        >>> print(tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))[0])
        -1.0
    """
    arguments = {"learning_rate": learning_rate}
    if learning_rate is None:
        identity = optax.with_extra_args_support(optax.identity())
        return Transformation(*identity, arguments=arguments)
    check_factor("learning_rate", learning_rate)
    return scheduled(
        "learning_rate",
        learning_rate,
        _descend if flip_sign else _ascend,
        needs_params=False,
        arguments=arguments,
    )


def _descend(learning_rate, u, p):
    del p
    return -learning_rate * u


def _ascend(learning_rate, u, p):
    del p
    return learning_rate * u
