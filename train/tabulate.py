"""The runs of `train.cifar10` in a folder as one table, beside the article's numbers.

python -m train.tabulate results/cifar10/cpu
"""

import json
import sys
from pathlib import Path

from train import report
from train.cifar10 import RECIPES


def table(folder: Path) -> str:
    """Markdown, from each results.json in the folders in it."""
    head = ("recipe", "the article's, %", "measured, %", "each run", "epochs")
    rows: list[tuple[str, ...]] = [(*head, "s of training", "not as in the recipe")]
    runs = [json.loads(path.read_text()) for path in folder.glob("*/results.json")]
    runs = [run for run in runs if run.get("recipe") in RECIPES]
    if not runs:
        raise ValueError(f"folder must have runs of train.cifar10 in it, got {folder}")
    for run in sorted(runs, key=lambda run: list(RECIPES).index(run["recipe"])):
        accuracy, changed = run["accuracy"], dict(run["changed"])
        spread = f" ± {accuracy['std']:.2f}" if accuracy["std"] is not None else ""
        epochs = changed.pop("epochs", RECIPES[run["recipe"]].epochs)
        rows.append(
            (
                run["recipe"],
                run["article"],
                f"{accuracy['mean']:.2f}{spread} (n = {run['n']})",
                " ".join(f"{value:.2f}" for value in accuracy["runs"]),
                str(epochs),
                f"{run['train_seconds']:.0f}",
                ", ".join(f"{key} {value}" for key, value in changed.items()) or "–",
            )
        )
    return report.markdown(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
