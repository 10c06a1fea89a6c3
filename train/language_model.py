"""AWD-LSTM and AWD-QRNN on WikiText-2, by the article's recipe: 90 epochs, not 750.

    python -m train.language_model                           # a small LSTM, 2 minutes
    python -m train.language_model qrnn --recipe adamw
    python -m train.language_model --data-dir notes.txt      # your own text
    python -m train.language_model lstm --data-dir DIR       # all of WikiText-2

Without --data-dir, the text is the documentation that comes with Python. One file, or
a folder of .txt and .md files, is split in order: 80 % to train, 10 % to validate, 10 %
to test. DIR has the three: wiki.{train,valid,test}.tokens, the publisher's zip, or your
own {train,valid,test}.txt. Tokens are words, or characters where a text has no spaces.
Their number chooses network, dropout and training: the article's from a million on,
small ones below; --small and --large choose by name. The baseline is an n-gram model.

A run writes to runs/NAME: config.json, vocabulary.json, metrics.jsonl, curves.png,
checkpoints/, best-SEED.npz and results.json. If it is killed, the same command without
--overwrite resumes from the last checkpoint and ends with the same bits.

    python -m train.generate runs/NAME       # generates text
    python -m train.tune_cache runs/NAME     # tunes the neural cache

Chunks of text have the article's random lengths. Each is padded to the next of a few
compiled lengths, and the padding counts nowhere. One call of one program trains on many
chunks. Perplexity is that of the whole text as a single stream, every token but the
first; the article left out the end that does not fill 2,000 tokens. Unlike Salesforce,
we report the last network, and beside it the best one, which best-SEED.npz keeps.
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
from train.evals import perplexity
from train.plots import curves
from train.recipes import language_model as recipe
from train.recipes.check import check_options, run_rules
from train.recipes.text_size import Size, choose_size
from train.run import checkpoint, devices, log, report_language_model
from train.run import trained_language_model as trained
from train.run.command import finish_steps, run_command
from train.run.folder import Run
from train.run.output import Output
from train.run.report import progress_line

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Output, recipe.Config):
    """Trains a language model. MODEL, --recipe and the text change other defaults."""

    # WikiText-2; or your text, a file or a folder; None: Python's docs
    data_dir: Path | None = None
    # of network and training; --small, --large; by default, the text's length decides
    size: Size = "small"
    # a token: a word or mark, what is spaced, a character; None: the text decides
    unit: text.Unit | None = None
    min_count: int | None = None  # of a word; rarer ones are <unk>; None: 1 or 2
    seed: int = 0  # of the first run: weights, dropout, lengths of chunks
    seeds: int = 1  # runs
    save_every: float = 60.0  # seconds between checkpoints
    tensorboard: bool = False  # also write events for TensorBoard


# The text itself may not change: its hash is compared.
MAY_CHANGE_ON_RESUME = (
    *("data_dir", "size", "unit", "min_count"),
    *("seeds", "save_every", "tensorboard"),
)


def parse_args(args: list[str]) -> Config:
    """From the command line, where the model may come first, without --model.

    Reads the text, except with --large or --help: its length changes other defaults.
    """
    import tyro

    if args and args[0] in ("lstm", "qrnn"):
        args = ["--model", *args]
    args = [f"--size={a[2:]}" if a in ("--small", "--large") else a for a in args]

    def number(value: str) -> int | None:
        return None if value == "None" else int(value)

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", choices=("lstm", "qrnn"), default="lstm")
    first.add_argument("--recipe", choices=recipe.RECIPES, default="adam-l2")
    first.add_argument("--size", choices=("small", "large"))
    first.add_argument("--data-dir", "--data_dir", default="None")
    first.add_argument("--unit", choices=("words", "spaced", "characters", "None"))
    first.add_argument("--min-count", "--min_count", type=number)
    known = first.parse_known_args(args)[0]
    tokens, size = None, known.size or "small"
    no_need = known.size == "large" or known.data_dir == "None"
    if not no_need and not {"-h", "--help"} & {*args}:
        unit = None if known.unit == "None" else known.unit
        tokens = len(text.load(Path(known.data_dir), unit, known.min_count).train)
        size = known.size or choose_size(tokens)
    default = defaults(known.model, known.recipe, size == "small", tokens)
    return tyro.cli(Config, args=args, default=default)


def defaults(
    model: Any = "lstm",
    recipe_name: Any = "adam-l2",
    small: bool = True,
    tokens: int | None = None,
) -> Config:
    """The settings of a recipe; see `recipes.language_model.defaults`."""
    settings = vars(recipe.defaults(model, recipe_name, small, tokens))
    return Config(**settings, size="small" if small else "large")


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
    corpus = text.load(config.data_dir, config.unit, config.min_count)
    columns = chunks.columns(corpus.train, config.batch_size)
    programs = recipe.build(config, len(corpus.vocabulary), len(columns))
    report_language_model.print_text(config, corpus)
    with Run(
        config,
        script="language_model",
        name=run_name(config),
        may_change=MAY_CHANGE_ON_RESUME,
        vocabulary=trained.vocabulary_hash(corpus.vocabulary),
        text=trained.text_hash(corpus),
        tokens=[len(split) for split in corpus[:3]],
    ) as run:
        if not (run.folder / "vocabulary.json").exists():
            content = {"words": corpus.vocabulary, "unit": corpus.unit}
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
        return report_language_model.report(
            config, corpus, run, (*MAY_CHANGE_ON_RESUME, "seed")
        )


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
        f"{len(corpus.vocabulary):,} different, about {schedule.total_steps:,} steps, "
        f"on {start['devices']}, compiled in {start['compile_seconds']:.1f} s\n"
        f"{schedule}",
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
            results = evaluate(setup, recipe.evaluation_params(state))
            best = evaluate_best(setup, state, seed)
            checkpoints.wait()
            run.log("end", seed=seed, step=int(state.step), **results, best=best)
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
    tokens_seen, loss, total = np.asarray(state.sums, np.float64)
    speed = meter.tokens_per_second
    line |= {"loss": loss / tokens_seen, "total": total / tokens_seen}
    line |= {"valid_loss": valid_loss}
    line |= {"seconds": tokens / speed, "tokens_per_second": speed}
    losses = [epoch["valid_loss"] for epoch in run.lines("epoch", seed)]
    if valid_loss < min(losses, default=np.inf):
        at = line["epoch"], line["step"], valid_loss
        best = trained.Best(recipe.evaluation_params(state), *at)
        trained.save_best(run.folder, seed, best)
    run.log("epoch", **line)
    losses.append(valid_loss)
    return line, recipe.start_averaging(setup.config, state, losses)


def evaluate(setup: Setup, params: Any) -> dict[str, Any]:
    """Perplexity of both texts without the neural cache and with it."""
    config, programs, results = setup.config, setup.programs, {}
    for split in ("valid", "test"):
        tokens, start = getattr(setup.corpus, split), programs.net.initial_state(1)
        results[split] = perplexity.evaluate(
            perplexity.segments(programs.read, params, start, tokens),
            len(tokens) - 1,
            theta=config.theta,
            lambda_=config.lambda_,
            window=config.window,
            convention=config.pointer,
        )
    return results


def evaluate_best(setup: Setup, state: recipe.State, seed: int) -> dict[str, Any]:
    """The epoch with the lowest validation loss; its perplexity if it is not the last.

    A run that was begun before best networks were kept has the epoch alone.
    """
    epochs = setup.run.lines("epoch", seed)
    epoch = min(epochs, key=lambda line: line["valid_loss"])
    found = {key: epoch[key] for key in ("epoch", "step", "valid_loss")}
    best = trained.read_best(setup.run.folder, seed, state.params)
    if best is None or best.epoch != epoch["epoch"] or epoch is epochs[-1]:
        return found
    return found | evaluate(setup, best.params)


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


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
