"""Argument checks. Every error names the argument, its value and what is allowed."""

import math
import reprlib
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
show = _REPR.repr  # for messages: cuts 10**400 and trees of arrays


def is_static(x: Any) -> TypeGuard[float]:
    """Whether x is a Python or NumPy number, and so known at trace time."""
    return isinstance(x, int | float | np.number)


def check_scalar(
    name: str,
    value: Any,
    *,
    below: float = math.inf,
    infinite: bool = False,
    schedule: bool = False,
) -> None:
    """Raises unless value is a number in [0, below), a scalar array or a schedule.

    The range of an array is not checked: a traced array has no value yet, and outside
    `jit` a concrete one comes from the state at every update, where a schedule that
    ends at -1e-12 instead of 0 must not stop a run. `check_array` checks it, at `init`.
    NaN is refused, and infinity unless `infinite`.
    """
    if isinstance(value, jax.Array) and value.ndim == 0:
        return
    if callable(value):
        if not schedule:
            raise TypeError(f"{name} must be a number, not a callable: got {value!r}")
        return _check_schedule(name, value)
    if isinstance(value, bool | np.bool_) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be a scalar number, got {show(value)}")
    number = _to_float(name, value)
    # Rounded to the dtype of the computation: 1 - 1e-9 is 1 in float32.
    rounded = (
        float(np.asarray(number, jnp.result_type(float))) if below == 1 else number
    )
    if not (0 <= rounded < below or infinite and rounded == math.inf):
        allowed = ">= 0" if infinite else "finite and >= 0"
        allowed = f"in [0, {below:g})" if below < math.inf else allowed
        raise ValueError(f"{name} must be {allowed}, got {show(value)}")


def check_factor(name: str, value: Any) -> None:
    """Raises unless value is what a link multiplies by: finite, or a schedule.

    It may be negative, or an array that broadcasts to each leaf. The elements of an
    array of JAX are not checked; see `check_scalar`.
    """
    if callable(value):
        _check_schedule(name, value)
    elif isinstance(value, np.ndarray) and value.ndim:
        if not (np.issubdtype(value.dtype, np.number) and np.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got {show(value)}")
    elif isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a number, got {value!r}")
    elif not isinstance(value, jax.Array):
        if not math.isfinite(_to_float(name, value)):
            raise ValueError(f"{name} must be finite, got {show(value)}")


def check_array(name: str, value: Any, *, infinite: bool = False) -> None:
    """Checks the range of an array that has a value. Call it at `init` only."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        check_scalar(name, np.asarray(value)[()], infinite=infinite)


def _check_schedule(name: str, value: Any) -> None:
    """Refuses phases that are called for another value than their learning rate."""
    from .schedules.phases import Phases  # which imports this module

    if isinstance(value, Phases):
        value.check_called_for(name)


def _to_float(name: str, value: Any) -> float:
    is_number = hasattr(value, "__float__") or hasattr(value, "__index__")  # not "0.1"
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    try:
        if is_number and kind not in ("U", "S", "c"):  # text, complex
            return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got {show(value)}") from None
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number, got {show(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_storage_dtype(name: str, dtype: Any) -> None:
    if dtype is None or dtype == "params":
        return
    allowed = f"{name} must be None, 'params' or a float or complex dtype"
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{allowed}, got {dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{allowed}, got {dtype.name}")


def check_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "update needs the parameters: call update(updates, state, params)"
        )
