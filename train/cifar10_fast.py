"""The shortest time to 94 % on CIFAR-10 that AdamW can do. Not measured yet, n = 0.

    python -m train.cifar10_fast --data-dir DIR --seeds 200 --name adamw   # see --help

Whether the network reaches 94 %, and when, has not been measured on a GPU. Its settings
come from a PyTorch prototype on a CPU, which is not kept: a quarter or half as wide,
single runs of 5 epochs on 40,000 training images, evaluated on the other 10,000. They
are a starting point, not a result. The recipe: train/recipes/cifar10_fast.py.

The clock. Before it starts, both programs are compiled and run once, and the images are
on the device as uint8. Training seconds are from the seed to the trained network:
initial weights, whitening, orders, padding, all the steps. Evaluation seconds are from
there to the accuracy. The time of a run is their sum. The time of a cold start, which
is reported too, is from the first line of `main` to the first accuracy, with reading
the files and compilation.

Everything is in runs/NAME. The same command, without --overwrite, goes on with the
seeds that are not finished.
"""

import datetime
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.data import cifar10 as data
from train.plots import curves
from train.recipes.check import check_options
from train.recipes.cifar10_fast import (
    Config,
    check,
    count_steps,
    evaluate,
    make_schedule,
    train,
)
from train.run import devices
from train.run.command import run_command
from train.run.environment import environment
from train.run.folder import Run
from train.run.log import write_json

MAY_CHANGE_ON_RESUME = ("data_dir", "seeds", "first_seed", "target")
TIMES = ("seconds", "train_seconds", "evaluate_seconds")


def main(config: Config) -> Path:
    """Trains the seeds that are not finished; returns the folder with the results."""
    started = time.perf_counter()
    check(config)
    train_set, test_set = read(config)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    with Run(
        config,
        script="cifar10_fast",
        name=f"cifar10-fast-{now}",
        may_change=MAY_CHANGE_ON_RESUME,
        seeds=range(config.first_seed, config.first_seed + config.seeds),
        devices=environment()["devices"],  # whose times are measured
    ) as run:
        losses = None
        if run.seeds_left:
            train_program, evaluate_program = compile_and_warm_up(
                run, started, train_set, test_set
            )
            for seed in run.seeds_left:
                losses = run_seed(
                    run, train_program, evaluate_program, train_set, test_set, seed
                )
        else:
            print(f"{run.folder} is finished; --overwrite starts again.")
        report(run, losses)
    return run.folder


def read(config: Config) -> tuple[Any, Any]:
    """The training and the test images, on the device.

    Raises:
        ValueError: there are fewer than the configuration asks for.
    """
    train_set, test_set = data.read_cifar10(config.data_dir)
    n, m = len(train_set.y), len(test_set.y)
    rules = {
        "train_size": (config.train_size <= n, f"in [1, {n}]"),
        "eval_size": (config.eval_size <= m, f"in [1, {m}]"),
    }
    check_options(config, rules)
    return jax.device_put(
        (
            tuple(array[: config.train_size] for array in train_set),
            tuple(array[: config.eval_size] for array in test_set),
        )
    )


def compile_and_warm_up(run: Run, started: float, train_set, test_set):
    """Compiles both programs, and runs them once, which does not count."""
    config, seed = run.config, np.uint32(run.seeds_left[0])
    dtype = devices.compute_dtype("auto")  # of activations
    _, steps = count_steps(config)
    print(f"{steps} steps of {config.batch_size} images.")
    print(make_schedule(config), flush=True)

    compile_started = time.perf_counter()
    train_program = jax.jit(functools.partial(train, config, dtype))
    lowered = train_program.lower(seed, *train_set)
    train_program, (trained, _) = lowered.compile(), lowered.out_info
    evaluate_program = jax.jit(functools.partial(evaluate, config, dtype))
    evaluate_program = evaluate_program.lower(trained, *test_set).compile()
    run.start(time.perf_counter() - compile_started)

    trained, _ = train_program(seed, *train_set)
    jax.block_until_ready(evaluate_program(trained, *test_set))
    cold = time.perf_counter() - started
    run.log("warm", cold_seconds=cold)
    print(f"Cold start to the first accuracy: {cold:.1f} s.", flush=True)
    return train_program, evaluate_program


def run_seed(run: Run, train_program, evaluate_program, train_set, test_set, seed: int):
    """Trains, evaluates and logs a seed; returns the loss of each step."""
    start = time.perf_counter()
    trained, losses = train_program(np.uint32(seed), *train_set)
    jax.block_until_ready(trained)
    middle = time.perf_counter()
    accuracies = jax.block_until_ready(evaluate_program(trained, *test_set))
    end = time.perf_counter()
    plain, mirrored, final = map(float, accuracies)
    per_epoch, _ = count_steps(run.config)
    run.log(
        "end",
        seed=seed,
        accuracy=final,
        plain=plain,  # of the images as they are
        mirrored=mirrored,  # with their mirror images
        loss=float(losses[-per_epoch:].mean()),  # of the last epoch
        train_seconds=middle - start,
        evaluate_seconds=end - middle,
        seconds=end - start,
    )
    print(
        f"seed {seed}: {final:.2f} % (plain {plain:.2f}, mirrored {mirrored:.2f}) "
        f"in {middle - start:.3f} + {end - middle:.3f} s",
        flush=True,
    )
    return losses


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def report(run: Run, losses) -> None:
    """Writes results.json, and curves.png if there are losses; prints the results.

    All seeds in the folder count, not only those of the last command.
    """
    config, ends = run.config, run.lines("end")
    columns = ("accuracy", "plain", "mirrored", "loss", *TIMES)
    results: dict[str, Any] = {c: statistics([end[c] for end in ends]) for c in columns}
    reached = np.mean([end["accuracy"] >= config.target for end in ends])
    results["share_at_target"] = float(reached)
    results["cold_seconds"] = run.lines("warm")[-1]["cold_seconds"]
    results["compile_seconds"] = run.lines("start")[-1]["compile_seconds"]
    write_json(run.folder / "results.json", results)
    if losses is not None:
        path = run.folder / "curves.png"
        curves.plot_seeds(ends, losses, make_schedule(config), config.target, path)
    print(format_results(config, results), f"Wrote {run.folder}.", sep="\n")


def statistics(values: list[float]) -> dict[str, float]:
    n, std = len(values), float(np.std(values, ddof=1))
    mean, error = float(np.mean(values)), std / math.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "standard_error": error}


def format_results(config: Config, results: dict[str, Any]) -> str:
    lines = []
    for key, unit in (("accuracy", "%"), *((key, "s") for key in TIMES)):
        n, mean, std, error = results[key].values()
        spread = f"n = {n}, std {std:.3f}, standard error {error:.3f}"
        lines.append(f"{key}: {mean:.3f} {unit} ({spread})")
    lines.append(f"share at {config.target:g} %: {results['share_at_target']:.3f}")
    lines.append(
        f"cold start to the first accuracy: {results['cold_seconds']:.1f} s, of it "
        f"compilation: {results['compile_seconds']:.1f} s"
    )
    return "\n".join(lines)


def parse_args(args: list[str]) -> Config:
    import tyro

    return tyro.cli(Config, args=args)


if __name__ == "__main__":
    # With a compilation cache, the time of a cold start would not be one.
    jax.config.update("jax_enable_compilation_cache", False)
    run_command(main, parse_args)
