"""Moments in eight bits: the code against its theory, and optimizers that use it.

The reference searches a float64 table of the codes' values.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from reference import trajectory
from tiers import examples, matrix

import adamw_jax as aj
from adamw_jax import Blocks, quantize_moments
from adamw_jax.wrappers.eight_bit import _blocks_along, _random_bits
from train.run import checkpoint

BOTH = [jnp.int8, jnp.uint8]
TABLES = {jnp.int8: (np.arange(128) / 127) ** 4, jnp.uint8: (np.arange(256) / 255) ** 8}


@functools.partial(jax.jit, static_argnames=("dtype", "block_size"))
def round_trip(x, dtype, block_size=256, bits=None):
    blocks = aj.quantize_blockwise(x, dtype, block_size=block_size, bits=bits)
    return blocks.codes, blocks.scale, aj.dequantize_blockwise(blocks)


def nearest(y, dtype):
    """The code nearest to y in [0, 1], and y's distance to the next code's edge."""
    table = TABLES[dtype]
    middles = (table[1:] + table[:-1]) / 2
    code = np.searchsorted(middles, y)
    edge = np.abs(y[:, None] / middles - 1).min(1)
    return (np.maximum(code, y > 0) if dtype == jnp.uint8 else code), edge


# ---------------------------------------------------------------------------
# the code
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
def test_codes_are_those_of_a_search_in_the_table(dtype):
    y = np.geomspace(1e-12, 1, 20_000).astype(np.float32)
    codes, scale, _ = round_trip(jnp.asarray(y), dtype, len(y))
    expected, edge = nearest(y.astype(np.float64), dtype)
    np.testing.assert_array_equal(scale, [1.0])
    sure = edge > 1e-5  # float32 and float64 may differ on the edge itself
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(codes)[sure], expected[sure])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("decade", range(8))
def test_relative_error_is_that_of_the_theory(dtype, decade):
    """At most half a gap, (high - low) / (high + low), and the bound is tight."""
    y = np.geomspace(10.0 ** -(decade + 1), 10.0**-decade, 50_001)
    x = jnp.asarray(np.append(y, 1.0), jnp.float32)
    y = np.asarray(x, np.float64)[:-1]
    error = np.abs(np.asarray(round_trip(x, dtype, len(x))[2], np.float64)[:-1] / y - 1)
    table = TABLES[dtype]
    i = np.searchsorted(table, [y[0], y[-1]])
    low, high = table[i[0] - 1 : i[1]], table[i[0] : i[1] + 1]
    bound = ((high - low) / (high + low))[low + high > 2 * y[0]].max()
    assert 0.97 * bound < error.max() < bound * (1 + 1e-5)


@pytest.mark.parametrize(
    ("dtype", "first", "hundredth"), [(jnp.int8, 0.016, 0.05), (jnp.uint8, 0.016, 0.03)]
)
def test_error_at_the_maximum_and_far_below(dtype, first, hundredth):
    """Half the gap of mu and of nu, at 1 and .01 of the maximum of the block."""
    table = TABLES[dtype]
    for y, expected in ((1.0, first), (0.01, hundredth)):
        i = min(np.searchsorted(table, y), len(table) - 1)
        half = (table[i] - table[i - 1]) / (table[i] + table[i - 1])
        assert half == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", BOTH)
def test_quantizing_again_changes_nothing(dtype):
    """All codes under many scales, rounded to nearest and with the extreme bits."""
    info, scales = jnp.iinfo(dtype), np.random.default_rng(0).uniform(-18, 18, 500)
    codes = np.arange(-info.max if dtype == jnp.int8 else 0, info.max + 1)
    codes = jnp.asarray(np.tile(codes, (500, 1)), dtype)
    blocks = Blocks(codes, jnp.asarray(10.0 ** scales[:, None], jnp.float32))
    x = jax.jit(aj.dequantize_blockwise)(blocks)
    for bits in (
        None,
        jnp.zeros(x.shape, "uint16"),
        jnp.full(x.shape, 65535, "uint16"),
    ):
        again, scale, same = round_trip(x, dtype, 256, bits)
        alive = np.asarray(x) != 0  # products below 1e-38 are zero in float32
        np.testing.assert_array_equal(
            np.where(alive, again, 0), np.where(alive, codes, 0)
        )
        np.testing.assert_array_equal(scale, blocks.scale)
        np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("dtype", BOTH)
def test_codes_are_monotone(dtype):
    start = -1.0 if dtype == jnp.int8 else 0.0
    x = np.linspace(start, 1, 100_001, dtype=np.float32)
    for bits in (None, jnp.zeros(len(x), "uint16"), jnp.full(len(x), 999, "uint16")):
        codes = np.asarray(round_trip(jnp.asarray(x), dtype, len(x), bits)[0], int)
        if bits is not None and dtype == jnp.int8:
            codes = np.abs(codes) * np.sign(x)
        assert (np.diff(codes) >= 0).all()
    assert (
        codes[0] == start * jnp.iinfo(dtype).max and codes[-1] == jnp.iinfo(dtype).max
    )


@pytest.mark.parametrize("dtype", BOTH)
def test_stochastic_rounding_is_unbiased(dtype):
    """Over all 65,536 possible bits the mean is right to 2^-16 of a gap."""
    table = TABLES[dtype]
    rng = np.random.default_rng(0)
    code = rng.integers(1, len(table) - 1, 12)
    low, high = table[code], table[code + 1]
    y = (low + (high - low) * rng.uniform(size=12)).astype(np.float32)
    sign = np.where((np.arange(12) % 2 == 0) & (dtype == jnp.int8), -1, 1)
    x = np.append(sign * y, 1).astype(np.float32)
    bits = jnp.broadcast_to(jnp.arange(65536, dtype="uint16")[:, None], (65536, 13))
    many = jnp.broadcast_to(jnp.asarray(x), (65536, 13))
    values = np.asarray(round_trip(many, dtype, 13, bits)[2], np.float64)[:, :-1]
    for k in range(12):  # only the two neighbours
        np.testing.assert_allclose(
            np.unique(np.abs(values[:, k])), [low[k], high[k]], rtol=1e-6
        )
    off = np.abs(np.abs(values).mean(0) - y) / (high - low)
    assert off.max() < 2.0**-16 + 1e-5  # and float32's own rounding


def dynamic_tree(signed):
    """Dettmers et al.: each decade has half as many codes as the one above."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1)
        values.extend(10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2)
    return np.sort(values)


@pytest.mark.parametrize(
    ("spread", "worst_mu", "worst_nu"), [(0.5, 0.8, 1.1), (2.0, 0.7, 0.2)]
)
def test_error_of_an_update_beside_the_dynamic_tree(spread, worst_mu, worst_nu):
    """As the docstring says: smaller for mu; for nu equal, and far smaller in tails."""
    rng = np.random.default_rng(0)
    size = np.exp(spread * rng.normal(size=(400, 256)))
    mu = 0.2 * size * rng.normal(size=size.shape)
    nu = size**2 * np.exp(0.2 * rng.normal(size=size.shape))

    def dynamic(x, signed):
        scale, table = np.abs(x).max(1, keepdims=True), dynamic_tree(signed)
        i = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(x) / scale)
        return np.sign(x) * scale * table[np.maximum(i, 0 if signed else 1)]

    def ours(x, dtype):
        return np.asarray(round_trip(jnp.asarray(x, jnp.float32), dtype)[2], np.float64)

    def error(m, v):
        return np.sqrt(np.mean((m / np.sqrt(v) - mu / np.sqrt(nu)) ** 2))

    assert error(ours(mu, jnp.int8), nu) < worst_mu * error(dynamic(mu, True), nu)
    assert error(mu, ours(nu, jnp.uint8)) < worst_nu * error(mu, dynamic(nu, False))
    assert TABLES[jnp.int8][1] < 4e-9 < 5e-7 < dynamic_tree(True)[1] < 6e-7
    assert TABLES[jnp.uint8][1] < 6e-20 < 3e-7 < dynamic_tree(False)[1] < 4e-7


# ---------------------------------------------------------------------------
# special values, shapes
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
def test_a_block_of_zeros(dtype):
    codes, scale, back = round_trip(jnp.array([0.0, -0.0] * 4), dtype, 4)
    for array in (codes, scale, back):
        np.testing.assert_array_equal(array, 0)
    assert not np.signbit(back).any()


def with_specials(dtype):
    """Rows of values over six decades, most of them with NaN and infinities."""
    rng = np.random.default_rng(0)
    x = np.exp(3 * rng.normal(size=(6, 64))).astype(np.float32)
    x[1, 5] = x[2, :3] = np.nan
    x[2, 7] = x[3, 60] = np.inf
    x[4] = np.where(np.arange(64) < 32, 0, np.nan)
    x[5, 1:] = np.inf
    if dtype == jnp.int8:
        x[:, ::3] *= -1
    return x


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("stochastic", matrix([False, True], quick=[False]))
def test_nan_and_infinity_concern_themselves_alone(dtype, stochastic):
    """The others of a block are those of a search in the table less two codes."""
    x, table = with_specials(dtype), TABLES[dtype]
    bits = jnp.full(x.shape, 65535, "uint16") if stochastic else None
    _, scale, back = round_trip(jnp.asarray(x), dtype, 64, bits)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(np.where(finite, 0, back), np.where(finite, 0, x))
    assert not np.isnan(scale).any()
    for row in (0, 1, 2, 3):
        values = np.abs(x[row, finite[row]]).astype(np.float64)
        codes = len(table) - 1 if row == 0 else len(table) - 3
        y = values / values.max() * table[codes]
        low = np.minimum(np.searchsorted(table, y, side="right") - 1, codes - 1)
        gap = (table[low + 1] - table[low]) * values.max() / table[codes]
        error = np.abs(np.abs(back[row, finite[row]]) - values)
        assert (error <= (1 if stochastic else 0.5) * gap + 1e-5 * values).all()
    np.testing.assert_array_equal(back[4, :32], 0)  # also if nothing else is finite
    np.testing.assert_allclose(back[5, 0], x[5, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", BOTH)
def test_quantizing_again_keeps_nan_and_infinity(dtype):
    x = jnp.asarray(with_specials(dtype))
    codes, scale, back = round_trip(x, dtype, 64)
    for bits in (None, jnp.full(x.shape, 999, "uint16")):
        again, same, _ = round_trip(back, dtype, 64, bits)
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_allclose(same, scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", BOTH)
def test_tiny_and_huge_values(dtype):
    x = jnp.array([[3e38, 1e38], [1.2e-38, 0.0], [2.0**-149, 0.0]])
    codes, _, back = round_trip(x, dtype, 2)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[0, 0], x[0, 0])
    np.testing.assert_allclose(back[1, 0], x[1, 0])
    assert np.abs(back[2]).max() <= 2.0**-149  # XLA may flush subnormal numbers
    assert codes[0, 0] == jnp.iinfo(dtype).max


def test_a_positive_second_moment_never_becomes_zero():
    x = jnp.array([1.0, 1e-30, 1e-10, 0.0])
    for bits in (None, jnp.full(4, 65535, "uint16")):
        codes, _, back = round_trip(x, jnp.uint8, 4, bits)
        assert codes[1] == 1 and back[1] > 0 and back[2] > 0 and back[3] == 0


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1024,), (4,)),
        ((64, 512), (64, 2)),
        ((64, 128), (32, 1)),  # two rows a block
        ((3, 3, 64, 128), (3, 3, 32, 1)),
        ((10, 400), (10, 2)),  # blocks of 200 keep to their row
        ((300,), (2,)),
        ((257,), (2,)),  # 129 and 128
        ((4, 4, 4), (1, 1, 1)),
        ((), ()),
        ((0,), (0,)),
        ((3, 0), (1, 0)),
    ],
)
def test_blocks(shape, counts):
    assert _blocks_along(shape, 256) == counts


@examples(60)
@given(st.lists(st.integers(1, 300), max_size=4), st.integers(1, 300))
def test_blocks_are_never_too_large(shape, block_size):
    counts = _blocks_along(tuple(shape), block_size)
    sizes = [-(-n // count) for n, count in zip(shape, counts, strict=True)]
    assert np.prod(sizes, dtype=int) <= block_size
    for n, size, count in zip(shape, sizes, counts, strict=True):
        assert -(-n // size) == count


@pytest.mark.parametrize(
    ("shape", "block_size"),
    matrix(
        [((257,), 256), ((5, 7, 3), 9), ((13, 31), 8), ((1,), 4)],
        quick=[((5, 7, 3), 9)],
    ),
)
@pytest.mark.parametrize("dtype", BOTH)
def test_odd_shapes(shape, block_size, dtype):
    """Each block separately, sliced by NumPy."""
    rng = np.random.default_rng(0)
    x = np.exp(3 * rng.normal(size=shape)).astype(np.float32)
    codes, scale, back = round_trip(jnp.asarray(x), dtype, block_size)
    assert codes.shape == back.shape == shape
    sizes = [-(-n // count) for n, count in zip(shape, scale.shape, strict=True)]
    for block in np.ndindex(*scale.shape):
        index = tuple(
            slice(i * n, (i + 1) * n) for i, n in zip(block, sizes, strict=True)
        )
        assert scale[block] == x[index].max()
        y = (x[index] / x[index].max()).astype(np.float64).ravel()
        expected, edge = nearest(y, dtype)
        sure = edge > 1e-5
        np.testing.assert_array_equal(np.ravel(codes[index])[sure], expected[sure])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,), (3,)])
def test_empty_and_small(dtype, shape):
    """Equal values are the scale of their block."""
    x = jnp.full(shape, 0.3)
    codes, scale, back = round_trip(x, dtype, 2)
    assert codes.shape == back.shape == shape
    assert scale.size == -(-x.size // 2)
    np.testing.assert_array_equal(codes, jnp.iinfo(dtype).max)
    np.testing.assert_array_equal(scale, np.full(scale.shape, np.float32(0.3)))
    np.testing.assert_allclose(back, x, rtol=1e-6)


def test_numbers_are_scalars():
    blocks = aj.quantize_blockwise(-0.3)
    assert blocks.codes == -127 and blocks.scale == np.float32(0.3)


@pytest.mark.parametrize("dtype", BOTH)
def test_float64(x64, dtype):
    x = jnp.asarray(np.linspace(0, 1, 1001) ** 5)
    codes, scale, back = round_trip(x, dtype, 1001)
    assert scale.dtype == back.dtype == jnp.float64
    expected, edge = nearest(np.asarray(x), dtype)
    np.testing.assert_array_equal(codes[edge > 1e-12], expected[edge > 1e-12])


# ---------------------------------------------------------------------------
# the random bits
# ---------------------------------------------------------------------------


def test_random_bits_are_even_and_unrelated():
    """Each statistic within 5 standard deviations of that of independent bits."""
    n = 1 << 18
    keys = [jax.random.fold_in(jax.random.PRNGKey(0), t) for t in (0, 1)]
    one, next_step = (np.asarray(_random_bits(key, (512, 512))).ravel() for key in keys)
    for half in (one & 0xFFFF, one >> 16):
        counts = np.bincount(half >> 8, minlength=256)
        chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    low, high, later = one & 0xFFFF, one >> 16, next_step & 0xFFFF
    for a, b in (
        (low, high),
        (low, later),
        (low[1:], low[:-1]),
        (low[512:], low[:-512]),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    ones = (one[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(n)


# ---------------------------------------------------------------------------
# optimizers
# ---------------------------------------------------------------------------

SHAPE = (8, 256)
rng = np.random.default_rng(1)
P = {"w": jnp.asarray(rng.normal(size=SHAPE), jnp.float32), "b": jnp.ones(3)}
G = {"w": jnp.asarray(rng.normal(size=SHAPE), jnp.float32), "b": jnp.ones(3)}


def eight_bit(tx, **options):
    return quantize_moments(tx, **({"min_size": 1024} | options))


def blocks_of(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Blocks))
    return [x for x in leaves if isinstance(x, Blocks)]


def equal(a, b):
    """Every bit, every dtype."""
    chex.assert_trees_all_equal(a, b, strict=True)


@pytest.mark.parametrize("stochastic", matrix([False, True], quick=[True]))
def test_against_float32_adam(stochastic):
    """300 steps with the same gradients: noise around a mean per parameter.

    A gap between codes is 3 % of nu's largest values and 9 % of those 1e-4 of them,
    half of that of the root. Rounded to nearest, nu keeps an error of half a gap for
    long: 2 to 5 % of a way. Rounded stochastically, it wanders: each step rounds what
    has changed by some .1 %, up with that probability over the gap, and forgets .1 %,
    which in the long run gives nu a deviation of sqrt(gap / 2), 14 % for a gap of 4 %,
    and its root one of 7 %.
    """
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=(16, 256)))
    noise = rng.normal(size=(300, 16, 256)) + 0.3 * rng.normal(size=(16, 256))
    grads = jnp.asarray(scale * noise, jnp.float32)
    p, make = jnp.zeros((16, 256)), aj.adam(1e-2)
    tx = eight_bit(make, stochastic_rounding=stochastic)
    exact, ours = (
        np.asarray(jax.jit(functools.partial(trajectory, t))(p, grads), np.float64)
        for t in (make, tx)
    )
    off = np.sqrt(np.mean((ours[-1] - exact[-1]) ** 2) / np.mean(exact[-1] ** 2))
    assert 1e-3 < off < (0.07 if stochastic else 0.05)
    # No bias: the mean distance travelled is the same.
    sign = np.sign(exact[-1])
    assert np.mean(sign * ours[-1]) / np.mean(sign * exact[-1]) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.slow
def test_a_second_moment_decays():
    """One unit gradient, then 2000 zeros: nu = .001 * .999^2000.

    One value of each block keeps its gradient, so the block's scale does not decay.
    """

    def nu_after(stochastic):
        tx = eight_bit(aj.scale_by_adam(), stochastic_rounding=stochastic)
        ones, first = jnp.ones((64, 256)), jnp.zeros((64, 256)).at[:, 0].set(1.0)

        @jax.jit
        def loop():
            state = tx.update(ones, tx.init(ones))[1]
            return jax.lax.fori_loop(
                0, 2000, lambda _, s: tx.update(first, s)[1], state
            )

        return np.asarray(aj.dequantize_blockwise(loop().inner_state.nu), np.float64)

    exact = 1e-3 * 0.999**2000
    assert nu_after(True)[:, 1:].mean() == pytest.approx(exact, rel=0.05)
    nearest = nu_after(False)
    assert nearest[:, 0].mean() == pytest.approx(1 - 0.999**2001, rel=1e-3)
    assert nearest[:, 1:].mean() > 1.5 * exact  # between codes it does not move


def test_the_maximum_of_amsgrad_does_not_grow():
    tx = eight_bit(aj.scale_by_amsgrad(b2=0.5))
    g = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (8, 256)), jnp.float32)

    @jax.jit
    def loop():
        state = tx.init(g)
        return jax.lax.fori_loop(0, 300, lambda _, s: tx.update(g, s)[1], state)

    state = loop().inner_state
    highest = np.asarray(aj.dequantize_blockwise(state.nu_max), np.float64)
    table = TABLES[jnp.uint8]
    code = np.searchsorted(table, 0.1**2)  # the smallest of the values
    gap = table[code] / table[code - 1] - 1
    assert np.abs(highest / np.asarray(g) ** 2 - 1).max() < gap


def test_small_parameters_are_those_of_the_inner_optimizer():
    inner = aj.adamw(1e-2, weight_decay=0.1)
    tx = eight_bit(inner)
    state, expected = tx.init(P), inner.init(P)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(G, state, P)
        theirs, expected = jax.jit(inner.update)(G, expected, P)
        np.testing.assert_array_equal(updates["b"], theirs["b"])
    assert len(blocks_of(state)) == 2  # mu and nu of w
    # The first update of all is exact: it is made before anything is rounded.
    first, _ = jax.jit(tx.update)(G, tx.init(P), P)
    theirs, _ = jax.jit(inner.update)(G, inner.init(P), P)
    np.testing.assert_array_equal(first["w"], theirs["w"])


@pytest.mark.parametrize(
    ("shape", "block_size"), [((512, 512), 256), ((512, 512), 64), ((300, 100), 256)]
)
def test_bytes_per_parameter(shape, block_size):
    tx = quantize_moments(aj.scale_by_adam(), block_size=block_size)
    state = jax.eval_shape(tx.init, jnp.zeros(shape))
    n = shape[0] * shape[1]
    blocks = np.prod(_blocks_along(shape, block_size))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == (
        2 * n + 8 * blocks + 2 * 4 + 8  # codes, scales, two counts, the key
    )
    if shape == (512, 512):
        assert blocks == n / block_size


INNER = {
    "adam": lambda: aj.adam(1e-2, l2=0.1),
    "adamw": lambda: aj.adamw(aj.one_cycle(1e-2, steps=100), weight_decay=0.1),
    "amsgrad": lambda: aj.amsgrad(1e-2),
    "sgd": lambda: aj.sgd(1e-2, 0.9),
    "masked": lambda: aj.adamw(1e-2, mask=aj.mask_by_path("w")),
    "frozen": lambda: aj.freeze_leaves(aj.adamw(1e-2), aj.mask_by_path("b")),
    "partition": lambda: optax.partition(
        {"a": aj.adam(1e-2), "b": aj.sgd(1e-2)}, {"w": "a", "b": "b"}
    ),
    "optax": lambda: optax.adamw(1e-2),
    "rms": lambda: optax.rmsprop(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), aj.adam(1e-2)),
}


@pytest.mark.parametrize(
    "name",
    matrix(list(INNER), quick=["adamw", "amsgrad", "optax"]),
)
def test_around_every_optimizer(lenient, name):
    """The updates are close to the inner ones and have their structure and dtype."""
    inner = INNER[name]()
    tx = eight_bit(inner)
    state, expected = tx.init(P), inner.init(P)
    assert blocks_of(state)
    step, their_step = jax.jit(tx.update), jax.jit(inner.update)
    for k in range(4):
        g = jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), G)
        updates, state = step(g, state, P)
        theirs, expected = their_step(g, expected, P)
        assert jax.tree.structure(updates) == jax.tree.structure(theirs)
        error = np.linalg.norm(updates["w"] - theirs["w"])
        assert error < 0.05 * np.linalg.norm(theirs["w"])
    marked = optax.tree.map_params(tx, lambda x: x, state)
    equal(marked, state)


def test_as_a_link_of_a_chain(lenient):
    """Wrapping only the moments equals wrapping the whole chain."""
    parts = aj.add_decayed_weights(0.1), aj.scale_by_learning_rate(1e-2)
    link = optax.chain(eight_bit(aj.scale_by_adam()), *parts)
    whole = eight_bit(optax.chain(aj.scale_by_adam(), *parts))
    states = [link.init(P), whole.init(P)]
    for _ in range(3):
        one, states[0] = link.update(G, states[0], P)
        other, states[1] = whole.update(G, states[1], P)
        equal(one, other)


def test_hyperparameters_are_read_and_overridden_inside():
    tx = eight_bit(aj.adamw(aj.one_cycle(1e-2, steps=100)))
    state = tx.init(P)
    assert float(aj.current_hyperparams(state)["b1"]) == pytest.approx(0.95)
    state = aj.override_hyperparams(state, learning_rate=0.0)
    updates, state = tx.update(G, state, P)
    assert not np.asarray(updates["w"]).any()


def test_narrow_moments_are_kept():
    tx = eight_bit(aj.scale_by_adam(mu_dtype=jnp.bfloat16))
    state = tx.init(P).inner_state
    assert state.mu["w"].dtype == jnp.bfloat16
    assert state.nu["w"].codes.dtype == jnp.uint8


def test_bfloat16_parameters():
    p, g = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (P, G))
    tx = eight_bit(aj.adamw(1e-2))
    state = tx.init(p)
    updates, state = jax.jit(tx.update)(g, state, p)
    inner = aj.adamw(1e-2)
    theirs = jax.eval_shape(inner.update, g, inner.init(p), p)[0]
    assert updates["w"].dtype == theirs["w"].dtype
    assert {x.scale.dtype for x in blocks_of(state)} == {jnp.dtype("float32")}


def test_a_gradient_of_none_changes_no_moment():
    tx = eight_bit(aj.scale_by_adam())
    _, state = tx.update(G, tx.init(P))
    updates, later = tx.update({"w": None, "b": G["b"]}, state)
    assert updates["w"] is None
    equal(blocks_of(later), blocks_of(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_shows(bad):
    tx = eight_bit(aj.adam(1e-2))
    g = G | {"w": G["w"].at[0, 0].set(bad)}
    _, state = tx.update(g, tx.init(P))
    updates, _ = tx.update(G, state)
    bad = np.isnan(updates["w"])
    assert bad[0, 0] and bad.sum() == 1  # not its block


@pytest.mark.parametrize("make", matrix([aj.adam, aj.amsgrad], quick=[aj.adam]))
def test_a_huge_gradient_stops_its_own_parameter(make):
    """Its square is infinite, and its updates zero, as in float32; the others go on."""
    inner = make(1e-2)
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.normal(size=(8, *SHAPE))
    grads = jnp.asarray(np.asarray(G["w"]) + noise, jnp.float32)
    grads = grads.at[2, 0, 5].set(1e30)

    @functools.partial(jax.jit, static_argnums=0)
    def run(tx, grads):
        def body(state, g):
            updates, state = tx.update(g, state)
            return state, updates

        return jax.lax.scan(body, tx.init(grads[0]), grads)[1]

    expected = np.asarray(run(inner, grads), np.float64)
    found = np.asarray(run(eight_bit(inner), grads), np.float64)
    assert np.isfinite(found).all()
    assert not found[2:, 0, 5].any() and not expected[2:, 0, 5].any()
    error = np.linalg.norm(found - expected, axis=2) / np.linalg.norm(expected, axis=2)
    assert error[:, 0].max() < 1.5 * error[:, 1:].max() < 0.1  # beside other blocks


def test_a_mean_of_states_is_refused():
    tx = eight_bit(aj.adam(1e-2))
    state = tx.init(P)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, state, state)
    with pytest.raises(TypeError, match=r"mu/w must be int8 or uint8, got float32"):
        tx.update(G, mean, P)


@pytest.mark.slow
def test_complex_parameters(lenient):
    """Their first moments are complex and stay as they are."""
    p = {"c": P["w"] + 1j * G["w"], "w": P["w"]}
    inner = optax.scale_by_adam()
    tx = eight_bit(inner)
    state, expected = tx.init(p), inner.init(p)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(p, state)
        theirs, expected = jax.jit(inner.update)(p, expected)
    assert updates["c"].dtype == state.inner_state.mu["c"].dtype == jnp.complex64
    error = np.linalg.norm(updates["c"] - theirs["c"])
    assert error < 0.05 * np.linalg.norm(theirs["c"])
    assert isinstance(state.inner_state.mu["w"], Blocks)


def test_leaves_without_moments():
    """Integers, empty arrays, scalars and None beside a quantized leaf."""
    p = {"w": P["w"], "none": None, "empty": jnp.ones((0, 3)), "scalar": jnp.ones([])}
    tx = eight_bit(aj.adamw(1e-2), min_size=1)
    state = tx.init(p)
    assert len(blocks_of(state)) == 4  # w and the scalar
    updates, _ = jax.jit(tx.update)(p, state, p)
    assert updates["none"] is None and updates["empty"].shape == (0, 3)
    theirs, _ = aj.adamw(1e-2).update(p, aj.adamw(1e-2).init(p), p)
    np.testing.assert_allclose(updates["scalar"], theirs["scalar"], rtol=1e-6)
    empty = eight_bit(aj.adamw(1e-2))
    assert empty.update({}, empty.init({}), {})[0] == {}


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_moments(optax.scale(-1.0)).init(P)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block_size": 0}, "block_size"), ({"min_size": 0}, "min")],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=f"{message}.* must be at least 1, got 0"):
        quantize_moments(aj.adam(1e-2), **options)


def test_bad_arguments_of_the_code():
    x = jnp.ones(4)
    with pytest.raises(TypeError, match="int8 or uint8"):
        aj.quantize_blockwise(x, jnp.int16)
    with pytest.raises(TypeError, match="uint16"):
        aj.quantize_blockwise(x, bits=jnp.zeros(4, "uint8"))
    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        aj.quantize_blockwise(x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="block_size"):
        aj.quantize_blockwise(x, block_size=0)


# ---------------------------------------------------------------------------
# seeds, jit, sharding, checkpoints
# ---------------------------------------------------------------------------


def steps(tx, state, count):
    for _ in range(count):
        _, state = jax.jit(tx.update)(G, state, P)
    return state


def test_the_rounding_follows_seed_and_step():
    runs = [
        steps(eight_bit(aj.adam(1e-2), seed=seed), eight_bit(aj.adam(1e-2), seed=seed)
              .init(P), 3)
        for seed in (0, 0, 1)
    ]  # fmt: skip
    equal(runs[0], runs[1])
    assert (blocks_of(runs[0])[0].codes != blocks_of(runs[2])[0].codes).any()


def test_parameters_and_moments_are_rounded_independently():
    same = {"a": G["w"], "b": G["w"]}
    tx = eight_bit(aj.scale_by_adam(b1=0.5, b2=0.5))
    state = tx.update(same, tx.init(same))[1].inner_state
    a, b = (np.asarray(state.mu[k].codes) for k in "ab")
    assert 0.2 < (a != b).mean() < 0.6  # a third, if independent
    ups = [
        np.asarray(aj.dequantize_blockwise(x["a"])) > 0.5 * exact
        for x, exact in (
            (state.mu, np.asarray(G["w"])),
            (state.nu, np.asarray(G["w"]) ** 2),
        )
    ]
    assert abs(np.corrcoef(*(u.ravel() for u in ups))[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.slow
def test_sizes_matter_to_init_only():
    state = eight_bit(aj.adam(1e-2), block_size=64).init(P)
    other = eight_bit(aj.adam(1e-2), block_size=256, min_size=10**6)
    equal(
        steps(other, state, 2), steps(eight_bit(aj.adam(1e-2), block_size=64), state, 2)
    )


def test_abstract_init():
    tx = eight_bit(aj.adamw(1e-2))
    abstract, concrete = jax.eval_shape(tx.init, P), tx.init(P)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, c in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)


@pytest.mark.slow
def test_vmap():
    tx = eight_bit(aj.adamw(1e-2))
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), P)
    states = jax.jit(jax.vmap(tx.init))(many)
    init = jax.jit(tx.init)
    with jax.disable_jit():  # the same operations: the same bits
        together, _ = jax.vmap(tx.update)(many, states, many)
    for i in range(2):
        p = jax.tree.map(lambda x, i=i: x[i], many)
        state = init(p)
        with jax.disable_jit():
            alone, _ = tx.update(p, state, p)
        np.testing.assert_array_equal(together["w"][i], alone["w"])


def test_one_trace_and_every_buffer_is_donated():
    tx = eight_bit(aj.adamw(1e-2))

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(state, g, p):
        return tx.update(g, state, p)[1]

    state = tx.init(P)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    memory = step.lower(state, G, P).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    for _ in range(3):
        old, state = state, step(state, G, P)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))


SHARDED = [  # shape, axes of the parameter that are sharded, kind of the mesh's axes
    (shape, spec, kind)
    for shape, spec in (
        ((64, 512), ("x",)),
        ((64, 512), (None, "x")),
        ((8, 64, 128), (None, "x")),
        ((16384,), ("x",)),
        ((64, 400), ("x",)),
    )
    for kind in ("Auto", "Explicit")
]
QUICK_SHARDED = [((64, 512), (None, "x"), "Explicit")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "spec", "kind"), matrix(SHARDED, quick=QUICK_SHARDED)
)
def test_state_follows_sharding(shape, spec, kind):
    """Without communication, and with the same bits as on one device."""
    kind = jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    tx = quantize_moments(aj.adamw(1e-2))
    p = jax.random.normal(jax.random.key(0), shape)
    spread = jax.device_put(p, sharding)

    update = jax.jit(tx.update)
    state, alone = tx.init(spread), tx.init(p)
    program = update.lower(spread, state, spread).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|permute|scatter", program)
    for _ in range(3):
        updates, state = update(spread, state, spread)
        expected, alone = update(p, alone, p)
        assert len(blocks_of(state)) == 2
        for codes, scale in blocks_of(state):
            assert codes.sharding.is_equivalent_to(sharding, codes.ndim)
            assert scale.sharding.is_equivalent_to(sharding, scale.ndim)
    np.testing.assert_array_equal(updates, expected)
    equal(
        jax.tree.map(np.asarray, blocks_of(state)),
        jax.tree.map(np.asarray, blocks_of(alone)),
    )


def test_checkpoints_restore_the_same_bits(tmp_path):
    tx = eight_bit(aj.adamw(aj.one_cycle(1e-2, steps=20)))
    state = steps(tx, tx.init(P), 3)
    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 3, state)
    with checkpoint.open_folder(tmp_path) as checkpoints:
        restored = checkpoint.restore(checkpoints, tx.init(P))
    equal(restored, state)
    equal(steps(tx, restored, 3), steps(tx, state, 3))


@pytest.mark.slow
def test_in_an_optimizer_of_nnx(lenient):
    """Its state consists of Variables."""
    net = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, eight_bit(aj.adamw(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
        optimizer.update(net, grads)
        return loss

    x = jax.random.normal(jax.random.key(0), (8, 64))
    losses = [float(step(net, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(optimizer))}
    assert {"int8", "uint8"} <= kinds


def test_a_state_of_nnx(lenient):
    """Its leaves are in Variables, also those of the updates."""
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Param)
    arrays = dict(enumerate(jax.tree.leaves(params)))
    tx = aj.quantize_moments(aj.adamw(0.1), block_size=8, min_size=32)
    state, right_state = tx.init(params), tx.init(arrays)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        right, right_state = tx.update(arrays, right_state, arrays)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for x, y in zip(*map(jax.tree.leaves, (updates, right)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
