"""A ResNet whose training begins in PyTorch, goes on in Flax, and ends in PyTorch.

    python -m train.continue_from_torch
    python -m train.continue_from_torch --dtype float32

AdamW in two parameter groups, the second without decay and at half the rate, under
OneCycleLR with cycled momentum. Each change of the library goes through a file, as
torch.save writes it: weights, moments, step counts, rates. Beside it run the one that
stayed in PyTorch, and one that takes the weights to Flax but not the moments.

In float64 the run that changes the library is the one that stayed. In float32 the
rounding, which differs, grows from step to step.

Writes results.json, results.md, losses.png and the two checkpoints into the folder of
the run. The images are scikit-learn's digits, four times as large; nothing is
downloaded.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from matplotlib.figure import Figure
from torch.nn import functional as F

import adamw_jax as aj
from train.data import batches
from train.data.digits import load_digits
from train.models.resnet import Head, ResNet
from train.references import resnet as torch_resnet
from train.run import record, report

CLASSES = 10

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small ResNet in two libraries by turns."""

    begin: int = 15  # steps in PyTorch
    middle: int = 20  # steps in Flax
    end: int = 15  # steps in PyTorch again
    architecture: str = "resnet18"
    width: int = 8  # channels behind the first convolution
    train_size: int = 512  # images
    batch_size: int = 32
    learning_rate: float = 3e-3  # the peak
    weight_decay: float = 0.1  # of kernels
    dtype: Literal["float64", "float32"] = "float64"
    seed: int = 0  # of weights and batches

    out: Path = Path("runs")  # where the folder is made
    name: str | None = None  # of the folder; None: with the time
    overwrite: bool = False  # also a folder that exists

    @property
    def steps(self) -> int:
        return self.begin + self.middle + self.end


def check(c: Config) -> None:
    for name in ("begin", "middle", "end"):
        if getattr(c, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(c, name)!r}")
    if not 2 <= c.batch_size <= c.train_size:  # batch norm needs two
        raise ValueError(
            f"batch_size must be in [2, {c.train_size}], got {c.batch_size!r}"
        )


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


class Data(NamedTuple):
    x: np.ndarray  # (images, 32, 32, 3)
    y: np.ndarray  # (images,)
    order: np.ndarray  # (steps, batch_size): which images


def read(c: Config) -> Data:
    images = load_digits(c.train_size, 1).train
    x = images.x.reshape(-1, 8, 8, 1) / 16
    x = x.repeat(4, 1).repeat(4, 2).repeat(3, 3).astype(c.dtype)
    epochs = -(-c.steps // (c.train_size // c.batch_size))
    rng = np.random.default_rng(c.seed)
    order = batches.order(rng, c.train_size, c.batch_size, epochs)
    return Data(x, images.y.astype(np.int32), order[: c.steps])


# ---------------------------------------------------------------------------
# PyTorch: network, optimizer, schedule, steps
# ---------------------------------------------------------------------------


def build_torch(c: Config):
    torch.manual_seed(c.seed)
    net = torch_resnet.ResNet(c.architecture, c.width, CLASSES)
    net = net.to(getattr(torch, c.dtype))
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the libraries draw other numbers
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
# Flax: network, step, and what PyTorch has in its place
# ---------------------------------------------------------------------------


class Net(nnx.Module):
    """`torch_resnet.ResNet`."""

    def __init__(self, c: Config):
        dtype = jnp.dtype(c.dtype)
        self.body = ResNet(c.architecture, c.width, dtype=dtype, rngs=nnx.Rngs(0))
        self.head = Head(self.body.features, CLASSES, rngs=nnx.Rngs(1))
        for layer in self.head.fc:
            if isinstance(layer, nnx.Dropout):
                layer.rate = 0.0

    def __call__(self, x):
        key = jax.random.key(0)  # of a dropout of nothing
        return self.head(self.body(x, train=True), train=True, key=key)


def rename(name: str) -> str:
    """PyTorch's network has no name for its body, and its head is called fc."""
    return f"head.{name}" if name.startswith("fc.") else f"body.{name}"


class Run(NamedTuple):
    graphdef: Any
    params: Any
    stats: Any
    tx: Any
    state: Any


def load(c: Config, checkpoint: dict[str, Any]) -> Run:
    """Everything that a checkpoint of PyTorch has, in Flax."""
    net = nnx.eval_shape(lambda: Net(c))
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
    return Run(graphdef, params, stats, tx, state)


def dump(run: Run, checkpoint: dict[str, Any], steps: int) -> dict[str, Any]:
    """A checkpoint for PyTorch, from one of PyTorch that is some steps older."""
    model = dict(checkpoint["model"])
    model |= aj.params_to_torch_state_dict(
        nnx.merge_state(run.params, run.stats), list(model), rename=rename
    )
    for name in model:
        if name.endswith("num_batches_tracked"):
            model[name] = model[name] + steps
    groups = checkpoint["optimizer"]["param_groups"]
    optimizer = aj.to_torch_state_dict(run.state, run.params, groups, rename=rename)
    scheduler = dict(checkpoint["scheduler"])
    scheduler["last_epoch"] += steps
    scheduler["_step_count"] += steps
    scheduler["_last_lr"] = [group["lr"] for group in optimizer["param_groups"]]
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def build_step(run: Run):
    tx = run.tx

    def loss_fn(params, stats, x, y):
        net = nnx.merge(run.graphdef, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(net(x), y)
        return losses.mean(), nnx.state(net, nnx.BatchStat)

    @jax.jit
    def step(params, stats, state, x, y):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), stats, state, loss

    return step


def train_flax(step, run: Run, data: Data, steps: range) -> tuple[Run, list[float]]:
    params, stats, state = run.params, run.stats, run.state
    losses = []
    for index in data.order[steps.start : steps.stop]:
        params, stats, state, loss = step(
            params, stats, state, data.x[index], data.y[index]
        )
        losses.append(float(loss))
    return run._replace(params=params, stats=stats, state=state), losses


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def weight_difference(net, stayed, start) -> float:
    """The largest error of a weight, over the largest distance in its tensor."""
    nets = (net, stayed, start)
    with torch.no_grad():
        return max(
            float((p - q).abs().max() / (q - p0).abs().max())
            for p, q, p0 in zip(*(n.parameters() for n in nets), strict=True)
        )


def table(c: Config, results: dict[str, Any]) -> str:
    head = ("step", "runs in", "loss", "stayed in PyTorch", "difference")
    rows: list[tuple[str, ...]] = [(*head, "without the moments")]
    changes = (0, c.begin, c.begin + c.middle, c.steps)
    shown = {s for change in changes for s in (change - 1, change, change + 4)}
    for step in sorted(s for s in shown if 0 <= s < c.steps):
        there = step < c.begin or step >= c.begin + c.middle
        loss, stayed = results["losses"][step], results["stayed"][step]
        moved = results["without_moments"]
        other = (
            moved[step - c.begin] if c.begin <= step < c.begin + len(moved) else None
        )
        rows.append(
            (
                str(step),
                "PyTorch" if there else "Flax",
                f"{loss:.6f}",
                f"{stayed:.6f}",
                f"{abs(loss - stayed):.1e}",
                "" if other is None else f"{other:.6f}",
            )
        )
    return report.markdown(rows)


def text(c: Config, results: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    return (
        f"{table(c, results)}\n\n"
        f"In {c.dtype}, the losses of the run that changes the library are within "
        f"{results['loss_difference']:.1e} of those of the run that stays, and its "
        f"weights, at the end, within {results['weight_difference']:.1e} of the "
        "distance that they have come. Without the moments a loss in Flax is up to "
        f"{results['difference_without_moments']:.1e} off.\n"
    )


def plot(c: Config, results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained", dpi=120)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses, stayed = np.array(results["losses"]), np.array(results["stayed"])
    top.plot(stayed, color="black", lw=4, alpha=0.25, label="stayed in PyTorch")
    parts = ((0, c.begin), (c.begin, c.begin + c.middle), (c.begin + c.middle, c.steps))
    for (first, last), colour, name in zip(
        parts, ("#d1495b", "#00798c", "#edae49"), ("PyTorch", "Flax", "PyTorch again"),
        strict=True,
    ):  # fmt: skip
        steps = np.arange(first, last)
        top.plot(steps, losses[first:last], ".-", color=colour, lw=1, label=name)
    moved = results["without_moments"]
    steps = np.arange(c.begin, c.begin + len(moved))
    top.plot(steps, moved, ":", color="gray", label="Flax, without the moments")
    top.set_ylabel("training loss")
    top.legend(frameon=False)
    difference = np.abs(losses - stayed)
    bottom.semilogy(np.where(difference > 0, difference, np.nan), "k.-", lw=1)
    bottom.set_ylabel("difference to the\nrun that stayed")
    bottom.set_xlabel("step")
    figure.savefig(path)


# ---------------------------------------------------------------------------
# all of it
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Trains, compares and writes; returns what is in results.json."""
    check(config)
    folder = record.new_folder(config, "continue-from-torch")
    with jax.enable_x64(config.dtype == "float64"):
        results = compare(config, folder)
    results |= {"config": vars(config)} | record.environment()
    record.write_json(folder / "results.json", results)
    plot(config, results, folder / "losses.png")
    summary = text(config, results)
    (folder / "results.md").write_text(summary, encoding="utf-8")
    print(f"{summary}\nWrote {folder}.", flush=True)
    return results


def compare(config: Config, folder: Path) -> dict[str, Any]:
    data, checkpoints = read(config), folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    first, second = config.begin, config.begin + config.middle
    begin, middle, end = (
        range(first),
        range(first, second),
        range(second, config.steps),
    )

    # begin in PyTorch, and stay there
    stayed = build_torch(config)
    losses = train_torch(*stayed, data, begin)
    save(checkpoints / "begin.pt", *stayed)
    losses_stayed = losses + train_torch(*stayed, data, range(first, config.steps))

    # go on in Flax
    checkpoint = torch.load(checkpoints / "begin.pt", weights_only=True)
    run = load(config, checkpoint)
    step = build_step(run)
    run, in_flax = train_flax(step, run, data, middle)
    torch.save(dump(run, checkpoint, config.middle), checkpoints / "middle.pt")

    # the same without the moments
    forgotten = checkpoint | {"optimizer": checkpoint["optimizer"] | {"state": {}}}
    _, without = train_flax(step, load(config, forgotten), data, middle)

    # end in PyTorch
    net, optimizer, scheduler = build_torch(config)
    checkpoint = torch.load(checkpoints / "middle.pt", weights_only=True)
    net.load_state_dict(checkpoint["model"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    losses += in_flax + train_torch(net, optimizer, scheduler, data, end)

    start, _, _ = build_torch(config)
    difference = np.abs(np.array(losses) - losses_stayed)
    lost = np.abs(np.array(without) - losses_stayed[first:second])
    return {
        "losses": losses,
        "stayed": losses_stayed,
        "without_moments": without,
        "loss_difference": float(difference.max()),
        "weight_difference": weight_difference(net, stayed[0], start),
        "difference_without_moments": float(lost.max()),
    }


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
