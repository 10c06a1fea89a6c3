"""What many small leaves cost a training step, and what `flatten` saves of it.

    python -m train.bench_flatten
    python -m train.bench_flatten --layers 400 --ways flatten

A network of many layers with 64 scales and 64 biases each, its gradient, and AdamW: one
compiled step, parameters and state donated, with parameters as a tree, in
`adamw_jax.flatten`, and as a tree in `optax.flatten`, in turns in one process.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamw_jax as aj
from train.bench import timing
from train.run import record
from train.run.report import markdown

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------

WIDTH = 64
Way = Literal["a tree", "flatten", "optax.flatten"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Times training steps of networks with many small leaves."""

    layers: tuple[int, ...] = (25, 50, 100)  # one network each, of two leaves a layer
    ways: tuple[Way, ...] = ("a tree", "flatten", "optax.flatten")
    calls: int = 20  # per turn
    turns: int = 7  # best and median of them are reported

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-flatten-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def check(c: Config) -> None:
    least = {"calls": c.calls, "turns": c.turns, "layers": min(c.layers, default=0)}
    for option, value in least.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {getattr(c, option)!r}")
    if not c.ways:
        raise ValueError("ways must name at least one way, got ()")


# ---------------------------------------------------------------------------
# what is timed
# ---------------------------------------------------------------------------


def network(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params:
        x = x + jnp.tanh(x * layer["scale"] + layer["bias"])
    return jnp.mean(x**2)


def initial(layers: int) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def draw():
        return jnp.asarray(0.1 * rng.standard_normal(WIDTH, np.float32))

    return [{"scale": draw(), "bias": draw()} for _ in range(layers)]


def training(
    way: Way, layers: int, calls: int, costs: dict[str, float]
) -> Callable[[], None]:
    """Writes into `costs` what it takes to compile, in seconds."""
    params: Any = initial(layers)
    if way == "flatten":
        params = aj.pack(params)
    adamw = aj.adamw(1e-3, weight_decay=0.1)
    tx = optax.flatten(adamw) if way == "optax.flatten" else adamw
    state, x = tx.init(params), jnp.ones(WIDTH)

    def step(params, state, x):
        def loss(params):
            return network(params.tree if way == "flatten" else params, x)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return aj.apply_updates(params, updates), state

    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x)
    costs["trace_seconds"], began = time.perf_counter() - began, time.perf_counter()
    compiled = lowered.compile()
    costs["compile_seconds"] = time.perf_counter() - began

    def turn():
        nonlocal params, state
        for _ in range(calls):
            params, state = compiled(params, state, x)
        jax.block_until_ready(params)

    return turn


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    check(config)
    folder = record.new_folder(config, "bench-flatten")
    rows: list[dict[str, Any]] = []
    for layers in config.layers:
        costs: dict[str, dict[str, float]] = {way: {} for way in config.ways}
        makers: dict[str, Callable[[], Any]] = {
            way: functools.partial(training, way, layers, config.calls, costs[way])
            for way in config.ways
        }
        seconds, _, _ = timing.in_turns(makers, config.turns, ())
        for way, turns in seconds.items():
            ms = [1e3 * turn / config.calls for turn in turns]
            middle = {"best_ms": min(ms), "median_ms": float(np.median(ms))}
            rows.append(
                {"leaves": 2 * layers, "way": way, **costs[way], **middle, "turns": ms}
            )
    environment = record.environment()
    results = {"rows": rows}
    page = report(config, rows, environment)
    record.write_bench(folder, config, environment, results, page)
    return results


def report(config: Config, rows: list[dict[str, Any]], environment) -> str:
    table: list[tuple[str, ...]] = [
        (
            "leaves",
            "parameters in",
            "s to trace",
            "compile",
            "ms a step, best",
            "median",
        )
    ]
    for row in rows:
        numbers = [row[key] for key in list(row)[2:6]]
        table.append((f"{row['leaves']:,}", row["way"], *(f"{x:.2g}" for x in numbers)))
    return (
        f"Training steps of networks whose leaves have {WIDTH} numbers, on "
        f"{environment['devices']}. {config.turns} turns of {config.calls} steps.\n\n"
        f"{markdown(table)}\n"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
