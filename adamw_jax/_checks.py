"""Argument checks. Every error names the argument, its value and what is allowed."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def is_static(x: Any) -> TypeGuard[float]:
    """Whether x is a Python or NumPy number, and so known at trace time."""
    return isinstance(x, int | float | np.number)


def check_scalar(
    name: str,
    value: Any,
    *,
    below: float = math.inf,
    schedule: bool = False,
) -> None:
    """Raises unless value is a number in [0, below), a scalar array or a schedule.

    The range of an array is not checked: a traced array has no value yet, and outside
    `jit` a concrete one comes from the state at every update, where a schedule that
    ends at -1e-12 instead of 0 must not stop a run. NaN and infinity are refused.
    """
    if isinstance(value, jax.Array) and value.ndim == 0:
        return
    if callable(value):
        if schedule:
            return
        raise TypeError(f"{name} must be a number, not a callable: got {value!r}")
    if isinstance(value, bool | np.bool_) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be a scalar number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    # Rounded to the dtype of the computation: 1 - 1e-9 is 1 in float32.
    rounded = (
        float(np.asarray(number, jnp.result_type(float))) if below == 1 else number
    )
    if not (0 <= rounded < below):
        allowed = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_storage_dtype(name: str, dtype: Any) -> None:
    if dtype is None or dtype == "params":
        return
    allowed = f"{name} must be None, 'params' or a float dtype"
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{allowed}, got {dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{allowed}, got {dtype.name}")


def check_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "update needs the parameters: call update(updates, state, params)"
        )
