"""Dtypes: of the arithmetic, of moments, of updates."""

from typing import Any

import jax
import jax.numpy as jnp


def compute_dtype(dtype: Any) -> Any:
    """The dtype of the arithmetic: float32, or complex64 for complex leaves.

    float64 and complex128 stay what they are, if x64 is enabled.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        double, single = jnp.complex128, jnp.complex64
    else:
        double, single = jnp.float64, jnp.float32
    x64 = dtype == double and jax.config.read("jax_enable_x64")
    return double if x64 else single


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is narrower than that of the arithmetic."""
    return jnp.dtype(dtype) != compute_dtype(dtype)


def real_dtype(dtype: Any) -> Any:
    """The compute dtype of absolute values and scalars: float32 or float64."""
    return jnp.finfo(compute_dtype(dtype)).dtype


def scalar_dtype(tree: Any) -> Any:
    """The dtype of scalars that are shared by all leaves: float32 or float64."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    wide = any(real_dtype(leaf.dtype) == jnp.float64 for leaf in leaves)
    return jnp.float64 if wide else jnp.float32


def as_array(x: Any) -> Any:
    """A leaf with a dtype. A Python int, also traced, is a number and becomes a float.

    What is not a number is returned as it is.
    """
    if isinstance(x, bool | int | float | complex):
        return jnp.asarray(float(x) if type(x) is int else x)
    is_int = getattr(x, "weak_type", False) and jnp.issubdtype(x.dtype, jnp.integer)
    return x.astype(jnp.result_type(float)) if is_int else x


def is_inexact(x: Any) -> bool:
    """Whether an array is floating point or complex: others are not trained."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def with_complex(dtype: Any, is_complex: bool) -> Any:
    """A compute dtype, or the complex one of the same precision."""
    if not is_complex:
        return dtype
    return jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64


def cast(x: Any, dtype: Any) -> Any:
    """`x.astype(dtype)` without the cost of a call where there is nothing to do."""
    return x if x.dtype == dtype else x.astype(dtype)


def abs_sq(x: jax.Array) -> jax.Array:
    """The square of the absolute value, as a real array."""
    is_complex = jnp.iscomplexobj(x)
    return jnp.square(x.real) + jnp.square(x.imag) if is_complex else jnp.square(x)


def storage_dtype(param: Any, dtype: Any = None, *, real: bool = False) -> Any:
    """The dtype of a moment; see :func:`zeros_like_params`."""
    wide = real_dtype(param.dtype) if real else compute_dtype(param.dtype)
    if dtype == "params":
        return jnp.finfo(param.dtype).dtype if real else param.dtype
    if dtype is None:
        return wide
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.finfo(dtype).dtype if real else dtype
    return wide if jnp.issubdtype(wide, jnp.complexfloating) else dtype


def update_dtype(grad: Any, param: Any = None) -> Any:
    """The dtype of an update: that of the gradient, or of a wider parameter.

    Optax's is the same: bfloat16 gradients of float32 parameters give float32 updates.
    """
    dtype = jax.dtypes.canonicalize_dtype(grad.dtype)  # NumPy's float64 without x64
    known = hasattr(param, "dtype") and is_inexact(param)
    if not known or jnp.iscomplexobj(param) != jnp.iscomplexobj(grad):
        return dtype
    other = jax.dtypes.canonicalize_dtype(param.dtype)
    return other if jnp.finfo(other).bits > jnp.finfo(dtype).bits else dtype
