"""From updates to parameters: added, or computed at once where that is cheaper."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._tree import compute_dtype, is_none


class NewParams:
    """What `update` may return if `_apply=True` was passed: parameters, not updates."""

    def __init__(self, params: Any, old: Any):
        self.params = params
        self.old = old  # those that the update was given


class Scaled:
    """What `update` may return then as well: updates that are still to be multiplied.

    For the kernel, in front of which XLA would write the product.
    """

    def __init__(self, updates: optax.Updates, factor: jax.Array):
        self.updates = updates
        self.factor = factor


def _refuse(x: Any, *_: Any) -> Any:
    raise TypeError(f"{type(x).__name__} is no tree of updates")


# Trees that cannot be entered, so that what expects updates fails. As a leaf, which an
# unknown class is to JAX, they would pass a link with a mask unseen.
jax.tree_util.register_pytree_node(NewParams, _refuse, _refuse)
jax.tree_util.register_pytree_node(Scaled, _refuse, _refuse)


def multiplied(updates: Any) -> optax.Updates:
    """The updates, in float32 where they were :class:`Scaled`."""
    if not isinstance(updates, Scaled):
        return updates

    def multiply(u):
        u = u.astype(compute_dtype(u.dtype))
        return updates.factor.astype(u.dtype) * u

    return jax.tree.map(multiply, updates.updates)


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates to parameters: `optax.apply_updates` that takes None updates.

    The sum is taken in float32 for narrower parameters and then rounded to the
    parameter's dtype. A parameter whose update is None is returned as it is.

    Args:
        params: any tree.
        updates: of the same structure, None where there is none.

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
    """The parameters after an update: `tx.update` and :func:`apply_updates` in one.

    Right for every transformation, and cheaper for two:

    * :func:`adamw_jax.adamw` on a CPU. A compiled kernel makes one pass over memory, 28
      bytes a float32 parameter, where XLA makes three of 40 bytes together.
    * :func:`adamw_jax.accumulate_gradients`, on any device. A micro-batch that closes
      no window costs nothing beside the sum: 12 bytes moved for a float32 parameter,
      where updates of -0.0 that are written, read and added make 28.

    Compile the step with params and state donated, given and returned in that order
    (JAX pairs donated buffers with results as they come); otherwise both are copied at
    every call. What comes in front of those two in a chain does not matter. A link
    behind them, which needs the updates, makes it `tx.update` and `apply_updates`;
    :func:`adamw_jax.freeze` around them does not.

    The kernel is compiled with the system's C++ compiler at the first use (seconds)
    and kept in `~/.cache/adamw_jax` or `XDG_CACHE_HOME`. It takes parameters and
    gradients in float32 or bfloat16 with float32 moments, on any number of devices,
    each of which computes what it holds. XLA computes the same, up to the rounding of
    single operations, without a compiler, for other dtypes, under `vmap` and `grad`,
    with `nesterov` or `epsilon_hat`, with moments that are rounded stochastically, and
    with `ADAMW_JAX_KERNEL=0` in the environment, which programs that are stored for
    other processes need (`jax.export`, `serialize_executable`). With several devices
    JAX's persistent compilation cache finds a program with the kernel again only under
    `JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY=1`.

    Args:
        tx: any transformation.
        grads: the gradients, of this micro-batch if `tx` accumulates.
        state: that of `tx`, which does not depend on the way it is updated.
        params: the parameters.
        **extra_args: of `tx.update`, as `weight` and `last` of an accumulation.

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
    update = optax.with_extra_args_support(tx).update
    understood = False

    def attempt(grads, state, params):
        nonlocal understood
        new, _ = update(grads, state, params, _apply=True, **extra_args)
        if isinstance(new, NewParams):  # of these parameters, not of copies in float32
            old, given = jax.tree.leaves(new.old), jax.tree.leaves(params)
            understood = len(old) == len(given) and all(map(operator.is_, old, given))

    try:  # abstractly: effects of the links must not happen twice
        jax.eval_shape(attempt, grads, state, params)
    except Exception:
        pass  # a link could not take that, or the error is the caller's: it comes again
    if understood:
        new, new_state = update(grads, state, params, _apply=True, **extra_args)
        assert isinstance(new, NewParams)
        return new.params, new_state
    updates, new_state = update(grads, state, params, **extra_args)
    return apply_updates(params, updates), new_state
