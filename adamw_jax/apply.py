"""Updates applied to parameters: added, or in one pass where that is cheaper."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._dtypes import as_array, compute_dtype, is_inexact
from ._transformation import Transformation
from ._tree import is_none, widen


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates to parameters: `optax.apply_updates` that accepts None updates.

    Parameters narrower than float32 are added in float32, then rounded to their own
    dtype. A parameter whose update is None is returned unchanged.

    Args:
        params: any tree.
        updates: a tree of the same structure, with None where there is no update.

    Returns:
        The new parameters, in the dtypes of the old ones.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
        >>> new = apply_updates(params, {"a": jnp.array(0.5), "b": None})
        >>> print(new["a"], new["b"])
        1.5 2.0
    """

    def add(p, u):
        if p is None or u is None:
            return p
        p, u = jnp.asarray(p), as_array(u)
        if u.dtype == jax.dtypes.float0:  # of jax.grad(allow_int=True)
            return p
        wide = compute_dtype(p.dtype)
        if not is_inexact(p):
            wide = u.dtype if is_inexact(u) else p.dtype
        return (p.astype(wide) + u.astype(wide)).astype(p.dtype)

    return jax.tree.map(add, params, updates, is_leaf=is_none)


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """Updates the parameters, in one pass over memory where `tx` can.

    If `tx` has a method `step(grads, state, params, **extra_args)`, this calls it.
    Otherwise it computes `tx.update` followed by :func:`apply_updates`. The numbers are
    the same up to the rounding of single operations.

    * :func:`adamw_jax.adamw` has a step. On a CPU a compiled kernel moves 28 bytes per
      float32 parameter, where XLA's three loops move 40.
    * :func:`adamw_jax.accumulate_gradients` has a step on any device. A micro-batch
      that does not close its window costs only the sum: 12 bytes per float32 parameter.
      Writing, reading and adding updates of -0.0 would move 28.
    * :func:`adamw_jax.chain` has a step if its last link has one, and
      :func:`adamw_jax.freeze_leaves` and :func:`adamw_jax.with_hyperparams` if their
      inner transformation has one. `optax.chain` and Optax's wrappers have none.

    :func:`describe_step` says which of the two a transformation gets, and why.

    Compile the training step with params and state donated, in the order in which they
    are returned: JAX pairs donated buffers with results by position. Otherwise both are
    copied at every call.

    Args:
        tx: any transformation.
        grads: the gradients, of one micro-batch if `tx` accumulates.
        state: the state of `tx`; it is the same with and without a step.
        params: the parameters.
        **extra_args: passed on to `tx`, such as `weight` and `last` of
            :func:`adamw_jax.accumulate_gradients`.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError, ValueError: those of `tx.update`.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from adamw_jax import accumulate_gradients, adamw
        >>> tx = accumulate_gradients(adamw(0.1), every_k=2)
        >>> @functools.partial(jax.jit, donate_argnums=(1, 2))
        ... def step(x, params, state):
        ...     grads = jax.grad(lambda p: ((p - x) ** 2).mean())(params)
        ...     return update_and_apply(tx, grads, state, params)
        >>> params = jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for x in (1.0, 3.0):
        ...     params, state = step(x, params, state)
        ...     print(params)
        [0. 0.]
        [0.1 0.1]
    """
    step = getattr(tx, "step", None)
    if step is not None:
        return step(grads, state, params, **extra_args)
    if isinstance(tx, Transformation):
        grads = widen(grads)  # updates are in the dtype of the gradients
    update = optax.with_extra_args_support(tx).update
    updates, state = update(grads, state, params, **extra_args)
    return apply_updates(params, updates), state


def describe_step(
    tx: optax.GradientTransformation, params: optax.Params | None = None
) -> str:
    """Says how :func:`update_and_apply` computes a transformation, and why.

    Args:
        tx: any transformation.
        params: arrays or `ShapeDtypeStruct`. If given, the answer counts the leaves
            that the kernel takes.

    Returns:
        One line.

    Example:
        >>> import optax
        >>> from adamw_jax import adamw, chain, clip_by_global_norm
        >>> print(describe_step(optax.chain(adamw(1e-3))))
        update, then apply_updates: chain has no step
        >>> print(describe_step(chain(adamw(1e-3, nesterov=True))))
        update, then apply_updates: the kernel does not support nesterov
    """
    describe = getattr(tx, "describe_step", None)
    if describe is not None:
        return describe(params)
    if hasattr(tx, "step"):
        return "step, of a transformation without describe_step"
    name = getattr(tx.update, "__qualname__", type(tx).__name__).split(".")[0]
    return f"update, then apply_updates: {name} has no step"
