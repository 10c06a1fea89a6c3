"""The runs in a folder as one table, beside the article's numbers.

python -m train.tabulate docs/results/cifar10/cpu             # of train.cifar10
python -m train.tabulate docs/results/language_model/cpu      # of train.language_model
python -m train.tabulate docs/results/cars/cpu                # of train.cars
python -m train.tabulate docs/results/update/cpu              # of train.bench_update
"""

import json
import sys
from pathlib import Path
from typing import Any

from train import cars, language_model
from train.recipes.cifar10 import RECIPES
from train.run import report


def table(folder: Path) -> str:
    """Markdown, from each results.json or bench.json in the folders in it."""
    paths = sorted(folder.glob("*/results.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    benches = [
        {"config": json.loads((path.parent / "config.json").read_text())}
        | json.loads(path.read_text())
        for path in sorted(folder.glob("*/bench.json"))
    ]
    kinds = {
        "train.cifar10": (cifar10, [r for r in runs if r.get("recipe") in RECIPES]),
        "train.language_model": (language_models, [r for r in runs if "words" in r]),
        "train.cars": (pictures, [r for r in runs if "weights" in r]),
        "train.bench_update": (updates, [b for b in benches if "here_over" in b]),
    }
    found = [kind for kind in kinds.values() if kind[1]]
    if len(found) != 1:
        raise ValueError(
            f"folder must have runs of one of {', '.join(kinds)} in it, got {folder}"
        )
    ((rows_of, runs),) = found
    return rows_of(runs)


def cifar10(runs: list[dict[str, Any]]) -> str:
    head = ("recipe", "the article's, %", "measured, %", "each run", "epochs")
    rows: list[tuple[str, ...]] = [(*head, "s of training", "not as in the recipe")]
    for run in sorted(runs, key=lambda run: list(RECIPES).index(run["recipe"])):
        changed = dict(run["changed"])
        epochs = changed.pop("epochs", RECIPES[run["recipe"]].epochs)
        rows.append(
            (
                run["recipe"],
                run["article"],
                f"{report.spread(run['accuracy'])} (n = {run['n']})",
                " ".join(f"{value:.2f}" for value in run["accuracy"]["runs"]),
                str(epochs),
                f"{run['train_seconds']:.0f}",
                listed(changed),
            )
        )
    return report.markdown(rows)


def language_models(runs: list[dict[str, Any]]) -> str:
    """Perplexities, validation / test."""
    head = ("model, recipe", "published", "with cache", "measured", "with cache", "n")
    rows: list[tuple[str, ...]] = [
        (*head, "epochs", "s of training", "not as in the recipe")
    ]
    order = [(m, r) for m in ("lstm", "qrnn") for r in language_model.RECIPES]
    for run in sorted(runs, key=lambda run: order.index((run["model"], run["recipe"]))):
        plain, cached = run.get("article") or (None, None)
        small, changed = run["tokens"] != language_model.WIKITEXT2, dict(run["changed"])
        recipe = language_model.defaults(run["model"], run["recipe"], small)
        epochs = changed.pop("epochs", recipe.epochs)
        rows.append(
            (
                f"{run['model']}, {run['recipe']}",
                *(" / ".join(map(str, x)) if x else "–" for x in (plain, cached)),
                *(
                    " / ".join(
                        map(report.spread, (run["valid"][key], run["test"][key]))
                    )
                    for key in ("perplexity", "with_cache")
                ),
                str(run["n"]),
                str(epochs),
                f"{run['train_seconds']:.0f}",
                listed(changed),
            )
        )
    ngrams = {
        f"{run['valid']['n-gram']:.2f} / {run['test']['n-gram']:.2f}" for run in runs
    }
    baseline = ("Kneser-Ney 5-grams", "–", "–", " and ".join(sorted(ngrams)))
    return report.markdown([*rows, (*baseline, "–", "–", "–", "–", "–")])


def pictures(runs: list[dict[str, Any]]) -> str:
    """Accuracies of fine-tuned and other ResNets."""
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
                listed(changed),
            )
        )
    return report.markdown(rows)


def updates(benches: list[dict[str, Any]]) -> str:
    """Milliseconds of an update, the median of the turns, and bytes for a parameter."""
    longest = sorted(benches, key=lambda bench: -len(bench["rows"]))
    names = list(dict.fromkeys(name for bench in longest for name in bench["rows"]))
    compiled = [name for name in names if "PyTorch" not in name]
    rows: list[tuple[str, ...]] = [
        ("parameters", "step", "floor, ms", *names, "here / PyTorch, fused")
        + ("bytes for a parameter, floor", *compiled)
    ]

    def place(bench):
        config = bench["config"]
        leaves = ["resnet50", "large", "transformer", "tiny"].index(config["leaves"])
        return config["step"], config["dtype"] != "float32", leaves

    for bench in sorted(benches, key=place):
        config, size, measured = bench["config"], bench["parameters"], bench["rows"]

        def cells(key, names, scale=1.0, measured=measured):
            values = [measured.get(name, {}).get(key) for name in names]
            return ["–" if x is None else f"{scale * x:.3g}" for x in values]

        ratio = bench["here_over"].get("PyTorch, fused")
        rows.append(
            (
                f"{size:,} {config['dtype']} in {bench['leaves']:,} leaves",
                config["step"],
                *cells("floor_ms", ["here"]),
                *cells("median_ms", names),
                f"{ratio:.2f}" if ratio else "–",
                *cells("floor_bytes", ["here"], 1 / size),
                *cells("bytes_accessed", compiled, 1 / size),
            )
        )
    return report.markdown(rows)


def listed(changed: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "–"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(Path(sys.argv[1])))
