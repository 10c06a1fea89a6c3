"""Low precision: stochastic rounding of moments and of updates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import matrix

import adamw_jax as aj


def _final_moment(
    steps, gradient, moment, shape=(100_000,), p_dtype="float32", **kwargs
):
    tx = aj.scale_by_adam(**kwargs)
    g = jnp.full(shape, gradient, p_dtype)

    @jax.jit
    def loop(g):
        state = tx.init(g)
        return jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], state)

    return np.asarray(getattr(loop(g), moment), np.float64)


@pytest.mark.parametrize(
    ("b1", "nearest"),
    matrix([(0.9, 0.984), (0.99, 0.805)], quick=[(0.99, 0.805)]),
)
def test_bfloat16_mu(b1, nearest):
    """The mean is right under a constant gradient of 1; to nearest, it is not."""
    steps = 1000
    mu = _final_moment(steps, 1.0, "mu", b1=b1, mu_dtype=jnp.bfloat16)
    assert abs(mu.mean() - 1) < 0.01
    mu = _final_moment(
        steps, 1.0, "mu", (8,), b1=b1, mu_dtype=jnp.bfloat16, stochastic_rounding=False
    )
    assert mu.mean() == pytest.approx(nearest, abs=1e-3)


@pytest.mark.parametrize("nu_dtype", [None, jnp.bfloat16])
def test_nu_decays_with_bfloat16_parameters(nu_dtype):
    """One unit gradient, then 2000 zeros: nu = .001 * .999^2000 (Optax: .001)."""
    tx = aj.scale_by_adam(nu_dtype=nu_dtype)
    g = jnp.ones(20_000, jnp.bfloat16)
    _, state = tx.update(g, tx.init(g))
    assert state.nu.dtype == (nu_dtype or jnp.float32)
    step = jax.jit(lambda _, s: tx.update(jnp.zeros_like(g), s)[1])
    state = jax.lax.fori_loop(0, 2000, step, state)
    nu = np.asarray(state.nu, np.float64).mean()
    assert nu == pytest.approx(1e-3 * 0.999**2000, rel=0.05 if nu_dtype else 1e-4)


def test_float16_storage():
    mu = _final_moment(300, 1.0, "mu", mu_dtype=jnp.float16, p_dtype="float16")
    assert abs(mu.mean() - 1) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_finite(dtype):
    """inject_hyperparams gives NaN here: b2 = .999 is 1 in bfloat16."""
    tx = aj.adamw(1e-3)
    p = jnp.ones(4, dtype)
    state = tx.init(p)
    for g in (jnp.zeros(4, dtype), jnp.ones(4, dtype)):
        updates, state = tx.update(g, state, p)
        chex.assert_tree_all_finite(updates)
    np.testing.assert_allclose(aj.current_hyperparams(state)["b2"], 0.999, rtol=1e-7)


def test_bfloat16_parameters_keep_small_updates():
    p0 = jnp.ones(20_000, jnp.bfloat16)
    constant = optax.GradientTransformation(
        lambda p: (), lambda u, s, p=None: (jnp.full(p.shape, -1e-3), s)
    )
    ends = {}
    for name, tx in {
        "nearest": constant,
        "stochastic": optax.chain(constant, aj.round_updates_stochastically()),
    }.items():

        @jax.jit
        def loop(p, tx=tx):
            def step(_, carry):
                updates, state = tx.update(p0, carry[1], carry[0])
                return aj.apply_updates(carry[0], updates), state

            return jax.lax.fori_loop(0, 300, step, (p, tx.init(p)))[0]

        ends[name] = float(loop(p0).astype(jnp.float32).mean())
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.7, abs=0.01)


def test_stochastic_rounding_depends_on_seed_and_resumes():
    def states(seed, steps, state=None):
        tx = aj.scale_by_adam(mu_dtype=jnp.bfloat16, seed=seed)
        g = jnp.full(100, 0.3)
        state = tx.init(g) if state is None else state
        for _ in range(steps):
            _, state = tx.update(g, state)
        return state

    whole = states(0, 10)
    resumed = states(99, 6, states(0, 4))  # the key lives in the state
    np.testing.assert_array_equal(whole.mu, resumed.mu)
    assert (np.asarray(whole.mu) != np.asarray(states(1, 10).mu)).any()


@pytest.mark.parametrize("make", [aj.scale_by_adam, aj.scale_by_amsgrad])
def test_random_bits_are_never_used_twice(make):
    """Not in another leaf, the other moment, or another step."""
    half_way, g = 0.5 + 2.0**-9, 1.0 + 2.0**-8  # of mu, and of nu, between bfloat16s
    narrow = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
    tx = make(0.5, 1 - half_way / g**2, **narrow)
    grads = {"a": jnp.full(400, g), "b": jnp.full(400, g)}
    start, seen = tx.init(grads), []
    for count in range(2):
        _, state = tx.update(grads, start._replace(count=jnp.int32(count)))
        for moment in (state.mu["a"], state.nu["a"], state.mu["b"], state.nu["b"]):
            seen.append(np.asarray(moment, np.float32) > half_way)
    for i, one in enumerate(seen):
        assert 0.4 < one.mean() < 0.6
        for other in seen[:i]:
            assert 0.4 < (one == other).mean() < 0.6


def test_random_bits_of_updates_differ_between_leaves_and_steps():
    tx = aj.round_updates_stochastically()
    p = {k: jnp.ones(500, jnp.bfloat16) for k in "ab"}
    u = {k: jnp.full(500, -1.95e-3) for k in "ab"}  # half of a spacing
    first, state = tx.update(u, tx.init(p), p)
    second, _ = tx.update(u, state, p)
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert 0.3 < float((one == other).mean()) < 0.7


@functools.partial(jax.jit, static_argnums=1)
def every_rounding(x, dtype):
    """Of each x by all 2^16 bits: the least, the greatest, how often the greatest."""
    bits = jnp.arange(2**16, dtype=jnp.uint16)

    def one(x):
        rounded = aj.stochastic_round(jnp.full(bits.shape, x), dtype, bits)
        rounded = rounded.astype(x.dtype)
        return rounded.min(), rounded.max(), (rounded == rounded.max()).sum()

    return jax.lax.map(one, x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (jnp.float16, "float32"),
        (jnp.bfloat16, "float32"),
        (jnp.float8_e5m2, "float32"),
        (jnp.bfloat16, "float64"),
        (jnp.float32, "float64"),
    ],
)
def test_no_bias_at_any_spacing(x64, dtype, wide, sign):
    """The average over all bits, at every exponent and in the subnormals."""
    info = jnp.finfo(dtype)
    lowest = int(info.minexp)
    if lowest > -126:  # XLA flushes the subnormals of bfloat16 and float32
        lowest -= int(info.nmant)
    exponents = np.arange(lowest, int(info.maxexp))
    mantissas = np.random.default_rng(0).uniform(1, 2, size=exponents.size)
    values = (sign * np.ldexp(mantissas, exponents)).astype(wide)
    values = values[np.abs(values) < float(info.max)]
    low, high, ups = map(np.asarray, every_rounding(jnp.asarray(values), dtype))

    exact, low, high = (a.astype(np.float64) for a in (values, low, high))
    exponents = np.maximum(np.frexp(exact)[1] - 1, int(info.minexp))
    spacing = np.ldexp(1.0, exponents - int(info.nmant))
    floor = np.floor(exact / spacing) * spacing
    np.testing.assert_array_equal(low, floor)
    up = np.where(high == floor, 0.0, ups / 2**16)  # below 2^-16 it never rounds up
    np.testing.assert_array_equal(high[up > 0], (floor + spacing)[up > 0])
    bias = up - (exact - floor) / spacing
    assert np.abs(bias).max() <= 2.0**-16
    if wide == "float32":  # 24 bits: exact wherever dtype and the bits hold them
        normal = np.abs(exact) >= float(info.tiny)
        enough = int(info.nmant) + 1 + 16 >= 24
        assert not enough or (bias[normal] == 0).all()


def test_bits_of_another_dtype():
    with pytest.raises(TypeError, match="uint16"):
        aj.stochastic_round(jnp.ones(1), jnp.bfloat16, jnp.zeros(1, jnp.uint32))


def test_stochastic_rounding_of_special_values():
    x = jnp.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 3.4e38])
    bits = jnp.full(x.shape, 2**16 - 1, jnp.uint16)
    rounded = np.asarray(aj.stochastic_round(x, jnp.bfloat16, bits), np.float32)
    np.testing.assert_array_equal(rounded[:5], x[:5])
