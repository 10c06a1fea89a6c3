"""Checks of arguments; an error names the argument, its value and what is allowed."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def is_static(x: Any) -> TypeGuard[float]:
    """Whether the value is a Python or NumPy number, known while tracing."""
    return isinstance(x, int | float | np.number)


def check_scalar(
    name: str,
    value: Any,
    *,
    below: float = math.inf,
    schedule: bool = False,
) -> None:
    """Raises unless value is a number in [0, below), or an array, or a schedule.

    Arrays pass: a traced one has no number yet, and a concrete one comes from the
    state at every update out of `jit`, where a schedule that ends at -1e-12 instead
    of 0 must not stop a run. NaN and infinity never do.
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
    # As it will be computed with: 1 - 1e-9 is 1 in float32.
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
    if dtype is None:
        return
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{name} must be None or a float dtype, got {dtype!r}"
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be None or a float dtype, got {dtype.name}")


def need_params(params: Any) -> None:
    if params is None:
        raise ValueError("update needs the parameters: update(updates, state, params)")
