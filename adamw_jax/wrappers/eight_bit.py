"""Moments in eight bits: blocks of codes with a scale, around any optimizer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .._tree import compute_dtype, increment


class Blocks(NamedTuple):
    """An array in eight bits. Both parts are sharded alike: their axes are the same."""

    codes: jax.Array  # int8, or uint8 if nothing is negative; of the array's shape
    scale: jax.Array  # largest magnitude of each block; shape: blocks along each axis


def _blocks_along(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """How often each axis is cut: blocks fill the last axis first, and then others."""
    counts: list[int] = []
    for n in reversed(shape):
        counts.append(-(-n // block_size))
        block_size //= -(-n // counts[-1])
    return tuple(reversed(counts))


def _cut(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Splits every axis into (blocks, values in a block), filled up with zeros."""
    sizes = [-(-n // count) for n, count in zip(x.shape, counts, strict=True)]
    both = list(zip(counts, sizes, strict=True))
    missing = [c * size - n for n, (c, size) in zip(x.shape, both, strict=True)]
    if any(missing):
        x = jnp.pad(x, [(0, m) for m in missing])
    return x.reshape([n for pair in both for n in pair])


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_cut`; `like` is what was cut."""
    shape = [math.prod(x.shape[i : i + 2]) for i in range(0, x.ndim, 2)]
    sharding = jax.typeof(like).sharding
    # On a mesh with explicit axes JAX asks where the joined ones are to be.
    x = jnp.reshape(
        x, shape, out_sharding=sharding if sharding.mesh.explicit_axes else None
    )
    return x if x.shape == like.shape else x[tuple(slice(n) for n in like.shape)]


def _inner_axes(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim, 2))


def _value(code: jax.Array, dtype: Any) -> jax.Array:
    """(c / 127)^4, or (c / 255)^8 of unsigned codes."""
    value = jnp.square(jnp.square(code * (1 / jnp.iinfo(dtype).max)))
    return jnp.square(value) if dtype == jnp.uint8 else value


def quantize_blockwise(
    x: jax.Array,
    dtype: Any = jnp.int8,
    *,
    block_size: int = 256,
    bits: jax.Array | None = None,
) -> Blocks:
    r"""Stores an array in eight bits per value and one scale per block.

    $$ x \approx s \, \mathrm{sign}(c) \left(\frac{|c|}{127}\right)^4
       \quad\text{(int8)}, \qquad
       x \approx s \left(\frac{c}{255}\right)^8 \quad\text{(uint8)}, \qquad
       s = \max_{block} |x| $$

    The fourth power, for a second moment that of its root, is a smooth form of the
    dynamic tree of Dettmers et al., in which a decade has half as many codes as the one
    above. It needs no table and no search, only square roots. The error that it makes
    in Adam's update is smaller for `mu` and about as large for `nu`; far smaller where
    the values of a block differ by orders of magnitude, since it reaches down to 4e-9
    and 6e-20 of the largest one instead of 5e-7 and 3e-7.

    Conventions that bite:

    * A block lies along the last axis, and goes on along the one before where that is
      shorter than a block. It never crosses the end of a row, and as long as its size
      divides what a device holds of an axis, no device needs another one's values.
    * Under uint8 what is positive never becomes zero, which would be divided by.
    * One NaN or infinity, and no value of its block is finite. -0 becomes 0.

    Args:
        x: float32 or float64, of any shape.
        dtype: int8, or uint8 where no value is negative.
        block_size: the most values in a block.
        bits: uint16 random bits, of the shape of x: a value becomes one of the two
            codes next to it, in the mean itself. None: the nearer one.

    Returns:
        The blocks. Quantizing what comes back from them again gives the same codes.

    Raises:
        TypeError: other dtypes than these, bits that are not uint16.
        ValueError: a block size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> blocks = quantize_blockwise(jnp.array([1.0, -0.1, 1e-3, 0.0]))
        >>> print(blocks.codes, blocks.scale)
        [127 -71  23   0] [1.]
        >>> [f"{x:.2g}" for x in dequantize_blockwise(blocks)]
        ['1', '-0.098', '0.0011', '0']

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    _check_block_size(block_size)
    if dtype not in (jnp.int8, jnp.uint8):
        raise TypeError(f"dtype must be int8 or uint8, got {dtype!r}")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if bits is not None and bits.dtype != jnp.uint16:
        raise TypeError(f"bits must be uint16, got {bits.dtype}")
    return _quantize(x, dtype, _blocks_along(x.shape, block_size), bits)


def _quantize(x: Any, dtype: Any, counts: tuple[int, ...], bits: Any) -> Blocks:
    whole, x = x, _cut(x, counts)
    magnitude = jnp.abs(x)
    scale = magnitude.max(_inner_axes(x), keepdims=True)
    # XLA's maximum drops NaN on a CPU, in arrays of some size; a sum keeps it.
    scale = scale + (magnitude * 0).sum(_inner_axes(x), keepdims=True)
    # XLA multiplies by the reciprocal, which is zero for the largest numbers.
    factor = jnp.where(scale > 2.0**100, 2.0**-100, jnp.ones_like(scale))
    y = magnitude * factor / jnp.where(scale > 0, scale * factor, 1)
    root = jnp.sqrt(jnp.sqrt(y))
    root = jnp.sqrt(root) if dtype == jnp.uint8 else root
    below = jnp.floor(root * int(jnp.iinfo(dtype).max))
    low, high = _value(below, dtype), _value(below + 1, dtype)
    threshold = 0.5
    if bits is not None:
        # Never 0 or 1, so that rounding errors do not move what is a code already.
        threshold = (_cut(bits, counts).astype(x.dtype) + 0.5) * 2.0**-16
    code = below + (y - low > threshold * (high - low)).astype(x.dtype)
    if dtype == jnp.uint8:
        code = jnp.maximum(code, (magnitude > 0).astype(x.dtype))
    else:
        code = jnp.where(x < 0, -code, code)
    return Blocks(_join(code.astype(dtype), whole), scale.reshape(counts))


def dequantize_blockwise(blocks: Blocks) -> jax.Array:
    """The values of :func:`quantize_blockwise`, in the dtype of the scale.

    Args:
        blocks: what it returned.

    Returns:
        An array of the shape of the codes.
    """
    codes, scale = blocks
    code = _cut(codes, scale.shape).astype(scale.dtype)
    value = jnp.sign(code) * _value(code, codes.dtype)
    return _join(value * jnp.expand_dims(scale, _inner_axes(code)), codes)


# What is quantized: the fields of these names in the states of Adam and its relatives,
# here and in Optax.
MOMENTS = {"mu": jnp.int8, "trace": jnp.int8, "nu": jnp.uint8, "nu_max": jnp.uint8}


class QuantizedMomentsState(NamedTuple):
    """The inner state with `Blocks` in place of its large moments."""

    inner_state: optax.OptState
    count: jax.Array | None = None  # int32 []: updates done; None without a key
    key: jax.Array | None = None  # uint32 [2]


def quantize_moments(
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any optimizer in eight bits: 2 bytes a parameter, not 8.

    At every update the moments are decoded, updated in float32 by the rule of `inner`,
    and encoded again. Put it around a whole optimizer or around a link of a chain;
    masks, phases and hyperparameters in the state stay what they are. Quantized are the
    fields `mu`, `nu`, `nu_max` and `trace` of the states inside; moments that are
    stored in less than float32 already (`mu_dtype`) are left alone.

    That is what is kept between updates. Within one, XLA makes float32 moments of the
    parameters that it is at work on: on a CPU, which does all at once, of all of them.

    How the values are stored is said at :func:`quantize_blockwise`. The maximum of
    AMSGrad is rounded to the nearest code, since one of random roundings would grow.

    Args:
        inner: an optimizer or transformation, of this package or of Optax.
        block_size: the most values that share a scale; 2 + 8 / block_size bytes are
            kept per parameter.
        min_size: parameters with fewer values keep their moments as they are.
        stochastic_rounding: with a key in the state; the mean of the moments is then
            right. Rounded to nearest, a second moment that is to decay by .1 % does
            not move between codes 3 % apart; only the scale of its block does.
        seed: of the rounding. `jax.vmap` of `init` gives every member the same key.

    Returns:
        A transformation; additional arguments of `update` reach the inner one. Sizes
        matter to `init` only: a restored state goes on with its own. `init` makes the
        moments in float32 first: call it in `jit` for a large model.

    Raises:
        TypeError, ValueError: sizes below 1 (when called), an inner state without any
            such field (`init`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adamw
        >>> tx = quantize_moments(adamw(1e-3, weight_decay=0.1))
        >>> state = tx.init({"kernel": jnp.ones((512, 512)), "bias": jnp.ones(512)})
        >>> sum(x.nbytes for x in jax.tree.leaves(state)) / (512 * 512 + 512)
        2.043...

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    _check_block_size(block_size)
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        def store(path, x):
            name = _moment(path)
            wide = hasattr(x, "dtype") and x.dtype == compute_dtype(x.dtype)
            if name is None or not wide or x.size < min_size:
                return x
            # Otherwise XLA folds the quantization of constant zeros, for minutes.
            x = lax.optimization_barrier(x)
            return quantize_blockwise(x, MOMENTS[name], block_size=block_size)

        state = inner.init(params)
        if not any(_fields_with_moments(state)):
            raise ValueError(
                f"there is nothing to quantize: the state of inner has no field "
                f"{', '.join(MOMENTS)}, got {type(state).__name__}"
            )
        state = jax.tree_util.tree_map_with_path(store, state)
        if not stochastic_rounding:
            return QuantizedMomentsState(state)
        return QuantizedMomentsState(
            state, jnp.zeros([], jnp.int32), jax.random.PRNGKey(seed)
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        inner_state, count, key = state
        if key is not None:
            now = jax.random.fold_in(key, count)
            count = increment(count)
        places: dict[tuple, int] = {}  # the number of each parameter

        def store(path, old, new):
            """As the old value was stored."""
            if not _is_blocks(old):
                return new
            old, bits, name = _as_blocks(old), None, _moment(path)
            if key is not None and name != "nu_max":
                # One draw of 32 bits for both moments of a parameter.
                place = tuple(k for k in path if k != jax.tree_util.GetAttrKey(name))
                number = places.setdefault(place, len(places))
                bits = _random_bits(jax.random.fold_in(now, number), new.shape)
                bits = (bits >> (16 if name == "nu" else 0)).astype(jnp.uint16)
            return _quantize(new, old.codes.dtype, old.scale.shape, bits)

        updates, new_state = inner.update(
            updates, _decode(inner_state), params, **extra_args
        )
        new_state = jax.tree_util.tree_map_with_path(
            store, inner_state, new_state, is_leaf=_is_blocks
        )
        return updates, QuantizedMomentsState(new_state, count, key)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size!r}")


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32: the index of each value, hashed with the two words of a key.

    Rounding needs unbiased bits, not cryptographic ones. The hash fuses into the loop
    that encodes, and every device computes the bits of its own shard; with
    `jax.random.bits` an update takes 2.3 times as long on a CPU under `unsafe_rbg`. The
    hash is Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).
    """

    def mix(x):
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    number = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        number = number * jnp.uint32(n) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return mix(mix(number ^ key[0]) + key[1])


def _is_blocks(x: Any) -> bool:
    """Also what nnx.Optimizer makes of them: a mapping from the names of the fields."""
    if isinstance(x, Mapping) and set(x) == set(Blocks._fields):
        codes = x["codes"]
        return getattr(codes, "dtype", None) in (jnp.int8, jnp.uint8)
    return isinstance(x, Blocks)


def _as_blocks(x: Any) -> Blocks:
    return x if isinstance(x, Blocks) else Blocks(**x)


def _decode(state: Any) -> Any:
    def decode(x):
        return dequantize_blockwise(_as_blocks(x)) if _is_blocks(x) else x

    return jax.tree.map(decode, state, is_leaf=_is_blocks)


def _moment(path: tuple) -> str | None:
    """The field of a state that a leaf belongs to, if it is a moment."""
    names = (k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey))
    return next((name for name in names if name in MOMENTS), None)


def _fields_with_moments(state: Any) -> Iterator[bool]:
    def has_moments(x):
        return not MOMENTS.keys().isdisjoint(getattr(x, "_fields", ()))

    return map(has_moments, jax.tree.leaves(state, is_leaf=has_moments))
