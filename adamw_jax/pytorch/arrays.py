"""Arrays from and to PyTorch: values, dtypes, and how axes are laid out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .problems import Problems


class Layout(NamedTuple):
    """How arrays are laid out in the two libraries: two functions of (path, array).

    Each takes the path of the JAX leaf, such as `conv1/kernel`, and a NumPy array, and
    returns an array. They only permute elements, and each must be the inverse of the
    other, which is checked.
    """

    from_torch: Callable[[str, np.ndarray], np.ndarray]
    to_torch: Callable[[str, np.ndarray], np.ndarray]


def _is_kernel(path: str, array: np.ndarray) -> bool:
    return path.split("/")[-1] == "kernel" and array.ndim >= 2


def _to_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (1, 0), (-2, -1)) if _is_kernel(path, array) else array


def _from_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-2, -1), (1, 0)) if _is_kernel(path, array) else array


# Kernels are (out, in, ...) in PyTorch and (..., in, out) in Flax: OIHW becomes HWIO,
# and matrices are transposed. All other leaves stay as they are. Attention, recurrent
# cells and transposed convolutions need a layout of their own, which can call this one
# for the other leaves.
flax_layout = Layout(_to_flax, _from_flax)


def to_array(x: Any) -> np.ndarray:
    """A NumPy array from a tensor, or from anything that NumPy accepts.

    Raises ValueError, which says what the tensor is, if it has not all its values.
    """
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = _local(x.detach())
    if str(x.device) == "meta":
        raise ValueError("is on PyTorch's meta device, where tensors have no values")
    # NumPy has no bfloat16 and no float8; float32 holds their values exactly.
    if str(x.dtype).startswith(("torch.bfloat16", "torch.float8")):
        x = x.float()
    return x.numpy(force=True)


def _local(x: Any) -> Any:
    """The tensor in a DTensor, if this process has all of it."""
    if not hasattr(x, "placements"):
        return x
    local = x.to_local()
    if local.shape == x.shape and not any(p.is_partial() for p in x.placements):
        return local
    try:
        return x.full_tensor()
    except Exception as error:  # without a process group, several kinds
        part = f"{tuple(local.shape)} of {tuple(x.shape)}"
        part = part if local.shape != x.shape else "a partial sum"
        raise ValueError(
            f"is a DTensor, of which this process has {part}: save its full_tensor()"
        ) from error


def address(x: Any) -> Any:
    """Where the values of an array are in memory; None if there are none."""
    if isinstance(x, np.ndarray):
        return x.size and (x.__array_interface__["data"][0], x.shape, x.strides) or None
    try:
        x = x.to_local() if hasattr(x, "placements") else x
        return x.data_ptr() and (x.data_ptr(), x.shape, x.stride()) or None
    except (AttributeError, NotImplementedError, RuntimeError):
        return None  # a tensor without memory


def to_tensor(array: np.ndarray) -> Any:
    """A tensor that owns its memory, because PyTorch writes to it."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def put_like(old: Any, array: np.ndarray) -> jax.Array:
    """A copy of the array with the dtype and on the devices of the old one."""
    array = np.array(array, old.dtype)
    if getattr(old, "committed", False):
        return jax.device_put(array, old.sharding)
    return jnp.array(array)


def put_number(old: Any, value: Any) -> Any:
    """Replaces a scalar, also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(lambda x: put_like(x, np.asarray(value)), old)


def put_array(
    path: str, key: str, old: Any, array: np.ndarray, problems: Problems
) -> Any:
    """Replaces an array by one of the same shape, if its dtype loses no bits."""
    if array.shape != old.shape:
        problems.add(
            f"leaf {path}", f"{key} has shape {array.shape}, expected {old.shape}"
        )
        return old
    with np.errstate(all="ignore"):
        cast = array.astype(old.dtype)
        exact = np.array_equal(cast.astype(array.dtype), array, equal_nan=True)
    if not exact:
        problems.add(
            f"leaf {path}",
            f"{key} has dtype {array.dtype}, and {old.dtype} would lose bits of it",
        )
        return old
    return put_like(old, cast)


def convert_layout(
    layout: Layout, path: str, array: np.ndarray, to: str, problems: Problems
) -> np.ndarray:
    """Converts to the other layout, after checking that this is invertible."""
    convert, invert = layout if to == "from_torch" else layout[::-1]
    order = np.arange(array.size).reshape(array.shape)
    owner = "PyTorch's " if to == "from_torch" else ""
    shape = f"{owner}shape {array.shape}"
    try:
        invertible = np.array_equal(invert(path, convert(path, order)), order)
        converted = convert(path, array)
    except ValueError as error:  # of a reshape or transpose in NumPy
        problems.add(f"leaf {path}", f"layout fails for {shape}: {error}")
        return array
    if not invertible:
        problems.add(f"leaf {path}", f"layout does not undo itself for {shape}")
    return converted
