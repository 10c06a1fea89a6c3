"""Bias correction: exact at every step and under every schedule."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import GRADS, P0, run
from reference import adam_loop, constant
from tiers import matrix

import adamw_jax as aj
from adamw_jax.transforms.bias_correction import (
    LogProduct,
    beta_at,
    init_log_product,
)


@pytest.mark.parametrize(
    "b2", matrix([0.9, 0.99, 0.999, 0.9999, 0.99999], quick=[0.9, 0.99999])
)
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("make", [aj.scale_by_adam, aj.scale_by_amsgrad])
def test_first_update_is_the_sign(b2, driven, make):
    """In float32, where Optax is off by 7e-6 to 7e-4."""
    if driven:
        b2 = (lambda b2: lambda t: jnp.float32(b2))(b2)
    tx = make(b2=b2, eps=0.0)
    g = jnp.array([3.7, -0.02, 1e-4, 5e3])
    u, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(u, np.sign(g), rtol=3e-7)


@pytest.mark.parametrize(
    "b", matrix([0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999], quick=[0.0, 0.9, 0.99999])
)
@pytest.mark.parametrize("driven", [False, True])
def test_correction_at_every_step(b, driven):
    """c = 1 - b^t in float32, to 3e-7 over 100,000 steps, for b a number or traced."""
    nominal = float(np.float32(b)) if driven else b  # as a traced float32
    beta = jnp.float32(b) if driven else b
    state = init_log_product(beta, jnp.zeros(1))

    @jax.jit
    def corrections(state):
        def step(state, t):
            at = beta_at(beta, "exact", t, state, jnp.float32)
            return at.log_product, at.correction

        return jax.lax.scan(step, state, jnp.arange(100_000))[1]

    t = np.arange(1, 100_001)
    exact = -np.expm1(t * math.log(nominal)) if nominal else np.ones(len(t))
    np.testing.assert_allclose(corrections(state), exact, rtol=3e-7)


@pytest.mark.parametrize("seed", matrix(range(3), quick=[0]))
def test_constant_gradient_invariance(x64, seed):
    """A constant gradient gives a constant update under any schedule of the betas."""
    rng = np.random.default_rng(seed)
    b1, b2 = jnp.asarray(rng.uniform(size=(2, 100)))
    tx = aj.scale_by_adam(lambda t: b1[t], lambda t: b2[t], eps=0.0)
    grads = np.tile(rng.normal(size=5), (100, 1))
    updates = np.diff(
        run(tx, np.zeros(5), grads, learning_rate=1.0), axis=0, prepend=0.0
    )
    np.testing.assert_allclose(updates, -np.sign(grads), atol=1e-10)


def test_constant_gradient_invariance_float32():
    cycle = aj.one_cycle(1.0, steps=200)
    tx = aj.scale_by_adam(cycle.schedule("b1"), 0.9, eps=0.0)
    g = jnp.array([0.3, -20.0])
    state = tx.init(g)
    update = jax.jit(tx.update)
    for _ in range(200):
        u, state = update(g, state)
        np.testing.assert_allclose(u, np.sign(g), rtol=1e-6)


def test_torch_correction_is_wrong_under_a_cycle():
    """Why there is an exact mode: PyTorch's step is 23 % too short here (T = 50)."""
    b1 = aj.one_cycle_torch(1.0, 50).schedule("b1")
    sizes = {}
    for mode in ("exact", "torch"):
        tx = aj.scale_by_adam(b1, 0.9, eps=0.0, bias_correction=mode)
        state, sizes[mode] = tx.init(jnp.ones(1)), []
        for _ in range(10):
            u, state = tx.update(jnp.ones(1), state)
            sizes[mode].append(float(u[0]))
    np.testing.assert_allclose(sizes["exact"], 1.0, rtol=1e-6)
    assert sizes["torch"][-1] == pytest.approx(0.771, abs=1e-3)


@pytest.mark.parametrize(("steps", "worst"), [(20, 0.37), (1000, 0.015)])
def test_error_of_pytorchs_correction(steps, worst):
    """The figures of scale_by_adam's docstring."""
    b1 = [aj.one_cycle_torch(1.0, steps).at(k)["b1"] for k in range(steps)]
    exact = 1 - np.cumprod(b1)
    torch = 1 - np.power(b1, np.arange(1, steps + 1))
    assert np.abs(exact / torch - 1).max() == pytest.approx(worst, abs=0.006)


@pytest.mark.parametrize(("b2", "error"), [(0.999, 1e-5), (0.99999, 1e-3)])
def test_error_of_the_naive_correction(b2, error):
    """The same for 1 - b^t in float32, at its worst over the first 1000 steps."""
    t = np.arange(1, 1001)
    naive = np.asarray(1 - jnp.float32(b2) ** jnp.asarray(t, jnp.float32), float)
    assert error < np.abs(naive / -np.expm1(t * math.log(b2)) - 1).max() < 3 * error


@pytest.mark.parametrize("make", [aj.scale_by_adam, aj.scale_by_amsgrad])
@pytest.mark.parametrize("traced", ["init", "update"])
def test_a_beta_that_is_an_array_at_init_or_at_update_only(x64, traced, make):
    """The betas of a sweep: exact for a constant, in either order."""

    def init(b1, b2):
        return make(b1, b2).init(jnp.asarray(P0))

    def update(b1, b2, g, state):
        return make(b1, b2).update(g, state)

    betas = 0.8, 0.95
    jitted = jax.jit(init) if traced == "init" else jax.jit(update)
    state = jitted(*betas) if traced == "init" else init(*betas)
    structure = jax.tree.structure(state)
    p, path = P0, []
    for g in GRADS[:20]:
        step = jitted if traced == "update" else functools.partial(update, *betas)
        arguments = (*betas, g, state) if traced == "update" else (g, state)
        updates, state = step(*arguments)
        p = p - 1e-2 * updates
        path.append(p)
        assert jax.tree.structure(state) == structure
    expected = adam_loop(
        P0,
        GRADS[:20],
        constant(1e-2),
        *map(constant, betas),
        maximum="raw" if make is aj.scale_by_amsgrad else None,
    )
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-13)


def test_numbers_that_change_after_an_array_at_init(x64):
    """The product in the state goes on; without one, PyTorch's power is left."""
    b1 = lambda t: 0.9 - 0.02 * t  # noqa: E731
    init = {"exact": jnp.float64(0.9), "torch": 0.9}
    for correction, first in init.items():
        state = aj.scale_by_adam(first).init(jnp.asarray(P0))
        p, path = P0, []
        for t, g in enumerate(GRADS[:10]):
            beta = b1(t) if correction == "exact" else jnp.float64(b1(t))
            updates, state = aj.scale_by_adam(beta).update(jnp.asarray(g), state)
            p = p - 1e-2 * updates
            path.append(p)
        # b2 is constant, where the two corrections agree.
        expected = adam_loop(P0, GRADS[:10], constant(1e-2), b1, correction=correction)
        np.testing.assert_allclose(path, expected, rtol=0, atol=1e-13)


def test_a_schedule_needs_a_state_that_knows_it():
    state = aj.scale_by_adam(0.9).init(jnp.ones(1))
    with pytest.raises(ValueError, match="b1 must be a schedule at init as well"):
        aj.scale_by_adam(lambda t: 0.9).update(jnp.ones(1), state)


@pytest.mark.parametrize("jit", [False, True])
def test_a_log_product_in_bfloat16(jit):
    """Cast after 10 of 300 steps: no worse than what the cast itself has lost.

    Without `lost`, steps of 1e-3 are rounded beside a sum of .3, whose spacing is 2e-3.
    """
    update = functools.partial(beta_at, jnp.float32(0.999), "exact")
    update = jax.jit(update, static_argnums=2) if jit else update
    state = LogProduct(jnp.zeros([]), jnp.zeros([]))
    for t in range(300):
        if t == 10:
            state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
        beta = update(jnp.int32(t), state, jnp.float32)
        state = beta.log_product
        exact = -math.expm1((t + 1) * math.log(0.999))
        assert float(beta.correction) == pytest.approx(exact, rel=1e-3)
    assert state.total.dtype == state.lost.dtype == jnp.bfloat16
