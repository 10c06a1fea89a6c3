"""Gradient accumulation: the optimizer runs once per window of micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _foreign
from .._checks import check_scalar
from .._dtypes import as_array, cast, is_inexact, scalar_dtype
from .._foreign import explain_names
from .._transformation import (
    Transformation,
    check_transformation,
    keep_state_dtypes,
    multiply,
)
from .._tree import (
    find_states,
    increment,
    map_leaves,
    narrow,
    schedule_step,
    zeros_like_params,
)
from ..apply import describe_step, update_and_apply


class AccumulateState(NamedTuple):
    """The sums of the current window. A new window overwrites those of the last one."""

    micro_step: jax.Array  # int32 []: micro-batches of the window so far
    step: jax.Array  # int32 []: updates of the inner transformation
    skipped: jax.Array  # int32 []: micro-batches skipped for NaN or infinity so far
    updated: jax.Array  # bool []: whether the last call ran the inner transformation
    weight: jax.Array  # float32 [] (float64 with float64): sum of the weights
    grads: optax.Updates  # like params, at least float32: weighted sum of the gradients
    inner_state: optax.OptState


@explain_names(_foreign.ACCUMULATE)
def accumulate_gradients(
    inner: optax.GradientTransformation,
    every_k: int | Callable[[jax.Array], Any],
    use_grad_mean: bool = True,
    *,
    skip_nonfinite: bool = False,
) -> Transformation:
    r"""Passes the mean gradient of k micro-batches to the inner transformation.

    $$ \bar g = \sum_{i=1}^k w_i g_i \Big/ \sum_{i=1}^k w_i, \qquad w_i = 1 $$

    If $g_i$ is the gradient of a mean over $w_i$ examples, $\bar g$ is the gradient of
    the mean over all of them: one step on the large batch.

    A micro-batch that does not close its window adds its gradient to a sum, and its
    updates are -0.0. `lax.cond` skips the inner transformation, so its step counts,
    schedules and phases count windows. :func:`update_and_apply` also saves the passes
    over the parameters that write and add those zeros.

    Conventions that bite:

    * The sum and the mean are float32 (float64 for float64 parameters), whatever the
      dtype of the gradients; the updates have that of the gradients.
    * The first gradient of a window replaces the sum, so a NaN reaches the mean of its
      own window and no other. Put `optax.apply_if_finite` inside to skip such windows.
      `skip_nonfinite` skips the micro-batch instead, with all its leaves, at the cost
      of one more read of the gradients. It still counts as one of the k; if the whole
      window is skipped, `inner` does not run.
    * Clipping in front acts on each micro-batch, clipping inside on the mean.
    * Which leaves have a None gradient may change between windows, not within one.

    `update` takes two more keyword arguments and passes all others to `inner`:

    * `weight`, $w_i \ge 0$, 1 by default: the number of examples or tokens in the
      micro-batch. One of weight 0 is ignored, even if its gradient is 0 / 0.
    * `last`, a bool: closes the window with this micro-batch, at the end of an epoch or
      of the training. To close it after the last micro-batch, pass gradients of zero
      with `weight=0` and `last=True`; without an open window this does nothing.

    Args:
        inner: the optimizer.
        every_k: the number of micro-batches in a window, an int >= 1; or a schedule
            from the number of inner updates done (int32) to an integer, where less than
            1 counts as 1. It is evaluated at every micro-batch.
        use_grad_mean: False passes the sum, $\sum w_i g_i$, to `inner`.
        skip_nonfinite: skip micro-batches with NaN or infinity; `skipped` in the state
            counts them.

    Returns:
        A transformation with a `step`. Under `jax.vmap` both branches of `lax.cond` are
        computed, so nothing is saved.

    Raises:
        TypeError, ValueError: every_k is not an integer >= 1 or a schedule of integers;
            a weight that is not traced is negative; at `init`, a parameter is not
            floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import sgd
        >>> tx = accumulate_gradients(sgd(1.0), every_k=2)
        >>> params = jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for g in ([1.0, 2.0], [3.0, 6.0]):
        ...     updates, state = tx.update(jnp.array(g), state, params)
        ...     print(updates, has_updated(state))
        [-0. -0.] False
        [-2. -4.] True
    """
    check_transformation("inner", inner)
    inner = keep_state_dtypes(inner)
    window = _window(every_k)
    wide_updates = getattr(inner, "wide_updates", False)

    def init(params):
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            step=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            updated=jnp.zeros([], bool),
            weight=jnp.zeros([], scalar_dtype(params)),
            grads=zeros_like_params(params),
            inner_state=inner.init(params),
        )

    def add_to_window(grads, state, params, run, wait, weight, last):
        """Adds a micro-batch to the sums, then takes the branch `run` or `wait`."""
        check_scalar("weight", weight)
        weight = jnp.asarray(weight, state.weight.dtype)
        finite = _all_finite(grads) if skip_nonfinite else jnp.asarray(True)
        counts = finite & (weight > 0)
        opens = state.micro_step == 0
        total = jnp.where(opens, 0.0, state.weight) + jnp.where(counts, weight, 0.0)

        # Not ==: a schedule may shrink the window below the number it already holds.
        k = jnp.asarray(window(schedule_step(state.step)), jnp.int32)
        closes = (state.micro_step + 1 >= k) | jnp.asarray(last, bool)
        runs = closes & (total > 0)
        # Dividing in the pass of the last sum costs no pass of its own.
        divides = runs if use_grad_mean else jnp.asarray(False)
        divisor = jnp.where(divides, 1 / total, 1.0)

        def add(_, g, old_sum):
            # Selected, not multiplied: 0 * NaN is NaN. And -0.0 + g is g, bit for bit.
            old_sum = jnp.where(opens, -0.0, old_sum)
            new_sum = old_sum + weight.astype(old_sum.dtype) * g.astype(old_sum.dtype)
            new_sum = jnp.where(counts, new_sum, old_sum)
            new_sum = new_sum * divisor.astype(old_sum.dtype)
            return new_sum, new_sum

        # Not inside lax.cond: XLA would copy the sums into it and out of it.
        trees = {"state.grads": state.grads}
        mean, sums = map_leaves(add, grads, trees, carried=1, casts=False)
        out, inner_state = jax.lax.cond(
            runs, run, wait, mean, state.inner_state, params
        )
        return out, AccumulateState(
            jnp.where(closes, 0, state.micro_step + 1),
            jnp.where(runs, increment(state.step), state.step),
            jnp.where(finite, state.skipped, increment(state.skipped)),
            runs,
            total,
            sums,
            inner_state,
        )

    def update(
        updates, state, params=None, *, weight=1.0, last=False, **extra_args
    ) -> tuple[Any, AccumulateState]:
        def run(mean, inner_state, _):
            # Not an operand: it may have leaves that are no arrays.
            new, new_state = inner.update(mean, inner_state, params, **extra_args)
            # The dtypes of the other branch.
            return jax.tree.map(lambda u, x: cast(u, x.dtype), new, mean), new_state

        def wait(mean, inner_state, _):
            # -0.0 is the neutral element: adding 0.0 would flip the sign of -0.0.
            return jax.tree.map(lambda x: jnp.full_like(x, -0.0), mean), inner_state

        new, state = add_to_window(updates, state, None, run, wait, weight, last)
        return new if wide_updates else narrow(new, updates, params), state

    def step(
        grads, state, params, *, factor=None, weight=1.0, last=False, **extra_args
    ) -> tuple[Any, AccumulateState]:
        def run(mean, inner_state, params):
            return update_and_apply(inner, mean, inner_state, params, **extra_args)

        def wait(mean, inner_state, params):
            del mean
            return params, inner_state

        grads = multiply(grads, factor)
        return add_to_window(grads, state, params, run, wait, weight, last)

    def describe(params):
        way = describe_step(inner, params)
        return f"at the end of a window: {way}; before, only a sum"

    return Transformation(
        init, update, step=step, describe_step=describe, wide_updates=wide_updates
    )


def has_updated(state: optax.OptState) -> jax.Array:
    """Whether the last call of `update` ran the inner transformation.

    Use it for work that is done once per window, such as averaging the parameters.
    Works inside `jit`, and on any state that contains one of
    :func:`accumulate_gradients`.

    Args:
        state: an optimizer state.

    Returns:
        A bool scalar; False in a new state.

    Raises:
        ValueError: the state contains no accumulation, or several.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw
        >>> tx = accumulate_gradients(adamw(1e-3), every_k=1)
        >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
        >>> print(has_updated(state))
        True
    """
    found = find_states(state, AccumulateState)
    if len(found) != 1:
        raise ValueError(
            f"the state must contain one AccumulateState, got {len(found)}"
        )
    # Unwraps the Variable in which nnx.Optimizer keeps a state.
    return jax.tree.leaves(found[0].updated)[0]


def _window(every_k: Any) -> Callable[[jax.Array], Any]:
    """The length of the window as a schedule, checked at step 0."""
    schedule = every_k if callable(every_k) else lambda step: every_k
    with jax.ensure_compile_time_eval():
        first = schedule(jnp.zeros([], jnp.int32))
    dtype = jnp.int32 if type(first) is int else getattr(first, "dtype", None)
    if np.ndim(first) or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            "every_k must be an integer or a schedule of integers, got "
            f"{first!r}{' at step 0' if callable(every_k) else ''}"
        )
    if not isinstance(first, jax.core.Tracer) and first < 1:
        raise ValueError(f"every_k must be at least 1, got {first!r}")
    return schedule


def _all_finite(tree: Any) -> jax.Array:
    # 0 * NaN and 0 * inf are NaN, and so is their sum: one pass, without the array of
    # bools of isfinite. XLA's maximum on a CPU drops NaN in larger arrays.
    finite = jnp.asarray(True)
    for leaf in map(as_array, jax.tree.leaves(tree)):
        if is_inexact(leaf):
            finite &= (leaf * 0).sum() == 0
    return finite
