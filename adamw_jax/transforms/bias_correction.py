"""The sum of the weights of a moving average, by which its bias is corrected."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import is_static
from .._tree import ScalarOrSchedule, scalar_dtype

BiasCorrection = Literal["exact", "torch", "none"]


class LogProduct(NamedTuple):
    """The logarithm of the product of all betas so far, as a compensated sum.

    The weights of a moving average with betas b_1 .. b_t sum to 1 - prod(b_i). Kept as
    that sum in float32, z = b z + (1 - b) stops growing at 1 - 3e-8 / (1 - b), .3 %
    short for b = .99999; with the lost low bits carried along (Kahan), the logarithm
    is right to 1e-7 at every step.
    """

    total: jax.Array  # []
    lost: jax.Array  # []


class Beta(NamedTuple):
    """What one step needs of b1 or b2: the decay and the sum of the weights so far."""

    decay: Any  # b_t
    rest: Any  # 1 - b_t, in float64 before it is rounded where b_t is a number
    correction: Any  # 1 - prod(b_i, i <= t); 1 without bias correction
    next_correction: Any  # the same one step ahead, for Nesterov's form
    log_product: LogProduct | None


def _one_minus_exp(x: jax.Array) -> jax.Array:
    """1 - exp(x) for x <= 0, to 2e-7 in float32, where XLA's expm1 is 4e-7 off."""
    if x.dtype == jnp.float64:
        return -jnp.expm1(x)
    series = jnp.ones_like(x)  # of (exp(x) - 1) / x
    for k in range(10, 1, -1):
        series = 1 + x / k * series
    return jnp.where(x > -0.5, -x * series, 1 - jnp.exp(x))


def init_log_product(beta: ScalarOrSchedule, params: Any) -> LogProduct | None:
    """What a beta that is not a number needs in the state."""
    if is_static(beta):  # the closed form needs no memory
        return None
    dtype = scalar_dtype(params)
    return LogProduct(jnp.zeros([], dtype), jnp.zeros([], dtype))


def beta_at(
    name: str,
    beta: ScalarOrSchedule,
    mode: BiasCorrection,
    step: jax.Array,
    state: LogProduct | None,
    dtype: Any,
) -> Beta:
    """The beta of a step (counted from 0) and its bias correction."""
    if is_static(beta) != (state is None):
        raise ValueError(
            f"{name} must be a number both at init and at update, or a schedule or "
            f"traced value at both: got {beta!r} at update"
        )
    if state is not None:
        dtype = state.total.dtype  # as it was made, so that the state keeps its types
    t = (step + 1).astype(dtype)
    if is_static(beta):
        # The logarithm in float64: 1 - float32(b)**t is off by 1e-5 to 1e-3.
        log = math.log(beta) if beta > 0 else -1000.0  # exp(-1000) is 0 as well
        decay, rest, total = float(beta), 1.0 - float(beta), t * log
    else:
        decay = jnp.asarray(beta(step) if callable(beta) else beta).astype(dtype)
        rest = 1 - decay
        # Not quite the logarithm of 0, and with a gradient there.
        log = jnp.log1p(-jnp.minimum(rest, 1 - float(jnp.finfo(dtype).epsneg)))
        total = t * log
        if mode == "exact" and state is not None:
            corrected = log - state.lost
            total = state.total + corrected
            state = LogProduct(total, (total - state.total) - corrected)
    if mode == "none":
        return Beta(decay, rest, 1.0, 1.0, state)
    correction, following = _one_minus_exp(total), _one_minus_exp(total + log)
    return Beta(decay, rest, correction, following, state)
