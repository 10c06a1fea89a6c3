"""How fast a training step is: beside PyTorch, and beside the floor.

    python -m train.bench cifar10                          # the article's WRN-22
    python -m train.bench cifar10 --blocks 1 --width 16    # one for a CPU

Times `train.cifar10`'s own epoch program, the same step called from a Python loop, and
the same network, augmentation and AdamW in PyTorch, eager and compiled: in turns, in
one process, so that all meet the same conditions. Images are random; they stay on the
device. The floor is the time that the arithmetic of the convolutions would take at the
rate of a large matrix product, measured in the same turns and in the same precision.
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
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from train import batches, cifar10, devices, record
from train.report import markdown
from train.wide_resnet import WideResNet

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Times a training step here and in PyTorch, side by side."""

    task: Literal["cifar10"]
    blocks: int = 3  # of each of the three stages; 3 and 96: the article's WRN-22
    width: int = 96  # channels of the first stage
    batch_size: int = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    steps: int = 20  # per turn
    turns: int = 7  # best and median of them are reported
    matmul: int | None = None  # rows of the matrix product; None: 8192, CPU 2048
    torch: bool = True  # time PyTorch as well
    torch_compile: bool = True  # also its compiler

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-cifar10-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def check(c: Config) -> None:
    for option in ("blocks", "width", "steps", "turns"):
        if getattr(c, option) < 1:
            raise ValueError(f"{option} must be at least 1, got {getattr(c, option)!r}")
    if c.batch_size < 2 or c.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be at least 2 and a multiple of the {jax.device_count()} "
            f"devices, got {c.batch_size}"
        )


# ---------------------------------------------------------------------------
# arithmetic
# ---------------------------------------------------------------------------


def forward_flops(blocks: int, width: int) -> int:
    """Of an image: two for every weight that a pixel of an output meets, taps outside
    of the image included; without norms and activations."""
    net = nnx.eval_shape(lambda: WideResNet(blocks, width, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def count(jaxpr) -> int:
        flops = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
                weights, outputs = eqn.invars[1].aval.size, eqn.outvars[0].aval
                flops += 2 * weights * outputs.size // outputs.shape[-1]
            for inner in jaxprs_in_params(eqn.params):
                flops += count(inner)
        return flops

    run = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))
    return count(run(state, x).jaxpr)


def matmul_program(config: Config, mesh) -> tuple[Callable[[], Any], float]:
    """A large product on every device at once, and its FLOPs."""
    n = config.matmul or (2048 if jax.default_backend() == "cpu" else 8192)
    dtype = devices.compute_dtype(config.dtype)
    shape, spec = (mesh.size, n, n), PartitionSpec("data")
    a, b = (
        jax.device_put(
            np.random.default_rng(i).normal(size=shape).astype(dtype),
            NamedSharding(mesh, spec),
        )
        for i in range(2)
    )
    specs = {"in_specs": (spec, spec), "out_specs": spec}
    program: Any = jax.jit(
        jax.shard_map(lambda a, b: a @ b, mesh=mesh, check_vma=False, **specs)
    )
    return functools.partial(program, a, b), 2.0 * mesh.size * n**3


# ---------------------------------------------------------------------------
# what is timed: each is called for a turn, and waits until it is done
# ---------------------------------------------------------------------------


def here(config: Config, steps: int, mesh, x, y) -> Callable[[], None]:
    """An epoch of so many steps as `train.cifar10` trains it."""
    size = steps * config.batch_size
    settings = cifar10.Config(
        blocks=config.blocks,
        width=config.width,
        dtype=config.dtype,
        batch_size=config.batch_size,
        train_size=size,
        epochs=1000,
    )
    programs = cifar10.build(settings, mesh, size)
    everywhere = NamedSharding(mesh, PartitionSpec())
    x, y = jax.device_put((batches.padded(x[:size]), y[:size]), everywhere)
    seed = np.int32(0)
    state = jax.jit(programs.initial_state, out_shardings=everywhere)(seed)
    program = jax.jit(programs.train_epoch, donate_argnums=0, out_shardings=everywhere)
    program = program.lower(state, x, y, seed, seed).compile()

    def turn():
        nonlocal state
        losses = None
        for epoch in range(config.steps // steps):
            state, losses = program(state, x, y, seed, np.int32(epoch))
        jax.block_until_ready(losses)

    return turn


def in_pytorch(config: Config, compiled: bool, x, y) -> Callable[[], None]:
    """The same steps in PyTorch: images on the device, channels last, autocast."""
    import torch

    from train import torch_wide_resnet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    net: Any = torch_wide_resnet.WideResNet(config.blocks, config.width)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    bfloat16 = devices.compute_dtype(config.dtype) == jnp.bfloat16
    mean, std = (
        torch.tensor(255 * values, device=device)
        for values in (batches.CIFAR10_MEAN, batches.CIFAR10_STD)
    )
    images = torch.tensor(batches.padded(x), device=device)
    labels = torch.tensor(y, device=device).long()

    crops = torch.randint(0, 8, (len(images), 3), device=device)
    crops[:, 2] %= 2

    def loss_of(index):
        batch = torch_wide_resnet.crop_and_flip(images, index, crops[index])
        batch = ((batch - mean) / std).permute(0, 3, 1, 2)  # in memory channels last
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return torch.nn.functional.cross_entropy(net(batch), labels[index])

    if compiled:
        loss_of = torch.compile(loss_of)

    def turn():
        order = torch.randperm(len(images), device=device)
        for step in range(config.steps):
            index = order[step * config.batch_size :][: config.batch_size]
            optimizer.zero_grad()
            loss_of(index).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    check(config)
    folder = record.new_folder(config, f"bench-{config.task}")
    rng = np.random.default_rng(0)
    size = config.steps * config.batch_size
    x = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    y = rng.integers(0, 10, size).astype(np.int32)
    mesh = devices.data_mesh()
    product, product_flops = matmul_program(config, mesh)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "matrix product": lambda: lambda: jax.block_until_ready(product()),
        "here, an epoch": lambda: here(config, config.steps, mesh, x, y),
        "here, step by step": lambda: here(config, 1, mesh, x, y),
    }
    if config.torch:
        makers["PyTorch, eager"] = lambda: in_pytorch(config, False, x, y)
        if config.torch_compile:
            makers["PyTorch, compiled"] = lambda: in_pytorch(config, True, x, y)

    # prepare, with a turn that does not count
    timed, failed, ready = {}, {}, {}
    for name, maker in makers.items():
        began = time.perf_counter()
        try:
            turn = maker()
            turn()
            timed[name] = turn
        except Exception as error:  # no PyTorch, or nothing for its compiler
            if not name.startswith("PyTorch"):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        ready[name] = time.perf_counter() - began
        print(
            f"{name}: {failed.get(name, f'ready in {ready[name]:.1f} s')}", flush=True
        )

    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(config.turns):
        for name, turn in timed.items():
            began = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - began)

    # report
    product_seconds = seconds.pop("matrix product")
    rate = product_flops / min(product_seconds)
    flops = 3 * forward_flops(config.blocks, config.width) * config.batch_size
    floor = flops / rate
    rows = {
        name: {
            "best_ms": 1e3 * min(turns) / config.steps,
            "median_ms": 1e3 * float(np.median(turns)) / config.steps,
            "images_per_second": size / float(np.median(turns)),
            "share_of_matmul_rate": floor * config.steps / float(np.median(turns)),
            "ready_seconds": ready[name],
            "turns_ms": [1e3 * turn / config.steps for turn in turns],
        }
        for name, turns in seconds.items()
    }
    results = {
        "rows": rows,
        "failed": failed,
        "matmul_tflops": rate / 1e12,
        "step_gflop": flops / 1e9,
        "floor_ms": 1e3 * floor,
        "scan_over_loop": _ratio(rows, "here, an epoch", "here, step by step"),
        "here_over_eager": _ratio(rows, "here, an epoch", "PyTorch, eager"),
        "here_over_compiled": _ratio(rows, "here, an epoch", "PyTorch, compiled"),
    }
    environment = record.environment()
    record.write_json(folder / "config.json", vars(config) | environment)
    record.write_json(folder / "bench.json", results)
    text = report(config, results, environment)
    (folder / "bench.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nWrote {folder}.")
    return results


def _ratio(rows, one: str, other: str) -> float | None:
    """Of the median times; None where one was not timed."""
    if one not in rows or other not in rows:
        return None
    return rows[one]["median_ms"] / rows[other]["median_ms"]


def report(config: Config, results: dict[str, Any], environment) -> str:
    dtype = devices.compute_dtype(config.dtype)
    lines = [
        f"WideResNet, {config.blocks} blocks a stage, width {config.width}, batches of "
        f"{config.batch_size}, {dtype}, on {environment['devices']}: "
        f"{results['step_gflop']:.1f} GFLOP a step, {results['floor_ms']:.3g} ms at "
        f"the {results['matmul_tflops']:.3g} TFLOP/s of a large matrix product. "
        f"{config.turns} turns of {config.steps} steps.",
        "",
    ]
    head = ("", "ms per step, best", "median", "images/s", "share of the matmul rate")
    rows: list[tuple[str, ...]] = [head]
    for name, row in results["rows"].items():
        rows.append(
            (
                name,
                f"{row['best_ms']:.3g}",
                f"{row['median_ms']:.3g}",
                f"{row['images_per_second']:,.0f}",
                f"{row['share_of_matmul_rate']:.1%}",
            )
        )
    rows += [(name, why, "", "", "") for name, why in results["failed"].items()]
    lines += [markdown(rows), ""]
    for key, text in (
        ("scan_over_loop", "A step in an epoch takes {:.2f} x one from a Python loop."),
        ("here_over_eager", "A step here takes {:.2f} x one of PyTorch, eager."),
        ("here_over_compiled", "A step here takes {:.2f} x one of PyTorch, compiled."),
    ):
        if results[key] is not None:
            lines.append(text.format(results[key]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    config = tyro.cli(Config, config=(tyro.conf.PositionalRequiredArgs,))
    devices.use_all_cores(config.batch_size)
    main(config)
