"""AdamW whose `step` updates and applies in one pass over memory.

`adamw_jax.adamw` is the one defined here. It is :func:`adamw_jax.optimizers.adamw`,
the plain chain, whose `update` it keeps, with a `step` beside it.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from .. import optimizers
from .._checks import need_params
from .._transformation import Transformation, multiply
from .._tree import compute_dtype, increment, map_leaves, scalar_dtype
from ..apply import apply_updates
from ..hyperparams import with_hyperparams
from ..masks import leaf_flags
from ..transforms.bias_correction import beta_at
from ..transforms.moments import ScaleByAdamState
from .build import why_no_kernel
from .kernel import is_known, one_pass


@functools.wraps(optimizers.adamw)
def adamw(*args: Any, **kwargs: Any) -> Transformation:
    """See :func:`adamw_jax.optimizers.adamw`."""
    tx = optimizers.adamw(*args, **kwargs)

    def factory(**values):
        return fuse(tx.factory(**values))

    return with_hyperparams(factory, **tx.hyperparams)


adamw.__module__ = __name__  # where pickle finds it


def fuse(tx: Transformation) -> Transformation:
    """The chain of AdamW with a `step`, where the kernel knows its rule.

    Args:
        tx: :func:`adamw_jax.chain` of [a change of sign,] `scale_by_adam`,
            `add_decayed_weights` and `scale_by_learning_rate`, without schedules.

    Returns:
        The same chain, with a `step` if it has neither `nesterov` nor `epsilon_hat`.
    """
    *sign, adam, decay, rate = cast(tuple[Transformation, ...], tx.links)
    rule = adam.arguments
    unknown = [name for name in ("nesterov", "epsilon_hat") if rule[name]]
    if unknown:
        reason = f"update, then apply_updates: the kernel does not know {unknown[0]}"
        return Transformation(*tx, links=tx.links, describe_step=lambda params: reason)
    place = len(sign)  # of the moments in the state

    def step(grads, state, params, *, factor=None, **extra_args):
        need_params(params)
        if state[place].key is not None or why_no_kernel() is not None:
            updates, state = tx.update(
                multiply(grads, factor), state, params, **extra_args
            )
            return apply_updates(params, updates), state
        params, moments = _step(
            state[place],
            grads,
            params,
            -1 if sign else 1,
            1.0 if factor is None else factor,
            rule,
            decay.arguments,
            rate.arguments["learning_rate"],
        )
        return params, (*state[:place], moments, *state[place + 1 :])

    def describe(params):
        if rule["rounds_stochastically"]:
            return "update, then apply_updates: moments are rounded stochastically"
        if (reason := why_no_kernel()) is not None:
            return f"update, then apply_updates: {reason}"
        text = "one pass of the compiled kernel over each leaf"
        if params is None:
            return text
        leaves = jax.tree.leaves(params)
        known = 0
        for leaf in leaves:
            wide = compute_dtype(leaf.dtype)
            moments = rule["mu_dtype"] or wide, rule["nu_dtype"] or wide
            known += is_known(leaf.dtype, *moments)
        other = "; XLA computes the others, whose dtypes the kernel does not know"
        return f"{text}, {known} of {len(leaves)}{other if known < len(leaves) else ''}"

    return Transformation(*tx, links=tx.links, step=step, describe_step=describe)


def _step(moments, grads, params, sign, factor, rule, decay, learning_rate):
    """The new parameters and moments."""
    dtype, mode = scalar_dtype((grads, moments.mu)), rule["bias_correction"]
    beta1, beta2 = (
        beta_at(name, rule[name], mode, moments.count, log, dtype)
        for name, log in (("b1", moments.log_b1), ("b2", moments.log_b2))
    )
    selected = leaf_flags(decay["mask"], params, grads)

    @functools.cache  # one vector for all leaves of a kind
    def scalars(dtype, decays):
        values = (
            # -g in m is g with the weight -(1 - b1), and in v it is g.
            *(beta1.decay, sign * beta1.rest, beta1.correction),
            *(beta2.decay, beta2.rest, beta2.correction),
            *(rule["eps"], rule["eps_root"], learning_rate),
            *(decay["weight_decay"] if decays else 0.0, factor),
        )
        return jnp.stack([jnp.asarray(x, dtype) for x in values])

    def leaf(i, g, mu, nu, p):
        decays = bool(selected[i])
        vector = scalars(jnp.dtype(compute_dtype(g.dtype)), decays)
        p, mu, nu = one_pass(p, mu, nu, g, vector, decays)
        return None, mu, nu, p

    trees = {"state.mu": moments.mu, "state.nu": moments.nu, "params": params}
    _, mu, nu, params = map_leaves(leaf, grads, trees, carried=3)
    moments = ScaleByAdamState(
        increment(moments.count), mu, nu, beta1.log_product, beta2.log_product
    )
    return params, moments
