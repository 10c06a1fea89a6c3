"""The result page of `train.compare`: its table and its sentences, from the numbers."""

from typing import Any, NamedTuple

from tabulate import tabulate

from train.evals.statistics import plural


class Name(NamedTuple):
    optimizer: str
    decay: str  # kind of decay
    short: str  # both in short


NAMES = {
    "sgd": Name("SGD, momentum", "L2", "SGD + L2"),
    "adam-l2": Name("Adam", "L2", "Adam + L2"),
    "adamw": Name("AdamW", "decoupled", "AdamW"),
    "amsgrad-l2": Name("AMSGrad", "L2", "AMSGrad + L2"),
    "amsgradw": Name("AMSGrad", "decoupled", "AMSGrad + decay"),
}


def page(config: dict[str, Any], results: dict[str, Any]) -> str:
    """The whole page in Markdown."""
    method = (
        f"Learning rate and decay are the best of a {config['grid']} x "
        f"{config['grid']} grid by validation accuracy, averaged over "
        f"{plural(config['tune_seeds'], 'run')}. Test accuracy is the mean ± standard "
        "deviation over fresh seeds."
    )
    points = "\n".join(f"- {note}" for note in [*notes(results), speed(results)])
    paragraphs = [f"{task(config)} {method}", table(config, results), points]
    return "\n\n".join([*paragraphs, f"**{results['finding']}**"]) + "\n"


def task(config: dict[str, Any]) -> str:
    """Data set and training in one sentence."""
    return (
        f"{config['dataset']}: {config['train_size']} training images, "
        f"{100 * config['label_noise']:g} % of them mislabelled; "
        f"{config['eval_size']} validation and {config['eval_size']} test images; "
        f"{config['epochs']} epochs of 1cycle in batches of {config['batch_size']}."
    )


def table(config: dict[str, Any], results: dict[str, Any]) -> str:
    """One row per optimizer, as in the article."""
    head = ["optimizer", "decay", "tuned rate", "tuned decay", "test accuracy, %"]
    head += [f"epochs (steps) to {config['target']:g} %", "s per run"]
    steps_per_epoch = config["train_size"] // config["batch_size"]
    rows = []
    for name, test in results["test"].items():
        best = results["tuning"][name]
        to_target = "never"
        if test["reached"]:
            epochs = test["epochs_to_target"]
            to_target = f"{epochs:.1f} ({epochs * steps_per_epoch:.0f})"
        if 0 < test["reached"] < test["n"]:
            to_target += f" in {test['reached']} of {test['n']}"
        rows.append(
            [
                NAMES[name].optimizer,
                NAMES[name].decay,
                f"{best['lr']:.2g}",
                f"{best['decay']:.2g}",
                f"{test['mean']:.2f} ± {test['std']:.2f} (n = {test['n']})",
                to_target,
                f"{best['seconds_per_run']:.2g}",
            ]
        )
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def notes(results: dict[str, Any]) -> list[str]:
    """How sharp the optima are, and which lie on an edge of their grid."""
    lines = []
    for name in ("adam-l2", "adamw"):
        best = results["tuning"][name]
        gain = best["accuracy"] - best["accuracy_at_lowest_decay"]
        lines.append(
            f"{NAMES[name].short}: cells within half a point of the best: "
            f"{best['basin']} of {best['cells']}; decay gains {gain:.2f} points; "
            f"{_decay_over_learning_rate(best['decay_slope'])}."
        )
    for name, best in results["tuning"].items():
        if best["edges"]:
            lines.append(
                f"{NAMES[name].short}: the best cell is on the edge of its grid "
                f"({', '.join(best['edges'])}); a better one may lie outside."
            )
    return lines


def _decay_over_learning_rate(slope: dict[str, float] | None) -> str:
    if slope is None:
        return (
            "there are too few seeds or learning rates to tell whether the best decay "
            "depends on the learning rate"
        )
    clear = round(slope["low"], 2) > 0 or round(slope["high"], 2) < 0
    return (
        f"the best decay {'depends' if clear else 'does not clearly depend'} on the "
        f"learning rate (power {slope['mean']:.2f}, 95 % confidence "
        f"{slope['low']:.2f} to {slope['high']:.2f})"
    )


def speed(results: dict[str, Any]) -> str:
    """Runs per second, and how long PyTorch would take."""
    speed = results["speed"]
    line = (
        f"{speed['runs']} runs in {speed['seconds']:.1f} s, "
        f"{speed['runs'] / speed['seconds']:.3g} runs/s on {speed['devices']}, after "
        f"{speed['compile_seconds']:.1f} s of compilation."
    )
    if not speed["torch"]:
        return f"{line} Not compared with PyTorch: not installed, or --no-torch."
    sample = speed["torch"].values()
    seconds = sum(run["seconds"] for run in sample) / len(sample)
    line += (
        f" A PyTorch loop on one core takes {seconds:.2g} s per run without "
        "evaluation, measured on one run of each optimizer: "
        f"{seconds * speed['runs']:.0f} s for all."
    )
    if all(run["accuracy"] is not None for run in sample):
        gap = max(abs(run["accuracy"] - run["accuracy_here"]) for run in sample)
        line += (
            f" Its final accuracies are within {gap:.2f} points of ours; it corrects "
            "the bias differently when b1 changes."
        )
    return line


def finding(results: dict[str, Any]) -> str:
    """One sentence on AdamW against Adam + L2, whichever is better."""
    difference = results["adamw_minus_adam_l2"]
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    verdict = "AdamW and Adam + L2 do not differ measurably"
    if low > 0 or high < 0:
        verdict = f"AdamW is {'better' if mean > 0 else 'worse'} than Adam + L2"
    basins = [results["tuning"][name]["basin"] for name in ("adamw", "adam-l2")]
    return (
        f"With learning rate and decay tuned for each, {verdict}: {mean:+.2f} points "
        f"of test accuracy (95 % confidence {low:+.2f} to {high:+.2f} over "
        f"{results['test']['adamw']['n']} paired seeds, for this split of the data and "
        f"these tuned values); cells within half a point of the best: {basins[0]} "
        f"against {basins[1]}."
    )
