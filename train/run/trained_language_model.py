"""Reads a network trained by `train.language_model` from the folder of its run."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data import text
from train.recipes import language_model as recipe
from train.run import checkpoint, log

Network = Literal["best", "last"]


class Trained(NamedTuple):
    config: recipe.Config
    data_dir: Path | None  # of the text; None: Python's documentation
    unit: text.Unit  # what a token is
    min_count: int | None  # see `text.load`
    vocabulary: tuple[str, ...]
    text: str | None  # hash of the training, validation and test text
    seed: int
    network: Network
    step: int  # of the network
    epoch: int | None  # that ended with the best network
    ended: bool  # False: the run is unfinished
    graphdef: Any
    params: Any  # for evaluation: the average, if there is one


def load(folder: Path, seed: int | None = None, network: Network = "last") -> Trained:
    """Reads a network of a run, which may be in progress. Writes nothing.

    Args:
        folder: of the run, runs/NAME.
        seed: of the run; None: the first one that has a checkpoint.
        network: "last": of the last checkpoint; "best": of the epoch with the lowest
            validation loss so far, or the last where a run has kept no best one.

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
    content = json.loads(path.read_text(encoding="utf-8"))
    words = tuple(content["words"])
    if vocabulary_hash(words) != settings["vocabulary"]:
        raise ValueError(f"{path} is not the vocabulary of this run: was it changed?")

    net = nnx.eval_shape(lambda: recipe.make_network(config, len(words), 0))
    graphdef, like = nnx.split(net)
    best = read_best(folder, seed, like) if network == "best" else None
    if best is None:
        params, step, epoch = *_read_last(folder, seed, config, like), None
    else:
        params, step, epoch = best.params, best.step, best.epoch
    return Trained(
        config=config,
        data_dir=settings.get("data_dir") and Path(settings["data_dir"]),
        unit=content.get("unit", "spaced"),
        min_count=settings.get("min_count"),
        vocabulary=words,
        text=settings.get("text"),
        seed=seed,
        network="last" if best is None else "best",
        step=step,
        epoch=epoch,
        ended=bool(log.read_events(folder, "end", seed)),
        graphdef=graphdef,
        params=params,
    )


def describe(folder: Path, trained: Trained) -> str:
    epoch = "" if trained.epoch is None else f" (epoch {trained.epoch})"
    state = "" if trained.ended else " of an unfinished run"
    return (
        f"{folder}, seed {trained.seed}, {trained.network} network, "
        f"step {trained.step:,}{epoch}{state}"
    )


# ---------------------------------------------------------------------------
# the best network, in a file of its own beside the checkpoints
# ---------------------------------------------------------------------------


class Best(NamedTuple):
    params: Any
    epoch: int
    step: int
    valid_loss: float


def best_path(folder: Path, seed: int) -> Path:
    return folder / f"best-{seed}.npz"


def save_best(folder: Path, seed: int, best: Best) -> None:
    """Replaces the file atomically: arrays by their path, and what the best is of."""
    path = best_path(folder, seed)
    arrays: dict[str, Any] = best._asdict()
    del arrays["params"]
    leaves = jax.tree_util.tree_leaves_with_path(best.params)
    arrays |= {_array_name(where): np.asarray(leaf) for where, leaf in leaves}
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        np.savez(file, **arrays)
    draft.replace(path)


def read_best(folder: Path, seed: int, like: Any) -> Best | None:
    """The best network so far, with the structure of `like`; None if none was kept.

    Raises:
        ValueError: the file is of another network.
    """
    path = best_path(folder, seed)
    if not path.exists():
        return None
    with np.load(path) as file:
        arrays = dict(file)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    found = [arrays.get(_array_name(where)) for where, _ in leaves]
    for array, (where, leaf) in zip(found, leaves, strict=True):
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{path} does not fit the settings of its run, whose "
                f"{_array_name(where)} is {leaf.dtype}{list(leaf.shape)}: were they "
                "changed?"
            )
    placed = [  # on the devices of `like`, for which the programs are compiled
        jax.device_put(array, getattr(leaf, "sharding", None))
        for array, (_, leaf) in zip(found, leaves, strict=True)
    ]
    return Best(
        jax.tree.unflatten(structure, placed),
        int(arrays["epoch"]),
        int(arrays["step"]),
        float(arrays["valid_loss"]),
    )


def _array_name(path: Any) -> str:
    return "params" + jax.tree_util.keystr(path)


def _read_last(folder: Path, seed: int, config: recipe.Config, params: Any):
    """The parameters of the last checkpoint, and its step."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    like: Any = {"step": number, "params": params, "averaged": number}
    like["sums"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    like["average"] = params if config.average_after else None
    restored = checkpoint.read(folder / "checkpoints" / str(seed), like)
    state = recipe.State(**restored, opt=(), hidden=())
    return recipe.evaluation_params(state), int(state.step)


# ---------------------------------------------------------------------------
# identity
# ---------------------------------------------------------------------------


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
