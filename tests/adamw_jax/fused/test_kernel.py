"""The kernel on one leaf, against its reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import matrix
from ways import ULP, assert_close, draws, needs_kernel, program

import adamw_jax as aj
from adamw_jax.fused import kernel

SIZES = (0, 1, 63, 64, 100_003, 1_000_003)  # the last two: several chunks and threads


def moments(shape, seed):
    return draws(shape, seed), draws(shape, seed + 1) ** 2


def scalars(weight_decay=0.1, eps=1e-8, eps_root=0.0, factor=1.0):
    betas = (0.9, 0.1, 0.271, 0.999, 0.001, 0.003)
    return jnp.array((*betas, eps, eps_root, 0.05, weight_decay, factor), "float32")


@needs_kernel
@pytest.mark.parametrize(
    ("size", "p_dtype", "g_dtype"),
    matrix(
        list(itertools.product(SIZES, ULP, ULP)),
        quick=[
            (0, "float32", "float32"),
            (1, "float32", "bfloat16"),
            (63, "bfloat16", "bfloat16"),
            (100_003, "float32", "float32"),
        ],
    ),
)
def test_one_leaf(size, p_dtype, g_dtype):
    """Against XLA and against float64, rounded once."""
    p, g = draws(size, 0, p_dtype), draws(size, 1, g_dtype)
    m, v = moments(size, 2)
    for decays in (True, False):
        s = scalars(weight_decay=0.1 * decays, factor=0.7)
        got = jax.jit(kernel.one_pass, static_argnums=5)(p, m, v, g, s, decays)
        xla = jax.jit(kernel.reference, static_argnums=0)(decays, p, m, v, g, s)
        p64, m64, v64, g64, s64 = (np.asarray(x, np.float64) for x in (p, m, v, g, s))
        d1, r1, c1, d2, r2, c2, eps, eps_root, rate, decay, factor = s64
        g64 = factor * g64
        m64, v64 = d1 * m64 + r1 * g64, d2 * v64 + r2 * g64**2
        u = m64 / c1 / (np.sqrt(v64 / c2 + eps_root) + eps)
        p64 = p64 - rate * (u + decay * p64)
        assert [x.dtype for x in got] == [p.dtype, m.dtype, v.dtype]
        for x, theirs, exact in zip(got, xla, (p64, m64, v64), strict=True):
            ulp = ULP[x.dtype.name]
            bound = {"rtol": 0.51 * ulp if ulp > 1e-3 else 4 * ulp, "atol": 4e-7}
            np.testing.assert_allclose(np.asarray(x, np.float64), exact, **bound)
            # XLA of jax 0.10 contracts the same products: equal bits, but for bad luck
            x, theirs = (np.asarray(z, np.float64) for z in (x, theirs))
            np.testing.assert_allclose(x, theirs, rtol=2 * ulp, atol=4e-7)
            if size > 1000 and jax.__version_info__ >= (0, 10):
                assert (x != theirs).mean() <= 0.01


@needs_kernel
def test_a_leaf_without_axes():
    p, g, (m, v) = draws((), 0), draws((), 1), moments((), 2)
    got = kernel.one_pass(p, m, v, g, scalars(), True)
    assert [x.shape for x in got] == [()] * 3
    assert_close(got, kernel.reference(True, p, m, v, g, scalars()))


@needs_kernel
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("size", [67, 300_007])
def test_nan_infinity_and_very_small_numbers(size, dtype):
    """As in XLA, which flushes subnormal numbers to zero, on every thread."""
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-20, 1e-38, 1e-42, 3e38]
    p, g = draws(size, 0, dtype), draws(size, 1, dtype)
    m, v = moments(size, 2)
    for at in (0, size // 2, size - len(special)):
        where = slice(at, at + len(special))
        g = g.at[where].set(jnp.asarray(special, dtype))
        v = v.at[where].set(jnp.full(len(special), 1e-42))
        m = m.at[where].set(0.0)
    p = p.at[10].set(jnp.inf).at[11].set(jnp.nan).at[12].set(3.38e38)
    s = scalars(weight_decay=0.0)
    got = jax.jit(kernel.one_pass, static_argnums=5)(p, m, v, g, s, False)
    xla = jax.jit(kernel.reference, static_argnums=0)(False, p, m, v, g, s)
    for x, theirs in zip(got, xla, strict=True):
        for test in (np.isnan, np.isposinf, np.isneginf):
            x64, theirs64 = (np.asarray(z, np.float64) for z in (x, theirs))
            np.testing.assert_array_equal(test(x64), test(theirs64))
        np.testing.assert_allclose(x64, theirs64, rtol=2.0**-7, atol=1e-37)
    assert np.isnan(np.asarray(got[0][:3], np.float64)).sum() >= 1
    assert np.asarray(got[0][10], np.float64) == np.inf  # it does not decay: no 0 * inf


@needs_kernel
def test_bfloat16_is_rounded_to_nearest_even():
    """Halfway cases: an update of exactly half a spacing."""
    p = jnp.array([1.0, 1.0078125, 1.015625, -1.0, -1.0078125], "bfloat16")
    # m = g, v = 1 and no decay: p - learning_rate * g
    s = jnp.array([0, 1, 1, 1, 0, 1, 0, 0, 2.0**-8, 0, 1], "float32")
    g, m, v = -jnp.sign(p).astype("float32"), jnp.zeros(5), jnp.ones(5)
    got, *_ = kernel.one_pass(p, m, v, g, s, False)
    np.testing.assert_array_equal(
        np.asarray(got, np.float64), [1.0, 1.015625, 1.015625, -1.0, -1.015625]
    )


@pytest.mark.slow
@needs_kernel
def test_many_calls_at_a_time():
    """Of several programs, in several threads: none waits for another for ever."""
    from concurrent.futures import ThreadPoolExecutor

    tx = aj.adamw(0.1)
    params = {str(i): draws(150_000 + i, i) for i in range(12)}
    step, state = program("step", tx), tx.init(params)
    expected, _ = step(params, state, params)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(step, params, state, params) for _ in range(24)]
        for job in jobs:
            for key, leaf in job.result(timeout=60)[0].items():
                np.testing.assert_array_equal(leaf, expected[key])
