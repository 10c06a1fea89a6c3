"""What every transformation keeps: None leaves, one trace, sharding, clear errors."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import matrix

import adamw_jax as aj

ALL = {
    "adam": lambda: aj.adam(1e-2, l2=0.1),
    "adamw": lambda: aj.adamw(aj.one_cycle(1e-2, steps=10)),
    "amsgrad": lambda: aj.amsgrad(1e-2, weight_decay=0.1, mu_dtype=jnp.bfloat16),
    "sgd": lambda: aj.sgd(1e-2, 0.9, weight_decay=0.1),
    "rounded": lambda: optax.chain(
        aj.sgd(1e-2, 0.9), aj.round_updates_stochastically()
    ),
}


SCALARS = [
    (aj.scale_by_adam, "b1"),
    (aj.scale_by_adam, "b2"),
    (aj.scale_by_adam, "eps"),
    (aj.scale_by_adam, "eps_root"),
    (aj.scale_by_amsgrad, "b1"),
    (aj.sgd, "learning_rate"),
    (functools.partial(aj.adamw, 0.1), "weight_decay"),
]
NO_NUMBER = [(functools.partial(aj.sgd, 0.1), x) for x in ("momentum", "l2")]  # is None
# These may be negative, and arrays, as in Optax.
FACTORS = [
    (aj.trace, "decay"),
    (aj.add_decayed_weights, "weight_decay"),
    (aj.add_l2_gradient, "l2"),
    (aj.scale_by_learning_rate, "learning_rate"),
]


@pytest.mark.parametrize("name", matrix(list(ALL), quick=["adamw", "amsgrad", "sgd"]))
def test_none_leaves_pass_through(name):
    """A frozen leaf has a None gradient; its parameter and moments stay."""
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    state = tx.init(p)
    g = {"a": jnp.ones(2), "b": None, "c": None}
    updates, new = jax.jit(tx.update)(g, state, p)
    assert updates["b"] is None and updates["c"] is None
    p1 = aj.apply_updates(p, updates)
    assert p1["b"] is p["b"] and (p1["a"] != p["a"]).all()
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("name", matrix(list(ALL), quick=["adamw", "amsgrad", "sgd"]))
def test_one_trace(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2)}
    state = tx.init(p)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return aj.apply_updates(p, updates), state

    for i in range(3):
        if i == 2 and name != "rounded":
            state = aj.override_hyperparams(state, learning_rate=0.5)
        p, state = step(p, state, {"a": jnp.full(2, float(i))})


@pytest.mark.parametrize("name", matrix(list(ALL), quick=["adamw", "rounded"]))
def test_donation(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    state = tx.init(p)
    old = [x for x in jax.tree.leaves(state) if x.shape]

    def step(p, state):
        updates, state = tx.update(p, state, p)
        return aj.apply_updates(p, updates), state

    jax.jit(step, donate_argnums=(0, 1))(p, state)
    assert all(x.is_deleted() for x in old)


@pytest.mark.parametrize("name", ALL)
def test_abstract_init(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}
    abstract = jax.eval_shape(tx.init, p)
    concrete = tx.init(p)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, c in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)


@pytest.mark.parametrize("name", matrix(list(ALL), quick=["adamw"]))
def test_state_follows_sharding(name):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    tx = ALL[name]()
    p = jax.device_put(jnp.arange(8.0), sharding)
    state = tx.init(p)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (8,)]
    assert all(x.sharding == sharding for x in moments)
    updates, new = jax.jit(tx.update)(p, state, p)
    assert updates.sharding == sharding
    alone, _ = jax.jit(tx.update)(
        jnp.arange(8.0), tx.init(jnp.arange(8.0)), jnp.arange(8.0)
    )
    np.testing.assert_array_equal(updates, alone)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [1e-3, 1e-2]),
        ("b1", [0.5, 0.9]),
        pytest.param("b2", [0.9, 0.999], marks=pytest.mark.slow),
        pytest.param("eps", [1e-8, 1e-2], marks=pytest.mark.slow),
        pytest.param("weight_decay", [0.0, 0.5], marks=pytest.mark.slow),
    ],
)
def test_vmap_over_hyperparameters(name, values):
    p, grads = jnp.array([1.0, -2.0]), jnp.array([[1.0, 2.0], [0.5, -3.0]])

    def train(value):
        tx = aj.adamw(**({"learning_rate": 1e-2} | {name: value}))
        state, q = tx.init(p), p
        for g in grads:
            updates, state = tx.update(g, state, q)
            q = aj.apply_updates(q, updates)
        return q

    together = jax.jit(jax.vmap(train))(jnp.array(values))
    alone = jnp.stack([train(value) for value in values])
    assert (together[0] != together[1]).all()
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize(("make", "name"), SCALARS + NO_NUMBER)
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_numbers(make, name, bad):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{bad}"):
        make(**{name: bad})


@pytest.mark.parametrize(("make", "name"), FACTORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_factors(make, name, bad):
    make(**{name: -0.1})
    with pytest.raises(ValueError, match=rf"^{name} must be finite, got {bad}"):
        make(**{name: bad})


@pytest.mark.parametrize(("make", "name"), SCALARS)
@pytest.mark.parametrize("bad", ["x", None, [1.0], True, np.ones(3), jnp.ones(3)])
def test_bad_types(make, name, bad):
    with pytest.raises(TypeError, match=rf"^{name} must be"):
        make(**{name: bad})


@pytest.mark.parametrize(("make", "name"), FACTORS + NO_NUMBER)
@pytest.mark.parametrize("bad", ["x", [1.0], True])
def test_bad_types_where_arrays_or_none_are_allowed(make, name, bad):
    with pytest.raises(TypeError, match=rf"^{name} must be"):
        make(**{name: bad})


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (aj.scale_by_adam, {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        (aj.scale_by_adam, {"b2": 1.5}, r"b2 must be in \[0, 1\), got 1.5"),
        (aj.sgd, {"learning_rate": 1, "momentum": 1}, r"momentum must be in \[0, 1\)"),
        (aj.scale_by_adam, {"bias_correction": "yes"}, "bias_correction .* 'yes'"),
        (aj.scale_by_amsgrad, {"convention": "keras"}, "convention .* 'keras'"),
        (
            aj.scale_by_amsgrad,
            {"convention": "optax", "epsilon_hat": True},
            "epsilon_hat",
        ),
    ],
)
def test_bad_choices(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("bad", ["int8", "nonsense"])
def test_bad_dtypes(name, bad):
    with pytest.raises(
        TypeError, match=f"{name} must be None, 'params' or a float or complex dtype"
    ):
        aj.scale_by_adam(**{name: bad})


def test_a_parameter_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="parameter layer/key has dtype key<fry>"):
        aj.scale_by_adam().init({"layer": {"key": jax.random.key(0)}})


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": jnp.ones(2)}, "no leaf b/w"),
        ({"a": jnp.ones(2), "b": {"w": jnp.ones(3), "x": jnp.ones(1)}}, "leaf b/x"),
        ({"a": jnp.ones(2), "b": {"w": jnp.ones(4)}}, r"b/w: shape \(4,\) .* \(3,\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, "leaf b"),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "amsgrad", "sgd"])
def test_gradients_that_do_not_match(name, grads, message):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": {"w": jnp.ones(3)}}
    state = tx.init(p)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, state, p)


def test_params_are_needed():
    tx = aj.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_adam_does_not_need_params():
    """As with optax.adam: swapping the import must be enough."""
    tx = aj.adam(1e-3)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_updates_are_added_in_float32():
    """In bfloat16 the update itself would already be rounded: 1.0039 -> 1.0."""
    p = jnp.array([1.0], jnp.bfloat16)
    u = jnp.array([2.0**-8 + 2.0**-12])
    assert float(aj.apply_updates(p, u)[0]) == 1 + 2.0**-7


def test_apply_updates_keeps_other_dtypes_exact():
    p = {"i": jnp.array([2**24 + 1]), "c": jnp.array([1 + 2j])}
    q = aj.apply_updates(p, {"i": jnp.array([0]), "c": jnp.array([-0.0 + 0j])})
    assert q["i"][0] == 2**24 + 1 and q["c"][0] == 1 + 2j


def test_numpy_float64_leaves_without_x64():
    tx = aj.adamw(1e-2)
    p = {"w": np.ones(3)}
    updates, _ = tx.update(p, tx.init(p), p)
    assert updates["w"].dtype == jnp.float32


def test_python_numbers_as_leaves():
    tx = aj.adamw(1e-2, weight_decay=0.0)
    updates, _ = tx.update({"w": 2.0}, tx.init({"w": 1.0}), {"w": 1.0})
    np.testing.assert_allclose(updates["w"], -1e-2, rtol=1e-6)


def test_gradient_through_an_update():
    """Meta-learning: the derivative with respect to b1, at 0 too, through the root."""

    def second(b1):
        tx = aj.scale_by_adam(b1, eps_root=1e-8)
        state = tx.init(jnp.ones(1))
        for g in (1.0, 3.0):
            u, state = tx.update(jnp.array([g]), state)
        return u[0]

    for b1 in (0.0, 0.5):
        slope = (second(jnp.float32(b1 + 1e-2)) - second(jnp.float32(b1))) / 1e-2
        grad = float(jax.grad(second)(jnp.float32(b1)))
        assert grad == pytest.approx(float(slope), rel=0.05)


def test_float32_leaves_stay_float32_under_x64(x64):
    p = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
    tx = aj.adamw(aj.one_cycle(1e-3, steps=10))
    updates, state = tx.update(p, tx.init(p), p)
    adam = state.inner_state[0]
    for tree in (updates, adam.mu, adam.nu):
        assert tree["a"].dtype == jnp.float32 and tree["b"].dtype == jnp.float64


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "sgd", "accumulated", "clipped"])
def test_parameters_with_leaves_that_are_no_arrays(name, lenient):
    """Equinox's modules have functions; their gradients and states have None there."""
    tx = ALL[name]() if name in ALL else aj.accumulate_gradients(aj.sgd(0.1), 1)
    if name == "clipped":
        tx = aj.chain(aj.clip_by_global_norm(1.0), aj.adam(0.1))
    arrays = {"w": jnp.ones(3), "act": None}
    model = arrays | {"act": jax.nn.relu}
    updates, state = tx.update(arrays, tx.init(arrays), model)
    expected, right = tx.update(arrays, tx.init(arrays), arrays)
    chex.assert_trees_all_equal((updates, state), (expected, right))
    with pytest.raises(TypeError, match="parameter act must be an array, got <"):
        aj.scale_by_adam().init(model)


def test_no_decay_leaves_infinite_parameters():
    params = jnp.array([-jnp.inf, 1.0])
    for decay, right in ((0.0, [-jnp.inf, 1.0]), (0.5, [-jnp.nan, 0.95])):
        tx = aj.sgd(0.1, weight_decay=decay)
        updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        np.testing.assert_allclose(aj.apply_updates(params, updates), right, rtol=1e-6)


def test_what_is_no_transformation_is_named():
    with pytest.raises(TypeError, match="link 1 of the chain must be a transf.*<func"):
        aj.chain(aj.sgd(0.1), aj.adamw)
    with pytest.raises(TypeError, match="inner must be a transformation.*got 2"):
        aj.accumulate_gradients(2, aj.sgd(0.1))
