"""What an update costs beside its arithmetic, where the leaves are tiny.

    python -m train.bench overhead

Times AdamW, AMSGrad and SGD of this library and of Optax: outside of `jit`, where every
operation is a dispatch, and in a compiled step with one leaf, which spends its time on
passing arrays in and out. Optax's optimizers are also timed inside
`optax.inject_hyperparams`, which keeps the hyperparameters in the state, as ours do.

The floor of a compiled step subtracts the gradient from the leaf and adds one to each
scalar, with as many scalars as there are in the state of our AdamW.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adamw_jax as aj
from train.bench import harness
from train.bench.harness import Bench, Program

STEPS = 1000  # of a cycle


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    """Times updates of tiny leaves, compiled and not."""

    leaves: int = 10  # outside of jit
    size: int = 64  # elements of a leaf
    eager_calls: int = 10  # in a turn
    compiled_calls: int = 200
    turns: int = 20  # best, median and spread of them are reported


def make_optimizers() -> dict[str, tuple[Any, Any, Any]]:
    """Ours, Optax's, and Optax's with the hyperparameters in the state."""
    cycle = optax.cosine_onecycle_schedule(STEPS, 1e-3)
    inject = optax.inject_hyperparams
    return {
        "adamw": (aj.adamw(1e-3), optax.adamw(1e-3), inject(optax.adamw)(1e-3)),
        "adamw, 1cycle": (
            aj.adamw(aj.one_cycle(1e-3, steps=STEPS)),
            optax.adamw(cycle),
            inject(optax.adamw)(cycle),
        ),
        "amsgrad": (aj.amsgrad(1e-3), optax.amsgrad(1e-3), inject(optax.amsgrad)(1e-3)),
        "sgd": (aj.sgd(0.1, 0.9), optax.sgd(0.1, 0.9), inject(optax.sgd)(0.1, 0.9)),
    }


class Loop:
    """Parameters and state that calls of a step advance."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any):
        self.step, self.params, self.state = step, params, state
        self.grads = jax.tree.map(lambda p: 0.1 * p, params)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.params, self.state = self.step(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))


def make_step(tx: Any) -> Callable[..., Any]:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def only_update(tx: Any) -> Callable[..., Any]:
    def step(params, state, grads):
        _, state = tx.update(grads, state, params)
        return params, state

    return step


def eager(config: Config, tx: Any) -> Program:
    params = {f"leaf{i}": jnp.ones(config.size) for i in range(config.leaves)}
    loop = Loop(only_update(tx), params, tx.init(params))
    figures = {"state_leaves": len(jax.tree.leaves(loop.state))}
    run = functools.partial(loop.run, config.eager_calls)
    return Program(run, config.eager_calls, figures=figures)


def compiled(config: Config, step: Callable[..., Any], init: Any) -> Program:
    params = jnp.ones(config.size)
    loop = Loop(jax.jit(step, donate_argnums=(0, 1)), params, init(params))
    figures = {"state_leaves": len(jax.tree.leaves(loop.state))}
    run = functools.partial(loop.run, config.compiled_calls)
    return Program(run, config.compiled_calls, figures=figures)


def floor(params, state, grads):
    return params - grads, [x + 1 for x in state]


def make_bench(config: Config) -> Bench:
    programs: dict[str, Callable[[], Program]] = {}
    ratios = []
    for way in ("outside of jit", "compiled"):
        for name, optimizers in make_optimizers().items():
            names = [
                f"{way}: {name}, {library}"
                for library in ("adamw_jax", "optax", "optax.inject_hyperparams")
            ]
            for row, tx in zip(names, optimizers, strict=True):
                programs[row] = (
                    functools.partial(eager, config, tx)
                    if way == "outside of jit"
                    else functools.partial(compiled, config, make_step(tx), tx.init)
                )
            ratios += [(names[0], peer) for peer in names[1:]]
    scalars = len(jax.tree.leaves(aj.adamw(1e-3).init(jnp.ones(1)))) - 2  # two moments
    programs[f"compiled: the floor, with {scalars} scalars"] = functools.partial(
        compiled, config, floor, lambda params: list(jnp.zeros(scalars))
    )
    return Bench(
        f"{config.leaves} leaves of {config.size} elements; one in the compiled steps",
        "update",
        f"{config.eager_calls} updates, and {config.compiled_calls} compiled steps",
        programs,
        ratios=ratios,
        columns={"arrays in the state": lambda row: str(row["state_leaves"])},
    )


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    harness.check_at_least(
        config, leaves=1, size=1, eager_calls=1, compiled_calls=1, turns=1
    )
    return harness.run(config, "overhead", make_bench(config))
