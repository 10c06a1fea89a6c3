"""Stochastic rounding: low-precision storage whose mean is right."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import need_params
from .._tree import compute_dtype, increment, map_leaves


def stochastic_round(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    r"""Rounds to one of the two neighbours in `dtype`, in the mean to x itself.

    $$ \lfloor x / u + r \rfloor \, u, \qquad r \sim U[0, 1), $$

    with $u$ the spacing of `dtype` at x. Round-to-nearest drops every change smaller
    than half a spacing (1/512 to 1/256 of the value in bfloat16): an average in which
    0.1 % of the new value is mixed at each step never moves. Rounded stochastically it
    moves now and then by a whole spacing, and its mean is the exact average.

    Args:
        x: float32 or float64, any shape.
        dtype: a narrower float dtype, such as bfloat16 or float16.
        bits: uint16 random bits, of the shape of x.

    Returns:
        x in `dtype`; its mean is x to 2^-16 of a spacing. NaN and infinity stay what
        they are; a value above the largest of `dtype` may become infinite.

    Raises:
        TypeError: bits of another dtype than uint16.

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
    # A spacing that is subnormal in x's own dtype would be flushed to zero.
    spacing = jnp.ldexp(jnp.ones_like(x), jnp.maximum(exponent, -126))
    uniform = bits.astype(x.dtype) * 2.0**-16
    # x / spacing has at most nmant + 1 bits before the point: the sum is exact enough.
    rounded = jnp.floor(x / spacing + uniform) * spacing
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


class StochasticRoundingState(NamedTuple):
    """The step and the key; together they give the random bits of every update."""

    count: jax.Array  # int32 []
    key: jax.Array  # uint32 [2]


def round_updates_stochastically(seed: int = 0) -> optax.GradientTransformation:
    r"""Makes `params + updates` a stochastic rounding of the exact sum.

    In bfloat16, $1 - 10^{-3}$ rounds to 1: three hundred such updates are all lost.
    Put this last in a chain and low-precision parameters move as float32 ones would,
    in the mean: $u \leftarrow \mathrm{round}(p + u) - p$. Float32 and float64
    parameters are left alone.

    The updates come out in float32, whatever the dtype of the parameters, so that
    `optax.apply_updates` and :func:`adamw_jax.apply_updates` add them without loss.

    Args:
        seed: of the random bits.

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
        return StochasticRoundingState(
            jnp.zeros([], jnp.int32), jax.random.PRNGKey(seed)
        )

    def update(updates, state, params=None):
        need_params(params)
        key = jax.random.fold_in(state.key, state.count)

        def leaf(i, u, p):
            if p.dtype == compute_dtype(p.dtype):
                return (u,)
            exact = p.astype(compute_dtype(p.dtype))
            bits = jax.random.bits(jax.random.fold_in(key, i), p.shape, "uint16")
            rounded = stochastic_round(exact + u.astype(exact.dtype), p.dtype, bits)
            return (rounded.astype(exact.dtype) - exact,)

        (updates,) = map_leaves(leaf, updates, {"params": params}, carried=0)
        count = increment(state.count)
        return updates, StochasticRoundingState(count, state.key)

    return optax.GradientTransformation(init, update)
