"""AdamW's step: the same training as by update and apply_updates, wherever it runs."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import adam_loop
from tiers import matrix
from ways import (
    ULP,
    WAYS,
    assert_close,
    calls_kernel,
    draws,
    needs_kernel,
    needs_xla_of_jax_0_10,
    program,
    trajectory,
)

import adamw_jax as aj
from adamw_jax.fused import build

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
    "clipped": lambda: aj.chain(optax.clip_by_global_norm(1.0), aj.adamw(0.01)),
    "narrow": lambda: aj.adamw(
        0.01, mu_dtype="bfloat16", stochastic_rounding=False
    ),  # one leaf of many dtypes: XLA
    "accumulated": lambda: aj.accumulate_gradients(aj.adamw(CYCLE), 3),
    "frozen": lambda: aj.freeze_leaves(aj.adamw(0.01), aj.mask_by_path("^bias")),
}


@pytest.mark.parametrize("name", matrix(OPTIMIZERS, quick=("masked", "accumulated")))
def test_a_training(name, lenient):
    """The same parameters and the same state as by two calls."""
    tx = OPTIMIZERS[name]()
    got = trajectory("step", tx, PARAMS, GRADS)
    # What is lost in one step is not recovered: errors of 25 steps, of p and its update
    assert_close(got, trajectory("two calls", tx, PARAMS, GRADS), ulps=50)
    moved = np.abs(got[0]["kernel"] - PARAMS["kernel"]).max()
    assert moved > 0.05
    if build.why_no_kernel() is None:
        step = program("step", tx)
        kernel = calls_kernel(step, PARAMS, tx.init(PARAMS), GRADS[0])
        assert kernel == (name != "narrow")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_a_loop(dtype):
    """In float64, with phases driving everything; bfloat16 gradients as they are."""
    p0 = draws(100, 0)
    grads = [draws(100, i, dtype) for i in range(25)]
    tx = aj.adamw(CYCLE, b2=0.99, weight_decay=0.1)
    got, _ = trajectory("step", tx, p0, grads)
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
    # Of bfloat16 gradients, the two calls would round the updates once more.
    wide = [jax.tree.map(lambda g: g.astype("float32"), tree) for tree in grads]
    tx = aj.adamw(0.05, weight_decay=0.1)
    got, state = trajectory("step", tx, p, grads)
    other, other_state = trajectory("two calls", tx, p, wide)
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
    assert not calls_kernel(program("step", tx), PARAMS, state, GRADS[0])
    assert_close(*(trajectory(way, tx, PARAMS, GRADS[:3]) for way in WAYS), ulps=0)


@pytest.mark.slow
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


@pytest.mark.slow
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
    tx = aj.chain(aj.adamw(0.05), behind)
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


@pytest.mark.parametrize("behind", [[], [optax.scale(0.5)]], ids=["step", "in two"])
def test_effects_happen_once(behind, lenient):
    seen = []

    def count(updates, params):
        jax.debug.callback(lambda: seen.append(1))
        return updates

    tx = aj.chain(optax.stateless(count), aj.adamw(0.1), *behind)
    program("step", tx)(PARAMS, tx.init(PARAMS), GRADS[0])
    jax.effects_barrier()
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.partition(
            {True: tx, False: optax.set_to_zero()}, {k: k != "bias" for k in PARAMS}
        ),
        lambda tx: optax.inject_hyperparams(lambda b: aj.chain(optax.scale(b), tx))(
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
    p, _ = trajectory("step", tx, PARAMS, GRADS[:3])
    np.testing.assert_array_equal(p["bias"], PARAMS["bias"])
    assert (p["kernel"] != PARAMS["kernel"]).any()


def test_none_gradients():
    tx = aj.adamw(0.05)
    grads = [g | {"bias": None} for g in GRADS[:3]]
    p, state = trajectory("step", tx, PARAMS, grads)
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


@needs_kernel
def test_donation_copies_nothing():
    p = {k: jnp.ones(10_000) for k in "abc"}
    tx = aj.adamw(1e-3)
    step = program("step", tx, donate_argnums=(0, 1))
    state = tx.init(p)
    compiled = step.lower(p, state, p).compile()
    assert "f32[10000]{0} copy(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < p["a"].nbytes / 4
    kept = program("step", tx).lower(p, state, p).compile()
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
    for call in (program("step", tx), lambda p, s, g: WAYS["step"](tx, g, s, p)):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "derivative",
    [
        pytest.param(jax.grad, id="reverse"),
        pytest.param(jax.jacfwd, id="forward", marks=pytest.mark.slow),
        pytest.param(jax.hessian, id="second", marks=pytest.mark.slow),
        pytest.param(lambda f: jax.vmap(jax.grad(f)), id="of members"),
    ],
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
    abstract = jax.eval_shape(program("step", tx), PARAMS, state, PARAMS)
    concrete = program("step", tx)(PARAMS, state, PARAMS)
    for x, y in zip(*map(jax.tree.leaves, (abstract, concrete)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@needs_kernel
@pytest.mark.parametrize("lowering", ["cuda", "tpu"])
def test_other_platforms_get_xla(lowering):
    tx = aj.adamw(0.1)
    traced = program("step", tx).trace(PARAMS, tx.init(PARAMS), PARAMS)
    text = traced.lower(lowering_platforms=(lowering,)).as_text()
    assert "adamw_jax_one_pass" not in text and "sqrt" in text


@needs_kernel
@pytest.mark.parametrize(
    ("axes", "spec", "accumulated"),
    matrix(
        list(
            itertools.product(
                ["Auto", "Explicit"], [("x",), (None, "x"), ()], [False, True]
            )
        ),
        quick=[("Auto", ("x",), False), ("Explicit", (None, "x"), True)],
    ),
)
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
        step = program("step", tx, donate_argnums=(0, 1))
        text = step.lower(p, state, split[0]).compile().as_text()
        assert not re.search("all-gather|all-to-all|collective-permute", text)
        shape = {("x",): "500,300", (None, "x"): "1000,150", (): "1000,300"}[spec]
        assert len(re.findall(rf"\(f32\[{shape}\]\S+, .*custom-call\(", text)) == 1
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
        for g in split:
            p, state = step(p, state, g)
    assert p.sharding.is_equivalent_to(sharding, 2)
    assert_close(p, trajectory("step", tx, alone, grads)[0], ulps=1)


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
    step = program("step", tx, donate_argnums=(0, 1), out_shardings=out)
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
    assert_close(step(p, state, p), program("step", tx)(p, state, p), ulps=1)


@pytest.mark.slow
def test_a_state_goes_from_one_way_to_the_other():
    tx = aj.adamw(CYCLE)
    p, state = trajectory("step", tx, PARAMS, GRADS[:10])
    for g in GRADS[10:]:
        p, state = program("two calls", tx)(p, state, g)
    assert_close((p, state), trajectory("two calls", tx, PARAMS, GRADS), ulps=50)


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


CLIP = aj.clip_by_global_norm(0.5)
CLIPPED = {
    "adamw": lambda: aj.chain(CLIP, aj.adamw(CYCLE)),
    "frozen": lambda: aj.chain(
        CLIP, aj.freeze_leaves(aj.adamw(CYCLE), aj.mask_by_path("bias"))
    ),
    "inside freeze": lambda: aj.freeze_leaves(
        aj.chain(CLIP, aj.adamw(CYCLE)), aj.mask_by_path("bias")
    ),
    "accumulated": lambda: aj.chain(
        CLIP, aj.accumulate_gradients(aj.chain(CLIP, aj.adamw(CYCLE)), 2)
    ),
    "nesterov": lambda: aj.chain(CLIP, aj.adamw(CYCLE, nesterov=True)),
    "another between": lambda: aj.chain(CLIP, optax.scale(2.0), aj.adamw(CYCLE)),
    "the last link": lambda: CLIP,
    "a mask between": lambda: aj.chain(
        CLIP, optax.masked(optax.set_to_zero(), is_bias), aj.adamw(CYCLE)
    ),
    "a decay between": lambda: aj.chain(
        CLIP, optax.add_decayed_weights(0.1, is_bias), aj.adamw(CYCLE)
    ),
    "a mask around": lambda: aj.chain(CLIP, optax.masked(aj.adamw(CYCLE), is_bias)),
    "sgd": lambda: aj.chain(CLIP, aj.sgd(0.1)),
    "scheduled": lambda: aj.chain(
        aj.with_hyperparams(aj.clip_by_global_norm, max_norm=0.5), aj.adamw(CYCLE)
    ),
}


@pytest.mark.parametrize("name", matrix(CLIPPED, quick=("adamw",)))
def test_clipped(lenient, name):
    tx = CLIPPED[name]()
    at_once, two = (trajectory(way, tx, PARAMS, GRADS) for way in WAYS)
    assert_close(at_once, two, ulps=50)


@pytest.mark.slow
def test_clipped_with_moments_in_eight_bits(lenient):
    """A code may round the other way where the last bit of a gradient differs."""
    tx = aj.chain(CLIP, aj.quantize_moments(aj.adamw(CYCLE)))
    (at_once, _), (two, _) = (trajectory(way, tx, PARAMS, GRADS) for way in WAYS)
    for x, y in zip(jax.tree.leaves(at_once), jax.tree.leaves(two), strict=True):
        assert (~np.isclose(x, y, rtol=1e-5, atol=1e-5)).mean() < 1e-3


@needs_kernel
@needs_xla_of_jax_0_10
def test_the_clipped_gradient_is_not_written():
    """The kernel multiplies; what it is given is the gradient itself."""
    p = draws(100_003, 0)
    tx = CLIPPED["adamw"]()
    step = program("step", tx, donate_argnums=(0, 1))
    compiled = step.lower(p, tx.init(p), p).compile()
    assert calls_kernel(step, p, tx.init(p), p)
    assert compiled.memory_analysis().temp_size_in_bytes < p.nbytes / 10
    (call,) = re.findall(r"custom-call\((.*?)\), custom_call", compiled.as_text())
    assert not re.search(r"fusion|multiply", call.rsplit(",", 1)[0])
