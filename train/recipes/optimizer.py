"""The optimizer that a configuration names."""

import dataclasses
import importlib
import inspect
from typing import Any

import jax
import optax

import adamw_jax
from adamw_jax import Phases

OURS = ("adam", "adamw", "amsgrad", "sgd")  # the last has no b2


def optimizer_rules(c: Any) -> dict[str, tuple[Any, str]]:
    """For a script's `check`: by option, whether it is right, and what it must be."""
    alone = f"left alone with {c.optimizer}, which takes it by optimizer_args"
    return {
        "optimizer": (
            c.optimizer in OURS or "." in c.optimizer,
            f"one of {', '.join(OURS)}, or an import path as optax.lion",
        ),
        "b1": (c.optimizer in OURS or c.b1 == type(c).b1, alone),
        "b2": (c.optimizer in OURS[:3] or c.b2 == type(c).b2, alone),
    }


def optimizer_of(config: Any, cycle: Phases) -> optax.GradientTransformation:
    """Ours are driven by all of the cycle, others by its learning rate."""
    if config.optimizer in OURS:
        factory, rate = getattr(adamw_jax, config.optimizer), cycle
    else:
        module, _, attribute = config.optimizer.rpartition(".")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"optimizer: cannot import {config.optimizer!r}: {error}"
            ) from error
        rate = cycle.schedule("learning_rate")
        if not callable(factory):
            raise ValueError(f"optimizer must be a function, got {config.optimizer}")
    known, args = inspect.signature(factory).parameters, dict(config.optimizer_args)
    for decay in ("weight_decay", "l2"):  # also 0, which need not be the default
        value = getattr(config, decay)
        if decay in known and decay not in args:
            args[decay] = value
        elif value and decay not in args:
            raise ValueError(
                f"{decay} must be 0 with {config.optimizer}, which has no such "
                f"argument, got {value}"
            )
    try:
        tx = factory(rate, **args)
    except TypeError as error:
        raise ValueError(
            f"optimizer_args: {config.optimizer} does not take {args}: {error}"
        ) from error
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise ValueError(
            f"optimizer: {config.optimizer} is not a transformation of gradients"
        )
    return tx


def rate_alone(cycle: Phases, steps_per_epoch: int) -> Phases:
    """For optimizers that are not ours, of which nothing else is driven."""
    phases = [dataclasses.replace(phase, b1=None) for phase in cycle.phases]
    return Phases(phases, steps_per_epoch)


def check_optimizer(config: Any, tx: optax.GradientTransformation, params: Any) -> None:
    """Raises a ValueError where the optimizer wants more than a gradient."""
    try:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"optimizer: {config.optimizer} is not a transformation of gradients that "
            f"needs nothing but them and the parameters: {error}"
        ) from error
