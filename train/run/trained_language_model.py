"""Reads a network trained by `train.language_model` from the folder of its run."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data import text
from train.recipes import language_model as recipe
from train.run import checkpoint, log


class Trained(NamedTuple):
    config: recipe.Config
    data_dir: Path | None  # of the text; None: Python's documentation
    vocabulary: tuple[str, ...]
    text: str | None  # hash of the training, validation and test text
    seed: int
    step: int  # of the checkpoint
    ended: bool  # False: the run is unfinished
    graphdef: Any
    params: Any  # for evaluation: the average, if there is one


def load(folder: Path, seed: int | None = None) -> Trained:
    """Reads the last checkpoint of a run, which may be in progress. Writes nothing.

    Args:
        folder: of the run, runs/NAME.
        seed: of the run; None: the first one that has a checkpoint.

    Raises:
        ValueError: there is no such folder, seed or checkpoint, or they do not match.
    """
    folder = Path(folder)
    settings = log.read_json(folder / "config.json")
    if settings.get("script") != "language_model":
        problem = "is not the folder of a run" if folder.exists() else "does not exist"
        raise ValueError(f"folder: {folder} {problem}; train.language_model makes one")
    config = _read_config(settings)
    seed = _find_seed(folder, settings, seed)
    path = folder / "vocabulary.json"
    words = tuple(json.loads(path.read_text(encoding="utf-8"))["words"])
    if vocabulary_hash(words) != settings["vocabulary"]:
        raise ValueError(f"{path} is not the vocabulary of this run: was it changed?")

    net = nnx.eval_shape(lambda: recipe.make_network(config, len(words), 0))
    graphdef, params = nnx.split(net)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    like: Any = {"step": number, "params": params, "averaged": number}
    like["sums"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    like["average"] = params if config.average_after else None
    ended = bool(log.read_events(folder, "end", seed))
    restored = checkpoint.read(folder / "checkpoints" / str(seed), like)
    state = recipe.State(**restored, opt=(), hidden=())
    return Trained(
        config=config,
        data_dir=settings.get("data_dir") and Path(settings["data_dir"]),
        vocabulary=words,
        text=settings.get("text"),
        seed=seed,
        step=int(state.step),
        ended=ended,
        graphdef=graphdef,
        params=recipe.evaluation_params(state),
    )


def describe(folder: Path, trained: Trained) -> str:
    state = "" if trained.ended else " of an unfinished run"
    return f"{folder}, seed {trained.seed}, step {trained.step:,}{state}"


def text_hash(corpus: text.Corpus) -> str:
    tokens = np.concatenate(corpus[:3]).tobytes()
    return hashlib.md5(tokens, usedforsecurity=False).hexdigest()


def vocabulary_hash(words: tuple[str, ...]) -> str:
    joined = "\n".join(words).encode()
    return hashlib.md5(joined, usedforsecurity=False).hexdigest()


def _read_config(settings: dict[str, Any]) -> recipe.Config:
    fields = [field.name for field in dataclasses.fields(recipe.Config)]
    config = recipe.Config(**{key: settings[key] for key in fields if key in settings})
    return dataclasses.replace(
        config,
        b1=tuple(config.b1),
        cudnn=config.cudnn and jax.default_backend() == "gpu",  # the same numbers
    )


def _find_seed(folder: Path, settings: dict[str, Any], seed: int | None) -> int:
    """Checks that a seed has a checkpoint; None: the first that has."""
    seeds = sorted(
        int(path.name)
        for path in (folder / "checkpoints").glob("*")
        if path.name.isdecimal() and checkpoint.latest(path)
    )
    seed = min(seeds, default=settings["seed"]) if seed is None else seed
    if seed not in seeds:
        others = (
            f"only of {', '.join(map(str, seeds))}" if seeds else "nor of any other"
        )
        raise ValueError(f"seed: {folder} has no checkpoint of seed {seed}, {others}")
    return seed
