"""A harsher environment than the users': no silent promotion of ranks or dtypes."""

import jax
import pytest

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
