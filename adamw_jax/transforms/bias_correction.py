"""Bias correction of moving averages whose decay may be scheduled."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import is_static
from .._dtypes import compute_dtype, scalar_dtype
from .._tree import ScalarOrSchedule

BiasCorrection = Literal["exact", "torch", "none"]


class LogProduct(NamedTuple):
    """The logarithm of the product of all betas so far, as a compensated sum.

    The weights of a moving average with betas b_1 .. b_t sum to 1 - prod(b_i). Tracked
    in float32 as z = b z + (1 - b), that sum stops growing at 1 - 3e-8 / (1 - b), which
    is .3 % too small for b = .99999. The logarithm with its lost low bits carried along
    (Kahan summation) is accurate to 1e-7 at every step. In a state that was cast to
    bfloat16, the low bits lose little more than the cast itself has lost.
    """

    total: jax.Array  # []
    lost: jax.Array  # []


class Beta(NamedTuple):
    """The decay b1 or b2 of one step and its bias corrections."""

    decay: Any  # b_t
    rest: Any  # 1 - b_t, computed in float64 if b_t is a number
    correction: Any  # 1 - prod(b_i, i <= t); 1 without bias correction
    next_correction: Any  # that of the next step, for Nesterov momentum
    log_product: LogProduct | None


def _one_minus_exp(x: jax.Array) -> jax.Array:
    """1 - exp(x) for x <= 0, accurate to 2e-7 in float32; XLA's expm1: to 4e-7."""
    if x.dtype == jnp.float64:
        return -jnp.expm1(x)
    series = jnp.ones_like(x)  # of (exp(x) - 1) / x
    for k in range(10, 1, -1):
        series = 1 + x / k * series
    return jnp.where(x > -0.5, -x * series, 1 - jnp.exp(x))


def init_log_product(beta: ScalarOrSchedule, params: Any) -> LogProduct | None:
    """The initial state of a beta that is not a plain number; None for one that is."""
    if is_static(beta):  # the closed form needs no memory
        return None
    dtype = scalar_dtype(params)
    return LogProduct(jnp.zeros([], dtype), jnp.zeros([], dtype))


def beta_at(
    beta: float | jax.Array,
    mode: BiasCorrection,
    step: jax.Array,
    state: LogProduct | None,
    dtype: Any,
) -> Beta:
    """The beta of a step (counted from 0) and its bias corrections.

    A beta may be a number at init and an array at update, or the reverse. Without a
    product in the state an array counts as the beta of every step so far.
    """
    if state is not None:
        # That of init, whatever the gradients; float32 in a state cast to bfloat16.
        dtype = compute_dtype(state.total.dtype)
    t = (step + 1).astype(dtype)
    if is_static(beta):
        # In float64: 1 - float32(b)**t is off by 1e-5 to 1e-3.
        log = math.log(beta) if beta > 0 else -1000.0  # exp(-1000) is 0 as well
        decay, rest = float(beta), 1.0 - float(beta)
    else:
        decay = jnp.asarray(beta).astype(dtype)
        rest = 1 - decay
        # Clipped, so that beta = 0 has a finite logarithm and gradient.
        log = jnp.log1p(-jnp.minimum(rest, 1 - float(jnp.finfo(dtype).epsneg)))
    total = t * log
    if mode == "exact" and state is not None:
        before, lost = (x.astype(dtype) for x in state)
        corrected = log - lost
        total = before + corrected
        stored = total
        if state.total.dtype != dtype:  # a cast and back may be optimized away
            info = jnp.finfo(state.total.dtype)
            stored = jax.lax.reduce_precision(total, info.nexp, info.nmant)
        lost = (stored - before) - corrected
        state = LogProduct(
            stored.astype(state.total.dtype), lost.astype(state.lost.dtype)
        )
    if mode == "none":
        return Beta(decay, rest, 1.0, 1.0, state)
    correction, next_correction = _one_minus_exp(total), _one_minus_exp(total + log)
    return Beta(decay, rest, correction, next_correction, state)
