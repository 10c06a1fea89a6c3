"""The runs in a folder as one table, beside the published numbers.

python -m train.tabulate docs/results/cifar10/cpu             # of train.cifar10
python -m train.tabulate docs/results/language_model/cpu      # of train.language_model
python -m train.tabulate docs/results/cars/cpu                # of train.cars
python -m train.tabulate docs/results/update/cpu              # of train.bench update
"""

import json
import sys
from pathlib import Path
from typing import Any

from train.recipes import cars, cifar10, language_model
from train.run import report
from train.run.command import run_command


def table(folder: Path) -> str:
    """Markdown, from every results.json or bench.json in the subfolders.

    Raises:
        ValueError: the folder has results of no command, or of more than one.
    """
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/results.json"))
    ]
    benches = [
        {"config": json.loads((path.parent / "config.json").read_text("utf-8"))}
        | json.loads(path.read_text("utf-8"))
        for path in sorted(folder.glob("*/bench.json"))
    ]
    kinds = {
        "train.cifar10": (
            cifar10_table,
            [run for run in runs if run.get("recipe") in cifar10.RECIPES],
        ),
        "train.language_model": (
            language_model_table,
            [run for run in runs if "words" in run],
        ),
        "train.cars": (cars_table, [run for run in runs if "weights" in run]),
        "train.bench update": (
            update_table,
            [bench for bench in benches if is_update(bench)],
        ),
    }
    found = [kind for kind in kinds.values() if kind[1]]
    if len(found) != 1:
        raise ValueError(
            f"folder must have results of one of {', '.join(kinds)}, got {folder}"
        )
    ((make_table, results),) = found
    return make_table(results)


def cifar10_table(runs: list[dict[str, Any]]) -> str:
    head = ("recipe", "the article's, %", "measured, %", "each run", "epochs")
    rows: list[tuple[str, ...]] = [(*head, "s of training", "not as in the recipe")]
    recipes = list(cifar10.RECIPES)
    for run in sorted(runs, key=lambda run: recipes.index(run["recipe"])):
        changed = dict(run["changed"])
        epochs = changed.pop("epochs", cifar10.RECIPES[run["recipe"]].epochs)
        rows.append(
            (
                run["recipe"],
                run["article"],
                f"{report.spread(run['accuracy'])} (n = {run['n']})",
                " ".join(f"{value:.2f}" for value in run["accuracy"]["runs"]),
                str(epochs),
                f"{run['train_seconds']:.0f}",
                list_changes(changed),
            )
        )
    return report.markdown(rows)


def language_model_table(runs: list[dict[str, Any]]) -> str:
    """Perplexities, validation / test."""
    head = ("model, recipe", "published", "with cache", "measured", "with cache", "n")
    rows: list[tuple[str, ...]] = [
        (*head, "epochs", "s of training", "not as in the recipe")
    ]
    order = [(m, r) for m in ("lstm", "qrnn") for r in language_model.RECIPES]
    for run in sorted(runs, key=lambda run: order.index((run["model"], run["recipe"]))):
        published = run.get("article") or (None, None)
        small = run["tokens"] != language_model.WIKITEXT2_TOKENS
        recipe = language_model.defaults(run["model"], run["recipe"], small)
        changed = dict(run["changed"])
        epochs = changed.pop("epochs", recipe.epochs)
        rows.append(
            (
                f"{run['model']}, {run['recipe']}",
                *(" / ".join(map(str, x)) if x else "–" for x in published),
                *(
                    " / ".join(
                        map(report.spread, (run["valid"][key], run["test"][key]))
                    )
                    for key in ("perplexity", "with_cache")
                ),
                str(run["n"]),
                str(epochs),
                f"{run['train_seconds']:.0f}",
                list_changes(changed),
            )
        )
    ngrams = {
        f"{run['valid']['n-gram']:.2f} / {run['test']['n-gram']:.2f}" for run in runs
    }
    baseline = ("Kneser-Ney 5-grams", "–", "–", " and ".join(sorted(ngrams)))
    return report.markdown([*rows, (*baseline, "–", "–", "–", "–", "–")])


def cars_table(runs: list[dict[str, Any]]) -> str:
    """Accuracies of ResNets, fine-tuned and from scratch."""
    head = ("recipe", "images", "begun with", "the article's, %", "measured, %")
    rows: list[tuple[str, ...]] = [
        (*head, "with augmentation", "n", "epochs", "s of training")
        + ("not as in the recipe",)
    ]
    for run in sorted(
        runs, key=lambda run: (run["classes"], run["weights"] or "", run["recipe"])
    ):
        changed = dict(run["changed"])
        frozen, epochs = (changed.pop(k, None) for k in ("frozen_epochs", "epochs"))
        frozen = frozen or (0 if frozen == 0 or not run["weights"] else 20)
        epochs = epochs or cars.Config.epochs
        rows.append(
            (
                run["recipe"],
                f"{run['images'][0]:,} of {run['classes']} classes",
                run["weights"] or "random weights",
                run.get("article", "–"),
                report.spread(run["accuracy"]),
                report.spread(run["tta_accuracy"]),
                str(run["n"]),
                f"{frozen} + {epochs}" if frozen else str(epochs),
                f"{run['train_seconds']:.0f}",
                list_changes(changed),
            )
        )
    return report.markdown(rows)


def is_update(bench: dict[str, Any]) -> bool:
    """Whether a benchmark is `update`; earlier ones did not write their name."""
    return bench["config"].get("bench", "update") == "update" and "leaves" in bench


def update_table(benches: list[dict[str, Any]]) -> str:
    """Milliseconds per update, the median of the turns, and bytes per parameter."""
    longest = sorted(benches, key=lambda bench: -len(bench["rows"]))
    names = list(dict.fromkeys(name for bench in longest for name in bench["rows"]))
    ours, peer = names[0], "PyTorch, fused"
    compiled = [name for name in names if "PyTorch" not in name]
    rows: list[tuple[str, ...]] = [
        ("parameters", "step", "floor, ms", *names, f"{ours} / {peer}")
        + ("bytes for a parameter, floor", *compiled)
    ]

    def order(bench):
        config = bench["config"]
        leaves = ["resnet50", "large", "transformer", "tiny"].index(config["leaves"])
        return config["step"], config["dtype"] != "float32", leaves

    for bench in sorted(benches, key=order):
        config, size, measured = bench["config"], bench["parameters"], bench["rows"]

        def cells(key, names, scale=1.0, measured=measured):
            values = [measured.get(name, {}).get(key) for name in names]
            return ["–" if x is None else f"{scale * x:.3g}" for x in values]

        ratio = "–"
        if peer in measured:
            ratio = measured[ours]["median_ms"] / measured[peer]["median_ms"]
            ratio = f"{ratio:.2f}"
        rows.append(
            (
                f"{size:,} {config['dtype']} in {bench['leaves']:,} leaves",
                config["step"],
                *cells("floor_ms", [ours]),
                *cells("median_ms", names),
                ratio,
                *cells("floor_bytes", [ours], 1 / size),
                *cells("bytes_accessed", compiled, 1 / size),
            )
        )
    return report.markdown(rows)


def list_changes(changed: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "–"


def main(args: list[str]) -> None:
    if len(args) != 1 or args[0].startswith("-"):
        sys.exit(__doc__)
    print(table(Path(args[0])))


if __name__ == "__main__":
    run_command(main, list)
