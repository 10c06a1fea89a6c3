"""AdamW at once: the kernel, XLA in its place, and update_and_apply around them."""

import functools
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import adam_loop

import adamw_jax as aj
from adamw_jax.fused import build, kernel

needs_kernel = pytest.mark.skipif(
    build.why_no_kernel() is not None, reason=f"no kernel: {build.why_no_kernel()}"
)
SIZES = (0, 1, 63, 64, 100_003, 1_000_003)  # the last two: several chunks and threads
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7}  # from 1 to the next number


def draws(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def moments(shape, seed):
    return draws(shape, seed), draws(shape, seed + 1) ** 2


def scalars(weight_decay=0.1, eps=1e-8, eps_root=0.0, factor=1.0):
    betas = (0.9, 0.1, 0.271, 0.999, 0.001, 0.003)
    return jnp.array((*betas, eps, eps_root, 0.05, weight_decay, factor), "float32")


def two_calls(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return aj.apply_updates(params, updates), state


WAYS = {"two calls": two_calls, "at once": aj.update_and_apply}


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


# ---- the kernel ---------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("g_dtype", ULP)
@pytest.mark.parametrize("p_dtype", ULP)
@pytest.mark.parametrize("size", SIZES)
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
            # XLA contracts the same products today: equal to the bit, but for bad luck
            x, theirs = (np.asarray(z, np.float64) for z in (x, theirs))
            np.testing.assert_allclose(x, theirs, rtol=2 * ulp, atol=4e-7)
            assert (x != theirs).mean() <= 0.01 if size > 1000 else True


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


@needs_kernel
def test_many_calls_at_a_time():
    """Of several programs, in several threads: none waits for another for ever."""
    from concurrent.futures import ThreadPoolExecutor

    tx = aj.adamw(0.1)
    params = {str(i): draws(150_000 + i, i) for i in range(12)}
    step, state = program("at once", tx), tx.init(params)
    expected, _ = step(params, state, params)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(step, params, state, params) for _ in range(24)]
        for job in jobs:
            for key, leaf in job.result(timeout=60)[0].items():
                np.testing.assert_array_equal(leaf, expected[key])


# ---- AdamW --------------------------------------------------------------------------

PARAMS = {
    "kernel": draws((61, 7), 0),
    "bias": draws(5, 1),
    "large": draws(140_001, 2),
    "nothing": None,
}
GRADS = [jax.tree.map(lambda p, i=i: draws(p.shape, 10 + i), PARAMS) for i in range(25)]
CYCLE = aj.one_cycle(0.1, steps=25)
OPTIMIZERS = {
    "numbers": lambda: aj.adamw(0.01, weight_decay=0.1),
    "phases": lambda: aj.adamw(CYCLE, weight_decay=0.1),
    "masked": lambda: aj.adamw(
        CYCLE, weight_decay=0.1, mask=lambda p: {k: k != "bias" for k in p}
    ),
    "schedules": lambda: aj.adamw(
        lambda t: 0.1 / (1 + t), lambda t: 0.9 - 0.5 / (2 + t), 0.99, weight_decay=0.1
    ),
    "maximize": lambda: aj.adamw(0.01, weight_decay=0.1, maximize=True),
    "torch": lambda: aj.adamw(CYCLE, bias_correction="torch", eps_root=1e-6),
    "uncorrected": lambda: aj.adamw(0.01, bias_correction="none", eps=1e-3),
    "schedule decay": lambda: aj.adamw(
        CYCLE, weight_decay=1e-3, decay_scale="schedule"
    ),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), aj.adamw(0.01)),
    "narrow": lambda: aj.adamw(
        0.01, mu_dtype="bfloat16", stochastic_rounding=False
    ),  # one leaf of many dtypes: XLA
    "accumulated": lambda: aj.accumulate_gradients(aj.adamw(CYCLE), 3),
    "frozen": lambda: aj.freeze_leaves(aj.adamw(0.01), aj.mask_by_path("^bias")),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training(name, lenient):
    """The same parameters and the same state as by two calls."""
    tx = OPTIMIZERS[name]()
    got = trajectory("at once", tx, PARAMS, GRADS)
    # What is lost in one step is not recovered: errors of 25 steps, of p and its update
    assert_close(got, trajectory("two calls", tx, PARAMS, GRADS), ulps=50)
    moved = np.abs(got[0]["kernel"] - PARAMS["kernel"]).max()
    assert moved > 0.05
    if build.why_no_kernel() is None:
        step = program("at once", tx)
        kernel = calls_kernel(step, PARAMS, tx.init(PARAMS), GRADS[0])
        assert kernel == (name != "narrow")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_a_loop(dtype):
    """In float64, with phases driving everything; bfloat16 gradients as they are."""
    p0 = draws(100, 0)
    grads = [draws(100, i, dtype) for i in range(25)]
    tx = aj.adamw(CYCLE, b2=0.99, weight_decay=0.1)
    got, _ = trajectory("at once", tx, p0, grads)
    expected = adam_loop(
        p0,
        [np.asarray(g, np.float64) for g in grads],
        lambda t: float(CYCLE.at(t)["learning_rate"]),
        lambda t: float(CYCLE.at(t)["b1"]),
        lambda t: 0.99,
        weight_decay=0.1,
    )[-1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_parameters():
    """Rounded at every step, so that one rounding the other way stays."""
    p = {"a": draws(1000, 0, "bfloat16"), "b": draws(140_001, 1, "bfloat16")}
    grads = [
        jax.tree.map(lambda x, i=i: draws(x.shape, i, "bfloat16"), p) for i in range(20)
    ]
    tx = aj.adamw(0.05, weight_decay=0.1)
    (got, state), (other, other_state) = (
        trajectory(way, tx, p, grads) for way in reversed(WAYS)
    )
    assert_close(state, other_state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=2 * ULP["bfloat16"], atol=1e-3)
        assert (x != y).mean() < 0.01


@pytest.mark.parametrize("options", [{"nesterov": True}, {"epsilon_hat": True}])
def test_other_rules_go_the_ordinary_way(options):
    tx = aj.adamw(0.01, **options)
    state = tx.init(PARAMS)
    assert not calls_kernel(program("at once", tx), PARAMS, state, GRADS[0])
    assert_close(*(trajectory(way, tx, PARAMS, GRADS[:3]) for way in WAYS), ulps=0)


def test_random_rounding_goes_the_ordinary_way():
    """The same bits are drawn."""
    tx = aj.adamw(0.01, mu_dtype="bfloat16", nu_dtype="bfloat16")
    ways = (trajectory(way, tx, PARAMS, GRADS[:3]) for way in WAYS)
    assert_close(*ways, ulps=0)


def is_bias(tree):
    """By path: False for what is taken for a leaf, as it has none."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" in jax.tree_util.keystr(path), tree
    )


@pytest.mark.parametrize(
    "behind",
    [
        optax.scale(0.5),
        aj.round_updates_stochastically(),
        optax.masked(optax.scale(0.5), {k: k == "bias" for k in PARAMS}),
        optax.masked(optax.scale(0.5), is_bias),
        optax.masked(optax.scale(0.5), aj.mask_by_path("bias")),
        optax.masked(optax.scale(0.5), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.add_decayed_weights(-0.5, is_bias),
        optax.partition(
            {"body": optax.scale(0.1), "head": optax.identity()},
            aj.labels_by_path({"body": "bias"}, default="head"),
        ),
        optax.transforms.freeze(is_bias),
        optax.apply_every(2),
        optax.identity(),
    ],
)
def test_a_link_behind(behind, lenient):
    """It needs updates, unless it does nothing with them."""
    tx = optax.chain(aj.adamw(0.05), behind)
    assert_close(*(trajectory(way, tx, PARAMS, GRADS[:4]) for way in WAYS), ulps=10)


def test_parameters_that_a_wrapper_replaces(lenient):
    """By copies in float32, which are not to come back in place of the bfloat16."""
    inner = aj.adamw(0.05)

    def wide(params):
        return jax.tree.map(lambda x: x.astype("float32"), params)

    tx = optax.GradientTransformationExtraArgs(
        lambda params: inner.init(wide(params)),
        lambda updates, state, params=None, **extra: inner.update(
            updates, state, wide(params), **extra
        ),
    )
    params = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    assert_close(*(trajectory(way, tx, params, GRADS[:2]) for way in WAYS), ulps=10)


@pytest.mark.parametrize("behind", [[], [optax.scale(0.5)]], ids=["at once", "in two"])
def test_effects_happen_once(behind, lenient):
    seen = []

    def count(updates, params):
        jax.debug.callback(lambda: seen.append(1))
        return updates

    tx = optax.chain(optax.stateless(count), aj.adamw(0.1), *behind)
    program("at once", tx)(PARAMS, tx.init(PARAMS), GRADS[0])
    jax.effects_barrier()
    assert len(seen) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.partition(
            {True: tx, False: optax.set_to_zero()}, {k: k != "bias" for k in PARAMS}
        ),
        lambda tx: optax.inject_hyperparams(lambda b: optax.chain(optax.scale(b), tx))(
            2.0
        ),
        lambda tx: aj.quantize_moments(tx, min_size=256),
        lambda tx: aj.sgd(0.1, momentum=0.9),
    ],
    ids=["if finite", "MultiSteps", "partition", "inject", "quantized", "sgd"],
)
def test_any_transformation(wrap, lenient):
    tx = wrap(aj.adamw(0.05))
    init, update = tx.init, tx.update
    tx = optax.GradientTransformationExtraArgs(init, update)
    (p, _), (other, _) = (trajectory(w, tx, PARAMS, GRADS[:4]) for w in reversed(WAYS))
    # A moment next to the middle of two codes may become the one or the other.
    for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(other), strict=True):
        assert (np.abs(x - y) > 1e-5).mean() < 1e-3
        assert np.abs(x - y).max() < 0.05


def test_frozen_leaves_do_not_change_by_one_bit():
    tx = aj.freeze_leaves(aj.adamw(0.05), aj.mask_by_path("^bias"))
    p, _ = trajectory("at once", tx, PARAMS, GRADS[:3])
    np.testing.assert_array_equal(p["bias"], PARAMS["bias"])
    assert (p["kernel"] != PARAMS["kernel"]).any()


def test_none_gradients():
    tx = aj.adamw(0.05)
    grads = [g | {"bias": None} for g in GRADS[:3]]
    p, state = trajectory("at once", tx, PARAMS, grads)
    np.testing.assert_array_equal(p["bias"], PARAMS["bias"])
    assert p["nothing"] is None
    np.testing.assert_array_equal(state.inner_state[0].mu["bias"], 0)
    assert_close((p, state), trajectory("two calls", tx, PARAMS, grads), ulps=20)


def test_nnx_state(lenient):
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    _, params = nnx.split(net)
    grads = [jax.tree.map(jnp.ones_like, params)] * 2
    tx = aj.adamw(0.05)
    ways = [trajectory(way, tx, params, grads) for way in WAYS]
    assert_close(*ways, ulps=10)


def test_float64_leaves(x64):
    p = {"a": draws(9, 0, "float64"), "b": draws(9, 1, "float32")}
    g = jax.tree.map(lambda x: x + 1, p)
    assert_close(*(trajectory(w, aj.adamw(0.05), p, [g, p]) for w in WAYS), ulps=20)


# ---- transformations of JAX ---------------------------------------------------------


@needs_kernel
def test_donation_copies_nothing():
    p = {k: jnp.ones(10_000) for k in "abc"}
    tx = aj.adamw(1e-3)
    step = program("at once", tx, donate_argnums=(0, 1))
    state = tx.init(p)
    compiled = step.lower(p, state, p).compile()
    assert "f32[10000]{0} copy(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < p["a"].nbytes / 4
    kept = program("at once", tx).lower(p, state, p).compile()
    assert "f32[10000]{0} copy(" in kept.as_text()  # can be seen there
    g = jax.tree.map(jnp.copy, p)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((p, state)) if x.ndim]
    donated = [x for x in jax.tree.leaves((p, state)) if x.ndim]
    new = jax.tree.leaves(step(p, state, g))
    assert all(x.is_deleted() for x in donated)
    assert places == [x.unsafe_buffer_pointer() for x in new if x.ndim]


def test_without_donation_the_inputs_stay():
    """Also where one array is given as parameter and gradient, and not in a jit."""
    tx, p = aj.adamw(0.1), {"a": draws(140_001, 0)}
    before, state = np.array(p["a"]), tx.init(p)
    for call in (program("at once", tx), lambda p, s, g: WAYS["at once"](tx, g, s, p)):
        new, new_state = call(p, state, p)
        np.testing.assert_array_equal(p["a"], before)
        np.testing.assert_array_equal(state.inner_state[0].mu["a"], 0)
        assert (new["a"] != before).any()
        np.testing.assert_allclose(new_state.inner_state[0].mu["a"], 0.1 * before, 1e-5)


def test_in_a_scan():
    tx = aj.adamw(CYCLE, weight_decay=0.1)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)

    def train(way, p):
        def body(carry, g):
            return WAYS[way](tx, g, carry[1], carry[0]), None

        return jax.lax.scan(body, (p, tx.init(p)), grads)[0]

    ways = [jax.jit(functools.partial(train, way))(PARAMS) for way in WAYS]
    assert_close(*ways, ulps=50)


def test_vmap():
    """Of parameters, states and rates: XLA computes it."""
    rates, p = jnp.array([0.1, 0.2, 0.3]), draws((3, 50), 0)

    def train(way, rate, p):
        tx = aj.adamw(rate)
        state = tx.init(p)
        for _ in range(3):
            p, state = WAYS[way](tx, p, state, p)
        return p

    got, expected = (
        jax.jit(jax.vmap(functools.partial(train, way)))(rates, p)
        for way in reversed(WAYS)
    )
    assert_close(got, expected, ulps=20)


@pytest.mark.parametrize(
    "derivative",
    [jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.vmap(jax.grad(f))],
    ids=["reverse", "forward", "second", "of members"],
)
def test_derivatives(derivative):
    """With respect to the learning rate and a decay of 0, through three steps."""

    def loss(way, hyper):
        tx = aj.adamw(hyper[0], weight_decay=hyper[1], eps_root=1e-6)
        p = {"a": draws(5, 0), "b": draws((2, 3), 1)}
        state = tx.init(p)
        for _ in range(3):
            p, state = WAYS[way](tx, jax.tree.map(jnp.sin, p), state, p)
        return sum((x**2).sum() for x in jax.tree.leaves(p))

    hyper = jnp.array([[0.1, 0.0], [0.2, 0.3]])
    hyper = hyper if "lambda" in derivative.__name__ else hyper[0]
    got, expected = (
        jax.jit(derivative(functools.partial(loss, way)))(hyper) for way in WAYS
    )
    assert np.abs(got).min() > 0
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_shapes_alone():
    tx = aj.adamw(0.1)
    state = tx.init(PARAMS)
    abstract = jax.eval_shape(program("at once", tx), PARAMS, state, PARAMS)
    concrete = program("at once", tx)(PARAMS, state, PARAMS)
    for x, y in zip(*map(jax.tree.leaves, (abstract, concrete)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@needs_kernel
@pytest.mark.parametrize("lowering", ["cuda", "tpu"])
def test_other_platforms_get_xla(lowering):
    tx = aj.adamw(0.1)
    traced = program("at once", tx).trace(PARAMS, tx.init(PARAMS), PARAMS)
    text = traced.lower(lowering_platforms=(lowering,)).as_text()
    assert "adamw_jax_one_pass" not in text and "sqrt" in text


@needs_kernel
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [("x",), (None, "x"), ()], ids=str)
@pytest.mark.parametrize("accumulated", [False, True])
def test_two_devices(axes, spec, accumulated):
    """Every device computes what it holds, and nothing is sent."""
    types = (getattr(jax.sharding.AxisType, axes),)
    mesh = jax.make_mesh((2,), ("x",), axis_types=types)
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    tx = aj.adamw(CYCLE, weight_decay=0.1)
    tx = aj.accumulate_gradients(tx, 2) if accumulated else tx
    alone, grads = draws((1000, 300), 0), [draws((1000, 300), i) for i in range(4)]
    with jax.set_mesh(mesh):
        p = jax.device_put(np.asarray(alone), sharding)
        state = tx.init(p)
        split = [jax.device_put(g, sharding) for g in grads]
        step = program("at once", tx, donate_argnums=(0, 1))
        text = step.lower(p, state, split[0]).compile().as_text()
        assert not re.search("all-gather|all-to-all|collective-permute", text)
        shape = {("x",): "500,300", (None, "x"): "1000,150", (): "1000,300"}[spec]
        assert len(re.findall(rf"\(f32\[{shape}\]\S+, .*custom-call\(", text)) == 1
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
        for g in split:
            p, state = step(p, state, g)
    assert p.sharding.is_equivalent_to(sharding, 2)
    assert_close(p, trajectory("at once", tx, alone, grads)[0], ulps=1)


@needs_kernel
@pytest.mark.parametrize("grads_too", [False, True])
def test_moments_sharded_and_parameters_whole(grads_too):
    """The parameters are sent, as they must be; the moments stay where they are."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, half = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("x",)))
    tx, alone = aj.adamw(0.1, weight_decay=0.1), draws(400_000, 0)
    p = jax.device_put(alone, whole)
    g = jax.device_put(draws(400_000, 1), half if grads_too else whole)
    state = jax.tree.map(
        lambda x: jax.device_put(x, half if x.ndim and x.size > 99 else whole),
        tx.init(alone),
    )
    out = jax.tree.map(lambda x: x.sharding, (p, state))
    step = program("at once", tx, donate_argnums=(0, 1), out_shardings=out)
    compiled = step.lower(p, state, g).compile()
    assert len(re.findall(r" all-gather\(", compiled.as_text())) == 1
    assert 'custom_call_target="adamw_jax_one_pass' in compiled.as_text()
    expected = program("two calls", tx)(alone, tx.init(alone), jax.device_get(g))
    assert_close(step(p, state, g), jax.device_put(expected, whole), ulps=1)


@needs_kernel
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, p = aj.adamw(0.1), draws((1000, 300), 0)
    state = tx.init(p)
    specs = (
        jax.P("x"),
        jax.tree.map(lambda x: jax.P("x") if x.ndim > 1 else jax.P(), state),
    )
    step = jax.jit(
        jax.shard_map(
            lambda p, state, g: aj.update_and_apply(tx, g, state, p),
            mesh=mesh,
            in_specs=(*specs, jax.P("x")),
            out_specs=specs,
            check_vma=check_vma,
        )
    )
    assert calls_kernel(step, p, state, p)
    assert_close(step(p, state, p), program("at once", tx)(p, state, p), ulps=1)


def test_a_state_goes_from_one_way_to_the_other():
    tx = aj.adamw(CYCLE)
    p, state = trajectory("at once", tx, PARAMS, GRADS[:10])
    for g in GRADS[10:]:
        p, state = program("two calls", tx)(p, state, g)
    assert_close((p, state), trajectory("two calls", tx, PARAMS, GRADS), ulps=50)


# ---- errors -------------------------------------------------------------------------


def test_leaves_that_do_not_match():
    tx = aj.adamw(0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"leaf bias: shape \(4,\) against \(5,\)"):
        aj.update_and_apply(tx, GRADS[0] | {"bias": jnp.ones(4)}, state, PARAMS)
    with pytest.raises(ValueError, match="updates has no leaf bias"):
        grads = {k: g for k, g in GRADS[0].items() if k != "bias"}
        aj.update_and_apply(tx, grads, state, PARAMS)
    with pytest.raises(ValueError, match="do not match at leaf bias"):
        aj.update_and_apply(tx, GRADS[0], state, PARAMS | {"bias": jnp.ones(4)})
    with pytest.raises(TypeError, match="update bias has dtype int32"):
        aj.update_and_apply(tx, GRADS[0] | {"bias": jnp.arange(5)}, state, PARAMS)


# ---- with and without a compiler ----------------------------------------------------

CODE = """
import warnings, jax.numpy as jnp, adamw_jax as aj
from adamw_jax.fused import build, kernel
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tx, p = aj.adamw(0.1), jnp.ones(3)
    for _ in range(2):
        p, state = aj.update_and_apply(tx, p, tx.init(p), p)
print([str(w.message)[:40] for w in caught], p[0], build.why_no_kernel(), sep="|")
"""


def in_process(tmp_path, **env):
    names = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "ADAMW_JAX_KERNEL")
    }
    env = names | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | env
    out = subprocess.run(
        [sys.executable, "-c", CODE],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    warned, p, why = out.stdout.strip().split("|", 2)
    assert float(p) == pytest.approx(0.8, abs=1e-3)
    return warned, why


def test_switched_off(tmp_path):
    warned, why = in_process(tmp_path, ADAMW_JAX_KERNEL="0")
    assert (warned, why) == ("[]", "ADAMW_JAX_KERNEL=0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", [shutil.which("false"), "/no/such/compiler"])
def test_a_compiler_that_fails(tmp_path, compiler):
    """One warning, whatever is computed after it; nothing is left behind."""
    warned, why = in_process(tmp_path, CXX=compiler)
    assert warned == "['adamw_jax goes without its kernel for CP']"
    assert why.startswith("it could not be compiled and loaded")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_kernel
def test_a_compiler_that_does_not_know_the_processor(tmp_path):
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *native*) exit 1;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    script.chmod(0o755)
    assert in_process(tmp_path, CXX=str(script)) == ("[]", "None")


def test_a_command_that_cannot_be_read(tmp_path):
    warned, why = in_process(tmp_path, CXX='c++ "')
    assert warned == "['adamw_jax goes without its kernel for CP']"
    assert "No closing quotation" in why


@needs_kernel
def test_a_relative_cache_is_none(tmp_path, monkeypatch):
    """As its specification says; nothing is written where the program happens to be."""
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    assert in_process(tmp_path, XDG_CACHE_HOME="cache", HOME=home) == ("[]", "None")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_no_compiler(tmp_path):
    warned, why = in_process(tmp_path, PATH=str(tmp_path))
    assert (warned, why[:24]) == ("[]", "there is no C++ compiler")


@needs_kernel
def test_it_is_compiled_once(tmp_path):
    assert in_process(tmp_path) == ("[]", "None")
    (path,) = (tmp_path / "adamw_jax").iterdir()
    made = path.stat().st_mtime_ns
    assert in_process(tmp_path, PATH=os.environ["PATH"]) == ("[]", "None")
    assert [x.stat().st_mtime_ns for x in path.parent.iterdir()] == [made]


@needs_kernel
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "adamw_jax").write_text("a file where a folder should be")
    assert in_process(tmp_path) == ("[]", "None")


@needs_kernel
def test_a_damaged_kernel_is_made_anew(tmp_path):
    in_process(tmp_path)
    (path,) = (tmp_path / "adamw_jax").iterdir()
    path.write_bytes(b"no library")
    assert in_process(tmp_path) == ("[]", "None")


# ---- behind clip_by_global_norm -----------------------------------------------------

CLIP = aj.clip_by_global_norm(0.5)
CLIPPED = {
    "adamw": lambda: optax.chain(CLIP, aj.adamw(CYCLE)),
    "frozen": lambda: optax.chain(
        CLIP, aj.freeze_leaves(aj.adamw(CYCLE), aj.mask_by_path("bias"))
    ),
    "inside freeze": lambda: aj.freeze_leaves(
        optax.chain(CLIP, aj.adamw(CYCLE)), aj.mask_by_path("bias")
    ),
    "accumulated": lambda: optax.chain(
        CLIP, aj.accumulate_gradients(optax.chain(CLIP, aj.adamw(CYCLE)), 2)
    ),
    "nesterov": lambda: optax.chain(CLIP, aj.adamw(CYCLE, nesterov=True)),
    "another between": lambda: optax.chain(CLIP, optax.scale(2.0), aj.adamw(CYCLE)),
    "the last link": lambda: CLIP,
    "a mask between": lambda: optax.chain(
        CLIP, optax.masked(optax.set_to_zero(), is_bias), aj.adamw(CYCLE)
    ),
    "a decay between": lambda: optax.chain(
        CLIP, optax.add_decayed_weights(0.1, is_bias), aj.adamw(CYCLE)
    ),
    "a mask around": lambda: optax.chain(CLIP, optax.masked(aj.adamw(CYCLE), is_bias)),
    "sgd": lambda: optax.chain(CLIP, aj.sgd(0.1)),
    "scheduled": lambda: optax.chain(
        aj.with_hyperparams(aj.clip_by_global_norm, max_norm=0.5), aj.adamw(CYCLE)
    ),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped(lenient, name):
    tx = CLIPPED[name]()
    at_once, two = (trajectory(way, tx, PARAMS, GRADS) for way in WAYS)
    assert_close(at_once, two, ulps=50)


def test_clipped_with_moments_in_eight_bits(lenient):
    """A code may round the other way where the last bit of a gradient differs."""
    tx = optax.chain(CLIP, aj.quantize_moments(aj.adamw(CYCLE)))
    (at_once, _), (two, _) = (trajectory(way, tx, PARAMS, GRADS) for way in WAYS)
    for x, y in zip(jax.tree.leaves(at_once), jax.tree.leaves(two), strict=True):
        assert (~np.isclose(x, y, rtol=1e-5, atol=1e-5)).mean() < 1e-3


@needs_kernel
def test_the_clipped_gradient_is_not_written():
    """The kernel multiplies; what it is given is the gradient itself."""
    p = draws(100_003, 0)
    tx = CLIPPED["adamw"]()
    step = program("at once", tx, donate_argnums=(0, 1))
    compiled = step.lower(p, tx.init(p), p).compile()
    assert calls_kernel(step, p, tx.init(p), p)
    assert compiled.memory_analysis().temp_size_in_bytes < p.nbytes / 10
    (call,) = re.findall(r"custom-call\((.*?)\), custom_call", compiled.as_text())
    assert not re.search(r"fusion|multiply", call.rsplit(",", 1)[0])
