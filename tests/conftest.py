"""A harsher environment than the users', and one compilation cache for all tests."""

import hashlib
import os
import pickle
from pathlib import Path

import chex
import jax
import jax.experimental
import jaxlib
import numpy as np
import pytest
from hypothesis import settings

from train.data import cifar10

ROOT = Path(__file__).parents[1]


def compilation_cache() -> Path:
    """A folder for this jaxlib and this kernel, kept between runs, ignored by Git.

    The kernel's sources are part of its name because the cache's own keys leave out
    how the kernel is partitioned.
    """
    kernel = sorted((ROOT / "adamw_jax" / "fused").glob("*.*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in kernel))
    return ROOT / ".cache" / f"jaxlib-{jaxlib.__version__}-{digest.hexdigest()[:8]}"


CONFIG = {
    # Two devices for the sharding tests; must precede the first computation.
    "jax_num_cpu_devices": 2,
    "jax_compilation_cache_dir": str(compilation_cache()),
    # Nearly all programs here compile in less than JAX's default of a second.
    "jax_persistent_cache_min_compile_time_secs": 0,
    # Programs with the kernel differ from process to process otherwise.
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
}
for name, value in CONFIG.items():
    jax.config.update(name, value)
    if name != "jax_num_cpu_devices":
        os.environ[name.upper()] = str(value)  # for the commands that tests start

if not hasattr(jax, "enable_x64"):  # before jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64

# The workers share the cores: one thread each for XLA and PyTorch.
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("quick", max_examples=10, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile("quick")  # --hypothesis-profile full loads the other


def pytest_collection_modifyitems(items):
    """The scripts first: their files take longest, and a file stays on one worker."""
    items.sort(key=lambda item: item.path.parent.name != "train")


@pytest.fixture(autouse=True)
def strict():
    chex.clear_trace_counter()  # chex.assert_max_traces counts within one test
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
def fast_compile():
    """Compile with few optimizations, for tests of neither speed nor XLA's text."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def cache():
    """The folder of the compilation cache, for the commands that a test starts."""
    return str(compilation_cache())


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """Sixty images a batch in the official format, brighter the higher the label."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [name for name in cifar10.CIFAR10_MD5 if not name.endswith(".bin")]:
        labels = rng.integers(0, 10, 60)
        pixels = rng.integers(0, 56, (60, 3072)) + 20 * labels[:, None]
        batch = {b"data": pixels.astype(np.uint8), b"labels": labels.tolist()}
        raw = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(raw)
        monkeypatch.setitem(cifar10.CIFAR10_MD5, name, hashlib.md5(raw).hexdigest())
    return tmp_path
