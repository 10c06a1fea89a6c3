"""Chains of transformations."""

import functools

import optax

from .._transformation import (
    Transformation,
    check_transformation,
    keep_state_dtypes,
    multiply,
    step_with_factor,
)
from .._tree import narrow, widen
from ..apply import describe_step


def chain(
    *transforms: optax.GradientTransformation, wide_updates: bool = False
) -> Transformation:
    """`optax.chain` without rounding between links, and with the `step` of the last.

    The gradients are cast to float32 (float64 and complex ones keep their precision),
    and what the last link returns is cast to the dtype of the gradients, or to that of
    wider parameters. In float32 state and updates are those of `optax.chain`. In
    bfloat16, `optax.chain` rounds the updates after every link; this rounds once, and
    at links of another library, which see and return the dtype of the parameters. The
    state keeps its dtypes.

    :func:`adamw_jax.update_and_apply` calls `update` of all links but the last, then
    `step` of the last one. If the link before it multiplies all gradients by one
    scalar, as :func:`adamw_jax.clip_by_global_norm` does, it passes that `factor` to
    the step, and the clipped gradients are never written to memory.

    Args:
        *transforms: the links, in the order in which they act.
        wide_updates: True returns the float32 updates of bfloat16 gradients as they
            are. So does a chain that ends with
            :func:`adamw_jax.round_updates_stochastically`.

    Returns:
        A transformation that passes extra arguments of `update` on to every link. It
        has a `step` if its last link has one.

    Raises:
        ValueError: there are no transformations, or the state passed to `step` is that
            of a chain of another length.

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
    for i, link in enumerate(transforms):
        check_transformation(f"link {i} of the chain", link)
    wide_updates |= getattr(transforms[-1], "wide_updates", False)
    *front, last = map(keep_state_dtypes, transforms)

    def check(state):
        if len(state) != len(transforms):
            raise ValueError(
                f"the state must be that of {len(transforms)} links, got {len(state)}"
            )

    def init(params):
        return tuple(link.init(params) for link in transforms)

    def update(updates, state, params=None, **extra_args):
        check(state)
        new, states = widen(updates), []
        for link, link_state in zip((*front, last), state, strict=True):
            new, link_state = link.update(new, link_state, params, **extra_args)
            states.append(link_state)
        return new if wide_updates else narrow(new, updates, params), tuple(states)

    def step(grads, state, params, *, factor=None, **extra_args):
        check(state)
        *states, last_state = state
        new = []
        for i, (link, link_state) in enumerate(zip(front, states, strict=True)):
            grads, factor = widen(multiply(grads, factor)), None
            if i == len(front) - 1 and hasattr(link, "factor"):
                factor, link_state = link.factor(grads, link_state)
            else:
                grads, link_state = link.update(grads, link_state, params, **extra_args)
            new.append(link_state)
        params, last_state = step_with_factor(
            last, grads, last_state, params, factor, **extra_args
        )
        return params, (*new, last_state)

    attributes = {"links": transforms, "wide_updates": wide_updates}
    if hasattr(transforms[-1], "step"):
        attributes["step"] = step
    return Transformation(
        init,
        update,
        describe_step=functools.partial(describe_step, transforms[-1]),
        **attributes,
    )
