"""Tiny runs of `train.compare` for several test modules."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.data import batches
from train.recipes import compare as recipe

TINY = recipe.Config(
    train_size=40, eval_size=50, width=16, epochs=6, batch_size=10, evaluate_every=3,
    target=20.0, grid=2, tune_seeds=2, seeds=3, chunk=2,
)  # fmt: skip
TINY_CIFAR = dataclasses.replace(
    TINY, dataset="cifar10", width=4, epochs=2, evaluate_every=1, tune_seeds=1
)


def build(config, vectorized=False):
    return recipe.build_program(config, mesh(), vectorized)


def mesh():
    return Mesh(np.array(jax.devices()), ("runs",))


build_once = functools.cache(build)


def train_two(program, config, name, splits, lr, decay):
    """Trains the second seed and the first; returns the first run and both results."""
    tables = recipe.draw_tables(config, splits.train.y, range(2))
    runs = recipe.select_runs(tables, np.array([1, 0]), np.array(lr), np.array(decay))
    images = batches.padded(splits.train.x), *batches.in_batches(splits.test)
    images = jax.device_put(images, NamedSharding(mesh(), PartitionSpec()))
    index = list(recipe.OPTIMIZERS).index(name)
    results = program(np.int32(index), runs, images)
    return recipe.select_runs(tables, 1, lr[0], decay[0]), np.asarray(results)
