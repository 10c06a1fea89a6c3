"""Adam's moments in 32, 16 and 8 bits: their size and their effect on the loss.

    python -m train.low_memory --data-dir DIR    # CIFAR-10, ten minutes on a CPU
    python -m train.low_memory --data-dir DIR --param-dtype bfloat16

Trains the small convolutional network of `train.compare` on 5,000 images of CIFAR-10
with AdamW and 1cycle. The moments are stored in float32, in bfloat16 and in eight bits,
the latter two rounded stochastically and to nearest. PyTorch's AdamW in float32 and,
where installed, the 8-bit AdamW of torchao and of bitsandbytes train the same network.
A seed determines the initial weights, the order of the images, their crops, and the
rounding; all optimizers see the same seeds.

With parameters and gradients in bfloat16, Optax and PyTorch store the moments in
bfloat16 as well, rounded to nearest. The second table compares that default with
float32 moments. The forward and the backward pass compute in float32 in both tables.

b1 is constant, unlike in the article, because PyTorch corrects the bias differently
when b1 changes. torchao runs without its compiler: the same arithmetic, but slower.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from adamw_jax import (
    adamw,
    chain,
    one_cycle,
    quantize_moments,
    round_updates_stochastically,
)
from train.data import batches
from train.data.cifar10 import load_cifar10
from train.evals.statistics import confidence_interval
from train.models.small import CNN
from train.recipes.check import check_options
from train.references import loop as torch_loop
from train.run import devices, report
from train.run.command import run_command
from train.run.environment import environment
from train.run.folder import new_folder
from train.run.log import write_json
from train.run.output import Output

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Compares size and effect of moments stored in several precisions."""

    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int = 5000  # training images
    eval_size: int = 5000  # test images
    width: int = 16  # channels of the first convolution
    epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 0.01  # the peak of 1cycle
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999  # nu changes by .1 % a step, hard to store; the article's is .99
    eps: float = 1e-8
    block_size: int = 256  # values that share a scale
    min_size: int = 4096  # smaller parameters keep moments in float32
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # and of the gradients
    seeds: int = 5  # runs of each optimizer
    torch: bool = True  # also the optimizers of PyTorch, torchao and bitsandbytes


def check(c: Config) -> None:
    least = {"train_size": 1, "eval_size": 1, "width": 1, "epochs": 1, "seeds": 2}
    rules = {
        option: (getattr(c, option) >= value, f"at least {value}")
        for option, value in least.items()
    }
    sizes = (1 <= c.batch_size <= c.train_size, f"in [1, {c.train_size}]")
    check_options(c, rules | {"batch_size": sizes})


# ---------------------------------------------------------------------------
# data, model, optimizers
# ---------------------------------------------------------------------------


def make_network(config: Config, seed: int) -> nnx.Module:
    return CNN(config.width, rngs=nnx.Rngs(seed))


def draw_run(config: Config, seed: int) -> dict[str, Any]:
    """All that is random in a run: initial network, order and crops of the images."""
    rng, net = np.random.default_rng(seed), make_network(config, seed)
    _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    order = batches.order(rng, config.train_size, config.batch_size, config.epochs)
    crops = batches.crops_and_flips(rng, order.shape)
    run = {"params": params, "stats": stats, "order": order, "crops": crops}
    return jax.tree.map(np.asarray, run) | {"seed": np.uint32(seed)}


def make_schedule(config: Config) -> Callable[[Any], Any]:
    """The learning rate of 1cycle."""
    steps = config.train_size // config.batch_size
    cycle = one_cycle(config.learning_rate, epochs=config.epochs, steps_per_epoch=steps)
    return cycle.schedule("learning_rate")


def float32(config: Config, seed, **moments):
    betas = (config.b1, config.b2, config.eps)
    decay = {"weight_decay": config.weight_decay}
    return adamw(make_schedule(config), *betas, **decay, **moments, seed=seed)


def bfloat16(config: Config, seed, stochastic: bool):
    moments = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
    return float32(config, seed, **moments, stochastic_rounding=stochastic)


def eight_bit(config: Config, seed, stochastic: bool):
    return quantize_moments(
        float32(config, seed),
        block_size=config.block_size,
        min_size=config.min_size,
        stochastic_rounding=stochastic,
        seed=seed,
    )


def rounded(config: Config, seed):
    """Float32 moments; the sum of parameter and update is rounded stochastically."""
    return chain(float32(config, seed), round_updates_stochastically(seed))


def optax_default(config: Config, seed):
    del seed
    betas = (config.b1, config.b2, config.eps)
    schedule = make_schedule(config)
    return optax.adamw(schedule, *betas, weight_decay=config.weight_decay)


OPTIMIZERS = {
    "float32": float32,
    "bfloat16": functools.partial(bfloat16, stochastic=True),
    "bfloat16, to nearest": functools.partial(bfloat16, stochastic=False),
    "8 bits": functools.partial(eight_bit, stochastic=True),
    "8 bits, to nearest": functools.partial(eight_bit, stochastic=False),
}

BFLOAT16_PARAMS = {  # the optimizers of parameters in bfloat16
    "float32": float32,
    "float32, parameters rounded stochastically": rounded,
    "bfloat16": OPTIMIZERS["bfloat16"],
    "bfloat16, to nearest": OPTIMIZERS["bfloat16, to nearest"],
    "bfloat16, to nearest, optax.adamw": optax_default,
}

TORCH_OPTIMIZERS = {  # name: (module, optimizer)
    "float32, PyTorch": ("torch.optim", "AdamW"),
    "8 bits, torchao": ("torchao.optim", "AdamW8bit"),
    "8 bits, bitsandbytes": ("bitsandbytes.optim", "AdamW8bit"),
}


def optimizers(config: Config) -> dict[str, Callable[..., Any]]:
    return OPTIMIZERS if config.param_dtype == "float32" else BFLOAT16_PARAMS


# ---------------------------------------------------------------------------
# a run
# ---------------------------------------------------------------------------


def train(name: str, config: Config, run: dict, train_x, train_y, test_x, test_y):
    """Trains one network with one of our optimizers.

    Args:
        name: of the optimizer.
        config: of the comparison.
        run: from `draw_run`.
        train_x: (images, ...) training images, padded for the crops.
        train_y: (images,) their labels.
        test_x: (batches, images, ...) test images.
        test_y: (batches, images) their labels.

    Returns:
        The training loss of the last epoch, test accuracy in %, optimizer state.
    """
    tx = optimizers(config)[name](config, run["seed"])
    net = nnx.eval_shape(lambda: make_network(config, 0))
    train_def, eval_def = (
        nnx.graphdef(nnx.view(net, use_running_average=mode)) for mode in (False, True)
    )

    def loss_fn(params, stats, x, y):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        net = nnx.merge(train_def, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x = jax.vmap(batches.crop_and_flip)(train_x[batch["order"]], batch["crops"])
        x, y = batches.normalise(x), train_y[batch["order"]]
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), loss

    params = jax.tree.map(lambda p: jnp.asarray(p, config.param_dtype), run["params"])
    carry = params, run["stats"], tx.init(params)
    steps = {key: run[key] for key in ("order", "crops")}
    (params, stats, opt), losses = lax.scan(step, carry, steps)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    net = nnx.merge(eval_def, params, stats)
    guesses = lax.map(lambda x: net(batches.normalise(x)).argmax(-1), test_x)
    last_epoch = losses[-(len(losses) // config.epochs) :].mean()
    return last_epoch, 100 * jnp.mean(guesses == test_y), opt


def train_torch(name: str, config: Config, run: dict, images):
    """Does the same with one of PyTorch's optimizers."""
    import torch
    from torch.nn import functional as F

    from train.references.wide_resnet import crop_and_flip

    module, optimizer_name = TORCH_OPTIMIZERS[name]
    make_optimizer: Any = getattr(importlib.import_module(module), optimizer_name)
    torch.set_num_threads(1)  # on a busy machine several wait for each other
    net = torch_loop.make_network(run["params"])
    betas = {"betas": (config.b1, config.b2), "eps": config.eps}
    optimizer = make_optimizer(
        net.parameters(), weight_decay=config.weight_decay, **betas
    )
    (group,) = optimizer.param_groups
    schedule = make_schedule(config)
    rates = np.asarray(jax.vmap(schedule)(np.arange(len(run["order"]))))

    x, y, test_x, test_y = (torch.from_numpy(np.array(a)) for a in images)
    x = torch.from_numpy(batches.normalise(x.numpy()))
    order, crops = (torch.from_numpy(run[key]).long() for key in ("order", "crops"))
    losses = []
    for index, crop, rate in zip(order, crops, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # in torchao
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(crop_and_flip(x, index, crop)), y[index].long())
        loss.backward()
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
            optimizer.step()
        losses.append(loss.item())

    net.eval()
    with torch.no_grad():
        correct = [
            (net(torch.from_numpy(batches.normalise(x.numpy()))).argmax(-1) == y)
            for x, y in zip(test_x, test_y, strict=True)
        ]
    accuracy = 100 * float(torch.cat(correct).float().mean())
    last = len(losses) // config.epochs
    return float(np.mean(losses[-last:])), accuracy, optimizer.state


def state_bytes(state: Any) -> int:
    """Size of all arrays in an Optax state."""
    return sum(x.nbytes for x in jax.tree.leaves(state))


def torch_state_bytes(state: Any) -> int:
    """Size of all tensors in a PyTorch optimizer's state, shared ones counted once."""
    import torch

    sizes = {}

    def visit(x):
        if hasattr(x, "__tensor_flatten__"):  # a subclass made of several tensors
            for name in x.__tensor_flatten__()[0]:
                visit(getattr(x, name))
        elif isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()

    for values in state.values():
        for value in values.values():
            visit(value)
    return sum(sizes.values())


# ---------------------------------------------------------------------------
# the comparison
# ---------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Trains with all optimizers and reports; returns the folder with the results."""
    check(config)
    splits = load_cifar10(config.data_dir, config.train_size, config.eval_size)
    test = batches.in_batches(splits.test)
    images = (batches.padded(splits.train.x), splits.train.y, *test)
    folder = new_folder(config, "low-memory")
    write_json(folder / "config.json", vars(config) | environment())
    runs = [draw_run(config, seed) for seed in range(config.seeds)]
    parameters = sum(x.size for x in jax.tree.leaves(runs[0]["params"]))

    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    images_on_device = jax.device_put(images)
    for name in optimizers(config):
        devices.print_compiling(f"  {name}")
        program = jax.jit(functools.partial(train, name, config))
        outcomes: list[Any] = [program(run, *images_on_device) for run in runs]
        rows[name] = summarize(outcomes, state_bytes(outcomes[0][-1]) / parameters)
        print(f"  {name}: loss {rows[name]['loss']['mean']:.4f}", flush=True)
    with_torch = config.torch and config.param_dtype == "float32"
    for name, (module, _) in TORCH_OPTIMIZERS.items() if with_torch else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing[name] = str(error)
            continue
        outcomes = [train_torch(name, config, run, images) for run in runs]
        size = torch_state_bytes(outcomes[0][-1])
        rows[name] = summarize(outcomes, size / parameters)
        print(f"  {name}: loss {rows[name]['loss']['mean']:.4f}", flush=True)

    # the effect of precision alone: the difference to float32 in the same library
    for name, row in rows.items():
        base = "float32, PyTorch" if name in TORCH_OPTIMIZERS else "float32"
        if name != base:
            change = np.subtract(row["loss"]["runs"], rows[base]["loss"]["runs"])
            row["loss_minus_float32"] = confidence_interval(change)

    results = {"parameters": parameters, "rows": rows, "missing": missing}
    write_json(folder / "results.json", results)
    text = page(config, results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nWrote {folder}.")
    return folder


def summarize(outcomes: list[Any], size: float) -> dict[str, Any]:
    """A row of the table, from (loss, accuracy, state) of each seed."""
    return {
        "bytes_per_parameter": size,
        "loss": report.summary([float(loss) for loss, _, _ in outcomes]),
        "accuracy": report.summary([float(accuracy) for _, accuracy, _ in outcomes]),
    }


def page(config: Config, results: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("moments", "bytes of state per parameter", "training loss")
        + ("minus that of float32", "test accuracy, %")
    ]
    for name, row in results["rows"].items():
        loss, difference = row["loss"], ""
        if interval := row.get("loss_minus_float32"):
            difference = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**interval)
        rows.append(
            (name, f"{row['bytes_per_parameter']:.2f}")
            + (f"{loss['mean']:.4f} ± {loss['std']:.4f}", difference)
            + (report.spread(row["accuracy"]),)
        )
    lines = [
        f"Parameters in {config.param_dtype}. "
        f"CIFAR-10 with {config.train_size} training images, {config.epochs} epochs of "
        f"1cycle in batches of {config.batch_size}; a network of "
        f"{results['parameters']:,} parameters. The training loss is that of the last "
        f"epoch. Values are mean ± standard deviation over {config.seeds} seeds; "
        "differences are paired by seed, with 95 % confidence intervals.",
        "",
        report.markdown(rows),
    ]
    for name, reason in results["missing"].items():
        lines.append(f"\nNot measured: {name} ({reason}).")
    return "\n".join(lines) + "\n"


def parse_args(args: Sequence[str] | None = None) -> Config:
    import tyro

    return tyro.cli(Config, args=args)


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
