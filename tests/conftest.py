"""A harsher environment than the users': no silent promotion of ranks or dtypes."""

import hashlib
import pickle

import jax
import numpy as np
import pytest

from train.data import cifar10 as data

# Two devices for the sharding tests; must precede the first computation.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def strict():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


@pytest.fixture
def lenient():
    """Optax and Flax themselves do not run under strict dtype promotion."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """For modules that compile the same few programs again and again."""
    folder = tmp_path_factory.getbasetemp().parent / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield str(folder)
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """Sixty images a batch in the official format, brighter the higher the label."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [name for name in data.CIFAR10_MD5 if not name.endswith(".bin")]:
        labels = rng.integers(0, 10, 60)
        pixels = rng.integers(0, 56, (60, 3072)) + 20 * labels[:, None]
        batch = {b"data": pixels.astype(np.uint8), b"labels": labels.tolist()}
        raw = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(raw)
        monkeypatch.setitem(data.CIFAR10_MD5, name, hashlib.md5(raw).hexdigest())
    return tmp_path
