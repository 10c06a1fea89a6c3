"""What a training step of train.language_model costs, beside PyTorch and the floor.

    python -m train.bench language_model                   # the article's AWD-LSTM
    python -m train.bench language_model --model qrnn      # its AWD-QRNN
    python -m train.bench language_model --steps 1 --turns 3    # the same on a CPU
    python -m train.bench language_model --embedding 128 --width 256 --layers 2 \\
        --batch-size 20 --bptt 35 --words 1471             # the small one, for a CPU

Times the program of `train.language_model` that runs many steps in one call, the same
steps called one by one from a Python loop, and the same network, optimizer and dropout
in PyTorch, eager and compiled. The text is random and stays on the device. The floor is
the arithmetic of the network, forward and backward, at the rate of a large matrix
product in the same dtype.

On a CPU that is busy with other work, PyTorch's threads wait for each other by
spinning, which slows it down many times. OMP_WAIT_POLICY=passive is fairer there.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.bench import harness, probes, training
from train.bench.harness import Bench, Program
from train.data import chunks
from train.recipes import language_model as recipe
from train.run import devices

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(training.Steps):
    """Times a training step of train.language_model, and the same in PyTorch."""

    model: Literal["lstm", "qrnn"] = "lstm"
    words: int = 33_279  # in the vocabulary; WikiText-2's
    embedding: int = 400  # width of the embedding and of the last layer
    width: int | None = None  # of the other layers; None: the article's, 1150 or 1550
    layers: int | None = None  # None: the article's, 3, or 4 of a QRNN
    batch_size: int = 100  # columns of the text
    bptt: int = 70  # tokens of a column in each step
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    cudnn: bool = False  # our LSTM by cuDNN, as PyTorch's


SHORTEST = chunks.SHORTEST + chunks.FIRST_EXTRA  # bptt; see `make_settings`


def check(config: Config) -> None:
    harness.check_at_least(config, steps=1, turns=1, words=2, bptt=SHORTEST)
    recipe.check(make_settings(config))


def make_settings(config: Config) -> recipe.Config:
    """The article's recipe with chunks of one length."""
    defaults = recipe.defaults(config.model, small=False)
    return dataclasses.replace(
        defaults,
        embedding=config.embedding,
        width=defaults.width if config.width is None else config.width,
        layers=defaults.layers if config.layers is None else config.layers,
        batch_size=config.batch_size,
        dtype=config.dtype,
        cudnn=config.cudnn,
        # The first chunk of an epoch is the longest: it has the length to be timed.
        bptt=config.bptt - chunks.FIRST_EXTRA,
        lengths=2,  # so that there is a choice between programs at every step
    )


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def token_flops(settings: recipe.Config, words: int) -> float:
    """The FLOPs of a token, forward."""
    net = nnx.eval_shape(lambda: recipe.make_network(settings, words, 0))
    graph, params = nnx.split(net)
    x = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def logits(params, x):
        net = nnx.merge(graph, params)
        return net.logits(net(x, net.initial_state(1)).raw)

    return probes.flops(logits, params, x)


def compile_programs(config: Config, settings: recipe.Config, tokens: np.ndarray):
    """Compiled programs, columns of text and the table of their chunks."""
    programs = recipe.build(settings, config.words, 100 * config.bptt)
    _, split = recipe.shardings()
    columns = jax.device_put(tokens, split(1))
    table = np.full((config.steps, 2), config.bptt, np.int32)
    table[:, 0] *= np.arange(config.steps, dtype=np.int32)
    return recipe.compile_programs(programs, columns, table), columns, table


def jax_program(
    config: Config, steps_per_call: int, compiled: Any, columns, table, work: float
) -> Program:
    """Segments of `steps_per_call` steps, as train.language_model trains them."""
    seed = np.int32(0)
    state = compiled.init(seed)

    def run():
        nonlocal state
        losses = None
        for first in range(0, config.steps, steps_per_call):
            segment = np.int32(first), np.int32(first + steps_per_call)
            state, losses = compiled.train(state, columns, table, *segment, seed)
        jax.block_until_ready(losses)

    return Program(run, config.steps, work)


def torch_program(
    config: Config, settings: recipe.Config, compile: bool, tokens, work: float
) -> Program:
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
        torch.compile(torch_awd.train_step) if compile else torch_awd.train_step,
        net,
        optimizer,
        rates=recipe.dropout_rates(settings),
        alpha=settings.alpha,
        beta=settings.beta,
        clip=settings.clip,
    )
    columns = torch.tensor(tokens, device=device).long()
    bfloat16 = config.dtype == "bfloat16"

    def run():
        state = net.initial_state(config.batch_size)
        for first in range(0, len(columns) - 1, config.bptt):
            x, y = (columns[first + i :][: config.bptt] for i in range(2))
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                _, state = step(tokens=x, targets=y, state=state)
        if device == "cuda":
            torch.cuda.synchronize()

    return Program(run, config.steps, work)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def make_bench(config: Config) -> Bench:
    settings = make_settings(config)
    shape = (config.steps * config.bptt + 1, config.batch_size)
    tokens = np.random.default_rng(0).integers(config.words, size=shape, dtype=np.int32)
    units = config.batch_size * config.bptt
    work = 3 * token_flops(settings, config.words) * units

    @functools.cache
    def compiled():
        return compile_programs(config, settings, tokens)

    def ours(steps_per_call: int) -> Program:
        return jax_program(config, steps_per_call, *compiled(), work)

    def torch(compile: bool) -> Program:
        return torch_program(config, settings, compile, tokens, work)

    loop = ", a loop over time" if config.model == "qrnn" else ""
    return training.make_bench(
        config,
        f"AWD-{config.model.upper()}, {settings.layers} layers, widths "
        f"{settings.embedding} and {settings.width}, {config.words:,} words, "
        f"{config.batch_size} x {config.bptt} tokens, {config.dtype}, "
        f"{work / 1e9:.1f} GFLOP a step",
        ("tokens", units),
        devices.compute_dtype(config.dtype),
        {
            "JAX, many steps a call": functools.partial(ours, config.steps),
            "JAX, one step a call": functools.partial(ours, 1),
        },
        {
            f"PyTorch, eager{loop}": functools.partial(torch, False),
            f"PyTorch, compiled{loop}": functools.partial(torch, True),
        },
    )


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    check(config)
    return harness.run(config, "language_model", make_bench(config))
