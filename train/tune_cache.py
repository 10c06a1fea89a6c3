"""The neural cache's window, theta and lambda, tuned for a trained network.

    python -m train.tune_cache runs/lstm-adam-l2
    python -m train.tune_cache runs/NAME --windows 1000 2000 --thetas 0.5 0.6 0.7

Takes the best of a grid on the validation text and evaluates it on the test text. The
best theta depends on the norm of the network's states, so it does not transfer between
networks.

Writes cache-SEED.json and cache-SEED.png to the folder of the run. The same command
replaces them; results of another grid or checkpoint are replaced with --overwrite only.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from train.data import text
from train.evals import neural_cache, perplexity
from train.plots import grids
from train.run import devices, log, trained_language_model
from train.run.command import run_command
from train.run.environment import environment
from train.run.trained_language_model import Trained

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the neural cache of a trained network."""

    folder: Path  # of a run of train.language_model: runs/NAME
    data_dir: Path | None = None  # of the run's text; None: where it was
    seed: int | None = None  # of the run; None: the first with a checkpoint
    network: trained_language_model.Network = "last"  # or best, on the validation text
    # tokens in the cache
    windows: tuple[int, ...] = (100, 200, 500, 1000, 2000, neural_cache.WINDOW, 6000)
    # how sharply the cache prefers near states
    thetas: tuple[float, ...] = (
        *(0.1, 0.2, 0.3, 0.4, 0.5, neural_cache.THETA, 0.8, 1.0),
        *(1.25, 1.5, 2.0, 2.5, 3.0),
    )
    # the cache's share of a probability
    lambdas: tuple[float, ...] = (
        *(0.03, 0.06, 0.1, neural_cache.LAMBDA, 0.15, 0.2, 0.25, 0.3),
        *(0.35, 0.4, 0.5),
    )

    overwrite: bool = False  # also replace results of other settings


def check(c: Config) -> None:
    rules = {
        "windows": (lambda x: x >= 1, "at least 1"),
        "thetas": (lambda x: 0 <= x < np.inf, "at least 0 and finite"),
        "lambdas": (lambda x: 0 <= x < 1, "in [0, 1)"),
    }
    for option, (valid, allowed) in rules.items():
        values = getattr(c, option)
        if not values or not all(map(valid, values)) or sorted({*values}) != [*values]:
            raise ValueError(
                f"{option} must be one or more increasing numbers, each {allowed}, "
                f"got {values!r}"
            )


def parse_args(args: list[str]) -> Config:
    import tyro

    return tyro.cli(Config, args=args, config=(tyro.conf.PositionalRequiredArgs,))


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


def load_text(config: Config, trained: Trained) -> text.Corpus:
    """The text of the run."""
    data_dir = config.data_dir or trained.data_dir
    if trained.data_dir is None and config.data_dir is not None:
        raise ValueError(
            f"data_dir must be None for {config.folder}, which was trained on Python's "
            f"documentation, got {str(data_dir)!r}"
        )
    if data_dir and not data_dir.exists():
        raise ValueError(
            f"data_dir: the text of the run is no longer in {data_dir}: pass its new "
            "folder, or file, as --data-dir"
        )
    unit = trained.unit if data_dir else None
    corpus = text.load(data_dir, unit, trained.min_count)
    if corpus.vocabulary != trained.vocabulary:
        source = data_dir or "this Python's documentation"
        raise ValueError(
            f"data_dir: the vocabulary of {source} ({len(corpus.vocabulary):,} words) "
            f"is not that of {config.folder} ({len(trained.vocabulary):,} words), "
            "which was trained on another text"
        )
    if trained_language_model.text_hash(corpus) != trained.text:
        raise ValueError(
            f"data_dir: {data_dir} has the vocabulary of {config.folder}, but other "
            "texts: were they changed?"
        )
    return corpus


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


class Predictions(NamedTuple):
    """The network's view of a text, in the memory of the host."""

    log_probs: np.ndarray  # (tokens - 1,)
    states: np.ndarray  # (tokens - 1, width)
    targets: np.ndarray  # (tokens - 1,)


def predict(read, trained: Trained, tokens: np.ndarray) -> Predictions:
    """Reads a text with a `perplexity.reader`."""
    net, n = nnx.merge(trained.graphdef, trained.params), len(tokens) - 1
    segments = perplexity.segments(read, trained.params, net.initial_state(1), tokens)
    parts = zip(*(map(np.asarray, segment[:3]) for segment in segments), strict=True)
    return Predictions(*(np.concatenate(part)[:n] for part in parts))


def perplexities(
    predictions: Predictions, pointer: neural_cache.Convention, points: dict[str, tuple]
) -> dict[str, float]:
    """Without the cache, and with each window, theta and lambda."""
    plain = float(np.exp(-predictions.log_probs.mean(dtype=np.float64)))
    return {"no cache": plain} | {
        name: neural_cache.tune(
            *predictions, *([value] for value in point), convention=pointer
        ).perplexities.item()
        for name, point in points.items()
    }


def find_edges(config: Config, tuned: neural_cache.Tuned, n: int) -> list[str]:
    """The best values at an edge of the grid that could be moved outwards."""
    bounds = {"windows": (1, n), "thetas": (0, np.inf), "lambdas": (0, 1)}
    found = []
    for (name, (low, high)), value in zip(bounds.items(), tuned[1:], strict=True):
        values = getattr(config, name)
        if len(values) > 1 and low < value < high and value in (values[0], values[-1]):
            found.append(f"{name} {value:g}")
    return found


# ---------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Tunes, evaluates and writes; returns the content of cache-SEED.json."""
    check(config)
    trained = trained_language_model.load(config.folder, config.seed, config.network)
    corpus = load_text(config, trained)
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
    check_earlier(config, path, settings)
    print(trained_language_model.describe(config.folder, trained))
    grid = (config.windows, config.thetas, config.lambdas)
    sizes = " x ".join(str(len(values)) for values in grid)
    print(
        f"{sizes} windows, thetas and lambdas, {len(corpus.valid):,} tokens", flush=True
    )

    # tune on the validation text
    read = perplexity.reader(trained.graphdef)
    valid = predict(read, trained, corpus.valid)
    tuned = neural_cache.tune(*valid, *grid, convention=run.pointer)
    points = {"the run's": (run.window, run.theta, run.lambda_), "tuned": tuned[1:]}
    results = {"valid": perplexities(valid, run.pointer, points)}
    edges = find_edges(config, tuned, len(valid.targets))
    del valid  # the states are large

    # evaluate on the test text
    test = predict(read, trained, corpus.test)
    results["test"] = perplexities(test, run.pointer, points)

    # report
    names = ("window", "theta", "lambda_")
    content = settings | {
        "seed": trained.seed,
        "network": trained.network,
        "ended": trained.ended,
        **{k: dict(zip(names, point, strict=True)) for k, point in points.items()},
        **results,
        "edges": edges,
        "perplexities": tuned.perplexities.tolist(),  # of the grid, validation
        **environment(),
    }
    log.write_json(path, content)
    grids.plot_cache(content, path.with_suffix(".png"))
    print_table(results, points)
    if edges:
        print(f"On the edge of the grid: {', '.join(edges)}. There may be better.")
    print(f"Wrote {path} and {path.with_suffix('.png').name}.", flush=True)
    return content


def check_earlier(config: Config, path: Path, settings: dict[str, Any]) -> None:
    """Refuses to replace results of other settings, except with --overwrite."""
    if not path.exists() or config.overwrite:
        return
    earlier = log.read_json(path)
    changed = [key for key, value in settings.items() if earlier.get(key) != value]
    if changed:
        raise ValueError(
            f"overwrite: {path} has other {', '.join(changed)}; pass --overwrite to "
            "replace it"
        )


def print_table(results: dict[str, dict[str, float]], points: dict[str, tuple]):
    print(f"{'':10}{'window':>8}{'theta':>8}{'lambda':>8}{'valid':>10}{'test':>10}")
    for name in results["valid"]:
        point = [f"{value:.4g}" for value in points.get(name, ())] or [""] * 3
        both = [f"{results[split][name]:.2f}" for split in ("valid", "test")]
        cells = [f"{cell:>8}" for cell in point] + [f"{cell:>10}" for cell in both]
        print(f"{name:10}{''.join(cells)}")


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
