"""AWD-LSTM and AWD-QRNN on WikiText-2, by the article's recipe: 90 epochs, not 750.

    python -m train.language_model                           # a small LSTM, 2 minutes
    python -m train.language_model qrnn --recipe adamw
    python -m train.language_model lstm --data-dir DIR       # all of WikiText-2

Without --data-dir, the text is the documentation that comes with Python and the network
is small. DIR contains wiki.{train,valid,test}.tokens, the publisher's zip, or your own
{train,valid,test}.txt. An n-gram model of the same text is the baseline.

A run writes to runs/NAME: config.json, vocabulary.json, metrics.jsonl, curves.png,
checkpoints/ and results.json. If it is killed, the same command without --overwrite
resumes from the last checkpoint and ends with the same bits.

    python -m train.generate runs/NAME       # generates text
    python -m train.tune_cache runs/NAME     # tunes the neural cache

Chunks of text have the article's random lengths. Each is padded to the next of a few
compiled lengths, and the padding counts nowhere. One call of one program trains on many
chunks. Perplexity is that of the whole text as a single stream, every token but the
first; the article left out the end that does not fill 2,000 tokens. Unlike Salesforce,
we evaluate the last network, not the best one.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax

from adamw_jax import Phases
from train.data import chunks, text
from train.evals import kneser_ney, perplexity
from train.plots import curves
from train.recipes import language_model as recipe
from train.recipes.check import check_options, run_rules
from train.run import checkpoint, devices, log
from train.run.command import finish_steps, run_command
from train.run.folder import Run
from train.run.output import Output
from train.run.report import changed_settings, machine, progress_line, spread, summary
from train.run.trained_language_model import text_hash, vocabulary_hash

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Output, recipe.Config):
    """Trains a language model. MODEL, --recipe and --data-dir change other defaults."""

    data_dir: Path | None = None  # WikiText-2 or your text; None: Python's docs
    seed: int = 0  # of the first run: weights, dropout, lengths of chunks
    seeds: int = 1  # runs
    save_every: float = 60.0  # seconds between checkpoints
    tensorboard: bool = False  # also write events for TensorBoard


MAY_CHANGE_ON_RESUME = ("data_dir", "seeds", "save_every", "tensorboard")


def parse_args(args: list[str]) -> Config:
    """From the command line, where the model may come first, without --model."""
    import tyro

    if args and args[0] in ("lstm", "qrnn"):
        args = ["--model", *args]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", choices=("lstm", "qrnn"), default="lstm")
    first.add_argument("--recipe", choices=recipe.RECIPES, default="adam-l2")
    first.add_argument("--data-dir", "--data_dir")
    known = first.parse_known_args(args)[0]
    small = known.data_dir in (None, "None")
    default = defaults(known.model, known.recipe, small)
    return tyro.cli(Config, args=args, default=default)


def defaults(model: Any = "lstm", recipe_name: Any = "adam-l2", small: bool = True):
    """The settings of a recipe; small: for Python's documentation, on a CPU."""
    return Config(**vars(recipe.defaults(model, recipe_name, small)))


# ---------------------------------------------------------------------------
# loop
# ---------------------------------------------------------------------------

SEGMENT_SECONDS = 5.0  # of training between two lines of progress, about


def main(config: Config) -> dict[str, Any]:
    """Trains the seeds that are not finished; returns what is in results.json."""
    recipe.check(config)
    check_options(
        config,
        run_rules(config) | {"save_every": (config.save_every >= 0, "at least 0")},
    )
    corpus = text.load(config.data_dir)
    columns = chunks.columns(corpus.train, config.batch_size)
    programs = recipe.build(config, len(corpus.vocabulary), len(columns))
    with Run(
        config,
        script="language_model",
        name=run_name(config),
        may_change=MAY_CHANGE_ON_RESUME,
        vocabulary=vocabulary_hash(corpus.vocabulary),
        text=text_hash(corpus),
        tokens=[len(split) for split in corpus[:3]],
    ) as run:
        if not (run.folder / "vocabulary.json").exists():
            content = {"words": corpus.vocabulary}
            log.write_json(run.folder / "vocabulary.json", content)
        if run.seeds_left:
            setup = compile_setup(config, programs, corpus, columns, run)
            try:
                train(setup, len(columns))
            except FloatingPointError:
                draw(config, programs.schedule, run)
                raise
        else:
            print(f"{run.folder} is already finished; --overwrite starts again.")
        draw(config, programs.schedule, run)
        return report(config, corpus, run)


def run_name(config: Config) -> str:
    data = f"-{config.data_dir.stem}" if config.data_dir else ""
    return config.name or f"{config.model}-{config.recipe}{data}"


class Setup(NamedTuple):
    """What all seeds share."""

    config: Config
    programs: recipe.Programs
    compiled: recipe.Compiled
    corpus: text.Corpus
    columns: jax.Array  # padded, on the devices
    run: Run


@dataclasses.dataclass
class Meter:
    """Speed. What a process trained before it was killed does not count."""

    seeds: int  # to train, the current one included
    started: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0  # of all seeds
    tokens: int = 0  # of the epoch
    seconds: float = 0.0  # of the epoch, in training

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def seconds_left(self, step: int, last: int) -> float:
        elapsed = time.perf_counter() - self.started
        return (self.seeds * last - step) * elapsed / self.steps


def compile_setup(config, programs, corpus, columns: np.ndarray, run: Run) -> Setup:
    """Sends the text to the devices and compiles."""
    started, schedule = time.perf_counter(), programs.schedule
    plan = chunks.plan(len(columns), config.bptt, 0, 1, config.chunks)
    columns = chunks.pad_columns(columns, config.bptt)
    on_devices = jax.device_put(columns, recipe.shardings()[1](1))
    compiled = recipe.compile_programs(programs, on_devices, plan.tables[0])
    start = run.start(compile_seconds=time.perf_counter() - started)
    parameters = sum(p.size for p in jax.tree.leaves(compiled.state.params))
    print(
        f"{run.folder}: {parameters:,} parameters, {len(corpus.train):,} tokens, "
        f"{len(corpus.vocabulary):,} words, about {schedule.total_steps:,} steps, on "
        f"{start['devices']}, compiled in {start['compile_seconds']:.1f} s\n{schedule}",
        flush=True,
    )
    return Setup(config, programs, compiled, corpus, on_devices, run)


def train(setup: Setup, rows: int) -> None:
    """Trains and evaluates the remaining seeds."""
    config, run = setup.config, setup.run
    seeds = run.seeds_left
    meter = Meter(len(seeds))
    for seed in seeds:
        plan = chunks.plan(rows, config.bptt, seed, config.epochs, config.chunks)
        with run.checkpoints(seed) as checkpoints:
            state = train_seed(setup, plan, seed, checkpoints, meter)
            results = {
                "valid": evaluate(setup, state, setup.corpus.valid),
                "test": evaluate(setup, state, setup.corpus.test),
            }
            checkpoints.wait()
            run.log("end", seed=seed, step=int(state.step), **results)
        meter.seeds -= 1


def train_seed(setup: Setup, plan: chunks.Plan, seed, checkpoints, meter: Meter):
    """Trains a seed, from its last checkpoint on; returns its last state."""
    config, compiled, run = setup.config, setup.compiled, setup.run
    schedule, last = setup.programs.schedule, int(plan.ends[-1])
    state = checkpoint.restore(checkpoints, compiled.state)
    if state is None:
        state = compiled.init(np.int32(seed))
    step = int(state.step)
    run.rewind(seed, step, epochs=plan.epoch(step))
    due, size = time.perf_counter() + config.save_every, 1
    meter.tokens, meter.seconds = 0, 0.0
    with run.events(seed, step) as write_events, finish_steps() as interrupt:
        while step < last:
            # a segment of an epoch: one call
            epoch, (first, steps) = plan.epoch(step), plan.position(step)
            table, stop = plan.tables[epoch], min(first + size, steps)
            called = time.perf_counter()
            state, losses = compiled.train(
                state, setup.columns, table, *map(np.int32, (first, stop, seed))
            )
            losses = np.asarray(losses)[first:stop]  # waits for the devices
            seconds = time.perf_counter() - called
            check_losses(setup, losses, seed, step)
            size = max(1, round((stop - first) * SEGMENT_SECONDS / seconds))
            step += stop - first
            meter.steps += stop - first
            meter.seconds += seconds
            meter.tokens += config.batch_size * int(table[first:stop, 1].sum())
            line = {"seed": seed, "epoch": epoch + 1, "step": step}
            line |= {"loss": float(losses.mean())} | schedule.at(step - 1)

            if stop == steps:
                tokens = config.batch_size * int(table[:, 1].sum())
                line, state = end_epoch(setup, state, line, tokens, meter)
                scalars = ("loss", "total", "valid_loss", *schedule.at(0))
                write_events(step, {key: line[key] for key in scalars})
            if interrupt.asked() or step == last or time.perf_counter() > due:
                check_parameters(setup, state, seed, step - 1)
                checkpoint.save(checkpoints, step, state)
                due = time.perf_counter() + config.save_every
            print_progress(config, line, last, meter)
            interrupt.here(step)
            if stop == steps:
                meter.tokens, meter.seconds = 0, 0.0
    return state


def end_epoch(setup: Setup, state: recipe.State, line, tokens: int, meter: Meter):
    """Validates, logs, and starts the average if it is time; returns line and state."""
    seed, run, programs = line["seed"], setup.run, setup.programs
    valid_loss = -float(
        perplexity.log_probs(
            programs.quick_read,
            recipe.evaluation_params(state),
            programs.net.initial_state(1),
            setup.corpus.valid,
        ).mean()
    )
    check_losses(setup, np.array([valid_loss]), seed, line["step"] - 1)
    trained, loss, total = np.asarray(state.sums, np.float64)
    speed = meter.tokens_per_second
    line |= {"loss": loss / trained, "total": total / trained}
    line |= {"valid_loss": valid_loss}
    line |= {"seconds": tokens / speed, "tokens_per_second": speed}
    run.log("epoch", **line)
    losses = [epoch["valid_loss"] for epoch in run.lines("epoch", seed)]
    return line, recipe.start_averaging(setup.config, state, losses)


def evaluate(setup: Setup, state: recipe.State, tokens: np.ndarray) -> dict[str, Any]:
    """Perplexity without the neural cache and with it."""
    config, programs = setup.config, setup.programs
    return perplexity.evaluate(
        perplexity.segments(
            programs.read,
            recipe.evaluation_params(state),
            programs.net.initial_state(1),
            tokens,
        ),
        len(tokens) - 1,
        theta=config.theta,
        lambda_=config.lambda_,
        window=config.window,
        convention=config.pointer,
    )


# ---------------------------------------------------------------------------
# divergence
# ---------------------------------------------------------------------------


def check_losses(setup: Setup, losses: np.ndarray, seed: int, step: int) -> None:
    """Ends a run whose loss, from `step` on, is twice that of guessing, or NaN."""
    diverged = ~(losses < 2 * np.log(len(setup.corpus.vocabulary)))
    if diverged.any():
        first = int(diverged.argmax())
        stop_diverged(setup, seed, step + first, loss=float(losses[first]))


def check_parameters(setup: Setup, state: recipe.State, seed: int, step: int) -> None:
    norm = float(optax.tree.norm(state.params))
    if not np.isfinite(norm):
        stop_diverged(setup, seed, step, parameter_norm=norm)


def stop_diverged(setup: Setup, seed: int, step: int, **values: float) -> NoReturn:
    rate = setup.programs.schedule.at(step)["learning_rate"]
    setup.run.diverged(seed, step, **values, learning_rate=rate)


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(config: Config, line: dict[str, Any], last: int, meter: Meter):
    valid = ""
    if "valid_loss" in line:
        valid = f"valid {line['valid_loss']:.4f} (perplexity "
        valid += f"{np.exp(line['valid_loss']):.2f})"
    print(
        progress_line(
            line,
            epochs=config.epochs,
            steps=last,
            results=valid,
            speed=f"{meter.tokens_per_second:,.0f} tokens/s",
            seconds_left=meter.seconds_left(line["step"], last),
        ),
        flush=True,
    )


def draw(config: Config, schedule: Phases, run: Run) -> None:
    path = run.folder / "curves.png"
    curves.plot_language_model(run.lines(), schedule, config.epochs, path)


def collect_results(config: Config, corpus: text.Corpus, run: Run) -> dict[str, Any]:
    """The content of results.json, from the log."""
    ends = [end for seed in run.seeds for end in run.lines("end", seed)]
    for end in ends:
        epochs = run.lines("epoch", end["seed"])
        end["train_seconds"] = sum(line["seconds"] for line in epochs)
        speeds = [line["tokens_per_second"] for line in epochs]
        end["tokens_per_second"] = float(np.mean(speeds))
    default = recipe.defaults(config.model, config.recipe, config.data_dir is None)
    results: dict[str, Any] = {
        "model": config.model,
        "recipe": config.recipe,
        "changed": changed_settings(config, default, (*MAY_CHANGE_ON_RESUME, "seed")),
        "tokens": [len(split) for split in corpus[:3]],
        "words": len(corpus.vocabulary),
        "n": len(ends),
        "train_seconds": float(np.mean([end["train_seconds"] for end in ends])),
        **machine(run.lines("start")),
        "runs": ends,
    }
    end_of_line = corpus.vocabulary.index(text.EOS)
    for split in ("valid", "test"):
        ngrams = kneser_ney.perplexity(
            corpus.train, getattr(corpus, split), len(corpus.vocabulary), end_of_line
        )
        results[split] = {"n-gram": ngrams}
        for key in ("perplexity", "with_cache"):
            results[split][key] = summary([end[split][key] for end in ends])
    if results["tokens"] == recipe.WIKITEXT2_TOKENS:
        results["article"] = recipe.PUBLISHED.get((config.model, config.recipe))
    return results


def report(config: Config, corpus: text.Corpus, run: Run) -> dict[str, Any]:
    """Writes results.json and prints its main numbers."""
    results = collect_results(config, corpus, run)
    log.write_json(run.folder / "results.json", results)

    def both(key: str) -> str:
        return " / ".join(spread(results[split][key]) for split in ("valid", "test"))

    changed = "".join(f", {key} {value}" for key, value in results["changed"].items())
    ngrams = f"{results['valid']['n-gram']:.2f} / {results['test']['n-gram']:.2f}"
    print(
        f"{config.model}, {config.recipe}{changed}: perplexity (validation / test, "
        f"n = {results['n']}) {both('perplexity')}, with the neural cache "
        f"{both('with_cache')}.\nInterpolated Kneser-Ney 5-grams on the same text: "
        f"{ngrams}.\n{results['train_seconds']:.1f} s of training per run on "
        f"{results['devices']}, after {results['compile_seconds'][-1]:.1f} s of "
        "compilation."
    )
    if results.get("article"):
        numbers = [f"{x[0]} / {x[1]}" for x in results["article"] if x]
        print(f"Published, without and with the cache: {', '.join(numbers)}.")
    print(f"Wrote {run.folder}.", flush=True)
    return results


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
