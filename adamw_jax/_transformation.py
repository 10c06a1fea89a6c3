"""The class of our transformations: Optax's, and what one may be able to do beside."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._tree import compute_dtype


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that may have more than `update`.

    `update` returns updates, always. Whatever else a transformation can do is an
    attribute that it has or lacks, so `hasattr` is the question to ask:

    Attributes:
        step: `step(grads, state, params, *, factor=None, **extra_args) -> (params,
            state)`: what `update` and :func:`adamw_jax.apply_updates` do together,
            where that is cheaper. The state is the one of `update`. `factor`, a scalar
            or None, multiplies every gradient first.
        factor: `factor(grads, state) -> (scalar, state)`, of a transformation that
            multiplies all gradients by one scalar.
        describe_step: `describe_step(params) -> str`, how `step` works and why; see
            :func:`adamw_jax.describe_step`.
        links: the transformations of a chain.
        arguments: what a link was built with, by name.
        factory: of :func:`adamw_jax.with_hyperparams`, from values to the inner
            transformation.
        hyperparams: what drives each of these values, by name.
    """

    step: Callable[..., tuple[Any, Any]]
    factor: Callable[[Any, Any], tuple[jax.Array, Any]]
    describe_step: Callable[[Any], str]
    links: tuple[optax.GradientTransformation, ...]
    arguments: Mapping[str, Any]
    factory: Callable[..., Any]
    hyperparams: Mapping[str, Any]

    def __new__(cls, init: Any, update: Any, **attributes: Any) -> "Transformation":
        """From `init`, `update` and the attributes that this one has."""
        self = super().__new__(cls, init, update)
        unknown = attributes.keys() - Transformation.__annotations__.keys()
        assert not unknown, unknown
        self.__dict__.update(attributes)
        return self


def multiply(grads: optax.Updates, factor: jax.Array | None) -> optax.Updates:
    """The gradients times a scalar, in float32 (float64 for float64 gradients)."""
    if factor is None:
        return grads

    def product(g):
        g = g if hasattr(g, "dtype") else jnp.asarray(g)
        g = g.astype(compute_dtype(g.dtype))
        return factor.astype(g.dtype) * g

    return jax.tree.map(product, grads)


def step_with_factor(
    tx: Any, grads: Any, state: Any, params: Any, factor: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """Calls `tx.step`, which need not know about factors if it is not one of ours."""
    if factor is None:
        return tx.step(grads, state, params, **extra_args)
    if "factor" in inspect.signature(tx.step).parameters:
        return tx.step(grads, state, params, factor=factor, **extra_args)
    return tx.step(multiply(grads, factor), state, params, **extra_args)
