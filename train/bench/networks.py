"""How fast a training step is: beside PyTorch, and beside the floor.

    python -m train.bench cifar10                          # the article's WRN-22
    python -m train.bench cifar10 --blocks 1 --width 16    # one for a CPU
    python -m train.bench language_model                   # the article's AWD-LSTM
    python -m train.bench language_model --model qrnn      # its AWD-QRNN
    python -m train.bench language_model --steps 1 --turns 3    # the same on a CPU
    python -m train.bench language_model --embedding 128 --width 256 --layers 2 \\
        --batch-size 20 --bptt 35 --words 1471             # the small one, for a CPU

Times the programs of `train.cifar10` or `train.language_model` that do many steps in a
call, the same steps called from a Python loop, and the same network, optimizer and all
that is drawn at random in PyTorch, eager and compiled: in turns, in one process, so
that all meet the same conditions. Images and texts are random; they stay on the device.
The floor is the time that the arithmetic of convolutions and matrix products would take
at the rate of a large matrix product, measured in the same turns and in the same
precision.

On a CPU with other work to do, PyTorch's threads wait for each other by spinning, which
makes it many times as slow. There, OMP_WAIT_POLICY=passive in the environment is fair.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from train import language_model
from train.bench import timing
from train.data import batches, text
from train.models.wide_resnet import WideResNet
from train.recipes import cifar10
from train.run import devices, record
from train.run.report import markdown

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cifar10:
    """Times a step of train.cifar10 here and in PyTorch, side by side."""

    task: str = dataclasses.field(default="cifar10", init=False)
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


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Times a step of train.language_model here and in PyTorch, side by side."""

    task: str = dataclasses.field(default="language_model", init=False)
    model: Literal["lstm", "qrnn"] = "lstm"
    words: int = 33_279  # in the vocabulary; that of WikiText-2
    embedding: int = 400  # width of the embedding and of the last layer
    width: int | None = None  # of the other layers; None: the article's, 1150 or 1550
    layers: int | None = None  # None: the article's, 3, or 4 of a QRNN
    batch_size: int = 100  # columns of the text
    bptt: int = 70  # tokens of a column in a step, always as many
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    cudnn: bool = False  # our LSTM by cuDNN, too
    steps: int = 20  # per turn
    turns: int = 7  # best and median of them are reported
    matmul: int | None = None  # rows of the matrix product; None: 8192, CPU 2048
    torch: bool = True  # time PyTorch as well
    torch_compile: bool = True  # also its compiler

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-language_model-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


SHORTEST = text.SHORTEST + text.FIRST_EXTRA  # bptt; see language_model_settings


def check(c: Cifar10 | LanguageModel) -> None:
    least = {"steps": 1, "turns": 1}
    if isinstance(c, Cifar10):
        least |= {"blocks": 1, "width": 1}
    else:
        least |= {"words": 2, "bptt": SHORTEST}
    for option, value in least.items():
        if getattr(c, option) < value:
            raise ValueError(
                f"{option} must be at least {value}, got {getattr(c, option)!r}"
            )
    if isinstance(c, LanguageModel):
        language_model.check(language_model_settings(c))
    elif c.batch_size < 2 or c.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be at least 2 and a multiple of the {jax.device_count()} "
            f"devices, got {c.batch_size}"
        )


class Task(NamedTuple):
    """What is timed."""

    title: str
    unit: str  # in which speed is given
    units: int  # of a step
    flops: int  # of a step
    # Makers of what is called for a turn, and waits until it is done: here in one call,
    # here step by step, PyTorch eager, PyTorch compiled.
    makers: dict[str, Callable[[], Callable[[], Any]]]


# ---------------------------------------------------------------------------
# CIFAR-10
# ---------------------------------------------------------------------------


def image_flops(blocks: int, width: int) -> int:
    """Of an image, forward."""
    net = nnx.eval_shape(lambda: WideResNet(blocks, width, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return timing.flops(lambda state, x: nnx.merge(graph, state)(x), state, x)


def cifar10_task(config: Cifar10, mesh) -> Task:
    rng = np.random.default_rng(0)
    size = config.steps * config.batch_size
    x = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    y = rng.integers(0, 10, size).astype(np.int32)
    return Task(
        f"WideResNet, {config.blocks} blocks a stage, width {config.width}, batches of "
        f"{config.batch_size}, {devices.compute_dtype(config.dtype)}",
        "images",
        config.batch_size,
        3 * image_flops(config.blocks, config.width) * config.batch_size,
        {
            "here, an epoch": lambda: cifar10_here(config, config.steps, mesh, x, y),
            "here, step by step": lambda: cifar10_here(config, 1, mesh, x, y),
            "PyTorch, eager": lambda: cifar10_in_pytorch(config, False, x, y),
            "PyTorch, compiled": lambda: cifar10_in_pytorch(config, True, x, y),
        },
    )


def cifar10_here(config: Cifar10, steps: int, mesh, x, y) -> Callable[[], None]:
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


def cifar10_in_pytorch(config: Cifar10, compiled: bool, x, y) -> Callable[[], None]:
    """The same steps in PyTorch: images on the device, channels last, autocast."""
    import torch

    from train.references import wide_resnet as torch_wide_resnet

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
# language models
# ---------------------------------------------------------------------------


def language_model_settings(config: LanguageModel) -> language_model.Config:
    """The article's recipe, with chunks of one length."""
    recipe = language_model.defaults(config.model, small=False)
    return dataclasses.replace(
        recipe,
        embedding=config.embedding,
        width=recipe.width if config.width is None else config.width,
        layers=recipe.layers if config.layers is None else config.layers,
        batch_size=config.batch_size,
        dtype=config.dtype,
        cudnn=config.cudnn,
        # The longest chunk is what the first one of an epoch has: the wanted length.
        bptt=config.bptt - text.FIRST_EXTRA,
        lengths=2,  # so that there is a choice between programs at every step
    )


def token_flops(settings: language_model.Config, words: int) -> int:
    """Of a token, forward."""
    net = nnx.eval_shape(lambda: language_model.network(settings, words, 0))
    graph, params = nnx.split(net)
    x = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def logits(params, x):
        net = nnx.merge(graph, params)
        return net.logits(net(x, net.initial_state(1)).raw)

    return timing.flops(logits, params, x)


def language_model_task(config: LanguageModel) -> Task:
    settings = language_model_settings(config)
    rng = np.random.default_rng(0)
    shape = (config.steps * config.bptt + 1, config.batch_size)
    tokens = rng.integers(config.words, size=shape, dtype=np.int32)

    @functools.cache
    def compiled():
        programs = language_model.build(settings, config.words, 100 * config.bptt)
        columns = jax.device_put(tokens, language_model.places()[1](1))
        table = np.full((config.steps, 2), config.bptt, np.int32)
        table[:, 0] *= np.arange(config.steps, dtype=np.int32)
        return language_model.compiled(programs, columns, table), columns, table

    def here(steps):
        return language_model_here(config, steps, *compiled())

    def in_pytorch(compiled):
        return language_model_in_pytorch(config, settings, compiled, tokens)

    units = config.batch_size * config.bptt
    loop = ", a loop over time" if config.model == "qrnn" else ""
    return Task(
        f"AWD-{config.model.upper()}, {settings.layers} layers, widths "
        f"{settings.embedding} and {settings.width}, {config.words:,} words, "
        f"{config.batch_size} x {config.bptt} tokens, {config.dtype}",
        "tokens",
        units,
        3 * token_flops(settings, config.words) * units,
        {
            "here, a stretch": lambda: here(config.steps),
            "here, step by step": lambda: here(1),
            f"PyTorch, eager{loop}": lambda: in_pytorch(False),
            f"PyTorch, compiled{loop}": lambda: in_pytorch(True),
        },
    )


def language_model_here(
    config: LanguageModel, steps: int, program, columns, table
) -> Callable[[], None]:
    """A stretch of an epoch of so many steps as `train.language_model` trains it."""
    seed = np.int32(0)
    state = program.initial_state(seed)

    def turn():
        nonlocal state
        losses = None
        for first in range(0, config.steps, steps):
            ends = np.int32(first), np.int32(first + steps)
            state, losses = program.train(state, columns, table, *ends, seed)
        jax.block_until_ready(losses)

    return turn


def language_model_in_pytorch(
    config: LanguageModel, settings: language_model.Config, compiled: bool, tokens
) -> Callable[[], None]:
    """The same steps in PyTorch: text on the device, autocast."""
    import torch

    from train.references import awd as torch_awd

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA does it
    net: Any = torch_awd.AWD(
        config.words,
        settings.embedding,
        settings.width,
        settings.layers,
        settings.model,
    ).to(device)
    optimizer = torch.optim.Adam(
        net.parameters(),
        lr=settings.learning_rate / settings.div,
        betas=(settings.b1[0], settings.b2),
        weight_decay=settings.l2,
        fused=True,
    )
    step = functools.partial(
        torch.compile(torch_awd.train_step) if compiled else torch_awd.train_step,
        net,
        optimizer,
        rates=language_model.rates_of(settings),
        alpha=settings.alpha,
        beta=settings.beta,
        clip=settings.clip,
    )
    columns = torch.tensor(tokens, device=device).long()
    bfloat16 = config.dtype == "bfloat16"

    def turn():
        state = net.initial_state(config.batch_size)
        for first in range(0, len(columns) - 1, config.bptt):
            x, y = (columns[first + i :][: config.bptt] for i in range(2))
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                _, state = step(tokens=x, targets=y, state=state)
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def main(config: Cifar10 | LanguageModel) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    check(config)
    folder = record.new_folder(config, f"bench-{config.task}")
    mesh = devices.data_mesh()
    if isinstance(config, Cifar10):
        task = cifar10_task(config, mesh)
    else:
        task = language_model_task(config)
    n = config.matmul or (2048 if jax.default_backend() == "cpu" else 8192)
    dtype = devices.compute_dtype(config.dtype)
    product, product_flops = timing.matmul_program(n, dtype, mesh)
    wanted = list(task.makers)[: 2 + config.torch * (1 + config.torch_compile)]
    makers = {"matrix product": lambda: lambda: jax.block_until_ready(product())}
    makers |= {name: task.makers[name] for name in wanted}
    # no PyTorch, or nothing for its compiler
    seconds, ready, failed = timing.in_turns(makers, config.turns, wanted[2:])

    # report
    product_seconds = seconds.pop("matrix product")
    rate = product_flops / min(product_seconds)
    floor = task.flops / rate
    rows: dict[str, dict[str, Any]] = {
        name: {
            "best_ms": 1e3 * min(turns) / config.steps,
            "median_ms": 1e3 * float(np.median(turns)) / config.steps,
            f"{task.unit}_per_second": (
                config.steps * task.units / float(np.median(turns))
            ),
            "share_of_matmul_rate": floor * config.steps / float(np.median(turns)),
            "ready_seconds": ready[name],
            "turns_ms": [1e3 * turn / config.steps for turn in turns],
        }
        for name, turns in seconds.items()
    }
    results: dict[str, Any] = {
        "rows": rows,
        "failed": failed,
        "matmul_tflops": rate / 1e12,
        "step_gflop": task.flops / 1e9,
        "floor_ms": 1e3 * floor,
    }
    # of the median times; None where one was not timed
    first, *others = task.makers
    keys = ("scan_over_loop", "here_over_eager", "here_over_compiled")
    for key, name in zip(keys, others, strict=True):
        results[key] = None
        if name in rows:
            results[key] = rows[first]["median_ms"] / rows[name]["median_ms"]
    environment = record.environment()
    page = report(config, task, results, environment)
    record.write_bench(folder, config, environment, results, page)
    return results


def report(config, task: Task, results: dict[str, Any], environment) -> str:
    lines = [
        f"{task.title}, on {environment['devices']}: "
        f"{results['step_gflop']:.1f} GFLOP a step, "
        f"{_three_digits(results['floor_ms'])} ms at the "
        f"{results['matmul_tflops']:.3g} TFLOP/s of a large matrix product. "
        f"{config.turns} turns of {config.steps} steps.",
        "",
    ]
    speed = f"{task.unit}/s"
    head = ("", "ms per step, best", "median", speed, "share of the matmul rate")
    rows: list[tuple[str, ...]] = [head]
    for name, row in results["rows"].items():
        rows.append(
            (
                name,
                _three_digits(row["best_ms"]),
                _three_digits(row["median_ms"]),
                f"{row[f'{task.unit}_per_second']:,.0f}",
                f"{row['share_of_matmul_rate']:.1%}",
            )
        )
    rows += [(name, why, "", "", "") for name, why in results["failed"].items()]
    lines += [markdown(rows), ""]
    many, _, eager, compiled = task.makers
    for key, line in (
        (
            "scan_over_loop",
            f"A step in {many.removeprefix('here, ')} takes {{:.2f}} x one from a "
            "Python loop.",
        ),
        ("here_over_eager", f"A step here takes {{:.2f}} x one of {eager}."),
        ("here_over_compiled", f"A step here takes {{:.2f}} x one of {compiled}."),
    ):
        if results[key] is not None:
            lines.append(line.format(results[key]))
    return "\n".join(lines) + "\n"


def _three_digits(ms: float) -> str:
    return f"{ms:.3g}" if ms < 999.5 else f"{ms:,.0f}"


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    config = tyro.cli(Cifar10 | LanguageModel)
    if isinstance(config, Cifar10):  # large matrix products do use all cores of one
        devices.use_all_cores(config.batch_size)
    main(config)
