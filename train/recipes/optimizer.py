"""The optimizer that a configuration names: one of adamw_jax, or any other's.

A configuration has optimizer, weight_decay, l2, b1, b2 and optimizer_args.
"""

import dataclasses
import importlib
import inspect
from typing import Any

import jax
import optax

import adamw_jax
from adamw_jax import Phases
from train.recipes.check import Rules

ADAMS = ("adam", "adamw", "amsgrad")
OURS = (*ADAMS, "sgd")  # the last has no b2


def optimizer_rules(config: Any) -> Rules:
    """For `check_options`. make_optimizer and check_optimizer check the rest."""
    name, defaults = config.optimizer, type(config)
    default = f"left at its default with {name}, which takes it by optimizer_args"
    return {
        "optimizer": (
            name in OURS or "." in name,
            f"one of {', '.join(OURS)}, or an import path such as optax.lion",
        ),
        "b1": (name in OURS or config.b1 == defaults.b1, default),
        "b2": (name in ADAMS or config.b2 == defaults.b2, default),
    }


def make_optimizer(config: Any, schedule: Phases) -> optax.GradientTransformation:
    """Ours follow the whole schedule, others its learning rate.

    Raises:
        ValueError: there is no such optimizer, or it does not take its arguments.
    """
    name = config.optimizer
    if name in OURS:
        factory, learning_rate = getattr(adamw_jax, name), schedule
    else:
        factory, learning_rate = _load(name), schedule.schedule("learning_rate")
    known, args = inspect.signature(factory).parameters, dict(config.optimizer_args)
    for decay in ("weight_decay", "l2"):
        value = getattr(config, decay)
        if decay in known and decay not in args:
            if value or known[decay].default is not None:  # 0 where that is no default
                args[decay] = value
        elif value and decay not in args:
            raise ValueError(
                f"{decay} must be 0 with {name}, which has no such argument, "
                f"got {value}"
            )
    try:
        tx = factory(learning_rate, **args)
    except TypeError as error:
        raise ValueError(
            f"optimizer_args: {name} does not take {args}: {error}"
        ) from error
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise ValueError(f"optimizer: {name} is not a gradient transformation")
    return tx


def _load(name: str) -> Any:
    """The function with an import path."""
    module, _, attribute = name.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"optimizer: cannot import {name!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"optimizer must be a function, got {name}")
    return factory


def adapt_schedule(config: Any, schedule: Phases) -> Phases:
    """Drops b1 from the schedule where the optimizer is not one of ours."""
    if config.optimizer in OURS:
        return schedule
    phases = [dataclasses.replace(phase, b1=None) for phase in schedule.phases]
    return dataclasses.replace(schedule, phases=phases)


def check_optimizer(config: Any, tx: optax.GradientTransformation, params: Any) -> None:
    """Raises a ValueError where the optimizer needs more than gradients and params."""
    try:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"optimizer: {config.optimizer} is not a gradient transformation of "
            f"gradients and parameters alone: {error}"
        ) from error
