"""Clipping by the global norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_scalar, is_static
from .._transformation import Transformation, multiply
from .._tree import compute_dtype, map_leaves, scalar_dtype


def clip_by_global_norm(
    max_norm: float | jax.Array, *, eps: float = 0.0
) -> Transformation:
    r"""Shrinks the gradients, all by one factor, to a global norm of at most max_norm.

    $$ g \leftarrow g \min\Big(1, \frac{n_{max}}{\lVert g \rVert + \epsilon}\Big) $$

    One read of the gradients for their norm and nothing more: the factor goes into the
    pass that updates the moments. Behind Optax's, which divides every gradient by the
    norm, XLA first writes a clipped copy: 60 bytes a parameter for a step of AdamW on a
    CPU and memory for another gradient, where this needs 44 and none. With
    :func:`adamw_jax.update_and_apply` in front of :func:`adamw_jax.adamw`: 32.

    Conventions that bite:

    * NaN in one leaf makes all NaN, and an infinite gradient all others 0, as in Optax
      and PyTorch; `optax.apply_if_finite` leaves such a step out.
    * Leaves that are not trained count if they have gradients; put it inside
      :func:`adamw_jax.freeze`.

    Args:
        max_norm: $n_{max} > 0$: a number or a traced scalar. By
            :func:`adamw_jax.with_hyperparams` also a schedule.
        eps: $\epsilon$; 0 in Optax, 1e-6 in PyTorch's `clip_grad_norm_`.

    Returns:
        A transformation whose updates are float32 (float64 for float64 gradients).

    Raises:
        TypeError, ValueError: a max_norm that is not positive, or an eps below 0.

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
    check_scalar("max_norm", max_norm)
    if is_static(max_norm) and max_norm == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    check_scalar("eps", eps)

    def factor(grads: Any, state: Any) -> tuple[jax.Array, Any]:
        dtype = scalar_dtype(grads)

        def square(g):
            g = jnp.asarray(g)
            return jnp.square(g.astype(compute_dtype(g.dtype))).sum().astype(dtype)

        squares = map(square, jax.tree.leaves(grads))
        norm = jnp.sqrt(sum(squares, jnp.zeros([], dtype))) + eps
        limit = jnp.asarray(max_norm, dtype)
        map_leaves(lambda _, g: (g,), grads, {}, carried=0)  # refuses integer leaves
        # NaN is not below anything: it goes on, into every leaf.
        return jnp.where(norm < limit, 1, limit / norm), state

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        scale, state = factor(updates, state)
        return multiply(updates, scale), state

    return Transformation(lambda params: optax.EmptyState(), update, factor=factor)
