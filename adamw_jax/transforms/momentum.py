"""Momentum."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_factor, check_storage_dtype
from .._transformation import Transformation
from .._tree import (
    ScalarOrSchedule,
    arrays_only,
    broadcast_factor,
    increment,
    map_leaves,
    schedule_step,
    zeros_like_params,
)


class _TraceFields(NamedTuple):
    trace: optax.Updates  # like params; accumulator_dtype
    step: jax.Array | None = None  # int32 []


class TraceState(_TraceFields, optax.TraceState):
    """The momentum buffer and, for a scheduled decay, the step of the schedule."""

    __slots__ = ()


def trace(
    decay: ScalarOrSchedule,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    dampened: bool = False,
) -> Transformation:
    r"""Momentum, $b_t = \mu b_{t-1} + g_t$; dampened, $\mu b_{t-1} + (1-\mu) g_t$.

    The update is $b_t$ or, with `nesterov`, $g_t + \mu b_t$ (dampened:
    $(1-\mu) g_t + \mu b_t$). The dampened form is the article's moving average. Its
    step does not grow with the momentum as $1/(1-\mu)$, so the two forms need different
    learning rates. The buffer starts at zero in both; PyTorch's `dampening` does not
    dampen the first gradient.

    Args:
        decay: $\mu$, usually in [0, 1); 1 sums the gradients. A number, a traced
            scalar, an array that broadcasts to each leaf, or a schedule of the step.
        nesterov: look one step ahead.
        accumulator_dtype: storage dtype of the buffer. None: that of the parameters,
            but at least float32.
        dampened: scale the gradient by $1-\mu$, which makes the buffer an average.

    Returns:
        A transformation whose updates have the dtype of the gradients, or of wider
        parameters if they are passed.

    Raises:
        TypeError, ValueError: decay is not a finite number; otherwise as for
            :func:`scale_by_adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = trace(0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(3):
        ...     u, state = tx.update(jnp.ones(1), state)
        >>> float(u[0])
        1.75

    References:
        Sutskever et al., `On the importance of initialization and momentum in deep
        learning <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    check_factor("decay", decay)
    check_storage_dtype("accumulator_dtype", accumulator_dtype)

    def init(params: Any) -> Any:
        step = jnp.zeros([], jnp.int32) if callable(decay) else None
        return TraceState(zeros_like_params(params, accumulator_dtype), step)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        mu = decay(schedule_step(state.step)) if callable(decay) else decay
        params = arrays_only(params)
        return _trace(updates, state, params, mu, nesterov, dampened)

    return Transformation(init, update)


# One program outside of jit, too, where each operation would be a dispatch.
@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _trace(updates, state, params, decay, nesterov, dampened):
    def leaf(_, g, buffer):
        factor = broadcast_factor("decay", jnp.asarray(decay, g.dtype), g)
        g = (1 - factor) * g if dampened else g
        new = factor * buffer.astype(g.dtype) + g
        return g + factor * new if nesterov else new, new.astype(buffer.dtype)

    updates, new = map_leaves(
        leaf, updates, {"state.trace": state.trace}, carried=1, params=params
    )
    step = None if state.step is None else increment(state.step)
    return updates, TraceState(new, step)
