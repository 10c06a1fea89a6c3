"""From updates to parameters: added, or computed at once where that is cheaper."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._tree import compute_dtype, is_none


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates to parameters: `optax.apply_updates` that takes None updates.

    The sum is taken in float32 for narrower parameters, then rounded to the
    parameter's dtype. A parameter whose update is None is returned unchanged.

    Args:
        params: any tree.
        updates: a tree of the same structure, with None where there is no update.

    Returns:
        The new parameters, with the dtypes of the old.

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
        p = p if hasattr(p, "dtype") else jnp.asarray(p)
        if not hasattr(u, "dtype") or not jnp.issubdtype(p.dtype, jnp.floating):
            return (p + u).astype(p.dtype)
        wide = compute_dtype(p.dtype)
        return (p.astype(wide) + u.astype(wide)).astype(p.dtype)

    return jax.tree.map(add, params, updates, is_leaf=is_none)


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """The parameters after an update, in one pass over memory where `tx` can.

    A transformation that has the method `step(grads, state, params, **extra_args)` is
    asked for it. Every other one computes `tx.update`, then :func:`apply_updates`:
    the same numbers, up to the rounding of single operations.

    * :func:`adamw_jax.adamw` has a step. On a CPU a compiled kernel moves 28 bytes a
      float32 parameter, where XLA's three loops move 40.
    * :func:`adamw_jax.accumulate_gradients` has one, on any device. A micro-batch that
      closes no window costs nothing but the sum: 12 bytes moved a float32 parameter,
      where updates of -0.0 that are written, read and added move 28.
    * :func:`adamw_jax.chain` has one if its last link has, and
      :func:`adamw_jax.freeze_leaves` and :func:`adamw_jax.with_hyperparams` if the
      transformation inside has. `optax.chain` and Optax's wrappers have none.

    :func:`describe_step` says which way a transformation takes, and why.

    Compile the training step with params and state donated, in the order in which they
    are returned (JAX pairs donated buffers with results by position); otherwise both
    are copied at every call.

    Args:
        tx: any transformation.
        grads: the gradients; those of a micro-batch if `tx` accumulates.
        state: the state of `tx`, the same whichever way it is updated.
        params: the parameters.
        **extra_args: passed on, such as `weight` and `last` of an accumulation.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError, ValueError: as `tx.update`.

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
    update = optax.with_extra_args_support(tx).update
    updates, state = update(grads, state, params, **extra_args)
    return apply_updates(params, updates), state


def describe_step(
    tx: optax.GradientTransformation, params: optax.Params | None = None
) -> str:
    """Says which way :func:`update_and_apply` takes for a transformation, and why.

    Args:
        tx: any transformation.
        params: arrays or `ShapeDtypeStruct`, to count the leaves that each way takes.

    Returns:
        One line.

    Example:
        >>> import optax
        >>> from adamw_jax import adamw, chain, clip_by_global_norm
        >>> print(describe_step(optax.chain(adamw(1e-3))))
        update, then apply_updates: chain has no step
        >>> print(describe_step(chain(adamw(1e-3, nesterov=True))))
        update, then apply_updates: the kernel does not know nesterov
    """
    describe = getattr(tx, "describe_step", None)
    if describe is not None:
        return describe(params)
    if hasattr(tx, "step"):
        return "step, of a transformation that does not say more"
    name = getattr(tx.update, "__qualname__", type(tx).__name__).split(".")[0]
    return f"update, then apply_updates: {name} has no step"
