"""CIFAR-10 by the article's recipe: a wide residual network, 94 % in 30 epochs.

    python -m train.cifar10 --data-dir DIR                          # AdamW, 30 epochs
    python -m train.cifar10 --data-dir DIR --recipe adamw-18-tta --seeds 5
    python -m train.cifar10 --data-dir DIR --blocks 1 --width 16 --epochs 8   # a laptop
    python -m train.cifar10 --data-dir DIR --optimizer optax.lion --learning-rate 3e-4

Everything is in runs/NAME: config.json, metrics.jsonl, curves.png, checkpoints/,
results.json. Ctrl-C saves the step that it has reached. If it is killed, the last epoch
was saved. The same command, without --overwrite, resumes and ends with the same bits.
(On a GPU that requires XLA_FLAGS=--xla_gpu_deterministic_ops=true, which is slower.)

Seconds of training are those of the epochs, without evaluation and checkpoints. The
recipe, and where it differs from the article's code: train/recipes/cifar10.py.
"""

import argparse
import hashlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adamw_jax import Phases
from train.data import batches
from train.data import cifar10 as data
from train.data.splits import Images
from train.evals import classify
from train.plots import curves
from train.recipes.cifar10 import (
    ARTICLE,
    RECIPES,
    TRAIN_SIZE,
    TTA_PASSES,
    Compiled,
    Config,
    Programs,
    build,
    check,
    compile_programs,
    resolve,
)
from train.run import checkpoint, devices
from train.run.command import Stop, finish_steps, run_command
from train.run.folder import Run
from train.run.log import write_json
from train.run.progress import Pace
from train.run.report import (
    changed_settings,
    machine,
    progress_line,
    spread,
    summary,
)

SEGMENT_SECONDS = 5.0  # of training in one call of the program, about
PROGRESS_SECONDS = 10.0  # between lines of progress within an epoch
MAY_CHANGE_ON_RESUME = ("data_dir", "seeds", "tensorboard")


def main(config: Config) -> dict[str, Any]:
    """Trains the seeds that are not finished; returns what is in results.json."""
    train, test = data.read_cifar10(config.data_dir)
    check(config, len(train.y))
    config = resolve(config, len(train.y))
    train = Images(train.x[: config.train_size], train.y[: config.train_size])
    programs = build(config, devices.data_mesh(), len(train.y))
    with Run(
        config,
        script="cifar10",
        name=f"cifar10-{config.recipe}",
        may_change=MAY_CHANGE_ON_RESUME,
        labels=hashlib.md5(train.y.tobytes(), usedforsecurity=False).hexdigest(),
    ) as run:
        try:
            if run.seeds_left:
                train_seeds(run, programs, train, test)
            else:
                print(f"{run.folder} is finished; --overwrite starts again.")
        except FloatingPointError:
            if len(run.seeds_left) < len(run.seeds):
                report(run, programs.schedule)
            else:
                draw(run, programs.schedule)
            raise
        return report(run, programs.schedule)


# ---------------------------------------------------------------------------
# loop
# ---------------------------------------------------------------------------


def train_seeds(run: Run, programs: Programs, train: Images, test: Images) -> None:
    config, schedule = run.config, programs.schedule
    everywhere = NamedSharding(devices.data_mesh(), PartitionSpec())
    x, y = jax.device_put((batches.padded(train.x), train.y), everywhere)
    test_x = jax.device_put(batches.in_batches(test).x, everywhere)
    started = time.perf_counter()
    program = compile_programs(programs, x, y, test_x, TTA_PASSES * config.tta)
    start = run.start(time.perf_counter() - started)
    parameters = sum(p.size for p in jax.tree.leaves(program.state.params))
    print(
        f"{run.folder}: {parameters:,} parameters, {len(y):,} images, "
        f"{schedule.total_steps:,} steps, on {start['devices']}, compiled in "
        f"{start['compile_seconds']:.1f} s\n{schedule}",
        flush=True,
    )
    seeds = run.seeds_left
    pace = Pace(len(seeds) * schedule.total_steps)
    for seed in seeds:
        train_seed(run, program, test.y, seed, pace)
        draw(run, schedule)


def train_seed(
    run: Run, program: Compiled, test_labels: np.ndarray, seed: int, pace: Pace
) -> None:
    """Trains a seed, from its last checkpoint if it has one, and evaluates it."""
    config, schedule, number = run.config, program.schedule, np.int32(seed)
    steps = schedule.total_steps // config.epochs
    with run.checkpoints(seed) as checkpoints:
        state = checkpoint.restore(checkpoints, program.state)
        if state is None:
            state = program.initial_state(number)
        step = int(state.step)
        run.rewind(seed, step, step // steps)
        pace.skip(step)
        with run.events(seed, step) as write_events, finish_steps() as stop:
            for epoch in range(step // steps, config.epochs):
                state, losses, seconds = train_epoch(
                    run, program, checkpoints, stop, seed, epoch, state, pace
                )
                results = end_epoch(run, program, test_labels, seed, state, losses)
                results |= {"seconds": seconds}
                results |= {"images_per_second": config.train_size / seconds}
                line = run.log("epoch", seed=seed, epoch=epoch + 1, **results)
                stop.asked()
                checkpoint.save(checkpoints, line["step"], state)
                shown = ("loss", "test_loss", "accuracy", *schedule.at(0))
                write_events(line["step"], {key: line[key] for key in shown})
                print_progress(config, schedule, line, pace.advance(0))
                stop.here(line["step"])

        started = time.perf_counter()
        print("Evaluating ...", flush=True)
        probabilities = program.evaluate_last(state, number)
        test_loss, accuracy = evaluate(probabilities, test_labels)
        checkpoints.wait()
        run.log(
            "end",
            seed=seed,
            passes=1 + TTA_PASSES * config.tta,
            test_loss=test_loss,
            accuracy=accuracy,
            seconds=time.perf_counter() - started,
        )


def train_epoch(
    run: Run,
    program: Compiled,
    checkpoints,
    stop: Stop,
    seed: int,
    epoch: int,
    state,
    pace: Pace,
) -> tuple[Any, np.ndarray, float]:
    """Trains to the end of an epoch; returns state, losses of the steps and seconds."""
    steps = program.schedule.total_steps // run.config.epochs
    losses, seconds = np.zeros(steps, np.float32), 0.0
    step = int(state.step) % steps
    if step:  # an interruption has saved in the middle of the epoch
        earlier = run.lines("stopped", seed)[-1]
        losses[:step], seconds = earlier["losses"], earlier["seconds"]
    size, shown = 1, time.perf_counter()
    while step < steps:
        called, last = time.perf_counter(), min(step + size, steps)
        state, new = program.train_epoch(
            state, np.int32(seed), np.int32(epoch), step, last
        )
        losses[step:last] = np.asarray(new)[step:last]  # waits for the device
        now = time.perf_counter()
        seconds += now - called
        size = max(1, round((last - step) * SEGMENT_SECONDS / (now - called)))
        left, step = pace.advance(last - step), last
        if step == steps:
            break
        line = {"seed": seed, "epoch": epoch + 1, "step": epoch * steps + step}
        if stop.asked():
            # logged first: a checkpoint within an epoch needs these losses
            run.log("stopped", **line, losses=losses[:step].tolist(), seconds=seconds)
            checkpoint.save(checkpoints, line["step"], state)
        if now - shown > PROGRESS_SECONDS:
            shown, line["loss"] = now, float(losses[:step].mean())
            line |= program.schedule.at(line["step"] - 1)
            print_progress(run.config, program.schedule, line, left)
        stop.here(line["step"])
    return state, losses, seconds


def end_epoch(
    run: Run, program: Compiled, test_labels: np.ndarray, seed: int, state, losses
) -> dict[str, Any]:
    """Evaluates after an epoch; returns what is logged of it.

    Raises:
        FloatingPointError: the seed diverges.
    """
    schedule, step = program.schedule, int(state.step)
    test_loss, accuracy = evaluate(program.evaluate(state, np.int32(seed)), test_labels)
    divergent = classify.divergent_step(losses, test_loss)
    if divergent is not None:
        at = step - len(losses) + divergent
        run.diverged(
            seed,
            at,
            loss=float(losses[divergent]),
            learning_rate=float(schedule.at(at)["learning_rate"]),
            test_loss=test_loss,
        )
    return {
        "step": step,
        "loss": float(losses.mean()),
        "test_loss": test_loss,
        "accuracy": accuracy,
        **{key: float(value) for key, value in schedule.at(step - 1).items()},
    }


def evaluate(probabilities, labels: np.ndarray) -> tuple[float, float]:
    """Cross-entropy and accuracy in %, of class probabilities in batches."""
    p = np.asarray(probabilities, np.float64).reshape(len(labels), -1)
    return classify.cross_entropy_and_accuracy(np.log(np.maximum(p, 1e-30)), labels)


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(config: Config, schedule: Phases, line: dict, left: float) -> None:
    results = speed = ""
    if "accuracy" in line:
        results = f"test {line['test_loss']:.4f} {line['accuracy']:.2f} %"
        speed = f"{line['images_per_second']:,.0f} images/s"
    sizes = {"epochs": config.epochs, "steps": schedule.total_steps}
    text = progress_line(line, **sizes, seconds_left=left, results=results, speed=speed)
    print(text, flush=True)


def draw(run: Run, schedule: Phases) -> None:
    path = run.folder / "curves.png"
    curves.plot_classifier(run.lines(), schedule, run.config.epochs, path)


def report(run: Run, schedule: Phases) -> dict[str, Any]:
    """Writes results.json and curves.png from the log, and prints the final lines."""
    config, starts = run.config, run.lines("start")
    ends = [end for seed in run.seeds for end in run.lines("end", seed)]
    for end in ends:
        epochs = run.lines("epoch", end["seed"])
        end["train_seconds"] = sum(line["seconds"] for line in epochs)
        end["plain_accuracy"] = epochs[-1]["accuracy"]
    ignore = (*MAY_CHANGE_ON_RESUME, "train_size", "seed", "dtype")
    changed = changed_settings(config, RECIPES[config.recipe], ignore)
    if config.train_size != TRAIN_SIZE:
        changed["train_size"] = config.train_size
    results: dict[str, Any] = {
        "recipe": config.recipe,
        "changed": changed,  # what differs from the recipe
        "n": len(ends),
        "accuracy": summary([end["accuracy"] for end in ends]),
        "train_seconds": float(np.mean([end["train_seconds"] for end in ends])),
        "article": ARTICLE[config.recipe],
        "runs": ends,
        "dtype": config.dtype,
        **machine(starts),
    }
    write_json(run.folder / "results.json", results)
    draw(run, schedule)
    each = ", ".join(f"{accuracy:.2f}" for accuracy in results["accuracy"]["runs"])
    other = ", ".join(f"{key} {value}" for key, value in changed.items())
    print(
        f"{config.recipe}{f' with {other}' if other else ''}: "
        f"{spread(results['accuracy'])} % (n = {results['n']}: {each})"
        f"{' with test-time augmentation' if config.tta else ''}, "
        f"{results['train_seconds']:.1f} s of training each on {results['devices']}, "
        f"after {starts[-1]['compile_seconds']:.1f} s of compilation.\n"
        f"The article's: {results['article']}.\nWrote {run.folder}.",
        flush=True,
    )
    return results


def parse_args(args: list[str]) -> Config:
    """The options of the command line; the recipe sets the defaults of the others."""
    import tyro

    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--recipe", choices=RECIPES, default="adamw-30")
    default = RECIPES[recipe.parse_known_args(args)[0].recipe]
    return tyro.cli(Config, args=args, default=default)


def start(config: Config) -> None:
    devices.use_all_cores(config.batch_size)
    main(config)


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(start, parse_args)
