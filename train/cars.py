"""Stanford Cars by the article's recipe: a ResNet-50, fine-tuned in two stages.

    python -m train.cars --data-dir DIR --weights FILE           # 20 + 40 epochs
    python -m train.cars --data-dir DIR --weights FILE --recipe adamw
    python -m train.cars --data-dir DIR --architecture resnet18  # from scratch
    python -m train.cars --data-dir DIR --weights imagenet  # of the extra pretrained
    python -m train.cars predict IMAGE... --model runs/NAME/model-0.safetensors

DIR is Stanford Cars as published, or any folder with a sub-folder of images per class;
see docs/reproduce/cars.md. FILE is a .pth or .safetensors with torchvision's names, as
torchvision and timm publish them, or a model written by this script. With weights, the
head is trained alone first, while the body stays frozen with its batch norm in
evaluation mode. Then everything is, the first half of the body at a ninth and the
second half at a third of the rate; from scratch, from the start and at one rate.

Results go to runs/NAME: config.json, metrics.jsonl, curves.png, checkpoints/,
results.json, and for each seed its predictions, a confusion matrix, the worst mistakes
and the model, which torchvision can load. The same command resumes a run that was
stopped. The recipe, and how the article's differs: train/recipes/cars.py.
"""

import itertools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from train.data import augment, loader, pictures
from train.evals.classify import cross_entropy_and_accuracy, mean_of_views
from train.evals.pictures import Predict, log_probabilities, predict, write_predictions
from train.models import classifier, pretrained
from train.plots import confusion, curves
from train.recipes import cars as recipe
from train.recipes.cars import TTA_PASSES, Compiled, Config, Programs, State
from train.run import checkpoint, devices
from train.run.command import finish_steps, run_command
from train.run.folder import Run
from train.run.log import write_json
from train.run.progress import Pace
from train.run.report import changed_settings, machine, progress_line, spread, summary

PROGRESS_SECONDS = 10.0  # between lines of progress within an epoch


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


class Task(NamedTuple):
    """What all seeds of a run share."""

    data: pictures.Pictures
    tensors: dict[str, np.ndarray]  # pretrained weights, if any
    programs: Programs
    steps: int  # per epoch


def main(config: Config) -> dict[str, Any]:
    """Trains the unfinished seeds; returns the contents of results.json."""
    config = recipe.resolve(config, pretrained.packaged())
    data, tensors = pictures.read(config.data_dir, config.valid_folder), {}
    train_size, asked = len(data.train.labels), config.batch_size
    config = recipe.fit_batch_size(config, train_size)
    recipe.check(config, train_size)
    if config.batch_size != asked:
        why = f"{asked} does not suit {train_size:,} training images"
        print(f"batch_size: {config.batch_size}, since {why}.")
    programs = recipe.build(config, train_size, len(data.classes))
    if config.weights:
        tensors, _ = pretrained.read(config.weights)
        shapes = jax.eval_shape(programs.init, 0)
        pretrained.load(tensors, *shapes, source=str(config.weights), head=False)
        print(f"{config.weights}: loads the body, not its classifier.")
    task = Task(data, tensors, programs, recipe.steps_per_epoch(config, train_size))
    with Run(
        config,
        script="cars",
        name=f"cars-{config.recipe}",
        may_change=recipe.MAY_CHANGE_ON_RESUME,
        data=pictures.fingerprint(data, config.data_dir),
        weights_md5=config.weights and pretrained.md5(config.weights),
    ) as run:
        if run.seeds_left:
            train_seeds(run, task)
        else:
            print(f"{run.folder} is finished; --overwrite starts again.")
        return report(run, task)


def train_seeds(run: Run, task: Task) -> None:
    data, schedule = task.data, task.programs.schedule
    train_size, start = len(data.train.labels), time.perf_counter()
    compiled = recipe.compile_programs(task.programs, run.config, train_size)
    event = run.start(time.perf_counter() - start)
    params = jax.tree.leaves(compiled.stages[0].state.params)
    print(
        f"{run.folder}: {sum(p.size for p in params):,} parameters, {train_size:,} "
        f"images of {len(data.classes)} classes, {len(data.valid.labels):,} held out "
        f"({data.split}), {schedule.total_steps:,} steps, on {event['devices']}, "
        f"compiled in {event['compile_seconds']:.1f} s\n{schedule}",
        flush=True,
    )
    pace = Pace(len(run.seeds_left) * schedule.total_steps)
    for seed in run.seeds_left:
        try:
            state = train_seed(run, task, compiled, seed, pace)
        except FloatingPointError:
            draw(run, task)
            raise
        finish_seed(run, task, compiled, seed, state)
        draw(run, task)


def train_seed(
    run: Run, task: Task, compiled: Compiled, seed: int, pace: Pace
) -> State:
    """Trains a seed from its last checkpoint, or from the start, to its end."""
    config, data, schedule = run.config, task.data, task.programs.schedule
    state = restore(run, task, compiled, seed)
    step = int(state.step)
    run.rewind(seed, step, step // task.steps)
    pace.skip(step)
    batches = loader.train_batches(
        data.train,
        config.size,
        config.batch_size,
        seed=seed,
        epochs=schedule.total_steps // task.steps,
        first_step=step,
        workers=config.workers,
    )
    with run.events(seed, step) as write_events, finish_steps() as stop:
        for stage in compiled.stages:
            if step >= stage.last:
                continue
            if step == stage.first > 0:  # a fresh optimizer
                state = stage.begin(state.step, state.params, state.stats)
            with run.checkpoints(seed, stage.name) as checkpoints:
                while step < stage.last:
                    state, line = train_epoch(
                        run, task, stage, seed, state, batches, checkpoints, pace, stop
                    )
                    step = line["step"]
                    log_probs = evaluate(run, task, compiled, state)
                    line["valid_loss"], line["accuracy"] = cross_entropy_and_accuracy(
                        log_probs, data.valid.labels
                    )
                    losses = {key: line[key] for key in ("loss", "valid_loss")}
                    if not np.isfinite(list(losses.values())).all():
                        run.diverged(seed, step, **losses)
                    run.log("epoch", **line)
                    stop.asked()
                    checkpoint.save(checkpoints, step, state)
                    shown = ("loss", "valid_loss", "accuracy", *schedule.at(0))
                    write_events(step, {key: line[key] for key in shown})
                    print_progress(task, line, pace.advance(0))
                    stop.here(step)
                checkpoints.wait()
    return state


def restore(run: Run, task: Task, compiled: Compiled, seed: int) -> State:
    """The last checkpoint of a seed, or else its initial state."""
    for stage in reversed(compiled.stages):
        folder = run.checkpoint_folder(seed, stage.name)
        if folder.exists() and checkpoint.latest(folder):
            with run.checkpoints(seed, stage.name) as checkpoints:
                return checkpoint.restore(checkpoints, stage.state)
    params, stats = compiled.init(np.int32(seed))
    if task.tensors:
        params, stats = pretrained.load(
            task.tensors, params, stats, source=str(run.config.weights), head=False
        )
        params, stats = jax.device_put((params, stats), recipe.replicated())
    return compiled.stages[0].begin(np.int32(0), params, stats)


def train_epoch(
    run: Run, task: Task, stage, seed, state: State, batches, checkpoints, pace, stop
) -> tuple[State, dict[str, Any]]:
    """Trains to the end of an epoch; returns the state and the epoch's log line."""
    config, steps, train_size = run.config, task.steps, len(task.data.train.labels)
    first_step, waited, images = int(state.step), 0.0, 0
    start = shown = saved = time.perf_counter()
    pending = []  # losses of the last steps
    for step in itertools.count(first_step + 1):
        # the device computes while the threads read the next batches
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        sharding = recipe.batch_sharding(len(batch["label"]))
        pixels, labels = jax.device_put((batch["image"], batch["label"]), sharding)
        if len(pending) == 2:  # limits the images in the device's memory
            pending.pop(0).block_until_ready()
        train_step = stage.train_step[len(labels)]
        state, loss = train_step(state, pixels, labels, np.int32(seed))
        pending.append(loss)
        images += len(labels)
        seconds_left = pace.advance()
        if step % steps == 0:
            break
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown, so_far = now, step % steps * config.batch_size
            line = {"seed": seed, "epoch": step // steps + 1, "step": step}
            line |= {"loss": float(state.loss) / so_far}
            line |= stage.hyperparameters(step - 1)
            print_progress(task, line, seconds_left)
        if stop.asked() or now - saved > config.save_every:
            saved = now
            checkpoint.save(checkpoints, step, state)
        stop.here(step)
    line = {"seed": seed, "stage": stage.name, "epoch": step // steps, "step": step}
    line |= {"loss": float(state.loss) / train_size}  # waits for the device
    line |= stage.hyperparameters(step - 1)
    seconds = time.perf_counter() - start
    line |= {
        "seconds": seconds * train_size / images,  # of the epoch, after a restart too
        "images_per_second": images / seconds,
        "share_waiting_for_images": waited / seconds,
    }
    return state, line


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


def evaluate(
    run: Run, task: Task, compiled: Compiled, state: State, augment_seed=None
) -> np.ndarray:
    """The log-probabilities of the validation images, plain or augmented."""
    config = run.config

    def predict(pixels):
        pixels = jax.device_put(pixels, recipe.batch_sharding(len(pixels)))
        return compiled.predict(state.params, state.stats, pixels)

    return log_probabilities(
        predict,
        task.data.valid,
        config.size,
        config.batch_size,
        augment_seed=augment_seed,
        workers=config.workers,
    )


def finish_seed(
    run: Run, task: Task, compiled: Compiled, seed: int, state: State
) -> None:
    """Evaluates with augmented views; writes predictions, pictures and the model."""
    config, valid, classes = run.config, task.data.valid, task.data.classes
    start, folder, labels = time.perf_counter(), run.folder, valid.labels
    augment_seeds = [None, *range(TTA_PASSES * seed, TTA_PASSES * (seed + 1))]
    views = [evaluate(run, task, compiled, state, s) for s in augment_seeds]
    averaged = mean_of_views(views)
    loss, accuracy = cross_entropy_and_accuracy(averaged, labels)
    plain_loss, plain_accuracy = cross_entropy_and_accuracy(views[0], labels)
    p, predictions = np.exp(averaged), averaged.argmax(-1)
    path = folder / f"predictions-{seed}.csv"
    write_predictions(path, p, valid, classes, config.data_dir)
    path = folder / f"confusion-{seed}.png"
    confusion.plot_confusion(labels, predictions, classes, path)

    def load_image(i):
        image = pictures.open_image(valid.paths[i], config.size)
        return augment.plain_view(image, config.size)

    path = folder / f"mistakes-{seed}.png"
    confusion.plot_mistakes(p, labels, classes, load_image, path)
    classifier.save_model(
        folder / f"model-{seed}.safetensors",
        state.params,
        state.stats,
        architecture=config.architecture,
        width=config.width,
        size=config.size,
        classes=classes,
        steps=int(state.step),
    )
    run.log(
        "end",
        seed=seed,
        step=int(state.step),
        loss=loss,
        accuracy=accuracy,
        passes=len(views),
        plain_loss=plain_loss,
        plain_accuracy=plain_accuracy,
        most_confused=confusion.most_confused(labels, predictions, classes),
        seconds=time.perf_counter() - start,
    )


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(task: Task, line: dict[str, Any], seconds_left: float) -> None:
    results = speed = ""
    if "valid_loss" in line:
        results = f"valid {line['valid_loss']:.4f} {line['accuracy']:.2f} %"
        waiting = f"{line['share_waiting_for_images']:.0%} waiting for them"
        speed = f"{line['images_per_second']:,.0f} images/s ({waiting})"
    total = task.programs.schedule.total_steps
    sizes = {"epochs": total // task.steps, "steps": total}
    shown = {"seconds_left": seconds_left, "results": results, "speed": speed}
    print(progress_line(line, **sizes, **shown), flush=True)


def draw(run: Run, task: Task) -> None:
    schedule, path = task.programs.schedule, run.folder / "curves.png"
    epochs = schedule.total_steps // task.steps
    curves.plot_classifier(run.lines(), schedule, epochs, path, held_out="valid")


def report(run: Run, task: Task) -> dict[str, Any]:
    """Writes results.json and curves.png from the log, and prints the final lines."""
    config, data = run.config, task.data
    ends = [end for seed in run.seeds for end in run.lines("end", seed)]
    for end in ends:
        epochs = run.lines("epoch", end["seed"])
        end["train_seconds"] = sum(line["seconds"] for line in epochs)
        for key in ("images_per_second", "share_waiting_for_images"):
            end[key] = epochs[-1][key]
    defaults = Config(config.data_dir, recipe=config.recipe, weights=config.weights)
    ignore = (*recipe.MAY_CHANGE_ON_RESUME, "seed", "dtype")
    changed = changed_settings(config, recipe.resolve(defaults), ignore)
    results: dict[str, Any] = {
        "recipe": config.recipe,
        "weights": config.weights and "/".join(config.weights.parts[-2:]),
        "changed": changed,  # settings that differ from the recipe
        "images": (len(data.train.labels), len(data.valid.labels)),
        "classes": len(data.classes),
        "split": data.split,
        "n": len(ends),
        "accuracy": summary([end["plain_accuracy"] for end in ends]),
        "tta_accuracy": summary([end["accuracy"] for end in ends]),
        "train_seconds": float(np.mean([end["train_seconds"] for end in ends])),
        "dtype": config.dtype,
        **machine(run.lines("start")),
        "runs": ends,
    }
    if results["images"] == recipe.ARTICLE_IMAGES and config.weights and not changed:
        results["article"] = recipe.ARTICLE
    write_json(run.folder / "results.json", results)
    draw(run, task)
    print_results(run, results)
    return results


def print_results(run: Run, results: dict[str, Any]) -> None:
    weights = run.config.weights
    source = f"from {weights.name}" if weights else "from scratch"
    changed = "".join(f", {key} {value}" for key, value in results["changed"].items())
    print(
        f"{results['recipe']} {source}{changed}: {spread(results['accuracy'])} % of "
        f"the images held out, {spread(results['tta_accuracy'])} % with test-time "
        f"augmentation (n = {results['n']}), {results['train_seconds']:.1f} s of "
        f"training each on {results['devices']}, after "
        f"{results['compile_seconds'][-1]:.1f} s of compilation."
    )
    for pair in results["runs"][0]["most_confused"][:3]:
        print(
            f"  {pair['is']} taken for {pair['taken for']}: {pair['times']} of "
            f"{pair['of']}"
        )
    if "article" in results:
        print(f"The article's: {results['article']}.")
    print(f"Wrote {run.folder}.", flush=True)


def parse_args(args: list[str]) -> Config | Predict:
    import tyro

    if args[:1] == ["predict"]:  # the images come first, without a name
        return tyro.cli(
            Predict,
            args=args[1:],
            prog="python -m train.cars predict",
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    return tyro.cli(Config, args=args)


def start(config: Config | Predict) -> Any:
    if isinstance(config, Predict):
        return predict(config)
    devices.use_all_cores(config.batch_size)
    return main(config)


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(start, parse_args)
