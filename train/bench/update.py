"""What an update of AdamW costs: ours, Optax's and PyTorch's, beside the floor.

    python -m train.bench update                         # ResNet-50's 161 leaves
    python -m train.bench update --leaves tiny           # 4,000 leaves of 64
    python -m train.bench update --leaves large          # 10 leaves of ten million
    python -m train.bench update --leaves transformer    # a billion, in 290 leaves
    python -m train.bench update --step full             # with clipping and a schedule

Times the update and its application on random gradients: compiled, with parameters and
state donated, beside PyTorch's fused and foreach implementations. No network is run.
`--step full` adds clipping by global norm, a mask that decays kernels only, and 1cycle.

The floor counts every byte that must be read or written: gradient, parameters and state
in, parameters and state out, in the dtypes of each library, and the gradient once more
for its norm. In float32 that is 28 bytes per parameter. It assumes the bandwidth of a
copy of the same number of parameters (x + 1, donated), timed in the same turns.

"adamw_jax" is `update_and_apply`; "two calls" are `tx.update` and `apply_updates`, as
for Optax; "packed" keeps parameters and gradients in few large buffers. Bytes accessed
are XLA's count for its program. XLA does not see into the kernel that
`update_and_apply` calls on a CPU, which accesses each byte of the floor once: that is
added. The peak is the memory of arguments, results and temporaries.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adamw_jax as aj
from train.bench import harness, probes
from train.bench.harness import Bench, Program
from train.models.resnet import ResNet
from train.recipes.check import check_options

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    """Times an update of AdamW: ours, Optax's and PyTorch's."""

    leaves: Literal["resnet50", "tiny", "large", "transformer"] = "resnet50"
    scale: float = 1.0  # of the number of parameters; ResNet-50's is fixed
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and gradients
    step: Literal["adamw", "full"] = "adamw"  # full: clipping, mask and schedule, too
    calls: int = 5  # updates per turn
    torch: bool = True  # time PyTorch as well


def check(config: Config) -> None:
    harness.check_at_least(config, calls=1, turns=1)
    check_options(config, {"scale": (0 < config.scale <= 1, "in (0, 1]")})


# ---------------------------------------------------------------------------
# leaves
# ---------------------------------------------------------------------------


def leaf_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """By path. With `--step full`, paths that end with "kernel" decay."""
    if config.leaves == "resnet50":
        net = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0)))
        params = nnx.to_flat_state(nnx.state(net, nnx.Param))
        shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in params}
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
            weight = "scale" if len(shape) == 1 else "kernel"
            shapes[f"{i}/{name}/{weight}"] = shape
            shapes[f"{i}/{name}/bias"] = shape[-1:]
    return shapes | {"norm/scale": (width,), "norm/bias": (width,)}


def random_leaves(config: Config, seed: int) -> dict[str, jax.Array]:
    shapes, dtype = leaf_shapes(config), jnp.dtype(config.dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):
        return (0.1 * jax.random.normal(key, shape)).astype(dtype)

    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        path: draw(key, shape)
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


def is_kernel(params: Any) -> Any:
    return {path: path.endswith("kernel") for path in params}


# ---------------------------------------------------------------------------
# optimizers
# ---------------------------------------------------------------------------

RATE, DECAY, BETAS, STEPS, CLIP = 1e-4, 0.1, (0.9, 0.999), 1000, 1.0


def make_ours(config: Config) -> optax.GradientTransformation:
    if config.step == "adamw":
        return aj.adamw(RATE, *BETAS, weight_decay=DECAY)
    schedule = aj.one_cycle(RATE, steps=STEPS)
    return aj.chain(
        aj.clip_by_global_norm(CLIP),
        aj.adamw(schedule, weight_decay=DECAY, mask=is_kernel),
    )


def make_optax(config: Config) -> optax.GradientTransformation:
    if config.step == "adamw":
        return optax.adamw(RATE, *BETAS, weight_decay=DECAY)
    schedule = optax.cosine_onecycle_schedule(STEPS, RATE)
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(schedule, *BETAS, weight_decay=DECAY, mask=is_kernel),
    )


def two_calls(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return aj.apply_updates(params, updates), state


def pack(tree: Any) -> Any:
    return aj.pack(tree, is_kernel)


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def jax_program(
    config: Config,
    tx: optax.GradientTransformation,
    apply: Callable[..., Any],
    convert: Callable[[Any], Any] = lambda tree: tree,
) -> Program:
    """`apply(tx, grads, state, params)` on converted leaves."""
    params, grads = (convert(random_leaves(config, seed)) for seed in range(2))
    state = jax.jit(tx.init)(params)

    def step(params, state, grads):
        return apply(tx, grads, state, params)

    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, grads)
    trace_end = time.perf_counter()
    lowered = traced.lower()
    lower_end = time.perf_counter()
    compiled: Any = lowered.compile()
    figures: dict[str, Any] = {
        "trace_seconds": trace_end - start,
        "lower_seconds": lower_end - trace_end,
        "compile_seconds": time.perf_counter() - lower_end,
    }
    floor = floor_bytes(grads, params, state, config.step == "full")
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    if accessed and "custom_call @adamw_jax_one_pass" in lowered.as_text():
        accessed += floor_bytes(grads, params, state, norm=False)
    figures["bytes_accessed"] = accessed
    figures["peak_bytes"] = peak_bytes(compiled.memory_analysis())

    def run():
        nonlocal params, state
        for _ in range(config.calls):
            params, state = compiled(params, state, grads)
        jax.block_until_ready(params)

    return Program(run, config.calls, floor, figures)


def floor_bytes(grads: Any, params: Any, state: Any, norm: bool) -> int:
    grads, params, state = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (grads, params, state)
    )
    return grads * (1 + norm) + 2 * (params + state)


def peak_bytes(memory: Any) -> int | None:
    """Of arguments, results and temporaries; None where XLA does not plan them."""
    return memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def torch_program(config: Config, fused: bool) -> Program:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, full = getattr(torch, config.dtype), config.step == "full"
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for path, shape in leaf_shapes(config).items():
        leaf = 0.1 * torch.randn(shape, device=device)
        leaf = torch.nn.Parameter(leaf.to(dtype))
        leaf.grad = torch.randn(shape, device=device).to(dtype)
        groups[not full or path.endswith("kernel")].append(leaf)
    leaves = groups[True] + groups[False]
    param_groups = [
        {"params": group, "weight_decay": DECAY * decays}
        for decays, group in groups.items()
        if group
    ]
    adamw = torch.optim.AdamW(
        param_groups, RATE, BETAS, fused=fused or None, foreach=not fused or None
    )
    scheduler = None
    if full:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(adamw, RATE, total_steps=10**9)

    def run():
        for _ in range(config.calls):
            if scheduler:
                torch.nn.utils.clip_grad_norm_(leaves, CLIP)
            adamw.step()
            if scheduler:
                scheduler.step()
        if device == "cuda":
            torch.cuda.synchronize()

    run()  # creates the state
    floor = sum(
        (x.grad.nbytes * (1 + full) + 2 * x.nbytes)
        + 2 * sum(adamw.state[x][key].nbytes for key in ("exp_avg", "exp_avg_sq"))
        for x in leaves
    )
    return Program(run, config.calls, floor)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    check(config)
    shapes = leaf_shapes(config)
    size = sum(math.prod(shape) for shape in shapes.values())
    ours, theirs = make_ours(config), make_optax(config)
    build = functools.partial(functools.partial, jax_program, config)
    programs: dict[str, Callable[[], Program]] = {
        "adamw_jax": build(ours, aj.update_and_apply),
        "adamw_jax, two calls": build(ours, two_calls),
    }
    if config.leaves != "large":  # whose leaves gain nothing by packing
        programs["adamw_jax, packed"] = build(ours, aj.update_and_apply, pack)
    programs["Optax"] = build(theirs, two_calls)
    torch = {"PyTorch, fused": True, "PyTorch, foreach": False} if config.torch else {}
    for name, fused in torch.items():
        programs[name] = functools.partial(torch_program, config, fused)
    first, *peers = programs
    kind = "AdamW" if config.step == "adamw" else "clipping, AdamW with a mask, 1cycle"
    return harness.run(
        config,
        "update",
        Bench(
            f"{kind}: {size:,} {config.dtype} parameters in {len(shapes):,} leaves",
            "update",
            f"{config.calls} updates",
            programs,
            probes.copy(size, config.calls),
            may_fail=tuple(torch),
            ratios=[(first, peer) for peer in peers],
            columns={
                "bytes per parameter, floor": per_parameter("floor_bytes", size),
                "accessed": per_parameter("bytes_accessed", size),
                "peak": per_parameter("peak_bytes", size),
                "s to trace": harness.seconds("trace_seconds"),
                "lower": harness.seconds("lower_seconds"),
                "compile": harness.seconds("compile_seconds"),
            },
            results={"parameters": size, "leaves": len(shapes)},
        ),
    )


def per_parameter(key: str, size: int) -> Callable[[dict[str, Any]], str]:
    """The cell of a number of bytes."""
    return lambda row: "–" if row.get(key) is None else f"{row[key] / size:.1f}"
