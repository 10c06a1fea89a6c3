"""AdamW with a `step` that updates the parameters in one pass over memory.

`adamw_jax.adamw` is the function defined here. It builds the plain chain of
:func:`adamw_jax.optimizers.adamw` and adds a `step`; its `update` stays the same.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from .. import optimizers
from .._checks import check_params
from .._dtypes import (
    as_array,
    is_inexact,
    is_narrow,
    real_dtype,
    scalar_dtype,
    storage_dtype,
)
from .._transformation import Transformation, multiply
from .._tree import are_all_none, increment, map_leaves
from ..apply import update_and_apply
from ..hyperparams import with_hyperparams
from ..masks import leaf_flags
from ..transforms.bias_correction import beta_at
from ..transforms.moments import ScaleByAdamState
from .build import why_no_kernel
from .kernel import is_supported, one_pass


@functools.wraps(optimizers.adamw)
def adamw(*args: Any, **kwargs: Any) -> Transformation:
    """See :func:`adamw_jax.optimizers.adamw`."""
    tx = optimizers.adamw(*args, **kwargs)

    def factory(**values):
        return fuse(tx.factory(**values))

    return with_hyperparams(factory, **tx.hyperparams)


adamw.__module__ = __name__  # where pickle finds it


def fuse(tx: Transformation) -> Transformation:
    """Adds a `step` to the chain of AdamW, if the kernel supports its rule.

    Args:
        tx: :func:`adamw_jax.chain` of [a change of sign,] `scale_by_adam`,
            `add_decayed_weights` and `scale_by_learning_rate`, without schedules.

    Returns:
        The same chain. It has a `step` unless it uses `nesterov` or `epsilon_hat`.
    """
    *sign, adam, decay, rate = cast(tuple[Transformation, ...], tx.links)
    rule = adam.arguments
    unsupported = [name for name in ("nesterov", "epsilon_hat") if rule[name]]
    if unsupported:
        reason = (
            f"update, then apply_updates: the kernel does not support {unsupported[0]}"
        )
        return Transformation(*tx, links=tx.links, describe_step=lambda params: reason)
    index = len(sign)  # of the moments in the state of the chain
    without_step = Transformation(*tx, links=tx.links)

    def step(grads, state, params, *, factor=None, **extra_args):
        check_params(params)
        if are_all_none(grads):
            return params, state
        if _rounds(state[index]) or why_no_kernel() is not None:
            grads = multiply(grads, factor)
            return update_and_apply(without_step, grads, state, params, **extra_args)
        params, moments = _step(
            state[index],
            grads,
            params,
            -1 if sign else 1,
            1.0 if factor is None else factor,
            rule,
            decay.arguments,
            rate.arguments["learning_rate"],
        )
        return params, (*state[:index], moments, *state[index + 1 :])

    def describe(params):
        leaves = [as_array(leaf) for leaf in jax.tree.leaves(params)]
        leaves = [leaf for leaf in leaves if is_inexact(leaf)]
        moments = [
            (
                storage_dtype(leaf, rule["mu_dtype"]),
                storage_dtype(leaf, rule["nu_dtype"], real=True),
            )
            for leaf in leaves
        ]
        narrow = any(is_narrow(dtype) for pair in moments for dtype in pair)
        if rule["rounds_stochastically"] and (narrow or params is None):
            return "update, then apply_updates: moments are rounded stochastically"
        if (reason := why_no_kernel()) is not None:
            return f"update, then apply_updates: {reason}"
        text = "one pass of the compiled kernel over each leaf"
        if params is None:
            return text
        supported = sum(
            is_supported(leaf.dtype, *pair)
            for leaf, pair in zip(leaves, moments, strict=True)
        )
        text = f"{text}, {supported} of {len(leaves)}"
        if supported < len(leaves):
            text += "; XLA computes the others, whose dtypes it does not support"
        return text

    return Transformation(*tx, links=tx.links, step=step, describe_step=describe)


def _rounds(moments: ScaleByAdamState) -> bool:
    """Whether a moment is rounded stochastically, which the kernel does not do."""
    leaves = jax.tree.leaves((moments.mu, moments.nu))
    narrow = (is_inexact(x) and is_narrow(x.dtype) for x in leaves)
    return moments.key is not None and any(narrow)


def _step(moments, grads, params, sign, factor, rule, decay, learning_rate):
    """Computes the new parameters and moments of all leaves."""
    dtype, mode = scalar_dtype((grads, moments.mu)), rule["bias_correction"]
    beta1, beta2 = (
        beta_at(rule[name], mode, moments.count, log, dtype)
        for name, log in (("b1", moments.log_b1), ("b2", moments.log_b2))
    )
    selected = leaf_flags(decay["mask"], params, grads)

    @functools.cache  # leaves of the same dtype and decay share one vector
    def scalars(dtype, decays):
        values = (
            # To maximize, m takes -(1 - b1) g; v does not depend on the sign of g.
            *(beta1.decay, sign * beta1.rest, beta1.correction),
            *(beta2.decay, beta2.rest, beta2.correction),
            *(rule["eps"], rule["eps_root"], learning_rate),
            *(decay["weight_decay"] if decays else 0.0, factor),
        )
        return jnp.stack([jnp.asarray(x, dtype) for x in values])

    def leaf(i, g, mu, nu, p):
        decays = bool(selected[i])
        vector = scalars(jnp.dtype(real_dtype(g.dtype)), decays)
        p, mu, nu = one_pass(p, mu, nu, g, vector, decays)
        return None, mu, nu, p

    trees = {"state.mu": moments.mu, "state.nu": moments.nu, "params": params}
    _, mu, nu, params = map_leaves(leaf, grads, trees, carried=3, casts=False)
    return params, ScaleByAdamState(
        increment(moments.count),
        mu,
        nu,
        beta1.log_product,
        beta2.log_product,
        moments.key,
    )
