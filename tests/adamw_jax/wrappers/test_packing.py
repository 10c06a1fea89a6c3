"""Parameters in a few buffers: the same training, bit for bit where XLA allows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import core, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from reference import compiled_update
from tiers import matrix

import adamw_jax as aj
from adamw_jax import no_decay_on_bias_and_norm as not_bias

rng = np.random.default_rng(3)


def params_of(dtype=jnp.float32):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "dense": {"kernel": draw(3, 4), "bias": draw(4)},
        "norm": {"scale": draw(4)},
        "head": [draw(4, 2), None, draw()],
        "large": {"kernel": draw(50, 30)},
        "empty": draw(0, 3),
    }


def loss_of(p, x):
    y = x @ p["dense"]["kernel"] + p["dense"]["bias"][None]
    y = y * p["norm"]["scale"][None]
    y = jnp.tanh(y) @ p["head"][0] * p["head"][2]
    return (y**2).mean() + (p["large"]["kernel"] ** 2).mean() * x[0, 0]


def train(tx, params, steps=5, scale=1.0):
    """Parameters and state after some steps of a compiled loop."""

    @jax.jit
    def step(params, state, x):
        def loss(params):
            tree = params.tree if isinstance(params, aj.Packed) else params
            return loss_of(tree, x)

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    xs = np.random.default_rng(4).normal(size=(steps, 6, 3)) * scale
    dtype, state = jax.tree.leaves(params)[0].dtype, tx.init(params)
    for x in xs:
        params, state = step(params, state, jnp.asarray(x, dtype))
    return params, state


def compare(a, b, **kwargs):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        compare = (
            np.testing.assert_allclose if kwargs else np.testing.assert_array_equal
        )
        compare(x, y, **kwargs)


labels = aj.labels_by_path({"head": "^head"}, default="body")
CYCLE = aj.one_cycle(0.1, steps=20, weight_decay=0.1)
OPTIMIZERS = {
    "adamw": (lambda: aj.adamw(0.1, mask=not_bias), [not_bias]),
    "cycle": (lambda: aj.adamw(CYCLE, mask=not_bias), [not_bias]),
    "amsgrad": (lambda: aj.amsgrad(0.1, l2=0.1), []),
    "sgd": (lambda: aj.sgd(0.1, 0.9, weight_decay=0.1, mask=not_bias), [not_bias]),
    "clipped": (
        lambda: optax.chain(aj.clip_by_global_norm(0.01), aj.adam(0.1, eps=1e-3)),
        [],
    ),
    "groups": (
        lambda: optax.chain(
            aj.adamw(0.1, mask=not_bias),
            aj.scale_by_group({"head": 1.0, "body": 0.1}, labels),
        ),
        [not_bias, labels],
    ),
    "frozen": (
        lambda: aj.freeze_leaves(
            aj.adamw(0.1, mask=not_bias), aj.mask_by_path("^dense")
        ),
        [not_bias, aj.mask_by_path("^dense")],
    ),
    "accumulated": (lambda: aj.accumulate_gradients(aj.adamw(0.1), 2), []),
    "masked by Optax": (
        lambda: optax.chain(
            optax.masked(optax.scale(0.5), aj.mask_by_path("kernel$")), aj.sgd(0.1)
        ),
        [aj.mask_by_path("kernel$")],
    ),
    "Optax's": (lambda: optax.adamw(0.1, weight_decay=0.1), []),
}


@pytest.mark.parametrize(
    ("name", "max_size"),
    matrix(
        list(itertools.product(OPTIMIZERS, (0, 1000, 10**6))),
        quick=[(name, 1000) for name in list(OPTIMIZERS)[::3]],
    ),
)
def test_the_training_is_the_same(x64, lenient, name, max_size):
    make, masks = OPTIMIZERS[name]
    params = params_of(jnp.float64)
    plain, plain_state = train(make(), params)
    flat = aj.pack(params, *masks, max_size=max_size)
    packed, state = train(make(), flat)
    assert isinstance(packed, aj.Packed)
    compare(packed.tree, plain, rtol=1e-12)
    compare(aj.unpack(state), plain_state, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_bfloat16_beside_float32():
    params = params_of()
    params["dense"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["dense"])
    flat = aj.pack(params)
    assert sorted(flat.buffers) == ["bfloat16", "float32"]
    compare(flat.tree, params)
    tx = aj.adamw(0.1)
    grads = jax.tree.map(jnp.ones_like, flat)
    updates, state = tx.update(grads, tx.init(flat), flat)
    ones = jax.tree.map(jnp.ones_like, params)
    expected, _ = tx.update(ones, tx.init(params), params)
    compare(aj.apply_updates(flat, updates).tree, aj.apply_updates(params, expected))


def test_the_gradient_is_one_of_the_buffers():
    params, x = params_of(), jnp.ones((6, 3))
    flat = aj.pack(params)
    grads = jax.grad(lambda p: loss_of(p.tree, x))(flat)
    expected = jax.grad(loss_of)(params, x)
    compare(grads.tree, expected, rtol=1e-6)
    compare(grads, aj.pack_like(expected, flat), rtol=1e-6)
    # In the other direction, too.
    _, tangent = jax.jvp(lambda p: loss_of(p.tree, x), (flat,), (flat,))
    _, expected = jax.jvp(lambda p: loss_of(p, x), (params,), (params,))
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)


def test_what_lies_where():
    flat = aj.pack(params_of(), not_bias, max_size=100)
    assert {name: x.shape for name, x in flat.buffers.items()} == {
        "float32/True": (1024,),
        "float32/False": (1024,),
    }
    assert [x.shape for x in flat.leaves] == [(50, 30)]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(flat)]
    assert paths == ["['float32/False']", "['float32/True']", "['large/kernel']"]
    assert repr(flat) == (
        "7 leaves, 1 of them not packed\n"
        "float32/False: 3 leaves in (1024,)\n"
        "float32/True: 3 leaves in (1024,)"
    )


def test_the_filling_stays_zero():
    packed, state = train(aj.adamw(0.1, weight_decay=0.1), aj.pack(params_of()))
    used = sum(x.size for x in jax.tree.leaves(packed.tree))
    for tree in (packed, state.inner_state[0].mu, state.inner_state[0].nu):
        np.testing.assert_array_equal(tree.buffers["float32"][used:], 0)


def test_a_step_is_as_small_as_that_of_one_leaf():
    """And is compiled once."""

    def fusions(count):
        flat = aj.pack({str(i): jnp.ones(8) for i in range(count)})
        return compiled_update(aj.adamw(0.1), flat).as_text().count(" fusion(")

    assert fusions(300) == fusions(1)
    traced = 0

    @jax.jit
    def step(params):
        nonlocal traced
        traced += 1
        return jax.tree.map(lambda x: x + 1, params)

    params = params_of()
    first = aj.pack(params)
    assert aj.pack(params_of())._layout is first._layout  # compared at every call
    step(step(first))
    step(aj.pack(params))  # another object of the same layout
    assert traced == 1


dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
arrays = st.builds(lambda shape, dtype: jnp.ones(shape, dtype), shapes, dtypes)
trees = st.recursive(
    arrays | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "float32", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(trees, st.integers(0, 30))
def test_any_tree(tree, max_size):
    tree = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), tree
    )
    flat = aj.pack(tree, max_size=max_size)
    compare(flat.tree, tree)
    compare(aj.pack_like(tree, flat), flat)
    assert all(buffer.size % 1024 == 0 for buffer in flat.buffers.values())


def test_checkpoints_are_plain(tmp_path):
    tx = aj.adamw(CYCLE, mask=not_bias)
    never = params_of()
    del never["empty"]  # Orbax does not write it
    params, state = train(tx, aj.pack(never, not_bias))
    plain = {"params": aj.unpack(params), "state": aj.unpack(state)}
    assert jax.tree.structure(plain) == jax.tree.structure(
        {"params": never, "state": tx.init(never)}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", plain)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: plain)
        restored = checkpointer.restore(tmp_path / "1", shapes)
    compare(aj.pack_like(restored["params"], params), params)
    compare(aj.pack_like(restored["state"], state), state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_there_and_back(lenient, name):
    make, masks = OPTIMIZERS[name]
    flat, tx = aj.pack(params_of(), *masks), make()
    state = tx.init(flat)
    plain = aj.unpack(state)
    assert jax.tree.structure(plain) == jax.tree.structure(tx.init(flat.tree))
    compare(aj.pack_like(plain, state), state)
    shapes = aj.unpack(jax.eval_shape(tx.init, flat))
    assert jax.tree.structure(shapes) == jax.tree.structure(plain)
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(plain), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.slow
def test_blocks_that_cross_the_leaves():
    """They train, and are not taken for blocks of the leaves."""
    params = {"a": jnp.ones((64, 8)), "b": jnp.ones((16, 64))}
    flat, tx = aj.pack(params), aj.quantize_moments(aj.adamw(0.1), min_size=256)
    state = tx.init(flat)
    updates, _ = tx.update(flat, state, flat)
    assert np.isfinite(updates.buffers["float32"]).all()
    with pytest.raises(ValueError, match="buffer float32 was replaced by a Blocks"):
        aj.unpack(state)


def test_labels_with_slashes():
    """Their buffers are not mistaken for each other's."""
    params = {"a": jnp.zeros(2), "b": jnp.ones(3)}
    flat = aj.pack(params, {"a": "a/b", "b": "a"}, {"a": "c", "b": "b/c"})
    assert len(flat.buffers) == 2


def test_nnx():
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(net, nnx.Param)
    flat = aj.pack(params, not_bias)
    x = jnp.ones((4, 3))
    grads = jax.grad(lambda p: nnx.merge(graphdef, p.tree)(x).sum())(flat)
    expected = nnx.grad(lambda net: net(x).sum())(net)
    np.testing.assert_array_equal(grads.tree["kernel"][...], expected["kernel"][...])


def test_the_view_of_many_at_once():
    stacked = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, aj.pack(params_of())))
    trees = jax.vmap(lambda flat: flat.tree)(stacked(jnp.arange(3.0)))
    assert trees["dense"]["kernel"].shape == (3, 3, 4)


NET = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        None,
        {"a": None, "b": []},
        jnp.ones(3),
        {"number": 1.5, "int": 3, "bool": True, "complex": 1 + 2j},
        {
            "complex": jnp.array([1 + 2j, 3j]),
            "int": jnp.arange(3),
            "bool": jnp.array([True]),
            "bfloat16": jnp.ones(2, jnp.bfloat16),
            "fp8": jnp.ones(2, jnp.float8_e4m3fn),
            "numpy": np.ones(2, np.float32),
        },
        core.freeze({"a": {"b": jnp.ones(2)}}),
        nnx.state(NET, nnx.Param),
        NET,
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_kinds_of_trees_and_leaves(tree):
    """Floats are packed, all other leaves kept; each comes back as it was."""
    packed = aj.pack(tree)
    for back in (packed.tree, aj.unpack({"x": packed})["x"]):
        compare(back, jax.tree.map(jnp.asarray, tree))
    compare(aj.pack_like(tree, packed), packed)
    kept = {x.dtype.kind for x in packed.leaves}
    assert kept <= set("bic")


def test_numpy_leaves_have_the_dtype_that_they_get():
    """Without x64 float64 is float32, so these two share a buffer."""
    packed = aj.pack({"a": np.ones(3), "b": jnp.ones(2), "c": np.float64(2)})
    assert list(packed.buffers) == ["float32"]
    np.testing.assert_array_equal(packed.buffers["float32"][:6], [1, 1, 1, 1, 1, 2])


def test_a_key_of_a_packed_dict():
    """As Flax's TrainState asks for it."""
    packed = aj.pack({"a": jnp.ones(3)})
    assert "a" in packed and "b" not in packed


# ---------------------------------------------------------------------------
# on two devices
# ---------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])


@pytest.mark.slow
def test_a_sharded_leaf_keeps_its_place():
    shard = NamedSharding(mesh(), PartitionSpec("data"))
    params = jax.device_put(params_of(), NamedSharding(mesh(), PartitionSpec()))
    params["large"]["kernel"] = jax.device_put(params["large"]["kernel"], shard)
    flat = aj.pack(params)
    assert [x.sharding for x in flat.leaves] == [shard]
    assert flat.buffers["float32"].sharding.is_fully_replicated
    tx = aj.adamw(0.1, weight_decay=0.1)
    state = tx.init(flat)
    assert state.inner_state[0].mu.leaves[0].sharding == shard
    packed, state = train(tx, flat)
    plain, _ = train(tx, jax.device_get(params))
    compare(packed.tree, jax.tree.map(jnp.asarray, plain), rtol=1e-6)
    assert packed.leaves[0].sharding.is_equivalent_to(shard, 2)


def test_moments_sharded_over_devices():
    """Each device keeps half of them, and the update needs no other half."""
    whole, shard = (
        NamedSharding(mesh(), PartitionSpec(*axes)) for axes in ((), ("data",))
    )
    params = aj.pack(params_of())
    tx = aj.adamw(0.1)
    expected, _ = train(tx, params)

    def placed(state):
        return jax.tree.map(
            lambda x: jax.device_put(
                x, shard if x.ndim == 1 and x.size > 99 else whole
            ),
            state,
        )

    state = placed(tx.init(params))
    params = jax.device_put(params, whole)
    buffer = state.inner_state[0].mu.buffers["float32"]
    assert buffer.addressable_shards[0].data.size * 2 == buffer.size

    def step(params, state, x):
        grads = jax.grad(lambda p: loss_of(p.tree, x))(params)
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(step, out_shardings=shardings)
    xs = np.random.default_rng(4).normal(size=(5, 6, 3))
    for x in xs:
        params, state = step(params, state, jnp.asarray(x, jnp.float32))
    compare(params, jax.device_put(expected, whole), rtol=1e-5, atol=1e-6)
    new = state.inner_state[0].mu.buffers["float32"]
    assert new.sharding.is_equivalent_to(shard, 1)


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------


def test_a_mask_that_cuts_through_a_buffer():
    flat = aj.pack(params_of())
    for mask in (not_bias, aj.mask_by_path("kernel")):
        with pytest.raises(
            ValueError, match=r"mask is .* share a buffer; .*pack\("
        ) as e:
            aj.adamw(0.1, mask=mask).init(flat)
        assert "dense/bias" in str(e.value) and "dense/kernel" in str(e.value)
    groups = aj.scale_by_group({"head": 1.0, "body": 0.1}, labels)
    with pytest.raises(ValueError, match=r"labels is 'body' for dense/bias and 'head'"):
        groups.init(flat)


def test_a_misspelled_mask():
    flat = aj.pack(params_of())
    with pytest.raises(ValueError, match=r"no leaf matches 'kernal'; .* dense/kernel"):
        aj.adamw(0.1, mask=aj.mask_by_path("kernal")).init(flat)
    with pytest.raises(ValueError, match=r"masks\[1\] does not have the structure"):
        aj.pack(params_of(), True, {"dense": True})
    with pytest.raises(ValueError, match="max_size must be at least 0, got -1"):
        aj.pack(params_of(), max_size=-1)


def test_leaves_that_are_no_arrays():
    for leaf in ("x", object(), jax.ShapeDtypeStruct((2,), jnp.float32)):
        with pytest.raises(TypeError, match="leaf a/b must be an array or a number"):
            aj.pack({"a": {"b": leaf}})
    with pytest.raises(TypeError, match="leaf a must be an array or a number, got 'x'"):
        aj.pack_like({"a": "x"}, aj.pack({"a": jnp.ones(2)}))


def test_trees_that_do_not_fit():
    flat = aj.pack({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="tree has no leaf b"):
        aj.pack_like({"a": jnp.ones(2)}, flat)
    with pytest.raises(
        ValueError, match=r"leaf b must have the packed shape \(3,\), got \(4,\)"
    ):
        aj.pack_like({"a": jnp.ones(2), "b": jnp.ones(4)}, flat)
    mixed = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="bfloat16 and float32 in buffer float32"):
        aj.pack_like(mixed, flat)
    tx = aj.adamw(0.1)
    with pytest.raises(ValueError, match="updates has an unexpected leaf a, b"):
        tx.update(flat.tree, tx.init(flat), flat)
