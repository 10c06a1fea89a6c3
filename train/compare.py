"""AdamW against Adam + L2, and the other optimizers of fast.ai's article.

    python -m train.compare                                    # digits, half a minute
    python -m train.compare --dataset cifar10 --data-dir DIR   # see --help

Compares SGD with momentum, Adam + L2, AdamW, AMSGrad + L2 and AMSGrad with decoupled
decay, all with 1cycle. Learning rate and decay are tuned for each on a grid, by
accuracy on validation images. Each tuned optimizer is then trained with fresh seeds and
evaluated once on test images. A seed determines the initial weights, the order of the
images and the label noise. One compiled program trains all runs, a chunk at a time.

The default task is scikit-learn's digits with 400 training images, a tenth of them
mislabelled, and a small MLP. With clean labels (`--label-noise 0`) this network hardly
overfits, and Adam with the best L2 coefficient is no better than without. With noise,
either form of decay is worth about a point, and the best decay lies inside the grid.
The task was chosen for that, not for which optimizer wins.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.data.batches import in_batches, normalise, padded
from train.data.cifar10 import load_cifar10
from train.data.digits import load_digits
from train.data.splits import Splits
from train.evals import comparison, statistics
from train.plots.comparison import plot_test
from train.plots.grids import plot_tuning
from train.recipes import compare as recipe
from train.references import loop as torch_loop
from train.run import devices
from train.run.command import run_command
from train.run.environment import environment
from train.run.folder import new_folder
from train.run.log import write_json
from train.run.output import Output
from train.run.progress import progress

TUNE_SEED, TEST_SEED = 1000, 2000  # the first seeds of tuning and test


@dataclasses.dataclass(frozen=True)
class Config(recipe.Config, Output):
    """Tunes five optimizers and compares them. --dataset changes the other defaults."""

    data_dir: Path | None = None  # CIFAR-10's official files; None: tensorflow-datasets
    torch: bool = True  # also time a PyTorch loop on one run of each optimizer


def load(config: Config) -> Splits:
    if config.dataset == "digits":
        if config.data_dir is not None:
            raise ValueError(
                f"data_dir must be None for digits, got {config.data_dir!r}"
            )
        return load_digits(config.train_size, config.eval_size)
    return load_cifar10(config.data_dir, config.train_size, config.eval_size)


# ---------------------------------------------------------------------------
# many runs of one optimizer
# ---------------------------------------------------------------------------


def compile_program(config: Config, mesh: Mesh, tables, images) -> tuple[Any, int]:
    """The compiled program, and the number of runs that one call trains."""
    chunk = -(-config.chunk // mesh.size) * mesh.size
    vectorized = config.dataset == "digits" and mesh.devices[0].platform != "cpu"
    runs = recipe.select_runs(tables, *np.zeros((3, chunk), int))
    program = recipe.build_program(config, mesh, vectorized)
    return program.lower(np.int32(0), runs, images).compile(), chunk


def train_all(program, chunk, advance, name, lr, decay, seed, tables, images):
    """Trains any number of runs of one optimizer, a chunk at a time.

    Args:
        program: as compiled for `chunk` runs.
        chunk: runs per call.
        advance: called with the number of runs finished, to show progress.
        name: of the optimizer.
        lr: (runs,) peak learning rates.
        decay: (runs,) decays.
        seed: (runs,) indices into the tables.
        tables: of all seeds.
        images: training images, evaluation images and their labels.

    Returns:
        (runs, points, 2) accuracies and losses, see `recipe.train`.
    """
    index, curves = np.int32(list(recipe.OPTIMIZERS).index(name)), []
    for first in range(0, len(lr), chunk):
        rows = np.arange(first, min(first + chunk, len(lr)))
        filled = np.resize(rows, chunk)  # the last chunk repeats runs to fill it
        runs = recipe.select_runs(tables, seed[filled], lr[filled], decay[filled])
        curves.append(np.asarray(program(index, runs, images))[: len(rows)])
        advance(len(rows), comparison.NAMES[name].short)
    return np.concatenate(curves)


# ---------------------------------------------------------------------------
# the comparison
# ---------------------------------------------------------------------------


def tune(config: Config, name: str, train_runs, tables, images) -> dict[str, Any]:
    """Trains the grid of one optimizer, evaluated on the validation images."""
    start, (rates, decays) = time.perf_counter(), recipe.GRIDS[config.dataset][name]
    lr, decay = (np.geomspace(*ends, config.grid) for ends in (rates, decays))
    cells = (config.grid, config.grid, config.tune_seeds)
    i, j, seed = np.indices(cells).reshape(3, -1)
    curves = train_runs(name, lr[i], decay[j], seed, tables, images)
    tuned = statistics.summarize_grid(lr, decay, curves[:, -1, 0].reshape(cells))
    return tuned | {"seconds_per_run": (time.perf_counter() - start) / len(i)}


def evaluate(
    config: Config, name: str, tuned: dict[str, Any], train_runs, tables, images
) -> dict[str, Any]:
    """Trains one tuned optimizer with fresh seeds, evaluated on the test images."""
    seed = np.arange(config.seeds)
    lr, decay = (np.full(config.seeds, tuned[key]) for key in ("lr", "decay"))
    curves = train_runs(name, lr, decay, seed, tables, images)
    epochs = np.arange(0, config.epochs, config.evaluate_every) + config.evaluate_every
    return statistics.summarize_test(curves, epochs, config.target)


def time_torch(config: Config, tuning, tested, tables, splits) -> dict[str, Any]:
    """Trains the first test run of each optimizer in PyTorch, if it is installed."""
    if not (config.torch and torch_loop.is_available()):
        return {}
    print("One run of each in PyTorch ...", flush=True)
    cycle, samples = recipe.make_schedule(config), {}
    train_x, test_x = map(normalise, (padded(splits.train.x), splits.test.x))
    for name, tuned in tuning.items():
        run = recipe.select_runs(tables, 0, tuned["lr"], tuned["decay"])
        sample = torch_loop.time_run(name, run, cycle, train_x, test_x, splits.test.y)
        sample["accuracy_here"] = tested[name]["accuracy"][0][-1]
        samples[name] = sample
    return samples


def write_report(config: Config, results: dict[str, Any], folder: Path) -> str:
    """Writes numbers, page and pictures; returns the page."""
    tuning, tested = results["tuning"], results["test"]
    difference = statistics.paired_difference(tested["adamw"], tested["adam-l2"])
    results = results | {"adamw_minus_adam_l2": difference}
    results["finding"] = comparison.finding(results)
    page = comparison.page(vars(config), results)
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(page, encoding="utf-8")
    plot_tuning(tuning, folder / "heatmap.png")
    plot_test(
        tested, recipe.make_schedule(config), config.target, folder / "curves.png"
    )
    return page


def main(config: Config) -> Path:
    """Tunes, tests, times and reports; returns the folder with the results."""
    started = time.perf_counter()
    recipe.check(config)
    splits = load(config)
    config = dataclasses.replace(config, eval_size=len(splits.test.y))
    machine = environment()
    total = len(recipe.OPTIMIZERS) * (config.grid**2 * config.tune_seeds + config.seeds)
    print(f"{comparison.task(vars(config))}\n{total} runs on {machine['devices']}.")

    # data, on all devices
    mesh = Mesh(np.array(jax.devices()), ("runs",))
    tune_tables, test_tables = (
        recipe.draw_tables(config, splits.train.y, range(first, first + count))
        for first, count in ((TUNE_SEED, config.tune_seeds), (TEST_SEED, config.seeds))
    )
    train_x = padded(splits.train.x)
    tune_images, test_images = (
        jax.device_put(
            (train_x, *in_batches(images)), NamedSharding(mesh, PartitionSpec())
        )
        for images in (splits.validation, splits.test)
    )

    # one program for all runs
    folder = new_folder(config, f"compare-{config.dataset}")
    write_json(folder / "config.json", vars(config) | machine)
    devices.print_compiling(str(folder))
    start = time.perf_counter()
    program, chunk = compile_program(config, mesh, tune_tables, tune_images)
    compiled = time.perf_counter()
    print(f"Compiled in {compiled - start:.1f} s.", flush=True)

    # tune all, then test all
    tuning, tested = {}, {}
    with progress(total, "runs") as advance:
        train_runs = functools.partial(train_all, program, chunk, advance)
        for name in recipe.OPTIMIZERS:
            tuning[name] = tune(config, name, train_runs, tune_tables, tune_images)
        for name, tuned in tuning.items():
            tested[name] = evaluate(
                config, name, tuned, train_runs, test_tables, test_images
            )
    speed = {
        "devices": machine["devices"],
        "compile_seconds": compiled - start,
        "runs": total,
        "seconds": time.perf_counter() - compiled,
        "torch": time_torch(config, tuning, tested, test_tables, splits),
    }

    results = {"tuning": tuning, "test": tested, "speed": speed}
    page = write_report(config, results, folder)
    print(f"Wrote {folder} after {time.perf_counter() - started:.0f} s.\n\n{page}")
    return folder


def parse_args(args: Sequence[str] | None = None) -> Config:
    import tyro

    dataset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dataset.add_argument("--dataset", choices=recipe.RECIPES, default="digits")
    defaults = recipe.RECIPES[dataset.parse_known_args(args)[0].dataset]
    return tyro.cli(Config, default=Config(**vars(defaults)), args=args)


if __name__ == "__main__":
    devices.use_all_cores()
    run_command(main, parse_args)
