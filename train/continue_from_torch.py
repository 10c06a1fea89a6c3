"""A ResNet that starts training in PyTorch, continues in Flax and ends in PyTorch.

    python -m train.continue_from_torch
    python -m train.continue_from_torch --dtype float32

AdamW has two parameter groups, the second without decay and at half the learning rate,
under OneCycleLR with cycled momentum. Each switch goes through a checkpoint file of
torch.save with weights, moments, step counts and the scheduler. Two more runs serve for
comparison: one stays in PyTorch, and one takes the weights to Flax but not the moments.

In float64 the switched run is the one that stays in PyTorch, up to rounding. In float32
the rounding errors of the two libraries differ and grow from step to step.

Writes results.json, results.md, losses.png and both checkpoints. The images are
scikit-learn's digits, enlarged four times; nothing is downloaded.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn import functional as F

import adamw_jax as aj
from train.data import batches
from train.data.digits import load_digits
from train.models.resnet import Head, ResNet
from train.plots.curves import plot_switches
from train.recipes.check import check_options
from train.references import resnet as torch_resnet
from train.run import report
from train.run.command import run_command
from train.run.devices import print_compiling
from train.run.environment import environment
from train.run.folder import new_folder
from train.run.log import write_json
from train.run.output import Output

CLASSES = 10

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Trains a small ResNet in PyTorch, in Flax, and in PyTorch again."""

    begin: int = 15  # steps in PyTorch
    middle: int = 20  # steps in Flax
    end: int = 15  # steps in PyTorch again
    architecture: str = "resnet18"
    width: int = 8  # channels of the first convolution
    train_size: int = 512  # images
    batch_size: int = 32
    learning_rate: float = 3e-3  # peak
    weight_decay: float = 0.1  # of kernels only
    dtype: Literal["float64", "float32"] = "float64"
    seed: int = 0  # of weights and batches

    @property
    def steps(self) -> int:
        return self.begin + self.middle + self.end


def check(c: Config) -> None:
    rules = {
        option: (getattr(c, option) >= 1, "at least 1")
        for option in ("begin", "middle", "end")
    }
    sizes = (2 <= c.batch_size <= c.train_size, f"in [2, {c.train_size}]")
    check_options(c, rules | {"batch_size": sizes})  # batch norm needs two


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


class Data(NamedTuple):
    x: np.ndarray  # (images, 32, 32, 3)
    y: np.ndarray  # (images,)
    order: np.ndarray  # (steps, batch_size) indices of images


def load_data(c: Config) -> Data:
    images = load_digits(c.train_size, 1).train
    x = images.x.reshape(-1, 8, 8, 1) / 16
    x = x.repeat(4, 1).repeat(4, 2).repeat(3, 3).astype(c.dtype)
    epochs = -(-c.steps // (c.train_size // c.batch_size))
    rng = np.random.default_rng(c.seed)
    order = batches.order(rng, c.train_size, c.batch_size, epochs)
    return Data(x, images.y.astype(np.int32), order[: c.steps])


# ---------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------


def build_torch(c: Config):
    torch.manual_seed(c.seed)
    net = torch_resnet.ResNet(c.architecture, c.width, CLASSES)
    net = net.to(getattr(torch, c.dtype))
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the libraries draw different random numbers
    named = list(net.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [(name, p) for name, p in named if p.ndim > 1]},
            {"params": [(name, p) for name, p in named if p.ndim == 1]}
            | {"weight_decay": 0.0},
        ],
        weight_decay=c.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [c.learning_rate, c.learning_rate / 2], total_steps=c.steps
    )
    return net, optimizer, scheduler


def train_torch(net, optimizer, scheduler, data: Data, steps: range) -> list[float]:
    x, y = torch.from_numpy(data.x).permute(0, 3, 1, 2), torch.from_numpy(data.y).long()
    losses = []
    for step in steps:
        index = torch.from_numpy(data.order[step]).long()
        loss = F.cross_entropy(net(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def save(path: Path, net, optimizer, scheduler) -> None:
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)


# ---------------------------------------------------------------------------
# Flax, from and to PyTorch's checkpoints
# ---------------------------------------------------------------------------


class Network(nnx.Module):
    """The twin of `torch_resnet.ResNet`."""

    def __init__(self, c: Config):
        dtype = jnp.dtype(c.dtype)
        self.body = ResNet(c.architecture, c.width, dtype=dtype, rngs=nnx.Rngs(0))
        self.head = Head(self.body.features, CLASSES, rngs=nnx.Rngs(1))
        for layer in self.head.fc:
            if isinstance(layer, nnx.Dropout):
                layer.rate = 0.0

    def __call__(self, x):
        key = jax.random.key(0)  # unused, since the dropout rate is 0
        return self.head(self.body(x, train=True), train=True, key=key)


def rename(name: str) -> str:
    """In PyTorch the body has no name and the head is called fc."""
    return f"head.{name}" if name.startswith("fc.") else f"body.{name}"


class Training(NamedTuple):
    graphdef: nnx.GraphDef
    params: nnx.State
    stats: nnx.State
    tx: optax.GradientTransformationExtraArgs
    state: optax.OptState


def from_torch(c: Config, checkpoint: dict[str, Any]) -> Training:
    """All that a PyTorch checkpoint holds, in Flax."""
    net = nnx.eval_shape(lambda: Network(c))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, c.dtype),
        nnx.state(net, (nnx.Param, nnx.BatchStat)),
    )
    nnx.update(
        net, aj.params_from_torch_state_dict(checkpoint["model"], shapes, rename=rename)
    )
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    groups = checkpoint["optimizer"]["param_groups"]
    tx, state = aj.optimizer_from_torch_state_dict(
        checkpoint["optimizer"],
        params,
        learning_rate=aj.phases_from_torch_scheduler(checkpoint["scheduler"], groups),
        step=checkpoint["scheduler"]["last_epoch"],
        rename=rename,
    )
    return Training(graphdef, params, stats, tx, state)


def to_torch(
    training: Training, checkpoint: dict[str, Any], steps: int
) -> dict[str, Any]:
    """The PyTorch checkpoint `steps` after the one that the training started from."""
    model = dict(checkpoint["model"])
    model |= aj.params_to_torch_state_dict(
        nnx.merge_state(training.params, training.stats), list(model), rename=rename
    )
    for name in model:
        if name.endswith("num_batches_tracked"):
            model[name] = model[name] + steps
    groups = checkpoint["optimizer"]["param_groups"]
    optimizer = aj.to_torch_state_dict(
        training.state, training.params, groups, rename=rename, tx=training.tx
    )
    scheduler = dict(checkpoint["scheduler"])
    scheduler["last_epoch"] += steps
    scheduler["_step_count"] += steps
    scheduler["_last_lr"] = [group["lr"] for group in optimizer["param_groups"]]
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def build_step(training: Training):
    def loss_fn(params, stats, x, y):
        net = nnx.merge(training.graphdef, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(net(x), y)
        return losses.mean(), nnx.state(net, nnx.BatchStat)

    @jax.jit
    def step(params, stats, state, x, y):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, state = training.tx.update(grads, state, params)
        return aj.apply_updates(params, updates), stats, state, loss

    return step


def train_flax(
    step, training: Training, data: Data, steps: range
) -> tuple[Training, list[float]]:
    params, stats, state = training.params, training.stats, training.state
    losses = []
    for index in data.order[steps.start : steps.stop]:
        params, stats, state, loss = step(
            params, stats, state, data.x[index], data.y[index]
        )
        losses.append(float(loss))
    return training._replace(params=params, stats=stats, state=state), losses


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def weight_difference(net, reference, start) -> float:
    """Largest error of a weight relative to the largest distance in its tensor.

    Args:
        net: after training with switches.
        reference: after training in PyTorch alone.
        start: before training.
    """
    nets = (net, reference, start)
    with torch.no_grad():
        return max(
            float((p - q).abs().max() / (q - p0).abs().max())
            for p, q, p0 in zip(*(n.parameters() for n in nets), strict=True)
        )


def table(c: Config, results: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("step", "runs in", "loss", "stayed in PyTorch", "difference")
        + ("without the moments",)
    ]
    first, last = c.begin, c.begin + c.middle
    without_moments = dict(enumerate(results["without_moments"], first))
    shown = {
        step
        for switch in (0, first, last, c.steps)
        for step in (switch - 1, switch, switch + 4)
        if 0 <= step < c.steps
    }
    for step in sorted(shown):
        loss, stayed = results["losses"][step], results["stayed"][step]
        other = without_moments.get(step)
        rows.append(
            (
                str(step),
                "Flax" if first <= step < last else "PyTorch",
                f"{loss:.6f}",
                f"{stayed:.6f}",
                f"{abs(loss - stayed):.1e}",
                "" if other is None else f"{other:.6f}",
            )
        )
    return report.markdown(rows)


def page(c: Config, results: dict[str, Any]) -> str:
    """The whole page in Markdown."""
    return (
        f"{table(c, results)}\n\n"
        f"In {c.dtype}, switching between PyTorch and Flax changes the loss by at most "
        f"{results['loss_difference']:.1e}; the final weights differ by "
        f"{results['weight_difference']:.1e} of the distance travelled. Without the "
        "moments, the loss in Flax is off by up to "
        f"{results['difference_without_moments']:.1e}.\n"
    )


# ---------------------------------------------------------------------------
# the three runs
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Trains, compares and reports; returns the content of results.json."""
    check(config)
    folder = new_folder(config, "continue-from-torch")
    with jax.enable_x64(config.dtype == "float64"):
        results = compare(config, folder)
    results |= {"config": vars(config)} | environment()
    write_json(folder / "results.json", results)
    switches = (config.begin, config.begin + config.middle)
    plot_switches(results, switches, folder / "losses.png")
    text = page(config, results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(f"{text}\nWrote {folder}.", flush=True)
    return results


def compare(config: Config, folder: Path) -> dict[str, Any]:
    data, checkpoints = load_data(config), folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    first, last = config.begin, config.begin + config.middle

    # begin in PyTorch, and stay there
    print(f"{folder}: {config.steps} steps in PyTorch ...", flush=True)
    reference = build_torch(config)
    losses = train_torch(*reference, data, range(first))
    save(checkpoints / "begin.pt", *reference)
    stayed = losses + train_torch(*reference, data, range(first, config.steps))

    # continue in Flax
    print_compiling(f"{folder}: Flax")
    checkpoint = aj.load_torch_checkpoint(checkpoints / "begin.pt")
    training = from_torch(config, checkpoint)
    step = build_step(training)
    training, in_flax = train_flax(step, training, data, range(first, last))
    checkpoint_after = to_torch(training, checkpoint, config.middle)
    torch.save(checkpoint_after, checkpoints / "middle.pt")

    # the same without the moments
    checkpoint["optimizer"] = checkpoint["optimizer"] | {"state": {}}
    training = from_torch(config, checkpoint)
    _, without_moments = train_flax(step, training, data, range(first, last))

    # end in PyTorch
    net, optimizer, scheduler = build_torch(config)
    checkpoint = torch.load(checkpoints / "middle.pt", weights_only=True)
    net.load_state_dict(checkpoint["model"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    in_torch = train_torch(net, optimizer, scheduler, data, range(last, config.steps))

    losses = losses + in_flax + in_torch
    start, _, _ = build_torch(config)
    difference = np.abs(np.subtract(losses, stayed))
    difference_without = np.abs(np.subtract(without_moments, stayed[first:last]))
    return {
        "losses": losses,
        "stayed": stayed,
        "without_moments": without_moments,
        "loss_difference": float(difference.max()),
        "weight_difference": weight_difference(net, reference[0], start),
        "difference_without_moments": float(difference_without.max()),
    }


def parse_args(args: Sequence[str] | None = None) -> Config:
    import tyro

    return tyro.cli(Config, args=args)


if __name__ == "__main__":
    run_command(main, parse_args)
