"""Eight-bit moments for any optimizer, quantized in blocks with a common scale."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .._transformation import Transformation, keep_state_dtypes
from .._tree import find_states, increment, is_variable, path_string
from ..transforms.rounding import init_key, step_key


class Blocks(NamedTuple):
    """An array in eight bits; both fields have its axes, and so its sharding."""

    codes: jax.Array  # int8, or uint8 for non-negative values; the shape of the array
    # Largest magnitude per block, negative in a block with NaN or infinity; its shape:
    # number of blocks per axis.
    scale: jax.Array


def _blocks_along(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """The number of blocks along each axis. Blocks fill the last axis first."""
    counts: list[int] = []
    for n in reversed(shape):
        counts.append(-(-n // block_size))  # none along an empty axis
        block_size //= -(-n // max(counts[-1], 1)) or 1
    return tuple(reversed(counts))


def _split_blocks(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Splits every axis into (blocks, values per block), padded with zeros."""
    sizes = [
        -(-n // max(count, 1)) or 1 for n, count in zip(x.shape, counts, strict=True)
    ]
    pairs = list(zip(counts, sizes, strict=True))
    padding = [c * size - n for n, (c, size) in zip(x.shape, pairs, strict=True)]
    if any(padding):
        x = jnp.pad(x, [(0, n) for n in padding])
    return x.reshape([n for pair in pairs for n in pair])


def _join_blocks(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_split_blocks`, with the shape and sharding of `like`."""
    shape = [math.prod(x.shape[i : i + 2]) for i in range(0, x.ndim, 2)]
    sharding = jax.typeof(like).sharding
    # On a mesh with explicit axes, a reshape needs the sharding of its result.
    x = jnp.reshape(
        x, shape, out_sharding=sharding if sharding.mesh.explicit_axes else None
    )
    return x if x.shape == like.shape else x[tuple(slice(n) for n in like.shape)]


def _inner_axes(x: jax.Array) -> tuple[int, ...]:
    """The axes of the values within a block."""
    return tuple(range(1, x.ndim, 2))


def _value(code: jax.Array, dtype: Any) -> jax.Array:
    """The magnitude of a code: (c / 127)^4, or (c / 255)^8 for unsigned codes."""
    value = jnp.square(jnp.square(code * (1 / jnp.iinfo(dtype).max)))
    return jnp.square(value) if dtype == jnp.uint8 else value


# The two largest codes of a block with a negative scale stand for infinity and NaN. The
# scale is larger there, so that its largest finite value has the code below these two.
def _infinity_and_nan(dtype: Any) -> tuple[int, int]:
    top = int(jnp.iinfo(dtype).max)
    return top, top - 1


def _scale_with_room(scale: jax.Array, dtype: Any) -> jax.Array:
    top, info = int(jnp.iinfo(dtype).max), jnp.finfo(scale.dtype)
    room = (top / (top - 2)) ** (8 if dtype == jnp.uint8 else 4)
    # A scale must not be infinite itself, nor 0, which has no sign.
    largest = jnp.minimum(scale, float(info.max) / (1.01 * room))
    return jnp.maximum(largest * room, float(info.tiny))


def quantize_blockwise(
    x: jax.Array,
    dtype: Any = jnp.int8,
    *,
    block_size: int = 256,
    bits: jax.Array | None = None,
) -> Blocks:
    r"""Quantizes an array to eight bits per value and one scale per block.

    $$ x \approx s \, \mathrm{sign}(c) \left(\frac{|c|}{127}\right)^4
       \quad\text{(int8)}, \qquad
       x \approx s \left(\frac{c}{255}\right)^8 \quad\text{(uint8)}, \qquad
       s = \max_{block} |x| $$

    `mu` and the root of `nu` are fourth powers of their codes: a smooth form of the
    dynamic tree of Dettmers et al., in which each decade has half as many codes as the
    one above. It needs no table and no search, only square roots. Compared with theirs,
    its error in Adam's update is smaller for `mu` and about as large for `nu`. It is
    far smaller where the values of a block differ by orders of magnitude, because the
    codes reach down to 4e-9 (int8) and 6e-20 (uint8) of the largest value, instead of
    5e-7 and 3e-7.

    Conventions that bite:

    * A block runs along the last axis and, if that axis is shorter than a block,
      continues along the one before. It never crosses the end of a row. As long as the
      block size divides the part of an axis that a device holds, no device needs values
      of another.
    * In uint8, positive values never round to zero, because Adam divides by them.
    * NaN and infinity stay what they are. The other values of the block keep a scale of
      their own, negative as a sign, which costs them two of the codes. -0 becomes 0.

    Args:
        x: float32 or float64, of any shape, scalar or empty too.
        dtype: int8, or uint8 for non-negative values.
        block_size: the largest number of values in a block.
        bits: uint16 random bits, with the shape of x, for stochastic rounding between
            the two neighbouring codes. None: round to the nearer one.

    Returns:
        The blocks. Quantizing their dequantized values again gives the same codes.

    Raises:
        TypeError: x, dtype or bits has another dtype.
        ValueError: block_size is less than 1.

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
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if x.dtype not in _WIDE:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if bits is not None and bits.dtype != jnp.uint16:
        raise TypeError(f"bits must be uint16, got {bits.dtype}")
    return _quantize(x, dtype, _blocks_along(x.shape, block_size), bits)


def _quantize(x: Any, dtype: Any, counts: tuple[int, ...], bits: Any) -> Blocks:
    original, x = x, _split_blocks(x, counts)
    is_finite = jnp.isfinite(x)
    magnitude = jnp.where(is_finite, jnp.abs(x), 0)
    scale = magnitude.max(_inner_axes(x), keepdims=True)
    marked = ~is_finite.all(_inner_axes(x), keepdims=True)
    scale = jnp.where(marked, _scale_with_room(scale, dtype), scale)
    # XLA divides by multiplying with the reciprocal, 0 for the largest numbers.
    factor = jnp.where(scale > 2.0**100, 2.0**-100, jnp.ones_like(scale))
    y = magnitude * factor / jnp.where(scale > 0, scale * factor, 1)
    root = jnp.sqrt(jnp.sqrt(y))
    root = jnp.sqrt(root) if dtype == jnp.uint8 else root
    below = jnp.floor(root * int(jnp.iinfo(dtype).max))
    low, high = _value(below, dtype), _value(below + 1, dtype)
    threshold = 0.5
    if bits is not None:
        # Never 0 or 1, so that rounding errors do not move values that are codes.
        threshold = (_split_blocks(bits, counts).astype(x.dtype) + 0.5) * 2.0**-16
    code = below + (y - low > threshold * (high - low)).astype(x.dtype)
    if dtype == jnp.uint8:
        code = jnp.maximum(code, (magnitude > 0).astype(x.dtype))
    infinity, nan = _infinity_and_nan(dtype)
    code = jnp.where(marked, jnp.minimum(code, nan - 1), code)
    code = jnp.where(is_finite, code, jnp.where(jnp.isnan(x), nan, infinity))
    if dtype == jnp.int8:
        code = jnp.where(x < 0, -code, code)
    scale = jnp.where(marked, -scale, scale)
    return Blocks(_join_blocks(code.astype(dtype), original), scale.reshape(counts))


def dequantize_blockwise(blocks: Blocks) -> jax.Array:
    """Computes the values of :func:`quantize_blockwise`, in the dtype of the scale.

    Args:
        blocks: the result of :func:`quantize_blockwise`.

    Returns:
        An array with the shape of the codes.
    """
    codes, scale = blocks
    code = _split_blocks(codes, scale.shape).astype(scale.dtype)
    scale = jnp.expand_dims(scale, _inner_axes(code))
    sign, magnitude = jnp.sign(code), jnp.abs(code)
    value = sign * (_value(code, codes.dtype) * jnp.abs(scale))
    infinity, nan = _infinity_and_nan(codes.dtype)
    special = jnp.where(magnitude == infinity, sign * jnp.inf, jnp.nan)
    value = jnp.where((scale < 0) & (magnitude >= nan), special, value)
    return _join_blocks(value, codes)


# The dtypes that are quantized. Moments stored below float32 and complex ones are not.
_WIDE = (jnp.float32, jnp.float64)

# The quantized fields of the states of Adam and its relatives, here and in Optax.
MOMENTS = {"mu": jnp.int8, "trace": jnp.int8, "nu": jnp.uint8, "nu_max": jnp.uint8}


class QuantizedMomentsState(NamedTuple):
    """The inner state, with :class:`Blocks` in place of its large moments."""

    inner_state: optax.OptState
    count: jax.Array | None = None  # int32 []: updates done; None without a key
    key: jax.Array | None = None  # uint32 [2], the data of a key


def quantize_moments(
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> Transformation:
    """Keeps the moments of any optimizer in eight bits: 2 bytes per parameter, not 8.

    At every update the moments are dequantized, updated in float32 by the rule of
    `inner`, and quantized again. It wraps a whole optimizer or one link of a chain, and
    masks, phases and hyperparameters in the state work as before. It quantizes the
    fields `mu`, `nu`, `nu_max` and `trace` of the inner states, except those that are
    stored below float32 (`mu_dtype`) or complex. The updates have the dtype that
    `inner` gives them.

    The saving is in the memory between updates. During one, XLA holds float32 moments
    of the parameters that it is computing; on a CPU, of all parameters at once.

    The code is described at :func:`quantize_blockwise`. Conventions that bite:

    * The maximum of AMSGrad is rounded to nearest, because a maximum of random
      roundings would grow.
    * NaN and infinity affect their own parameter only, as in float32. The square of a
      gradient of 1e30 is infinite, so the updates of that parameter are zero from then
      on; those of its block go on.
    * Codes cannot be averaged, neither by `lax.pmean` nor over steps. An average that
      `update` can recognize, because its codes are floats, is an error.

    Args:
        inner: an optimizer or transformation of this package or of Optax.
        block_size: the largest number of values that share a scale. The state takes 2 +
            8 / block_size bytes per parameter.
        min_size: parameters with fewer values keep float32 moments.
        stochastic_rounding: round the moments stochastically, with a key in the state,
            so that they have no bias. Rounded to nearest, a second moment that should
            decay by .1 % per step does not move between codes 3 % apart; only the scale
            of its block does.
        seed: seed of the rounding. `jax.vmap` of `init` gives all members the same key.

    Returns:
        A transformation that passes extra arguments of `update` on to the inner one.
        Only `init` uses the sizes; a restored state keeps its own. `init` first makes
        the moments in float32: call it under `jit` for a large model.

    Raises:
        ValueError: block_size or min_size is less than 1; or, at `init`, the state of
            `inner` has none of these fields.
        TypeError: at `update`, codes are not int8 or uint8.

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
    inner = keep_state_dtypes(inner)

    def init(params: Any) -> Any:
        def store(path, leaf):
            name, x = _moment(path), _unwrap(leaf)
            wide = getattr(x, "dtype", None) in _WIDE
            if name is None or not wide or x.size < min_size:
                return leaf
            # Otherwise XLA folds the quantization of constant zeros, for minutes.
            x = lax.optimization_barrier(x)
            return quantize_blockwise(x, MOMENTS[name], block_size=block_size)

        state = inner.init(params)
        if not find_states(state, _has_moments):
            raise ValueError(
                f"there is nothing to quantize: the state of inner must have a field "
                f"{', '.join(MOMENTS)}, got {type(state).__name__}"
            )
        state = jax.tree_util.tree_map_with_path(store, state, is_leaf=is_variable)
        if not stochastic_rounding:
            return QuantizedMomentsState(state)
        return QuantizedMomentsState(
            state,
            jnp.zeros([], jnp.int32),
            init_key(seed),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        inner_state, count, key = state
        if key is not None:
            of_step = step_key(key, count)
            count = increment(count)
        numbers: dict[tuple, int] = {}  # of the parameters, by path

        def store(path, old, new):
            """Stores the new value as the old one was stored."""
            if not _is_blocks(old):
                return _wrap_like(old, new)
            bits, name = None, _moment(path)
            owner = _owner(path, name)
            nu = second_moments.get(owner)
            # NovoGrad's nu is one number, and divides before mu.
            if name == "mu" and nu is not None and nu.shape == new.shape:
                # Finite mu over infinite nu is 0, and the block need not span such mu.
                is_zero = jnp.isinf(nu) & jnp.isfinite(new)
                new = jnp.where(is_zero, 0, new)
            if key is not None and name != "nu_max":
                # One draw of 32 bits serves both moments of a parameter.
                number = numbers.setdefault(owner, len(numbers))
                words = jax.random.key_data(jax.random.fold_in(of_step, number))
                bits = _random_bits(words, new.shape)
                bits = (bits >> (16 if name == "nu" else 0)).astype(jnp.uint16)
            return _quantize(new, old.codes.dtype, old.scale.shape, bits)

        # Without Variables, in which init left what is not quantized.
        new, new_state = inner.update(
            _unwrap(updates),
            _unwrap(decode_moments(inner_state)),
            _unwrap(params),
            **extra_args,
        )
        updates = jax.tree.map(_wrap_like, updates, new, is_leaf=_is_node)
        second_moments = {
            _owner(path, "nu"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(new_state)
            if _moment(path) == "nu"
        }
        new_state = jax.tree_util.tree_map_with_path(
            store, inner_state, new_state, is_leaf=_is_node
        )
        return updates, QuantizedMomentsState(new_state, count, key)

    wide_updates = getattr(inner, "wide_updates", False)
    return Transformation(init, update, wide_updates=wide_updates)


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int):
        raise TypeError(f"block_size must be an integer, got {block_size!r}")
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


def _unwrap(tree: Any) -> Any:
    """Replaces the Variables in a tree by their values."""

    def value(x):
        return jax.tree.leaves(x)[0] if is_variable(x) else x

    return jax.tree.map(value, tree, is_leaf=is_variable)


def _wrap_like(old: Any, new: Any) -> Any:
    """Puts a value into a Variable, if the old one was in one."""
    is_wrapped = is_variable(old) and new is not None
    return jax.tree.unflatten(jax.tree.structure(old), [new]) if is_wrapped else new


def _is_node(x: Any) -> bool:
    return x is None or _is_blocks(x) or is_variable(x)


def _is_blocks(x: Any) -> bool:
    return isinstance(x, Blocks)


def decode_moments(state: Any) -> Any:
    """Replaces all blocks of a state by their values."""

    def decode(path, x):
        if not _is_blocks(x):
            return x
        x = Blocks(*jax.tree.leaves(x))  # without the Variables of nnx.Optimizer
        if x.codes.dtype not in (jnp.int8, jnp.uint8):
            raise TypeError(
                f"the codes of {path_string(path)} must be int8 or uint8, got "
                f"{x.codes.dtype}: states in eight bits cannot be averaged or cast"
            )
        return dequantize_blockwise(x)

    return jax.tree_util.tree_map_with_path(decode, state, is_leaf=_is_blocks)


def encode_like(old: Blocks, x: jax.Array) -> Blocks:
    """Quantizes an array as an old one was, rounded to nearest."""
    return _quantize(x, old.codes.dtype, old.scale.shape, None)


def _moment(path: tuple) -> str | None:
    """The field of the state that a leaf is in, if that is a moment."""
    names = (k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey))
    return next((name for name in names if name in MOMENTS), None)


def _owner(path: tuple, name: str | None) -> tuple:
    """The path of a moment without its name: the same for all moments of a leaf."""
    return tuple(k for k in path if k != jax.tree_util.GetAttrKey(name))


def _has_moments(x: Any) -> bool:
    return not MOMENTS.keys().isdisjoint(getattr(x, "_fields", ()))
