"""A tiny text and a tiny model, for the tests of train.language_model and its kin."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import language_model
from train.evals import perplexity
from train.recipes import language_model as recipe
from train.run import checkpoint, log

WORDS = 20
TINY = dataclasses.replace(
    language_model.defaults(),
    **{"embedding": 8, "width": 12, "epochs": 8, "batch_size": 4, "bptt": 8},
    **{"lengths": 2, "window": 50, "learning_rate": 2e-2, "name": "run"},
)
EPOCHS, STEPS = 8, 19  # steps of an epoch: 160 rows // 8 - 1
SALESFORCE = {
    **{"scale_by_length": True, "ar": "dropped", "optimizer": "sgd", "clip": 0.25},
    **{"learning_rate": 3.0, "b1": (0.0, 0.0), "schedule": "constant"},
}
AVERAGED = {**SALESFORCE, "chunks": "salesforce", "average_after": 1, "epochs": 4}


def write_text(folder, words=WORDS):
    """Three files; every word has few successors, so that something can be learned."""
    folder.mkdir(exist_ok=True)
    chances = np.random.default_rng(0).dirichlet(np.full(words, 0.1), words)
    sizes = {"train": 582, "valid": 110, "test": 70}  # a tenth more with <eos>
    for seed, (name, size) in enumerate(sizes.items()):
        rng, word, written = np.random.default_rng(seed), 0, []
        for i in range(size):
            word = rng.choice(words, p=0.98 * chances[word] + 0.02 / words)
            written.append(f"w{word}" + (" " if (i + 1) % 10 else "\n"))
        (folder / f"{name}.txt").write_text("".join(written))
    return folder


def metrics(folder):
    return log.read_lines(folder / "metrics.jsonl")


def train_tiny(out, **changes):
    """Trains on a text that is in the folder, or written there; returns its run's."""
    if not (out / "train.txt").exists() and "data_dir" not in changes:
        write_text(out)
    config = dataclasses.replace(TINY, **{"data_dir": out, "out": out} | changes)
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        share_programs(patch)
        language_model.main(config)
    return out / "run"


def save_state(folder, step, params, average=None, averaged=-1, seed=0):
    """A checkpoint as training writes it, except for what is not read."""
    state = recipe.State(
        jnp.int32(step), params, (jnp.zeros(3),), (jnp.zeros((4, 16)),), jnp.zeros(3),
        average, jnp.int32(averaged),
    )  # fmt: skip
    with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
        checkpoint.save(checkpoints, step, state)
        checkpoints.wait()


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(ours, expected, tolerance):
    ours, expected = jax.tree.leaves(ours), jax.tree.leaves(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------
# programs, which are compiled once for all tests of a process
# ---------------------------------------------------------------------------

build, compile_programs = recipe.build, recipe.compile_programs
reader = functools.cache(perplexity.reader)
_programs, _compiled = {}, {}


def build_once(config, words, rows):
    """`recipe.build`, but the same object for the same hyperparameters."""
    names = {field.name for field in dataclasses.fields(recipe.Config)}
    settings = {name: value for name, value in vars(config).items() if name in names}
    of_the_cache = ("theta", "lambda_", "window", "pointer")  # no program has them
    key = {name: settings[name] for name in settings if name not in of_the_cache}
    key = repr(key), words, rows
    if key not in _programs:
        _programs[key] = build(recipe.Config(**settings), words, rows)
    return _programs[key]


def compile_once(programs, columns, table):
    """`recipe.compile_programs`, once for programs, shapes and shardings."""
    key = id(programs), columns.shape, table.shape, columns.sharding
    if key not in _compiled:
        _compiled[key] = programs, compile_programs(programs, columns, table)
    return _compiled[key][1]


def share_programs(monkeypatch):
    """Makes runs of the same hyperparameters in one process share their programs."""
    monkeypatch.setattr(perplexity, "reader", reader)
    monkeypatch.setattr(recipe, "build", build_once)
    monkeypatch.setattr(recipe, "compile_programs", compile_once)
