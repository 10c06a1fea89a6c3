"""What a training step of train.cifar10 costs, beside PyTorch and beside the floor.

    python -m train.bench cifar10                          # the article's WRN-22
    python -m train.bench cifar10 --blocks 1 --width 16    # one for a CPU

Times the program of `train.cifar10` that runs an epoch in one call, the same steps
called one by one from a Python loop, and the same network, optimizer and augmentation
in PyTorch, eager and compiled. Images are random and stay on the device. The floor is
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.bench import harness, probes, training
from train.bench.harness import Bench, Program
from train.data import batches
from train.models.wide_resnet import WideResNet
from train.recipes import cifar10 as recipe
from train.recipes.check import check_options
from train.run import devices

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(training.Steps):
    """Times a training step of train.cifar10, and the same in PyTorch."""

    blocks: int = 3  # of each of the three stages; 3 and 96: the article's WRN-22
    width: int = 96  # channels of the first stage
    batch_size: int = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations


def check(config: Config) -> None:
    harness.check_at_least(config, steps=1, turns=1, blocks=1, width=1)
    size, count = config.batch_size, jax.device_count()
    allowed = f"at least 2 and a multiple of the {count} devices"
    rules = {"batch_size": (size >= 2 and size % count == 0, allowed)}
    check_options(config, rules)


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def image_flops(blocks: int, width: int) -> float:
    """The FLOPs of an image, forward."""
    net = nnx.eval_shape(lambda: WideResNet(blocks, width, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return probes.flops(lambda state, x: nnx.merge(graph, state)(x), state, x)


def jax_program(
    config: Config, steps_per_call: int, work: float, mesh: Mesh, x, y
) -> Program:
    """Epochs of `steps_per_call` steps, as train.cifar10 trains them."""
    size = steps_per_call * config.batch_size
    settings = recipe.Config(
        blocks=config.blocks,
        width=config.width,
        dtype=config.dtype,
        batch_size=config.batch_size,
        epochs=1000,
    )
    programs = recipe.build(settings, mesh, size)
    replicated = NamedSharding(mesh, PartitionSpec())
    x, y = jax.device_put((batches.padded(x[:size]), y[:size]), replicated)
    seed = np.int32(0)
    state = jax.jit(programs.initial_state, out_shardings=replicated)(seed)
    epoch = jax.jit(programs.train_epoch, donate_argnums=0, out_shardings=replicated)
    compiled = epoch.lower(state, x, y, seed, seed).compile()

    def run():
        nonlocal state
        losses = None
        for epoch in range(config.steps // steps_per_call):
            state, losses = compiled(state, x, y, seed, np.int32(epoch))
        jax.block_until_ready(losses)

    return Program(run, config.steps, work)


def torch_program(config: Config, compile: bool, work: float, x, y) -> Program:
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

    def loss_fn(index):
        batch = torch_wide_resnet.crop_and_flip(images, index, crops[index])
        batch = ((batch - mean) / std).permute(0, 3, 1, 2)  # in memory channels last
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return torch.nn.functional.cross_entropy(net(batch), labels[index])

    if compile:
        loss_fn = torch.compile(loss_fn)

    def run():
        order = torch.randperm(len(images), device=device)
        for step in range(config.steps):
            index = order[step * config.batch_size :][: config.batch_size]
            optimizer.zero_grad()
            loss_fn(index).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Program(run, config.steps, work)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def make_bench(config: Config) -> Bench:
    rng, mesh = np.random.default_rng(0), devices.data_mesh()
    size = config.steps * config.batch_size
    x = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    y = rng.integers(0, 10, size).astype(np.int32)
    dtype = devices.compute_dtype(config.dtype)
    work = 3 * image_flops(config.blocks, config.width) * config.batch_size
    ours = functools.partial(jax_program, config, work=work, mesh=mesh, x=x, y=y)
    torch = functools.partial(torch_program, config, work=work, x=x, y=y)
    return training.make_bench(
        config,
        f"WideResNet, {config.blocks} blocks a stage, width {config.width}, batches of "
        f"{config.batch_size}, {dtype}, {work / 1e9:.1f} GFLOP a step",
        ("images", config.batch_size),
        dtype,
        {
            "JAX, many steps a call": functools.partial(ours, config.steps),
            "JAX, one step a call": functools.partial(ours, 1),
        },
        {
            "PyTorch, eager": functools.partial(torch, False),
            "PyTorch, compiled": functools.partial(torch, True),
        },
    )


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    check(config)
    return harness.run(config, "cifar10", make_bench(config))
