"""What many small leaves cost a training step, and what packing them saves.

    python -m train.bench packing
    python -m train.bench packing --layers 400 --layouts packed

A network of many layers, each with 64 scales and 64 biases, its gradient and AdamW: one
compiled step with parameters and state donated. The parameters are a tree, packed by
`adamw_jax.flatten`, or a tree whose update is flattened by `optax.flatten`.
"""

import dataclasses
import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamw_jax as aj
from train.bench import harness
from train.bench.harness import Bench, Program
from train.recipes.check import check_options

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------

WIDTH = 64
Layout = Literal["tree", "packed", "optax.flatten"]


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    """Times training steps of networks with many small leaves."""

    layers: tuple[int, ...] = (25, 50, 100)  # of one network each; two leaves per layer
    layouts: tuple[Layout, ...] = ("tree", "packed", "optax.flatten")
    calls: int = 20  # steps per turn


def check(config: Config) -> None:
    harness.check_at_least(config, calls=1, turns=1)
    layers, layouts = config.layers, config.layouts
    check_options(
        config,
        {
            "layers": (min(layers, default=0) >= 1, "one number or more, at least 1"),
            "layouts": (layouts, "at least one of tree, packed and optax.flatten"),
        },
    )


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def network(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params:
        x = x + jnp.tanh(x * layer["scale"] + layer["bias"])
    return jnp.mean(x**2)


def random_params(layers: int) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def draw():
        return jnp.asarray(0.1 * rng.standard_normal(WIDTH, np.float32))

    return [{"scale": draw(), "bias": draw()} for _ in range(layers)]


def make_step(layout: Layout, layers: int) -> tuple[Any, Any, Any]:
    """(params, state, x) -> params, state, and the first two."""
    params: Any = random_params(layers)
    if layout == "packed":
        params = aj.pack(params)
    tx: Any = aj.adamw(1e-3, weight_decay=0.1)
    if layout == "optax.flatten":
        tx = optax.flatten(tx)

    def step(params, state, x):
        def loss_fn(params):
            return network(params.tree if layout == "packed" else params, x)

        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return aj.apply_updates(params, updates), state

    return step, params, tx.init(params)


def make_program(layout: Layout, layers: int, calls: int) -> Program:
    step, params, state = make_step(layout, layers)
    x = jnp.ones(WIDTH)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x)
    trace_end = time.perf_counter()
    compiled = lowered.compile()
    figures = {
        "trace_seconds": trace_end - start,
        "compile_seconds": time.perf_counter() - trace_end,
    }

    def run():
        nonlocal params, state
        for _ in range(calls):
            params, state = compiled(params, state, x)
        jax.block_until_ready(params)

    return Program(run, calls, figures=figures)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def row_name(layers: int, layout: str) -> str:
    return f"{2 * layers:,} leaves, {layout}"


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    check(config)
    pairs = [(layers, layout) for layers in config.layers for layout in config.layouts]
    return harness.run(
        config,
        "packing",
        Bench(
            f"Training steps of networks whose leaves have {WIDTH} numbers",
            "step",
            f"{config.calls} steps",
            {
                row_name(*pair): functools.partial(
                    make_program, pair[1], pair[0], config.calls
                )
                for pair in pairs
            },
            ratios=[(row_name(*pair), row_name(pair[0], "tree")) for pair in pairs],
            ratio_column="x tree",
            columns={
                "s to trace": harness.seconds("trace_seconds"),
                "compile": harness.seconds("compile_seconds"),
            },
        ),
    )
