"""States: dtypes, shapes and shardings, under `jit`, `scan` and `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers.cases import (
    MAKERS,
    OPTIMIZERS,
    dtypes,
    first_update,
    parameters,
    types,
)
from tiers import matrix

BOTH = ["float32", "bfloat16"]


def like(dtype, shape=(2,)):
    return {
        "w": jax.ShapeDtypeStruct(shape, dtype),
        "b": jax.ShapeDtypeStruct((), dtype),
    }


def abstract_update(tx, params):
    """Types of the state before and after an update, and of the updates."""
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    return types(state), types(new), types(updates)


CELLS = [(n, d) for n in MAKERS for d in (*BOTH, "float16", "complex64")]
QUICK = [(n, d) for n in MAKERS for d in ("bfloat16", "complex64")]


@pytest.mark.parametrize(("name", "dtype"), matrix(CELLS, quick=QUICK))
def test_types_of_an_update(lib, same, name, dtype):
    """The state keeps its types; the updates have those of the gradients."""
    params = like(dtype)
    before, after, updates = abstract_update(MAKERS[name](lib), params)
    same(after, before)
    same(updates, types(params))


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_float64(lib, same, name, x64):
    """The steps are exact to float64's precision, apart from beta**t."""
    tx, params = OPTIMIZERS[name](lib), jnp.ones(1)
    updates, state = tx.update(params, tx.init(params), params)
    same(dtypes(updates), "float64")
    same(1 + updates, parameters(name, 1), rtol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_of_abstract_parameters(lib, same, name):
    """`init` needs shapes and dtypes only."""
    tx, params = OPTIMIZERS[name](lib), like("float32")
    same(types(tx.init(params)), types(jax.eval_shape(tx.init, params)))


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_jit_and_eager_init_have_the_same_types(lib, same, name):
    tx, params = OPTIMIZERS[name](lib), {"w": jnp.ones(2, jnp.bfloat16)}
    same(types(jax.jit(tx.init)(params)), types(tx.init(params)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    matrix(
        [(name, dtype) for name in OPTIMIZERS for dtype in BOTH],
        quick=[("adamw", "bfloat16"), ("nesterov", "bfloat16"), ("amsgrad", "float32")],
    ),
)
def test_scan_over_parameters_and_state(lib, same, name, dtype):
    """With `p + u`, so that the updates must have the parameters' dtype."""
    tx, params = OPTIMIZERS[name](lib), jnp.ones(1, dtype)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jnp.ones_like(p), state, p)
        return (p + updates, state), p + updates

    path = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=3)[1])(params)
    same(dtypes(path), dtype)
    # Below 1 each step rounds the sum, and an update of .3, to half a spacing: 2^-9.
    narrow = {"rtol": 0, "atol": 3 * 1.3 * 2**-9}
    tolerance = {"rtol": 1e-5} if dtype == "float32" else narrow
    same(path[:, 0], parameters(name, 3), **tolerance)


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw"]))
def test_vmap_over_parameters(lib, same, name):
    tx, params = OPTIMIZERS[name](lib), jnp.array([1.0, 2.0])

    def step(p):
        return p + tx.update(jnp.ones(()), tx.init(p), p)[0]

    same(
        jax.jit(jax.vmap(step))(params),
        [parameters(name, 1, p=p)[0] for p in (1.0, 2.0)],
    )


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_the_state_has_the_sharding_of_the_parameters(lib, same, name):
    """On a mesh with automatic axes, for `init` in and outside of `jit`."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    params = jax.device_put(jnp.ones(4), sharding)
    tx = OPTIMIZERS[name](lib)
    moment = "mu" if name == "adamw" else "trace"
    update = jax.jit(tx.update)
    for state in (tx.init(params), jax.jit(tx.init, out_shardings=None)(params)):
        updates, state = update(params, state, params)
        for x in (updates, optax.tree.get(state, moment)):
            same(x.sharding.is_equivalent_to(sharding, 1), True)


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_explicit_sharding(lib, same, name):
    """With the sharding in the type, of the parameters, moments and updates."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = OPTIMIZERS[name](lib)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
        params = jnp.zeros((2, 4), jnp.float16, out_sharding=sharding)
        state = tx.init(params)
        same(types(jax.jit(tx.init)(params)), types(state))
        updates, new = jax.eval_shape(tx.update, params, state, params)
        same(types(new), types(state))
        same(types(updates), types(params))


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "float16"])
def test_mu_dtype(lib, same, moment_dtype):
    for tx in (
        lib.adam(0.1, mu_dtype=moment_dtype),
        lib.scale_by_adam(mu_dtype=moment_dtype),
    ):
        for params in (jnp.ones(2), jnp.ones(2, jnp.bfloat16)):
            same(dtypes(optax.tree.get(tx.init(params), "mu")), moment_dtype)


def test_real_mu_dtype_of_complex_parameters(lib, differs):
    state = lib.adam(0.1, mu_dtype="float32").init(jnp.ones(2, "complex64"))
    found = dtypes(optax.tree.get(state, "mu"))
    differs(found, optax="float32", here="complex64")


def test_complex_mu_dtype(lib, same):
    state = lib.adam(0.1, mu_dtype="complex64").init(jnp.ones(2))
    same(dtypes(optax.tree.get(state, "mu")), "complex64")


def test_state_of_a_traced_beta(lib, differs):
    """The number of its leaves: a count and two moments, and the product in two."""

    def state(b1):
        return lib.scale_by_adam(b1=b1).init(jnp.ones(2))

    assert len(jax.tree.leaves(state(0.9))) == 3
    found = len(jax.tree.leaves(jax.eval_shape(state, 0.9)))
    differs(found, optax=3, here=5)


def test_accumulator_dtype(lib, same):
    tx = lib.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    same(dtypes(optax.tree.get(tx.init(jnp.ones(2)), "trace")), "bfloat16")


def test_dtype_of_moments_by_default(lib, differs):
    params = jnp.ones(2, jnp.bfloat16)
    states = lib.adam(0.1).init(params), lib.sgd(0.1, momentum=0.9).init(params)
    found = [
        dtypes(optax.tree.get(state, name))
        for state, name in zip((states[0], *states), ("mu", "nu", "trace"), strict=True)
    ]
    differs(found, optax=["bfloat16"] * 3, here=["float32"] * 3)


def test_moments_in_the_dtype_of_the_parameters(lib, same):
    """What Optax does by default has a word here."""
    words = {} if lib is optax else {"mu_dtype": "params", "nu_dtype": "params"}
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    state = lib.adam(0.1, **words).init(params)
    for name in ("mu", "nu"):
        same(dtypes(optax.tree.get(state, name)), dtypes(params))


def test_chain_of_bfloat16_gradients(lib, differs):
    """Two rates, .3 and .7, of a gradient of 3: rounded twice, or once."""
    tx = lib.chain(lib.scale_by_learning_rate(0.3), lib.scale_by_learning_rate(0.7))
    g = jnp.full(1, 3.0, jnp.bfloat16)
    u = np.float64(first_update(tx, g, g)[0])

    def rounded(x):
        return float(jnp.asarray(x, jnp.bfloat16))

    twice = rounded(rounded(rounded(0.3) * 3) * rounded(0.7))
    differs(u, optax=twice, here=rounded(0.3 * 3 * 0.7))


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_the_gradient_through_an_update(lib, same, name):
    """The derivative of sum(update) by the parameters is that of the decay."""
    tx = OPTIMIZERS[name](lib)
    g = jnp.full(2, 0.5)
    state = tx.init(g)
    total = jax.jit(lambda p: tx.update(g, state, p)[0].sum())
    slope = jax.grad(total)(jnp.ones(2))
    same(slope, [-0.01, -0.01] if name == "adamw" else [0.0, 0.0])


def test_the_gradient_by_the_learning_rate(lib, same):
    def last(rate):
        tx = lib.sgd(rate, momentum=0.9)
        p, state = jnp.ones(1), tx.init(jnp.ones(1))
        for _ in range(2):
            u, state = tx.update(jnp.ones(1), state, p)
            p = p + u
        return p[0]

    same(jax.jit(jax.grad(last))(0.1), -2.9)  # 1 + 1.9
