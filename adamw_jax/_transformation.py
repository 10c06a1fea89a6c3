"""`Transformation`: an Optax transformation that may offer more than `update`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._dtypes import as_array, cast, compute_dtype, is_inexact
from ._tree import narrow, optional_leaves


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that may offer more than `update`.

    `update` always returns updates. Everything else is an optional attribute: ask for
    it with `hasattr`.

    Attributes:
        step: `step(grads, state, params, *, factor=None, **extra_args) -> (params,
            state)`: does the work of `update` and :func:`adamw_jax.apply_updates` in
            one call, where that is cheaper. The state is the same as that of `update`.
            `factor`, a scalar or None, multiplies every gradient first.
        factor: `factor(grads, state) -> (scalar, state)`: present if the transformation
            multiplies all gradients by one scalar.
        describe_step: `describe_step(params) -> str`: how `step` works and why; see
            :func:`adamw_jax.describe_step`.
        wide_updates: whether updates are float32 also for bfloat16 gradients.
        links: the transformations of a chain.
        arguments: the arguments that a link was built with, by name.
        factory: the factory of :func:`adamw_jax.with_hyperparams`, from hyperparameter
            values to the inner transformation.
        hyperparams: the number or schedule behind each of these values, by name.
    """

    step: Callable[..., tuple[Any, Any]]
    factor: Callable[[Any, Any], tuple[jax.Array, Any]]
    describe_step: Callable[[Any], str]
    wide_updates: bool
    links: tuple[optax.GradientTransformation, ...]
    arguments: Mapping[str, Any]
    factory: Callable[..., Any]
    hyperparams: Mapping[str, Any]

    def __new__(cls, init: Any, update: Any, **attributes: Any) -> "Transformation":
        """Builds a transformation from `init`, `update` and its optional attributes."""
        self = super().__new__(cls, init, update)
        unknown = attributes.keys() - Transformation.__annotations__.keys()
        assert not unknown, unknown
        self.__dict__.update(attributes)
        return self


def check_transformation(name: str, tx: Any) -> None:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{name} must be a transformation, such as adamw(1e-3), got {tx!r}"
        )


def multiply(grads: optax.Updates, factor: jax.Array | None) -> optax.Updates:
    """Multiplies the gradients by a scalar, in float32 (float64 for float64 ones)."""
    if factor is None:
        return grads

    def product(g):
        g = as_array(g)
        if not is_inexact(g):
            return g
        g = cast(g, compute_dtype(g.dtype))
        return factor.astype(g.dtype) * g

    return jax.tree.map(product, grads)


def step_with_factor(
    tx: Any, grads: Any, state: Any, params: Any, factor: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """Calls `tx.step`; a step of another library need not accept `factor`."""
    if factor is None:
        return tx.step(grads, state, params, **extra_args)
    if "factor" in inspect.signature(tx.step).parameters:
        return tx.step(grads, state, params, factor=factor, **extra_args)
    return tx.step(multiply(grads, factor), state, params, **extra_args)


def keep_state_dtypes(tx: optax.GradientTransformation) -> Any:
    """Makes the state of another library's transformation keep its dtypes.

    Where updates are wider than the parameters, it sees them in the dtype of the
    parameters, as it would without this library, and what it returns is widened again.
    Optax's Adam would return float32 moments for bfloat16 ones, and some of Optax's
    conditions fail for updates and states of different dtypes.
    """
    inner = optax.with_extra_args_support(tx)
    if isinstance(tx, Transformation) or hasattr(tx, "step"):
        return inner

    def update(updates, state, params=None, **extra_args):
        narrowed = narrow_like(updates, params)
        new, new_state = inner.update(narrowed, state, params, **extra_args)
        return narrow(new, updates), cast_like(new_state, state)

    return inner._replace(update=update)


def narrow_like(updates: Any, params: Any) -> Any:
    """Casts the updates of narrower parameters to the dtype of these, if known."""
    leaves, treedef = jax.tree.flatten(updates)

    def leaf(u, p):
        if not (hasattr(p, "dtype") and hasattr(u, "dtype")):
            return u
        same_kind = jnp.iscomplexobj(u) == jnp.iscomplexobj(p)
        both = is_inexact(u) and is_inexact(p) and same_kind
        is_narrower = both and jnp.finfo(p.dtype).bits < jnp.finfo(u.dtype).bits
        return cast(u, p.dtype) if is_narrower else u

    flat = map(leaf, leaves, optional_leaves(treedef, params))
    return treedef.unflatten(flat)


def cast_like(state: Any, old: Any) -> Any:
    """Casts the floating point leaves of a state to the dtypes of the old one."""
    if jax.tree.structure(state) != jax.tree.structure(old):
        return state  # optax.monitor begins with an empty dict

    def leaf(new, old):
        both = hasattr(new, "dtype") and hasattr(old, "dtype")
        return cast(new, old.dtype) if both and is_inexact(old) else new

    return jax.tree.map(leaf, state, old)
