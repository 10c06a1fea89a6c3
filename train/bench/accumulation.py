"""What a micro-batch of gradient accumulation costs, beside an AdamW step.

    python -m train.bench_accumulate
    python -m train.bench_accumulate --parameters 100000000 --every-k 8

Times `adamw_jax.accumulate_gradients`, applied in two ways, `optax.MultiSteps`, AdamW
alone and the sum alone, one micro-batch at a time: all around the same AdamW, compiled,
parameters and state donated, in turns in one process. A micro-batch that closes its
window is timed apart from those that do not. Gradients are random; no network is run.

The floor counts what must be read and written, once and in float32. For a parameter: 12
bytes for the sum (gradient and sum in, sum out), 28 for AdamW (gradient, moments and
parameter in, the last three out), 32 where a window closes (AdamW's, and the sum in).
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamw_jax as aj
from train.run import devices, record
from train.run.report import markdown

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Times micro-batches of gradient accumulation."""

    parameters: int = 10_000_000  # in all
    leaves: int = 10  # of as many parameters each
    every_k: int = 4  # micro-batches in a window
    turns: int = 20  # windows; best and median of them are reported

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-accumulate-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def check(c: Config) -> None:
    for option, least in {"leaves": 1, "every_k": 2, "turns": 1}.items():
        if getattr(c, option) < least:
            raise ValueError(
                f"{option} must be at least {least}, got {getattr(c, option)!r}"
            )
    if c.parameters < 1 or c.parameters % c.leaves:
        raise ValueError(
            f"parameters must be a multiple of the {c.leaves} leaves, at least 1 each, "
            f"got {c.parameters!r}"
        )


# ---------------------------------------------------------------------------
# what is timed: step(params, state, grads) -> params, state
# ---------------------------------------------------------------------------

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
SUM, ADAMW, CLOSING = 12, 28, 32  # bytes for a parameter, at least
PLAIN, SUM_ALONE = "AdamW alone", "the sum alone"


def programs(every_k: int) -> dict[str, tuple[Callable[[Any], Any], Step]]:
    """By name: what makes the state, and the step."""
    adamw = aj.adamw(1e-3, weight_decay=0.1)
    ours, theirs = (
        aj.accumulate_gradients(adamw, every_k),
        optax.MultiSteps(adamw, every_k),
    )

    def by_updates(tx, params, state, grads):
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    def at_once(params, state, grads):
        return aj.update_and_apply(ours, grads, state, params)

    def sum_only(params, state, grads):
        return params, jax.tree.map(jnp.add, state, grads)

    return {
        "ours, update_and_apply": (ours.init, at_once),
        "ours, apply_updates": (ours.init, functools.partial(by_updates, ours)),
        "optax.MultiSteps": (theirs.init, functools.partial(by_updates, theirs)),
        PLAIN: (adamw.init, functools.partial(by_updates, adamw)),
        SUM_ALONE: (lambda p: jax.tree.map(jnp.zeros_like, p), sum_only),
    }


def random_tree(seed: int, config: Config) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    size = config.parameters // config.leaves
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(size, np.float32))
        for i in range(config.leaves)
    }


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def measure(config: Config) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By name: seconds [turn, micro-batch of the window], and bytes of temporaries."""
    grads = random_tree(1, config)
    running, temporary = {}, {}
    for name, (init, step) in programs(config.every_k).items():
        params = random_tree(0, config)
        state = init(params)
        compiled: Any = (
            jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        )
        running[name] = compiled, params, state
        memory = compiled.memory_analysis()
        temporary[name] = memory.temp_size_in_bytes if memory else 0
    seconds = {name: np.zeros((config.turns, config.every_k)) for name in running}
    for turn in range(-1, config.turns):  # the first does not count
        for name, (step, params, state) in running.items():
            for i in range(config.every_k):
                began = time.perf_counter()
                params, state = jax.block_until_ready(step(params, state, grads))
                if turn >= 0:
                    seconds[name][turn, i] = time.perf_counter() - began
            running[name] = step, params, state
    return seconds, temporary


def main(config: Config) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    check(config)
    folder = record.new_folder(config, "bench-accumulate")
    seconds, temporary = measure(config)
    plain = 1e3 * float(np.median(seconds[PLAIN]))
    mean = ((config.every_k - 1) * SUM + CLOSING) / config.every_k
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, of: str, times: np.ndarray, floor: float) -> None:
        ms = 1e3 * times.ravel()
        median = float(np.median(ms))
        rows[name] = {
            "best_ms": float(ms.min()),
            "median_ms": median,
            "adamw_steps": median / plain,
            "floor_bytes": floor * config.parameters,
            "floor_gb_per_second": floor * config.parameters / median / 1e6,
            "temporary_bytes": temporary[of],
        }

    for name, times in seconds.items():
        if name == PLAIN:
            add(name, name, times, ADAMW)
        elif name == SUM_ALONE:
            add(name, name, times, SUM)
        else:
            add(f"{name}: sums", name, times[:, :-1], SUM)
            add(f"{name}: closes", name, times[:, -1:], CLOSING)
            add(f"{name}: mean of a window", name, times.mean(1), mean)
    results: dict[str, Any] = {
        "rows": rows,
        "window_ms": {
            name: [1e3 * float(x) for x in times.sum(1)]
            for name, times in seconds.items()
        },
    }
    environment = record.environment()
    page = report(config, rows, environment)
    record.write_bench(folder, config, environment, results, page)
    return results


def report(config: Config, rows: dict[str, Any], environment: dict[str, Any]) -> str:
    head = (
        "one micro-batch",
        "ms, best",
        "median",
        "x AdamW",
        "floor, B/parameter",
        "at GB/s",
        "temporary, B/parameter",
    )
    table: list[tuple[str, ...]] = [head]
    for name, row in rows.items():
        table.append(
            (
                name,
                f"{row['best_ms']:.3g}",
                f"{row['median_ms']:.3g}",
                f"{row['adamw_steps']:.2f}",
                f"{row['floor_bytes'] / config.parameters:g}",
                f"{row['floor_gb_per_second']:.3g}",
                f"{row['temporary_bytes'] / config.parameters:.1f}",
            )
        )
    return (
        f"{config.parameters:,} float32 parameters in {config.leaves} leaves, windows "
        f"of {config.every_k}, on {environment['devices']}. {config.turns} turns.\n\n"
        f"{markdown(table)}\n"
    )


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    main(tyro.cli(Config))
