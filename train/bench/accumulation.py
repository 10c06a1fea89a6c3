"""What a micro-batch of gradient accumulation costs, beside a step of AdamW.

    python -m train.bench accumulation
    python -m train.bench accumulation --parameters 100000000 --every-k 8

Times `adamw_jax.accumulate_gradients`, `optax.MultiSteps`, AdamW without accumulation,
and the bare sum, all around the same AdamW, on random gradients: compiled, with
parameters and state donated. No network is run. The micro-batch that completes a window
is timed apart from those before it.

A transformation is applied in one call, by `update_and_apply`, or in two, by
`tx.update` and `apply_updates`. The table compares like with like: each row with the
AdamW that is applied in the same way.

The floor counts what must be read and written, in float32. Per parameter: 12 bytes for
the sum (gradient and sum in, sum out), 28 for AdamW (gradient, moments and parameter
in, the last three out), 32 for a completed window (AdamW's, and the sum in). It assumes
the bandwidth of a copy of the same number of parameters, timed in the same turns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamw_jax as aj
from train.bench import harness, probes
from train.bench.harness import Bench, Program
from train.recipes.check import check_options

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    """Times micro-batches of gradient accumulation."""

    parameters: int = 10_000_000  # in total
    leaves: int = 10  # of the same size
    every_k: int = 4  # micro-batches in a window
    turns: int = 20  # windows; best, median and spread of them are reported


def check(config: Config) -> None:
    harness.check_at_least(config, leaves=1, every_k=2, turns=1)
    parameters, leaves = config.parameters, config.leaves
    check_options(
        config,
        {
            "parameters": (
                parameters >= 1 and parameters % leaves == 0,
                f"a positive multiple of the {leaves} leaves",
            )
        },
    )


# ---------------------------------------------------------------------------
# steps: (params, state, grads) -> params, state
# ---------------------------------------------------------------------------

SUM, ADAMW, WINDOW_END = 12, 28, 32  # bytes per parameter, at least
ONE_CALL, TWO_CALLS = "update_and_apply", "two calls"
ADAMW_NAME, BARE_SUM = "AdamW", "sum"


class Step:
    """Parameters and state that a compiled step advances."""

    def __init__(self, config: Config, grads: Any, init: Callable, step: Callable):
        self.params, self.grads = random_tree(0, config), grads
        self.state = init(self.params)
        args = self.params, self.state, self.grads
        self.compiled: Any = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            args = self.params, self.state, self.grads
            self.params, self.state = self.compiled(*args)
        jax.block_until_ready((self.params, self.state))

    def temporary_bytes(self) -> int:
        memory = self.compiled.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0


def random_tree(seed: int, config: Config) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    size = config.parameters // config.leaves
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(size, np.float32))
        for i in range(config.leaves)
    }


def in_one_call(tx, params, state, grads):
    return aj.update_and_apply(tx, grads, state, params)


def in_two_calls(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return aj.apply_updates(params, updates), state


def make_steps(every_k: int) -> dict[str, tuple[Callable[[Any], Any], Callable]]:
    """What initializes the state, and the step, by name."""
    adamw = aj.adamw(1e-3, weight_decay=0.1)
    ours = aj.accumulate_gradients(adamw, every_k)
    theirs: Any = optax.MultiSteps(adamw, every_k)

    def sum_gradients(params, state, grads):
        return params, jax.tree.map(jnp.add, state, grads)

    return {
        f"accumulate_gradients, {ONE_CALL}": (
            ours.init,
            functools.partial(in_one_call, ours),
        ),
        f"accumulate_gradients, {TWO_CALLS}": (
            ours.init,
            functools.partial(in_two_calls, ours),
        ),
        f"optax.MultiSteps, {TWO_CALLS}": (
            theirs.init,
            functools.partial(in_two_calls, theirs),
        ),
        f"{ADAMW_NAME}, {ONE_CALL}": (
            adamw.init,
            functools.partial(in_one_call, adamw),
        ),
        f"{ADAMW_NAME}, {TWO_CALLS}": (
            adamw.init,
            functools.partial(in_two_calls, adamw),
        ),
        BARE_SUM: (lambda p: jax.tree.map(jnp.zeros_like, p), sum_gradients),
    }


def accumulates(name: str) -> bool:
    """Whether a step has windows."""
    return name != BARE_SUM and not name.startswith(ADAMW_NAME)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def make_bench(config: Config) -> Bench:
    every_k, size, grads = config.every_k, config.parameters, random_tree(1, config)
    programs: dict[str, Callable[[], Program]] = {}
    totals: dict[str, tuple[str, ...]] = {}
    ratios: list[tuple[str, str]] = []
    for name, (init, step) in make_steps(every_k).items():
        make = functools.cache(functools.partial(Step, config, grads, init, step))
        if accumulates(name):
            # two rows that share a state: they run one after the other in each turn
            rows = f"{name}: inside a window", f"{name}: end of a window"
            programs[rows[0]] = make_program(make, every_k - 1, SUM * size)
            programs[rows[1]] = make_program(make, 1, WINDOW_END * size)
            totals[f"{name}: mean"] = rows
            rows = (*rows, f"{name}: mean")
        else:
            work = SUM if name == BARE_SUM else ADAMW
            programs[name] = make_program(make, every_k, work * size)
            rows = (name,)
        call = ONE_CALL if name.endswith(ONE_CALL) or name == BARE_SUM else TWO_CALLS
        ratios += [(row, f"{ADAMW_NAME}, {call}") for row in rows]
    return Bench(
        f"{size:,} float32 parameters in {config.leaves} leaves",
        "micro-batch",
        f"{every_k} micro-batches",
        programs,
        probes.copy(size, every_k),
        totals=totals,
        ratios=ratios,
        ratio_column="x AdamW",
        columns={
            "bytes per parameter, floor": lambda row: f"{row['floor_bytes'] / size:g}",
            "temporary": lambda row: f"{row['temporary_bytes'] / size:.1f}",
        },
    )


def make_program(
    make_step: Callable[[], Step], calls: int, work: float
) -> Callable[[], Program]:
    def make() -> Program:
        step = make_step()
        figures = {"temporary_bytes": step.temporary_bytes()}
        return Program(functools.partial(step.run, calls), calls, work, figures)

    return make


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    check(config)
    return harness.run(config, "accumulation", make_bench(config))
