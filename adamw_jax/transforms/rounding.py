"""Stochastic rounding: low-precision storage without bias."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import check_params
from .._dtypes import compute_dtype, is_narrow
from .._transformation import Transformation
from .._tree import arrays_only, increment, map_leaves, schedule_step


def init_key(seed: int) -> jax.Array:
    """A key for a state, as data: every format of checkpoints can store integers."""
    return jax.random.key_data(jax.random.key(seed))


def step_key(key: jax.Array, count: jax.Array) -> jax.Array:
    """The key of a step, from the data in a state."""
    if jnp.issubdtype(key.dtype, jnp.floating):  # an average of two states
        key = key.astype(jnp.uint32)
    return jax.random.fold_in(jax.random.wrap_key_data(key), schedule_step(count))


def stochastic_round(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    r"""Rounds to one of the two neighbours in `dtype`; the expected value is x.

    $$ \lfloor x / u + r \rfloor \, u, \qquad r \sim U[0, 1), $$

    with $u$ the spacing of `dtype` at x. Rounding to nearest loses every change below
    half a spacing (in bfloat16 1/512 to 1/256 of the value): an average that takes in
    0.1 % of the new value at each step never moves. Rounded stochastically it sometimes
    moves by a whole spacing, and its expected value is the exact average.

    Args:
        x: float32 or float64, of any shape.
        dtype: a narrower float dtype, such as bfloat16 or float16.
        bits: uint16 random bits, with the shape of x.

    Returns:
        x in `dtype`; its expected value is x to 2^-16 of a spacing, and exactly x for
        normal float16 and bfloat16 values made from float32, which has at most 16 bits
        more. NaN and infinity are unchanged; a value above the largest of `dtype` may
        become infinite, and XLA flushes values below 2^-126 to zero.

    Raises:
        TypeError: bits is not uint16.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.full(100_000, 1.001)  # bfloat16 has 1 and 1.0078125 next to it
        >>> bits = jax.random.bits(jax.random.key(0), x.shape, "uint16")
        >>> rounded = stochastic_round(x, jnp.bfloat16, bits)
        >>> [float(v) for v in jnp.unique(rounded)]
        [1.0, 1.0078125]
        >>> print(f"{rounded.astype('float32').mean():.4f}")
        1.0010
    """
    if bits.dtype != jnp.uint16:
        raise TypeError(f"bits must be uint16, got {bits.dtype}")
    info = jnp.finfo(dtype)
    _, exponent = jnp.frexp(x)  # |x| in [2^(e-1), 2^e)
    exponent = jnp.maximum(exponent - 1, int(info.minexp)) - int(info.nmant)
    # XLA would flush a spacing that is subnormal in the dtype of x to zero: both are
    # scaled up first.
    shift = jnp.where(exponent < int(jnp.finfo(x.dtype).minexp), 32, 0)
    scale = jnp.where(shift == 0, 1, jnp.asarray(2.0**32, x.dtype))
    spacing = jnp.ldexp(jnp.ones_like(x), exponent + shift)
    steps = x * scale / spacing  # exact
    below = jnp.floor(steps)
    # The sum steps + uniform would be rounded: in float16 the two need 27 bits.
    uniform = bits.astype(x.dtype) * 2.0**-16
    up = uniform >= 1 - (steps - below)
    rounded = (below + up.astype(x.dtype)) * spacing / scale
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


class StochasticRoundingState(NamedTuple):
    """The step and the key that determine the random bits of an update."""

    count: jax.Array  # int32 []
    key: jax.Array  # uint32 [2]


def round_updates_stochastically(seed: int = 0) -> Transformation:
    r"""Makes `params + updates` a stochastic rounding of the exact sum.

    In bfloat16 $1 - 10^{-3}$ rounds to 1, so three hundred such updates are all lost.
    With this transformation as the last link of a chain,
    $u \leftarrow \mathrm{round}(p + u) - p$, low-precision parameters move on average
    as float32 parameters would. Updates of float32 and float64 parameters are not
    changed.

    The updates are float32 whatever the dtype of the parameters, so that
    `optax.apply_updates` and :func:`adamw_jax.apply_updates` add them without loss.

    Args:
        seed: seed of the random bits.

    Returns:
        A transformation; `update` needs `params`.

    Raises:
        ValueError: `update` was called without `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from adamw_jax import round_updates_stochastically
        >>> def train(tx):
        ...     p = jnp.ones(1000, jnp.bfloat16)
        ...     state = tx.init(p)
        ...     for _ in range(300):
        ...         u, state = tx.update(jnp.full(1000, -1e-3), state, p)
        ...         p = optax.apply_updates(p, u)
        ...     return float(p.astype("float32").mean())
        >>> print(f"{train(optax.identity()):.2f}")
        1.00
        >>> print(f"{train(round_updates_stochastically()):.2f}")
        0.70
    """

    def init(params):
        del params
        return StochasticRoundingState(jnp.zeros([], jnp.int32), init_key(seed))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        return _round_updates(updates, state, arrays_only(params))

    return Transformation(init, update, wide_updates=True)


# One program outside of jit, too, where each operation would be a dispatch.
@functools.partial(jax.jit, inline=True)
def _round_updates(updates, state, params):
    key = step_key(state.key, state.count)

    def leaf(i, u, p):
        if not is_narrow(p.dtype):
            return (u,)
        exact = p.astype(compute_dtype(p.dtype))
        bits = jax.random.bits(jax.random.fold_in(key, i), p.shape, "uint16")
        rounded = stochastic_round(exact + u.astype(exact.dtype), p.dtype, bits)
        return (rounded.astype(exact.dtype) - exact,)

    trees = {"params": params}
    (updates,) = map_leaves(leaf, updates, trees, carried=0, casts=False)
    return updates, StochasticRoundingState(increment(state.count), state.key)
