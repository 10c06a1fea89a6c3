"""One transformation behind the other."""

import functools

import optax

from .._transformation import Transformation, multiply, step_with_factor
from ..apply import describe_step


def chain(*transforms: optax.GradientTransformation) -> Transformation:
    """`optax.chain` that passes on the `step` of its last link.

    The state is that of `optax.chain`, a tuple of the links' states, and so are the
    updates. :func:`adamw_jax.update_and_apply` computes the links in front by their
    `update`, and takes the step of the last one. A last but one link that multiplies
    all gradients by one scalar, :func:`adamw_jax.clip_by_global_norm`, hands that
    `factor` to the step, so the clipped gradients are never written to memory.

    Args:
        *transforms: the links, in the order in which they act.

    Returns:
        A transformation; additional arguments of `update` reach every link. It has a
        `step` if its last link has.

    Raises:
        ValueError: there are no transformations; `step` was given the state of a chain
            with another number of links.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamw_jax import adamw, clip_by_global_norm, update_and_apply
        >>> tx = chain(clip_by_global_norm(1.0), adamw(0.1))
        >>> params, grads = jnp.zeros(2), jnp.array([30.0, -40.0])
        >>> params, state = update_and_apply(tx, grads, tx.init(params), params)
        >>> print(f"{params[0]:.2f} {params[1]:.2f}")
        -0.10 0.10
    """
    if not transforms:
        raise ValueError("chain needs at least one transformation, got none")
    init, update = optax.chain(*transforms)
    describe = functools.partial(describe_step, transforms[-1])
    if not hasattr(transforms[-1], "step"):
        return Transformation(init, update, links=transforms, describe_step=describe)
    *front, last = map(optax.with_extra_args_support, transforms)

    def step(grads, state, params, *, factor=None, **extra_args):
        if len(state) != len(transforms):
            raise ValueError(
                f"the state must be that of {len(transforms)} links, got {len(state)}"
            )
        *states, last_state = state
        new = []
        for i, (link, link_state) in enumerate(zip(front, states, strict=True)):
            grads, factor = multiply(grads, factor), None
            if i == len(front) - 1 and hasattr(link, "factor"):
                factor, link_state = link.factor(grads, link_state)
            else:
                grads, link_state = link.update(grads, link_state, params, **extra_args)
            new.append(link_state)
        params, last_state = step_with_factor(
            last, grads, last_state, params, factor, **extra_args
        )
        return params, (*new, last_state)

    return Transformation(
        init, update, step=step, links=transforms, describe_step=describe
    )
