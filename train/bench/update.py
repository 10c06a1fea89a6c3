"""What an update of AdamW costs: beside Optax and PyTorch, and beside the floor.

    python -m train.bench_update                         # ResNet-50's 161 leaves
    python -m train.bench_update --leaves tiny           # 4,000 leaves of 64
    python -m train.bench_update --leaves large          # 10 leaves of ten million
    python -m train.bench_update --leaves transformer    # a billion, in 290 leaves
    python -m train.bench_update --step full             # with clipping and a schedule

Times update and application, compiled, parameters and state donated, and the same in
PyTorch, fused and foreach: in turns, in one process. No network is run; gradients are
random. With --step full there is clipping by global norm in front, decay of kernels
only, and 1cycle.

The floor counts every byte that must be read or written once: gradient, parameters and
state in, parameters and state out, in the types in which each library keeps them; and
the gradient once more for its norm. In float32 that is 28 bytes a parameter. It is
given at the rate of a copy of as many parameters (x + 1, donated), measured in the same
turns.

"Here" is `update_and_apply`; "two calls" are `tx.update` and `apply_updates`, as for
Optax; "flat" is with parameters and gradients in `flatten`. Bytes accessed are XLA's
own count of what its program reads and writes; it does not see into the kernel that
`update_and_apply` calls on a CPU, whose loop reads and writes each byte once: added.
The peak is of arguments, results and temporaries, as XLA plans them.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adamw_jax as aj
from train.bench import timing
from train.models.resnet import ResNet
from train.run import record
from train.run.report import markdown

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Times an update here, in Optax and in PyTorch, side by side."""

    leaves: Literal["resnet50", "tiny", "large", "transformer"] = "resnet50"
    scale: float = 1.0  # of the number of parameters, except ResNet-50's
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and gradients
    step: Literal["adamw", "full"] = "adamw"  # full: clipping, mask and schedule, too
    calls: int = 5  # per turn
    turns: int = 7  # best and median of them are reported
    torch: bool = True  # time PyTorch as well

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-update-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def check(c: Config) -> None:
    for option in ("calls", "turns"):
        if getattr(c, option) < 1:
            value = getattr(c, option)
            raise ValueError(f"{option} must be at least 1, got {value!r}")
    if not 0 < c.scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {c.scale!r}")


# ---------------------------------------------------------------------------
# leaves
# ---------------------------------------------------------------------------


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """By path; what is named kernel decays with --step full."""
    if config.leaves == "resnet50":
        net = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0)))
        flat = nnx.to_flat_state(nnx.state(net, nnx.Param))
        shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in flat}
        return shapes | {"fc/kernel": (2048, 1000), "fc/bias": (1000,)}
    if config.leaves == "tiny":
        count = math.ceil(4000 * config.scale)
        return {f"{i}/{('kernel', 'bias')[i % 2]}": (64,) for i in range(count)}
    if config.leaves == "large":
        size = math.ceil(10_000_000 * config.scale)
        return {f"{i}/kernel": (size,) for i in range(10)}
    width = 64 * math.ceil(28 * math.sqrt(config.scale))  # 1,792 for a billion
    shapes: dict[str, tuple[int, ...]] = {"embedding": (50_257, width)}
    for i in range(24):
        for name, shape in (
            ("norm1", (width,)),
            ("attention", (width, 3 * width)),
            ("projection", (width, width)),
            ("norm2", (width,)),
            ("up", (width, 4 * width)),
            ("down", (4 * width, width)),
        ):
            if len(shape) == 1:
                shapes[f"{i}/{name}/scale"] = shape
                shapes[f"{i}/{name}/bias"] = shape
            else:
                shapes[f"{i}/{name}/kernel"] = shape
                shapes[f"{i}/{name}/bias"] = shape[1:]
    return shapes | {"norm/scale": (width,), "norm/bias": (width,)}


def random_leaves(config: Config, seed: int) -> dict[str, jax.Array]:
    shapes, key = shapes_of(config), jax.random.key(seed)
    dtype = jnp.dtype(config.dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):
        return (0.1 * jax.random.normal(key, shape)).astype(dtype)

    keys = jax.random.split(key, len(shapes))
    return {
        path: draw(key, shape)
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


# ---------------------------------------------------------------------------
# what is timed
# ---------------------------------------------------------------------------

RATE, DECAY, BETAS, STEPS, CLIP = 1e-4, 0.1, (0.9, 0.999), 1000, 1.0


def kernels(params: Any) -> Any:
    return {path: path.endswith("kernel") for path in params}


def optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    if config.step == "adamw":
        return {
            "here": aj.adamw(RATE, *BETAS, weight_decay=DECAY),
            "Optax": optax.adamw(RATE, *BETAS, weight_decay=DECAY),
        }
    cycle = aj.one_cycle(RATE, steps=STEPS)
    rate = optax.cosine_onecycle_schedule(STEPS, RATE)
    theirs = optax.adamw(rate, *BETAS, weight_decay=DECAY, mask=kernels)
    return {
        "here": optax.chain(
            aj.clip_by_global_norm(CLIP),
            aj.adamw(cycle, weight_decay=DECAY, mask=kernels),
        ),
        "Optax": optax.chain(optax.clip_by_global_norm(CLIP), theirs),
    }


def at_once(tx, params, state, grads):
    return aj.update_and_apply(tx, grads, state, params)


def two_calls(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return aj.apply_updates(params, updates), state


def as_they_are(tree):
    return tree


def packed(tree):
    return aj.pack(tree, kernels)


def in_jax(
    config: Config, tx, way, leaves, costs: dict[str, Any]
) -> Callable[[], None]:
    """Writes into `costs` what the program takes, apart from time."""
    params, grads = (leaves(random_leaves(config, seed)) for seed in range(2))
    state = jax.jit(tx.init)(params)
    step = functools.partial(way, tx)

    began = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, grads)
    costs["trace_seconds"], began = time.perf_counter() - began, time.perf_counter()
    lowered = traced.lower()
    costs["lower_seconds"], began = time.perf_counter() - began, time.perf_counter()
    compiled = lowered.compile()
    costs["compile_seconds"] = time.perf_counter() - began
    analysis: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    accessed = analysis.get("bytes accessed")
    if accessed and "custom_call @adamw_jax_one_pass" in lowered.as_text():
        accessed += floor(grads, params, state, norm=False)
    costs["bytes_accessed"] = accessed
    costs["peak_bytes"] = memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    costs["floor_bytes"] = floor(grads, params, state, config.step == "full")

    def turn():
        nonlocal params, state
        for _ in range(config.calls):
            params, state = compiled(params, state, grads)
        jax.block_until_ready(params)

    return turn


def floor(grads, params, state, norm: bool) -> int:
    grads, params, state = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (grads, params, state)
    )
    return grads * (1 + norm) + 2 * (params + state)


def in_pytorch(config: Config, fused: bool, costs: dict[str, Any]):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, groups = getattr(torch, config.dtype), {True: [], False: []}
    for path, shape in shapes_of(config).items():
        leaf = 0.1 * torch.randn(shape, device=device)
        leaf = torch.nn.Parameter(leaf.to(dtype))
        leaf.grad = torch.randn(shape, device=device).to(dtype)
        decays = config.step == "adamw" or path.endswith("kernel")
        groups[decays].append(leaf)
    leaves = groups[True] + groups[False]
    given = [
        {"params": group, "weight_decay": DECAY * decays}
        for decays, group in groups.items()
        if group
    ]
    adamw = torch.optim.AdamW(
        given, RATE, BETAS, fused=fused or None, foreach=not fused or None
    )
    cycle = None
    if config.step == "full":
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, RATE, total_steps=10**9)

    def turn():
        for _ in range(config.calls):
            if cycle:
                torch.nn.utils.clip_grad_norm_(leaves, CLIP)
            adamw.step()
            if cycle:
                cycle.step()
        if device == "cuda":
            torch.cuda.synchronize()

    turn()  # makes the state
    sizes = [
        (x.grad.nbytes * (1 + bool(cycle)) + 2 * x.nbytes)
        + 2 * sum(adamw.state[x][key].nbytes for key in ("exp_avg", "exp_avg_sq"))
        for x in leaves
    ]
    costs["floor_bytes"] = sum(sizes)
    return turn


def copy(config: Config) -> Callable[[], None]:
    """x + 1 in float32, in one array of as many numbers: four bytes in, four out."""
    size = sum(math.prod(shape) for shape in shapes_of(config).values())
    x = jnp.zeros(size)
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()

    def turn():
        nonlocal x
        for _ in range(config.calls):
            x = program(x)
        x.block_until_ready()

    return turn


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    check(config)
    folder = record.new_folder(config, "bench-update")
    shapes = shapes_of(config)
    size = sum(math.prod(shape) for shape in shapes.values())
    costs: dict[str, dict[str, Any]] = {}
    makers: dict[str, Callable[[], Any]] = {"a copy": lambda: copy(config)}
    ours, theirs = optimizers(config).values()
    for name, tx, way, leaves in (
        ("here", ours, at_once, as_they_are),
        ("here, two calls", ours, two_calls, as_they_are),
        ("here, flat", ours, at_once, packed),
        ("Optax", theirs, two_calls, as_they_are),
    ):
        if leaves is packed and config.leaves == "large":
            continue  # there is nothing to pack
        costs[name] = {}
        makers[name] = functools.partial(in_jax, config, tx, way, leaves, costs[name])
    torch = {"PyTorch, fused": True, "PyTorch, foreach": False} if config.torch else {}
    for name, fused in torch.items():
        costs[name] = {}
        makers[name] = functools.partial(in_pytorch, config, fused, costs[name])
    seconds, _, failed = timing.in_turns(makers, config.turns, tuple(torch))

    bandwidth = 8 * size * config.calls / min(seconds.pop("a copy"))
    rows: dict[str, dict[str, Any]] = {}
    for name, turns in seconds.items():
        median = float(np.median(turns)) / config.calls
        least = costs[name]["floor_bytes"] / bandwidth
        rows[name] = costs[name] | {
            "best_ms": 1e3 * min(turns) / config.calls,
            "median_ms": 1e3 * median,
            "floor_ms": 1e3 * least,
            "share_of_bandwidth": least / median,
            "turns_ms": [1e3 * turn / config.calls for turn in turns],
        }
    results: dict[str, Any] = {
        "rows": rows,
        "failed": failed,
        "parameters": size,
        "leaves": len(shapes),
        "copy_gb_per_second": bandwidth / 1e9,
        # of the median times; None where one was not timed
        "here_over": {
            name: rows["here"]["median_ms"] / rows[name]["median_ms"]
            for name in list(rows)[1:]
        },
    }
    environment = record.environment()
    page = report(config, results, environment)
    record.write_bench(folder, config, environment, results, page)
    return results


def report(config: Config, results: dict[str, Any], environment) -> str:
    size = results["parameters"]
    lines = [
        f"{size:,} {config.dtype} parameters in {results['leaves']:,} leaves, on "
        f"{environment['devices']}, where a copy runs at "
        f"{results['copy_gb_per_second']:.3g} GB/s; "
        + {
            "adamw": "AdamW alone. ",
            "full": "clipping, AdamW with a mask, 1cycle. ",
        }[config.step]
        + f"{config.turns} turns of {config.calls} updates.",
        "",
    ]
    head = ("", "ms, best", "median", "floor, ms", "share of it", "B/parameter, floor")
    rows: list[tuple[str, ...]] = [
        (*head, "accessed", "peak", "s to trace", "lower", "compile")
    ]
    for name, row in results["rows"].items():
        more = [
            "–" if row.get(key) is None else f"{row[key] / size:.1f}"
            for key in ("bytes_accessed", "peak_bytes")
        ]
        more += [
            "–" if row.get(key) is None else f"{row[key]:.2g}"
            for key in ("trace_seconds", "lower_seconds", "compile_seconds")
        ]
        rows.append(
            (name, f"{row['best_ms']:.3g}", f"{row['median_ms']:.3g}")
            + (f"{row['floor_ms']:.3g}", f"{row['share_of_bandwidth']:.0%}")
            + (f"{row['floor_bytes'] / size:.1f}", *more)
        )
    rows += [(name, why, *[""] * 9) for name, why in results["failed"].items()]
    lines += [markdown(rows), ""]
    lines += [
        f"An update here takes {ratio:.2f} x one of {name}."
        for name, ratio in results["here_over"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
