"""Both ways to new parameters, `update` with `apply_updates` and `update_and_apply`."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamw_jax as aj
from adamw_jax.fused import build

needs_kernel = pytest.mark.skipif(
    build.why_no_kernel() is not None, reason=f"no kernel: {build.why_no_kernel()}"
)
# What XLA fuses depends on its version: before jax 0.10 clipped gradients are written.
needs_xla_of_jax_0_10 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="measured with the XLA of jax 0.10"
)


def needs_flax(version, reason):
    installed = importlib.metadata.version("flax")
    old = tuple(map(int, installed.split("."))) < version
    return pytest.mark.skipif(old, reason=reason)


ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7}  # from 1 to the next number


def draws(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def two_calls(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return aj.apply_updates(params, updates), state


WAYS = {"two calls": two_calls, "step": aj.update_and_apply}


def program(way, tx, **options):
    """In the order of the results, as donation wants it."""
    return jax.jit(lambda p, state, g: WAYS[way](tx, g, state, p), **options)


def trajectory(way, tx, params, grads):
    step, state = program(way, tx), jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def calls_kernel(step, *args):
    return "custom_call @adamw_jax_one_pass" in step.lower(*args).as_text()


def assert_close(one, other, ulps=4):
    """Structure and dtypes are the same; rounding errors are those of the largest."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        # Scalars, as the low bits that a log product lost, are of the size of 1.
        scale = np.nanmax(np.abs(y), initial=0, where=np.isfinite(y)) if y.ndim else 1
        atol = ulps * scale * ULP["float32"]
        np.testing.assert_allclose(x, y, rtol=ulps * ULP["float32"], atol=atol)
