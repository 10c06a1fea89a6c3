"""Clipping by the global norm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_array, check_scalar, is_static
from .._dtypes import abs_sq, as_array, is_inexact, scalar_dtype
from .._transformation import Transformation, multiply
from .._tree import arrays_only, narrow, path_string, widen


def clip_by_global_norm(
    max_norm: float | jax.Array, *, eps: float = 0.0
) -> Transformation:
    r"""Scales all gradients by one factor, to a global norm of at most max_norm.

    $$ g \leftarrow g \min\Big(1, \frac{n_{max}}{\lVert g \rVert + \epsilon}\Big) $$

    It reads the gradients once, for their norm; the factor then enters the pass that
    updates the moments. Optax divides every gradient by the norm, so XLA first writes a
    clipped copy: on a CPU a step of AdamW then moves 60 bytes per float32 parameter and
    holds a second gradient, where this moves 44 and holds none. In front of
    :func:`adamw_jax.adamw`, :func:`adamw_jax.update_and_apply` moves 32.

    Conventions that bite:

    * A NaN in one leaf makes all leaves NaN, and an infinite gradient makes all others
      0, as in Optax and PyTorch. `optax.apply_if_finite` skips such a step.
    * A max_norm that is scheduled to 0 makes all gradients 0, zeros included. The
      derivative of the clipped gradients is finite everywhere, also at zero gradients,
      where it is the identity (in Optax, NaN).
    * The gradients of frozen leaves count towards the norm, unless this link is inside
      :func:`adamw_jax.freeze_leaves`.

    Args:
        max_norm: $n_{max} > 0$: a number or a traced scalar; a schedule through
            :func:`adamw_jax.with_hyperparams`. Infinity: no clipping.
        eps: $\epsilon$; 0 in Optax, 1e-6 in PyTorch's `clip_grad_norm_`.

    Returns:
        A transformation whose updates have the dtype of the gradients, or of wider
        parameters if they are passed.

    Raises:
        TypeError, ValueError: max_norm is not positive, or eps is negative. The range
            of an array is checked at `init`, if it is known there.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> clipped, _ = tx.update(grads, tx.init(grads))
        >>> print(f"{clipped['a']:.1f} {clipped['b']:.1f}")
        0.6 0.8

    References:
        Pascanu et al., `On the difficulty of training recurrent neural networks
        <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    check_scalar("max_norm", max_norm, infinite=True)
    if is_static(max_norm) and max_norm == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    check_scalar("eps", eps)

    def init(params: Any) -> Any:
        del params
        check_array("max_norm", max_norm, infinite=True)
        check_array("eps", eps)
        return optax.EmptyState()

    def factor(grads: Any, state: Any) -> tuple[jax.Array, Any]:
        return _factor(grads, max_norm, eps), state

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        return _clip(updates, arrays_only(params), max_norm, eps), state

    return Transformation(init, update, factor=factor)


# One program outside of jit, too, where each operation would be a dispatch.
@functools.partial(jax.jit, inline=True)
def _clip(grads, params, max_norm, eps):
    return narrow(multiply(grads, _factor(grads, max_norm, eps)), grads, params)


@functools.partial(jax.jit, inline=True)
def _factor(grads, max_norm, eps):
    dtype = scalar_dtype(grads)
    squares = []
    for path, g in jax.tree_util.tree_leaves_with_path(widen(grads)):
        g = as_array(g)
        if jnp.issubdtype(g.dtype, jnp.integer):
            raise TypeError(f"update {path_string(path)} has dtype {g.dtype}")
        if is_inexact(g):  # float0 is the gradient of a leaf that is not trained
            squares.append(abs_sq(g).sum().astype(dtype))
    total = sum(squares, jnp.zeros([], dtype))
    limit = jnp.asarray(max_norm, dtype)
    # Where a branch is not selected its operand is 1, because the derivative of the
    # root at 0 and of 1 / norm below it is infinite, and 0 times infinity is NaN.
    is_zero = total == 0
    root = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, total)))
    norm = root + eps
    # Comparisons with NaN are False, so a NaN norm reaches every leaf.
    is_small = norm < limit
    divisor = jnp.where(is_small | (norm == 0), 1, norm)
    return jnp.where(is_small, 1, limit / divisor)
