"""Adam's moments in 32, 16 and 8 bits: what they take, and what they cost.

    python -m train.low_memory --data-dir DIR    # CIFAR-10, ten minutes on a CPU

The small convolutional network of `train.compare` on 5,000 images of CIFAR-10, with
AdamW and 1cycle: the moments in float32, in bfloat16 and in eight bits, both rounded
stochastically and to nearest. Beside them AdamW of PyTorch in float32, and in eight
bits that of torchao and of bitsandbytes, where they are installed. A seed stands for
the initial weights, the order of the images, their crops, and the rounding; all
optimizers have the same seeds.

b1 is constant, unlike in the article: with a cycled one PyTorch corrects the bias in
another way. torchao runs without its compiler: the same arithmetic, slower.
"""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from adamw_jax import adamw, one_cycle, quantize_moments
from train.data import batches
from train.data import cifar10 as data
from train.evals import statistics
from train.models import small as models
from train.references import loop as torch_loop
from train.run import devices, record, report

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains with moments of several precisions and compares size and result."""

    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    train_size: int = 5000  # training images
    eval_size: int = 5000  # test images

    width: int = 16  # channels of the first convolution
    epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 0.01  # the peak of 1cycle
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999  # harder to store than the article's .99: nu changes by .1 %
    eps: float = 1e-8

    block_size: int = 256  # values that share a scale
    min_size: int = 4096  # of a parameter whose moments are quantized
    seeds: int = 5  # runs of each
    torch: bool = True  # PyTorch's, torchao's and bitsandbytes' optimizers, too

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: low-memory-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def check(c: Config) -> None:
    least = {"train_size": 1, "eval_size": 1, "width": 1, "epochs": 1, "seeds": 2}
    for option, value in least.items():
        if getattr(c, option) < value:
            raise ValueError(
                f"{option} must be at least {value}, got {getattr(c, option)!r}"
            )
    if not 1 <= c.batch_size <= c.train_size:
        raise ValueError(
            f"batch_size must be in [1, {c.train_size}], got {c.batch_size!r}"
        )


# ---------------------------------------------------------------------------
# data, model, optimizers
# ---------------------------------------------------------------------------


def network(config: Config, seed: int) -> nnx.Module:
    return models.CNN(config.width, rngs=nnx.Rngs(seed))


def tables(config: Config, seed: int) -> dict[str, Any]:
    """Everything that is random in a run."""
    rng, net = np.random.default_rng(seed), network(config, seed)
    _, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    order = batches.order(rng, config.train_size, config.batch_size, config.epochs)
    crops = batches.crops_and_flips(rng, order.shape)
    table = {"params": params, "stats": stats, "order": order, "crops": crops}
    return jax.tree.map(np.asarray, table) | {"seed": np.uint32(seed)}


def learning_rate(config: Config):
    steps = config.train_size // config.batch_size
    cycle = one_cycle(config.learning_rate, epochs=config.epochs, steps_per_epoch=steps)
    return cycle.schedule("learning_rate")


def float32(config: Config, seed, **moments):
    betas = (config.b1, config.b2, config.eps)
    decay = {"weight_decay": config.weight_decay}
    return adamw(learning_rate(config), *betas, **decay, **moments, seed=seed)


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


OPTIMIZERS = {
    "float32": float32,
    "bfloat16": functools.partial(bfloat16, stochastic=True),
    "bfloat16, to nearest": functools.partial(bfloat16, stochastic=False),
    "8 bits": functools.partial(eight_bit, stochastic=True),
    "8 bits, to nearest": functools.partial(eight_bit, stochastic=False),
}

TORCH_OPTIMIZERS = {  # name in the table: (module, optimizer)
    "float32, PyTorch": ("torch.optim", "AdamW"),
    "8 bits, torchao": ("torchao.optim", "AdamW8bit"),
    "8 bits, bitsandbytes": ("bitsandbytes.optim", "AdamW8bit"),
}


# ---------------------------------------------------------------------------
# a run
# ---------------------------------------------------------------------------


def train(name: str, config: Config, member: dict, train_x, train_y, test_x, test_y):
    """One whole run -> the last epoch's training loss, test accuracy in %, state."""
    tx = OPTIMIZERS[name](config, member["seed"])
    net = nnx.eval_shape(lambda: network(config, 0))
    train_def, eval_def = (
        nnx.graphdef(nnx.view(net, use_running_average=mode)) for mode in (False, True)
    )

    def loss_of(params, stats, x, y):
        net = nnx.merge(train_def, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
        return loss, nnx.state(net, nnx.BatchStat)

    def step(carry, batch):
        params, stats, opt = carry
        x = jax.vmap(batches.crop_and_flip)(train_x[batch["order"]], batch["crops"])
        x, y = batches.normalise(x), train_y[batch["order"]]
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, stats, x, y
        )
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), loss

    carry = member["params"], member["stats"], tx.init(member["params"])
    steps = {key: member[key] for key in ("order", "crops")}
    (params, stats, opt), losses = lax.scan(step, carry, steps)
    net = nnx.merge(eval_def, params, stats)
    guesses = lax.map(lambda x: net(batches.normalise(x)).argmax(-1), test_x)
    last = losses[-(len(losses) // config.epochs) :].mean()
    return last, 100 * jnp.mean(guesses == test_y), opt


def train_torch(name: str, config: Config, member: dict, images):
    """The same run with an optimizer of PyTorch's kind."""
    import torch
    from torch.nn import functional as F

    from train.references.wide_resnet import crop_and_flip

    module, kind = TORCH_OPTIMIZERS[name]
    make: Any = getattr(importlib.import_module(module), kind)
    torch.set_num_threads(1)  # on a busy machine more of them wait for each other
    net = torch_loop.make_network(member["params"])
    betas = {"betas": (config.b1, config.b2), "eps": config.eps}
    optimizer = make(net.parameters(), weight_decay=config.weight_decay, **betas)
    (group,) = optimizer.param_groups
    schedule = learning_rate(config)
    rates = np.asarray(jax.vmap(schedule)(np.arange(len(member["order"]))))

    x, y, test_x, test_y = (torch.from_numpy(np.array(a)) for a in images)
    x = torch.from_numpy(batches.normalise(x.numpy()))
    order, crops = (torch.from_numpy(member[key]).long() for key in ("order", "crops"))
    losses = []
    for index, crop, rate in zip(order, crops, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(crop_and_flip(x, index, crop)), y[index].long())
        loss.backward()
        with torch.compiler.set_stance("force_eager"):  # torchao's step is compiled
            optimizer.step()
        losses.append(loss.item())

    net.eval()
    with torch.no_grad():
        right = [
            (net(torch.from_numpy(batches.normalise(x.numpy()))).argmax(-1) == y)
            for x, y in zip(test_x, test_y, strict=True)
        ]
    accuracy = 100 * float(torch.cat(right).float().mean())
    last = len(losses) // config.epochs
    return float(np.mean(losses[-last:])), accuracy, optimizer.state


def state_bytes(state: Any) -> int:
    """Of all arrays in a state of ours."""
    return sum(x.nbytes for x in jax.tree.leaves(state))


def torch_state_bytes(state: Any) -> int:
    """Of all tensors in the state of a PyTorch optimizer, shared ones once."""
    import torch

    sizes = {}

    def visit(x):
        if hasattr(x, "__tensor_flatten__"):  # several tensors in the shape of one
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
    """Trains all, reports; returns the folder with the results."""
    check(config)
    splits = data.load_cifar10(config.data_dir, config.train_size, config.eval_size)
    test = batches.in_batches(splits.test)
    images = (batches.padded(splits.train.x), splits.train.y, *test)
    folder = record.new_folder(config, "low-memory")
    environment = record.environment()
    members = [tables(config, seed) for seed in range(config.seeds)]
    parameters = sum(x.size for x in jax.tree.leaves(members[0]["params"]))

    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    on_device = jax.device_put(images)
    for name in OPTIMIZERS:
        program = jax.jit(functools.partial(train, name, config))
        runs = []
        for member in members:
            loss, accuracy, state = program(member, *on_device)
            runs.append((float(loss), float(accuracy)))
        rows[name] = summary(runs, state_bytes(state) / parameters)
        print(f"  {name}: loss {rows[name]['loss']['mean']:.4f}", flush=True)

    for name, (module, _) in TORCH_OPTIMIZERS.items() if config.torch else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing[name] = str(error)
            continue
        runs = []
        for member in members:
            loss, accuracy, state = train_torch(name, config, member, images)
            runs.append((loss, accuracy))
        rows[name] = summary(runs, torch_state_bytes(state) / parameters)
        print(f"  {name}: loss {rows[name]['loss']['mean']:.4f}", flush=True)

    # what the precision alone changes: against float32 of the same library
    for name, row in rows.items():
        base = "float32, PyTorch" if name in TORCH_OPTIMIZERS else "float32"
        if name != base:
            change = np.subtract(row["loss"]["runs"], rows[base]["loss"]["runs"])
            row["loss_minus_float32"] = statistics.confidence_interval(change)

    results = {"parameters": parameters, "rows": rows, "missing": missing}
    record.write_json(folder / "config.json", vars(config) | environment)
    record.write_json(folder / "results.json", results)
    text = page(config, results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nWrote {folder}.")
    return folder


def summary(runs: list[tuple[float, float]], size: float) -> dict[str, Any]:
    losses, accuracies = (list(values) for values in zip(*runs, strict=True))
    return {
        "bytes_per_parameter": size,
        "loss": report.summary(losses),
        "accuracy": report.summary(accuracies),
    }


def page(config: Config, results: dict[str, Any]) -> str:
    head = ("moments", "bytes of state per parameter", "training loss")
    table: list[tuple[str, ...]] = [
        (*head, "minus that of float32", "test accuracy, %")
    ]
    for name, row in results["rows"].items():
        loss, change = row["loss"], row.get("loss_minus_float32")
        difference = ""
        if change:
            difference = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**change)
        table.append(
            (name, f"{row['bytes_per_parameter']:.2f}")
            + (f"{loss['mean']:.4f} ± {loss['std']:.4f}", difference)
            + (f"{report.spread(row['accuracy'])}",)
        )
    lines = [
        f"CIFAR-10, {config.train_size} training images, {config.epochs} epochs of "
        f"1cycle in batches of {config.batch_size}; a network of "
        f"{results['parameters']:,} parameters. The training loss is that of the last "
        f"epoch. Mean ± standard deviation of {config.seeds} seeds; differences are "
        "paired, with 95 % confidence.",
        "",
        report.markdown(table),
    ]
    lines += [f"\n{name}: left out, {why}." for name, why in results["missing"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    main(tyro.cli(Config))
