"""Gradient accumulation: the optimizer runs when a window is full, and only then."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_scalar
from .._transformation import Transformation, multiply
from .._tree import (
    find_states,
    increment,
    map_leaves,
    scalar_dtype,
    zeros_like_params,
)
from ..apply import describe_step, update_and_apply


class AccumulateState(NamedTuple):
    """A window's sums; what a closed window left in them is never read again."""

    micro_step: jax.Array  # int32 []: micro-batches of the window so far
    step: jax.Array  # int32 []: updates of the inner transformation
    skipped: jax.Array  # int32 []: micro-batches left out for NaN or infinity, ever
    updated: jax.Array  # bool []: the last call ran the inner transformation
    weight: jax.Array  # float32 []: sum of the window's weights (float64 with float64)
    grads: optax.Updates  # like params, at least float32: the window's weighted sum
    inner_state: optax.OptState


def accumulate_gradients(
    inner: optax.GradientTransformation,
    every_k: int | Callable[[jax.Array], Any],
    use_grad_mean: bool = True,
    *,
    skip_nonfinite: bool = False,
) -> Transformation:
    r"""Gives the inner transformation the mean gradient of k micro-batches.

    $$ \bar g = \sum_{i=1}^k w_i g_i \Big/ \sum_{i=1}^k w_i, \qquad w_i = 1 $$

    With $g_i$ the gradient of a mean over $w_i$ examples that is the gradient of the
    mean over all of them: one step on the large batch.

    An update that closes no window adds the gradient to a sum, and returns updates of
    -0.0. The inner transformation is not computed then (`lax.cond`), so its step
    counts, schedules and phases count windows. To save the passes over the parameters
    as well that make and add those zeros, use :func:`update_and_apply`.

    Conventions that bite:

    * The sum, the mean and the updates are float32 (float64 for float64 parameters),
      whatever the gradients' dtype.
    * A window's first gradient replaces the sum. NaN in a micro-batch makes its
      window's mean NaN, which is what `inner` gets (`optax.apply_if_finite` goes
      inside), and no other. `skip_nonfinite` leaves the micro-batch out of the mean
      instead, all leaves of it, at the cost of one more read of the gradients. It
      counts as one of the k; if nothing is left, `inner` does not run.
    * What clips is in front for each micro-batch, and inside for their mean.
    * Which leaves have a None gradient may change between windows, not within one.

    `update` takes two more arguments, by keyword; all others reach `inner`:

    * `weight`, $w_i \ge 0$, 1 by default: examples or tokens of the micro-batch. One
      of weight 0 is left out, even if its gradient is 0 / 0.
    * `last`, a bool: close the window with this micro-batch, at the end of training or
      of an epoch. Where the last one is over already, flush with gradients of zeros,
      `weight=0` and `last=True`; that does nothing if no window is open.

    Args:
        inner: the optimizer.
        every_k: micro-batches in a window: an int >= 1, or a schedule that is called
            with the number of inner updates done (int32) and returns an integer; less
            than 1 counts as 1. Read at each micro-batch.
        use_grad_mean: False gives `inner` the sum, $\sum w_i g_i$.
        skip_nonfinite: leave out micro-batches with NaN or infinity; `skipped` in the
            state counts them.

    Returns:
        A transformation, as chainable as any. Under `jax.vmap` both sides of a
        `lax.cond` are computed and nothing is saved.

    Raises:
        TypeError, ValueError: `every_k` is neither of those, or less than 1; a weight
            that is negative (unless traced); at `init`, a parameter that is no float.

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
    inner = optax.with_extra_args_support(inner)
    window = _window(every_k)

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
        """Adds a micro-batch, then runs the inner transformation if it is the last."""
        check_scalar("weight", weight)
        weight = jnp.asarray(weight, state.weight.dtype)
        finite = _all_finite(grads) if skip_nonfinite else jnp.asarray(True)
        counts = finite & (weight > 0)
        opens = state.micro_step == 0
        total = jnp.where(opens, 0.0, state.weight) + jnp.where(counts, weight, 0.0)

        # Not ==: a schedule may shrink the window below the micro-batches in it.
        k = jnp.asarray(window(state.step), jnp.int32)
        closes = (state.micro_step + 1 >= k) | jnp.asarray(last, bool)
        runs = closes & (total > 0)
        # The mean is made with the last sum, where it costs no pass of its own.
        divides = runs if use_grad_mean else jnp.asarray(False)
        divisor = jnp.where(divides, 1 / total, 1.0)

        def add(_, g, before):
            # Selected, not multiplied: 0 * NaN is NaN. And -0.0 + g is g, to the bit.
            before = jnp.where(opens, -0.0, before)
            after = before + weight.astype(before.dtype) * g.astype(before.dtype)
            after = jnp.where(counts, after, before) * divisor.astype(before.dtype)
            return after, after

        # Outside of the cond: inside, XLA copies the sums to either branch and back.
        mean, sums = map_leaves(add, grads, {"state.grads": state.grads}, carried=1)
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
        def run(mean, inner_state, params):
            new, new_state = inner.update(mean, inner_state, params, **extra_args)
            # The types of the other branch: Optax's Adam makes bfloat16 moments float32
            new = jax.tree.map(_cast_like, new, mean)
            return new, jax.tree.map(_cast_like, new_state, inner_state)

        def wait(mean, inner_state, params):
            del params
            # -0.0, the neutral element: -0.0 + 0.0 would flip the sign of a zero.
            return jax.tree.map(lambda x: jnp.full_like(x, -0.0), mean), inner_state

        return add_to_window(updates, state, params, run, wait, weight, last)

    def step(
        grads, state, params, *, factor=None, weight=1.0, last=False, **extra_args
    ) -> tuple[Any, AccumulateState]:
        def run(mean, inner_state, params):
            params, new_state = update_and_apply(
                inner, mean, inner_state, params, **extra_args
            )
            return params, jax.tree.map(_cast_like, new_state, inner_state)

        def wait(mean, inner_state, params):
            del mean
            return params, inner_state

        grads = multiply(grads, factor)
        return add_to_window(grads, state, params, run, wait, weight, last)

    def describe(params):
        return f"where a window closes: {describe_step(inner, params)}; else nothing"

    return Transformation(init, update, step=step, describe_step=describe)


def has_updated(state: optax.OptState) -> jax.Array:
    """Whether the last call of `update` closed a window and ran the optimizer.

    For what happens once a step, such as an average of the parameters. Works inside
    `jit`, and on any state that contains that of :func:`accumulate_gradients`.

    Args:
        state: an optimizer state.

    Returns:
        bool []; False in a new state.

    Raises:
        ValueError: the state is not that of one accumulation.

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
        raise ValueError(f"the state is that of {len(found)} accumulations, not 1")
    # Out of the Variable of nnx.Optimizer, if it holds the state.
    return jax.tree.leaves(found[0].updated)[0]


def _window(every_k: Any) -> Callable[[jax.Array], Any]:
    """The schedule of the window's length, checked at step 0."""
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
    # One pass, where isfinite makes an array of bools: 0 * NaN and 0 * inf are NaN, and
    # a sum keeps it. A maximum does not: XLA's on a CPU drops NaN in larger arrays.
    finite = jnp.asarray(True)
    for leaf in jax.tree.leaves(tree):
        finite &= (leaf * 0).sum() == 0
    return finite


def _cast_like(x: Any, like: Any) -> jax.Array:
    return x if getattr(x, "dtype", None) == like.dtype else jnp.asarray(x, like.dtype)
