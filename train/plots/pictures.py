"""Pictures: of `train.compare`, of training runs, of the learning-rate finder."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from train.evals.statistics import best_decays, confidence
from train.run.report import NAMES

COLOURS = {
    "sgd": "#7f7f7f",
    "adam-l2": "#d1495b",
    "adamw": "#00798c",
    "amsgrad-l2": "#edae49",
    "amsgradw": "#6a4c93",
}


def heatmap(tuning: dict[str, Any], path: Path) -> None:
    """Loshchilov and Hutter's picture: accuracy over learning rate and decay."""
    grids = {
        name: {key: np.array(value) for key, value in tuning[name]["grid"].items()}
        for name in ("adam-l2", "adamw")
    }
    top = max(grid["accuracies"].mean(-1).max() for grid in grids.values())
    colours = Normalize(np.floor(top) - 10, top)  # what is below has simply failed

    figure = Figure(figsize=(12, 6), layout="constrained", dpi=120)
    runs = grids["adamw"]["accuracies"].shape[-1]
    for ax, (name, grid) in zip(figure.subplots(1, 2), grids.items(), strict=True):
        lrs, decays, accuracy = grid.values()
        mean, best = accuracy.mean(-1), tuning[name]
        ax.imshow(mean.T, origin="lower", norm=colours, aspect="auto")
        ax.set_xticks(range(len(lrs)), [f"{lr:.2g}" for lr in lrs])
        ax.set_yticks(range(len(decays)), [f"{decay:.2g}" for decay in decays])
        ax.set_xlabel("peak learning rate")
        ax.set_ylabel(
            "L2 coefficient" if name == "adam-l2" else "decoupled weight decay"
        )
        ax.set_title(
            f"{NAMES[name][2]}: best {best['accuracy']:.1f} %, {best['basin']} of "
            f"{best['cells']} cells\nwithin half a point of it",
            fontsize=12,
        )

        # the best decay of each learning rate, and the best cell
        x, y = best_decays(lrs, decays, accuracy)
        x = np.searchsorted(lrs, x)
        y = np.interp(np.log(y), np.log(decays), np.arange(len(decays)))
        outline = [withStroke(linewidth=4, foreground="black")]
        ax.plot(x, y, "o-", color="white", lw=2, ms=5, path_effects=outline)
        i, j = np.unravel_index(mean.argmax(), mean.shape)
        ax.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, ec="red", lw=2.5))

        for (i, j), value in np.ndenumerate(mean):
            text, edge = ("white", "black")[:: 1 if colours(value) < 0.6 else -1]
            outline = [withStroke(linewidth=1.5, foreground=edge, alpha=0.4)]
            label = ax.text(i, j + 0.22, f"{value:.1f}", color=text, ha="center")
            label.set(fontsize=9, va="center", path_effects=outline)
    scale = ScalarMappable(colours)  # viridis, for the images as well
    bar = figure.colorbar(scale, ax=figure.axes, extend="min", pad=0.01)
    bar.set_label("validation accuracy, %")
    figure.supxlabel(
        f"Mean of {runs} run(s) per cell. Red: the best cell. White: the "
        "best decay of every learning rate that comes within a point of it.",
        fontsize=10,
    )
    figure.savefig(path)


def curves(test: dict[str, Any], cycle: Any, target: float, path: Path) -> None:
    """Mean test accuracy with a band of one standard deviation; the phases beneath."""
    figure = Figure(figsize=(12, 6), layout="constrained", dpi=120)
    axes = figure.subplot_mosaic(
        [["curve", "end"], ["phase", "end"]], width_ratios=(5, 3), height_ratios=(3, 1)
    )
    curve, phase, end = axes["curve"], axes["phase"], axes["end"]
    for row, (name, result) in enumerate(test.items()):
        epochs, values = np.array(result["epochs"]), np.array(result["accuracy"])
        mean, std, colour = values.mean(0), values.std(0, ddof=1), COLOURS[name]
        curve.plot(epochs, mean, "o-", color=colour, ms=4, lw=2, label=NAMES[name][2])
        curve.fill_between(
            epochs, mean - std, mean + std, color=colour, alpha=0.1, lw=0
        )

        # where each seed ended, their mean and how sure that is
        last = values[:, -1]
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(last))
        end.plot(last, row + spread, ".", color=colour, alpha=0.35, ms=6)
        sure = confidence(last)
        end.plot([sure["low"], sure["high"]], [row, row], color="black", lw=2)
        end.plot(sure["mean"], row, "D", color=colour, mec="black", ms=8)
    curve.axhline(target, color="black", lw=0.8, ls=":", label=f"target, {target:g} %")
    curve.set_ylabel("test accuracy, %")
    curve.set_title("mean of the seeds, band: one standard deviation")
    curve.legend(frameon=False, ncols=2)
    curve.tick_params(labelbottom=False)
    end.set_yticks(range(len(test)), [NAMES[name][2] for name in test])
    end.invert_yaxis()
    end.set_xlabel("test accuracy at the end, %")
    end.set_title("every seed; mean and its 95 % interval")

    steps = np.arange(cycle.total_steps)
    x = steps * epochs[-1] / cycle.total_steps
    phase.plot(x, cycle.schedule("learning_rate")(steps), color="black")
    phase.set_ylabel("learning rate\n/ peak")
    phase.set_xlabel("epoch")
    phase.sharex(curve)
    momentum = phase.twinx()
    momentum.plot(x, cycle.schedule("b1")(steps), color="gray", ls="--")
    momentum.set_ylabel("b1 (dashed)", color="gray")
    for ax in (curve, phase, momentum, end):
        ax.spines["top"].set_visible(False)
    figure.savefig(path)


def training(
    lines: list[dict[str, Any]], cycle: Any, epochs: int, path: Path, held_out="test"
) -> None:
    """Loss and accuracy of the runs in a log of images; the phases beneath."""
    figure = Figure(figsize=(9, 9), layout="constrained", dpi=120)
    loss, accuracy, phase = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    seeds = sorted({line["seed"] for line in lines if line["event"] == "epoch"})
    for seed in seeds:
        run = [x for x in lines if x["event"] == "epoch" and x["seed"] == seed]
        epoch, train, test, right = (
            [line[key] for line in run]
            for key in ("epoch", "loss", f"{held_out}_loss", "accuracy")
        )
        first = seed == seeds[0]
        options: dict[str, Any] = {"lw": 1.5, "alpha": max(0.3, 1 / len(seeds))}
        for values, colour, label in (
            (train, COLOURS["adamw"], "training, with augmentation"),
            (test, COLOURS["adam-l2"], held_out),
        ):
            label = label if first else None
            loss.plot(epoch, values, "o-", ms=3, color=colour, label=label, **options)
        accuracy.plot(epoch, right, "o-", ms=3, color=COLOURS["adam-l2"], **options)
    for line in lines:
        if line["event"] == "diverged":
            for ax in (loss, accuracy):
                at = line["step"] * epochs / cycle.total_steps
                ax.axvline(at, color="black", ls=":", label="diverged")
    ends = [line for line in lines if line["event"] == "end"]
    if ends:
        label = f"at the end, mean of {ends[0]['passes']} pass(es)"
        last = [line["accuracy"] for line in ends]
        accuracy.plot([epochs] * len(last), last, "D", color="black", label=label)
        accuracy.set_title(f"in the end {np.mean(last):.2f} % (n = {len(last)})")
        accuracy.legend(frameon=False, loc="lower right")
    loss.set_yscale("log")
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    accuracy.set_ylabel(f"{held_out} accuracy, %")

    momentum = _phases(phase, cycle, epochs)
    for ax in (loss, accuracy, phase, momentum):
        ax.spines["top"].set_visible(False)
    figure.savefig(path)


def _phases(ax, cycle: Any, epochs: int):
    """Learning rate and, on a second axis that is returned, b1."""
    steps = np.arange(cycle.total_steps)
    x = steps * epochs / cycle.total_steps
    ax.plot(x, cycle.schedule("learning_rate")(steps), color="black")
    ax.set_ylabel("learning rate")
    ax.set_xlabel("epoch")
    momentum = ax.twinx()
    if "b1" in cycle.at(0):
        momentum.plot(x, cycle.schedule("b1")(steps), color="gray", ls="--")
        momentum.set_ylabel("b1 (dashed)", color="gray")
    return momentum


def language_model(lines: list[dict], cycle: Any, epochs: int, path: Path) -> None:
    """Perplexity of the runs in a log of `train.language_model`; the phases beneath."""
    figure = Figure(figsize=(9, 7), layout="constrained", dpi=120)
    ax, phase = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    seeds = sorted({line["seed"] for line in lines if line["event"] == "epoch"})
    for seed in seeds:
        run = [x for x in lines if x["event"] == "epoch" and x["seed"] == seed]
        epoch = [line["epoch"] for line in run]
        for key, name, label in (
            ("loss", "adamw", "training, with dropout"),
            ("valid_loss", "adam-l2", "validation"),
        ):
            ax.plot(
                epoch,
                np.exp([line[key] for line in run]),
                "o-",
                ms=3,
                lw=1.5,
                alpha=max(0.3, 1 / len(seeds)),
                color=COLOURS[name],
                label=label if seed == seeds[0] else None,
            )
    for line in lines:
        if line["event"] == "diverged":
            at = line["step"] * epochs / cycle.total_steps
            ax.axvline(at, color="black", ls=":", label="diverged")
    ends = [line for line in lines if line["event"] == "end"]
    for key, marker in (("perplexity", "D"), ("with_cache", "*")):
        values = [line["test"][key] for line in ends]
        if values:
            label = f"test{', with cache' * (marker == '*')}: {np.mean(values):.1f}"
            at = [epochs] * len(values)
            ax.plot(at, values, marker, color="black", label=label, ls="")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("perplexity")
    ax.legend(frameon=False)
    for each in (ax, phase, _phases(phase, cycle, epochs)):
        each.spines["top"].set_visible(False)
    figure.savefig(path)


def many_seeds(runs: list[dict], losses, cycle: Any, target: float, path: Path) -> None:
    """Runs of `train.cifar10_fast`: the loss of the last one, and how all ended."""
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=120)
    loss, end = figure.subplots(1, 2)
    steps = np.arange(len(losses))
    loss.plot(steps, losses, color=COLOURS["adamw"], lw=1)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss, labels smoothed")
    loss.set_title("the last seed")
    rate = loss.twinx()
    rate.plot(steps, cycle.schedule("learning_rate")(steps), color="gray", ls="--")
    rate.set_ylabel("learning rate (dashed)", color="gray")
    accuracies = np.array([run["accuracy"] for run in runs])
    end.hist(accuracies, bins=min(20, len(runs)), color=COLOURS["adamw"])
    end.axvline(accuracies.mean(), color="black", label=f"mean {accuracies.mean():.2f}")
    end.axvline(target, color="black", ls=":", label=f"target {target:g}")
    end.set_xlabel("test accuracy, %")
    end.set_ylabel("seeds")
    end.legend(frameon=False)
    for ax in (loss, rate, end):
        ax.spines["top"].set_visible(False)
    figure.savefig(path)


def learning_rates(found: Any) -> Figure:
    """The curve of `train.lr_find`, without its first ten and last five points."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    ax = figure.subplots()
    curve = np.stack(found[:3])  # rates, losses and smoothed losses
    rates, losses, smoothed = curve[:, 10:-5] if curve.shape[1] > 16 else curve
    ax.plot(rates, losses, ".", color="#7f7f7f", alpha=0.5, ms=4, label="each batch")
    ax.plot(rates, smoothed, color=COLOURS["adamw"], lw=2, label="smoothed")
    ax.set_xscale("log")
    low, high = min(losses, default=0), max(smoothed, default=0)
    if high > low:  # some losses lie far above
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    if found.why_not() is None:
        for name, style in (("suggestion", "-"), ("steepest", ":")):
            rate = getattr(found, name)
            label = f"{name}, {rate:.2g}"
            ax.axvline(rate, color=COLOURS["adam-l2"], ls=style, label=label)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("training loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def cache(tuned: dict[str, Any], path: Path) -> None:
    """Of `train.tune_cache`: perplexity over theta and lambda at the best window."""
    best, windows, thetas, lambdas = (
        tuned[key] for key in ("tuned", "windows", "thetas", "lambdas")
    )
    grid = np.array(tuned["perplexities"])[windows.index(best["window"])]
    plain = tuned["valid"]["no cache"]
    colours = Normalize(grid.min(), max(plain, grid.min() + 1e-6))
    figure = Figure(figsize=(10, 6), layout="constrained", dpi=120)
    ax = figure.subplots()
    image = ax.imshow(
        grid.T, origin="lower", norm=colours, aspect="auto", cmap="viridis_r"
    )
    ax.set_xticks(range(len(thetas)), [f"{theta:g}" for theta in thetas])
    ax.set_yticks(range(len(lambdas)), [f"{share:g}" for share in lambdas])
    ax.set_xlabel("theta")
    ax.set_ylabel("lambda")
    for (i, j), value in np.ndenumerate(grid):
        colour = "white" if colours(value) > 0.5 else "black"
        ax.text(i, j, f"{value:.4g}", color=colour, ha="center", va="center", size=8)
    i, j = thetas.index(best["theta"]), lambdas.index(best["lambda_"])
    ax.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, ec="red", lw=2.5))
    ax.set_title(
        f"the best of {len(windows)} windows, {best['window']}: "
        f"{tuned['valid']['tuned']:.2f}, without a cache {plain:.2f}"
    )
    bar = figure.colorbar(image, ax=ax, extend="max", pad=0.01)
    bar.set_label("validation perplexity")
    figure.savefig(path)
