"""The neural cache's window, theta and lambda, tuned for a trained network.

    python -m train.tune_cache runs/lstm-adam-l2
    python -m train.tune_cache runs/NAME --windows 1000 2000 --thetas 0.5 0.6 0.7

The best of a grid on the validation text, then judged on the test text. Theta depends
on the length of the network's states, so that the best one of another is no guess.

Writes cache-SEED.json and cache-SEED.png into the run's folder. The same command again
replaces them; those of another grid or another checkpoint only with --overwrite.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from train import language_model
from train.evals import neural_cache, perplexity
from train.plots import grids
from train.run import devices, record

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the neural cache of a trained network."""

    folder: Path  # of a run of train.language_model: runs/NAME
    data_dir: Path | None = None  # of its text; None: where it was
    seed: int | None = None  # of the run; None: the first with a checkpoint
    # how many tokens are kept, to be tried
    windows: tuple[int, ...] = (100, 200, 500, 1000, 2000, neural_cache.WINDOW, 6000)
    # how much the nearest states count more, to be tried
    thetas: tuple[float, ...] = (
        *(0.1, 0.2, 0.3, 0.4, 0.5, neural_cache.THETA, 0.8, 1.0),
        *(1.25, 1.5, 2.0, 2.5, 3.0),
    )
    # the cache's share of the mixture, to be tried
    lambdas: tuple[float, ...] = (
        *(0.03, 0.06, 0.1, neural_cache.LAMBDA, 0.15, 0.2, 0.25, 0.3),
        *(0.35, 0.4, 0.5),
    )

    overwrite: bool = False  # also what was tuned with other settings


def check(c: Config) -> None:
    rules = {
        "windows": (lambda x: x >= 1, "at least 1"),
        "thetas": (lambda x: 0 <= x < np.inf, "at least 0 and finite"),
        "lambdas": (lambda x: 0 <= x < 1, "in [0, 1)"),
    }
    for option, (good, allowed) in rules.items():
        values = getattr(c, option)
        if not values or not all(map(good, values)) or sorted({*values}) != [*values]:
            raise ValueError(
                f"{option} must be one or more numbers, {allowed}, each above the one "
                f"before it; got {values!r}"
            )


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


def read(config: Config, trained: language_model.Trained):
    """The text that the run had."""
    data_dir = config.data_dir or trained.config.data_dir
    if trained.config.data_dir is None and config.data_dir is not None:
        raise ValueError(
            f"data_dir must be None for {config.folder}, which has learned the "
            f"documentation of Python, got {str(data_dir)!r}"
        )
    if data_dir and not data_dir.exists():
        raise ValueError(
            f"data_dir: the text of the run is not in {data_dir} (any more): say "
            "where it is with --data-dir"
        )
    settings = dataclasses.replace(trained.config, data_dir=data_dir)
    corpus = language_model.read(settings)
    if corpus.vocabulary != trained.vocabulary:
        where = data_dir or "this Python's documentation"
        raise ValueError(
            f"data_dir: the vocabulary of {where} ({len(corpus.vocabulary):,} words) "
            f"is not that of {config.folder} ({len(trained.vocabulary):,} words), "
            "which has learned another text"
        )
    if language_model.text_hash(corpus) != trained.text:
        raise ValueError(
            f"data_dir: {data_dir} has the words of {config.folder} in other texts: "
            "were they changed?"
        )
    return corpus


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """A text as the network sees it, in the memory of the host."""

    log_probs: np.ndarray  # (tokens - 1,)
    states: np.ndarray  # (tokens - 1, width)
    targets: np.ndarray  # (tokens - 1,)


def evaluate(trained: language_model.Trained, tokens: np.ndarray) -> Evaluated:
    net, n = nnx.merge(trained.graphdef, trained.params), len(tokens) - 1
    segments = perplexity.segments(
        perplexity.reader(trained.graphdef),
        trained.params,
        net.initial_state(1),
        tokens,
    )
    parts = zip(*(map(np.asarray, segment[:3]) for segment in segments), strict=True)
    return Evaluated(*(np.concatenate(part)[:n] for part in parts))


def perplexities(text: Evaluated, pointer, triples: dict[str, tuple]) -> dict[str, Any]:
    """Without the cache, and with each window, theta and lambda."""
    return {"no cache": float(np.exp(-text.log_probs.mean(dtype=np.float64)))} | {
        name: neural_cache.tune(
            *text, *([value] for value in triple), convention=pointer
        ).perplexities.item()
        for name, triple in triples.items()
    }


def edges(config: Config, tuned: neural_cache.Tuned, n: int) -> list[str]:
    """Of the grid, on which the best values are and beyond which there are others."""
    bounds = {"windows": (1, n), "thetas": (0, np.inf), "lambdas": (0, 1)}
    found = []
    for (name, (low, high)), value in zip(bounds.items(), tuned[1:], strict=True):
        values = getattr(config, name)
        if len(values) > 1 and low < value < high and value in (values[0], values[-1]):
            found.append(f"{name} {value:g}")
    return found


# ---------------------------------------------------------------------------
# all of it
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Tunes, judges and writes; returns what is in cache-SEED.json."""
    check(config)
    trained = language_model.load(config.folder, config.seed)
    corpus = read(config, trained)
    run = trained.config
    path = config.folder / f"cache-{trained.seed}.json"
    settings = {
        "script": "tune_cache",
        "step": trained.step,
        "tokens": [len(corpus.valid), len(corpus.test)],
        "windows": list(config.windows),
        "thetas": list(config.thetas),
        "lambdas": list(config.lambdas),
    }
    if path.exists() and not config.overwrite:
        before = record.read_config(path)
        others = [key for key, value in settings.items() if before.get(key) != value]
        if others:
            raise ValueError(
                f"overwrite: {path} is of other {', '.join(others)}; pass --overwrite "
                "to replace it"
            )
    of = f"{config.folder}, seed {trained.seed}, step {trained.step:,}"
    print(of if trained.ended else f"{of} of an unfinished run")
    grid = (config.windows, config.thetas, config.lambdas)
    sizes = " x ".join(str(len(values)) for values in grid)
    print(
        f"{sizes} windows, thetas and lambdas, {len(corpus.valid):,} tokens", flush=True
    )

    # tune on the validation text
    valid = evaluate(trained, corpus.valid)
    tuned = neural_cache.tune(*valid, *grid, convention=run.pointer)
    triples = {"the run's": (run.window, run.theta, run.lambda_), "tuned": tuned[1:]}
    results: dict[str, Any] = {"valid": perplexities(valid, run.pointer, triples)}
    outside = edges(config, tuned, len(valid.targets))
    del valid  # the states are large

    # judge on the test text
    results["test"] = perplexities(evaluate(trained, corpus.test), run.pointer, triples)

    # report
    names = ("window", "theta", "lambda_")
    content = settings | {
        "seed": trained.seed,
        "ended": trained.ended,
        **{k: dict(zip(names, triple, strict=True)) for k, triple in triples.items()},
        **results,
        "edges": outside,
        "perplexities": tuned.perplexities.tolist(),  # of the grid, validation
        **record.environment(),
    }
    record.write_json(path, content)
    grids.plot_cache(content, path.with_suffix(".png"))
    print(f"{'':10}{'window':>8}{'theta':>8}{'lambda':>8}{'valid':>10}{'test':>10}")
    for name in results["valid"]:
        triple = [f"{value:.4g}" for value in triples.get(name, ())] or [""] * 3
        both = [f"{results[split][name]:.2f}" for split in ("valid", "test")]
        cells = [f"{cell:>8}" for cell in triple] + [f"{cell:>10}" for cell in both]
        print(f"{name:10}{''.join(cells)}")
    if outside:
        print(f"On the edge of the grid: {', '.join(outside)}. There may be better.")
    print(f"Wrote {path} and {path.with_suffix('.png').name}.", flush=True)
    return content


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    main(tyro.cli(Config, config=(tyro.conf.PositionalRequiredArgs,)))
