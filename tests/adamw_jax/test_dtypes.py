"""Dtypes of updates and moments: narrow, complex, integer leaves, Python scalars."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import matrix

import adamw_jax as aj

OPTIMIZERS = {
    "adam": functools.partial(aj.adam, 0.1, l2=0.1),
    "adamw": functools.partial(aj.adamw, 0.1, nesterov=True),
    "amsgrad": functools.partial(aj.amsgrad, 0.1, weight_decay=0.1),
    "sgd": functools.partial(aj.sgd, 0.1, 0.9, weight_decay=0.1),
}
LINKS = {
    "scale_by_adam": aj.scale_by_adam,
    "scale_by_amsgrad": aj.scale_by_amsgrad,
    "trace": functools.partial(aj.trace, 0.9),
    "add_decayed_weights": functools.partial(aj.add_decayed_weights, 0.1),
    "scale_by_learning_rate": functools.partial(aj.scale_by_learning_rate, 0.1),
    "clip_by_global_norm": functools.partial(aj.clip_by_global_norm, 1.0),
}
WRAPPED = {
    "accumulate": lambda: aj.accumulate_gradients(aj.adamw(0.1), 2),
    "freeze": lambda: aj.freeze_leaves(
        aj.adamw(0.1), lambda p: jax.tree.map(lambda x: x.ndim == 0, p)
    ),
    "clip": lambda: aj.chain(aj.clip_by_global_norm(1.0), aj.adamw(0.1)),
    "8 bits": lambda: aj.quantize_moments(aj.adamw(0.1), block_size=4, min_size=2),
    "of Optax": lambda: aj.chain(optax.clip(1.0), optax.adam(0.1)),
}
EVERY = OPTIMIZERS | LINKS | WRAPPED


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def assert_same_dtypes(one, other):
    assert dtypes(one) == dtypes(other)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "dtype", matrix(["bfloat16", "float16", "float32"], quick=["bfloat16"])
)
@jax.numpy_dtype_promotion("standard")
def test_updates_and_state_keep_their_dtypes(name, dtype):
    """So `p + u` stays in bfloat16, and lax.scan can carry parameters and state."""
    tx = EVERY[name]()
    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones((), dtype)}

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), dtypes_match(updates)

    def dtypes_match(updates):
        assert_same_dtypes(updates, params)

    jax.eval_shape(
        lambda: jax.lax.scan(body, (params, tx.init(params)), None, length=2)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@jax.numpy_dtype_promotion("standard")
def test_wider_parameters_widen_the_updates(name):
    """bfloat16 gradients of float32 parameters, as in Optax."""
    tx, params = OPTIMIZERS[name](), jnp.ones(2)
    grads = jnp.ones(2, jnp.bfloat16)
    updates, _ = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert updates.dtype == jnp.float32
    theirs = optax.adamw(0.1)
    updates, _ = jax.eval_shape(theirs.update, grads, theirs.init(params), params)
    assert updates.dtype == jnp.float32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrow_updates_are_the_float32_ones_rounded_once(name):
    tx = OPTIMIZERS[name]()
    params = jnp.array([1.0, -2.0, 3.0], jnp.bfloat16)
    grads = jnp.array([0.3, 0.1, -0.7], jnp.bfloat16)
    wide, _ = tx.update(grads.astype("float32"), tx.init(params), params)
    narrow, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert wide.dtype == jnp.float32 and narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", EVERY)
def test_chains_know_the_links_of_this_library(name):
    """Others would see the dtype of the parameters, so the updates would be rounded."""
    assert isinstance(EVERY[name](), aj.Transformation)


def test_float32_between_the_links_of_an_optimizer():
    """Neither the momentum nor its product with the rate is a bfloat16 number."""
    tx = aj.sgd(1 + 2**-9, momentum=0.9)
    params, grads = jnp.ones(1, jnp.bfloat16), jnp.array([1 + 2**-7], jnp.bfloat16)
    state = tx.init(params)
    exact = np.float64(0)
    for _ in range(3):
        updates, state = aj.chain(tx, wide_updates=True).update(grads, (state,), params)
        (state,) = state
        exact = 0.9 * exact + (1 + 2**-7)
    np.testing.assert_allclose(updates, [-(1 + 2**-9) * exact], rtol=3e-7)


def test_optax_chain_rounds_between_links():
    """The reason for adamw_jax.chain: 1.001 rounds to 1 in bfloat16, twice or never."""
    links = [aj.scale_by_learning_rate(1.001, flip_sign=False)] * 2
    grads = jnp.ones(1, jnp.bfloat16)
    tx = aj.chain(*links, wide_updates=True)
    ours, _ = tx.update(grads, tx.init(grads), grads)
    tx = optax.chain(*links)
    theirs, _ = tx.update(grads, tx.init(grads), grads)
    assert theirs[0] == 1
    np.testing.assert_allclose(ours[0], 1.001**2, rtol=1e-6)


@jax.numpy_dtype_promotion("standard")
def test_links_of_optax_see_the_dtype_of_the_parameters():
    """So conditions inside of them, here on the first step, have branches of one."""
    for inner in (
        optax.scale_by_novograd(),
        optax.apply_if_finite(optax.scale_by_adam(), 3),
        optax.transforms.conditionally_mask(optax.trace(0.9), lambda step: step < 1),
    ):
        tx = aj.chain(aj.clip_by_global_norm(1.0), inner, aj.scale_by_learning_rate(1))
        params = jnp.ones(2, jnp.bfloat16)
        updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert updates.dtype == jnp.bfloat16
        assert_same_dtypes(state, tx.init(params))


def test_update_and_apply_does_not_round_the_updates():
    """1 + 2 (1 + 2^-9) is 3 + 2^-8: above half a spacing of 2^-6, if not rounded."""
    tx = aj.chain(aj.scale_by_learning_rate(1 + 2**-9, flip_sign=False))
    params = jnp.array([1.0], jnp.bfloat16)
    grads = jnp.array([2.0], jnp.bfloat16)
    exact = np.float32(1.0) + np.float32(2.0) * np.float32(1 + 2**-9)
    new, _ = aj.update_and_apply(tx, grads, tx.init(params), params)
    assert new.dtype == jnp.bfloat16
    assert new[0] == jnp.asarray(exact, jnp.bfloat16)


@pytest.mark.parametrize(
    "name", matrix([*WRAPPED], quick=["accumulate", "clip", "of Optax"])
)
@jax.numpy_dtype_promotion("standard")
def test_optaxs_wrappers_accept_bfloat16(name):
    """They select between the gradients and the updates, or between two states."""
    params = jnp.ones((2, 3), jnp.bfloat16)
    for wrap in (
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.transforms.conditionally_mask(tx, lambda step: step < 1),
        lambda tx: optax.transforms.conditionally_transform(tx, lambda step: step < 1),
    ):
        tx = wrap(WRAPPED[name]())
        updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert_same_dtypes(updates, params)
        assert_same_dtypes(state, tx.init(params))


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_moments_in_the_dtype_of_the_parameters(name):
    """mu_dtype="params" is what Optax does; None, float32."""
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    ours = OPTIMIZERS[name](mu_dtype="params", nu_dtype="params").init(params)
    theirs = optax.adamw(0.1).init(params)
    for field in ("mu", "nu"):
        expected = optax.tree.get(theirs, field)
        assert_same_dtypes(optax.tree.get(ours, field), expected)
    default = OPTIMIZERS[name]().init(params)
    assert optax.tree.get(default, "mu")["a"].dtype == jnp.float32
    assert optax.tree.get(default, "nu")["a"].dtype == jnp.float32


def test_the_kernel_takes_float32_moments_of_the_parameters():
    """In bfloat16 they would be rounded stochastically, which it does not do."""
    tx = aj.adamw(0.1, mu_dtype="params", nu_dtype="params")
    wide, narrow = jnp.ones(3), jnp.ones(3, jnp.bfloat16)
    assert "rounded stochastically" in aj.describe_step(tx, narrow)
    if "no kernel" not in (way := aj.describe_step(tx, wide)):
        assert way == aj.describe_step(aj.adamw(0.1), wide)
    new, state = aj.update_and_apply(tx, wide, tx.init(wide), wide)
    expected, _ = tx.update(wide, tx.init(wide), wide)
    np.testing.assert_allclose(new, wide + expected, rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(wide))


def test_moments_of_parameters_are_rounded_stochastically():
    """The mean of 1,000 second moments of 1e-3 of a spacing each is right."""
    tx = aj.scale_by_adam(b2=0.999, mu_dtype="params", nu_dtype="params")
    params = jnp.ones(1000, jnp.bfloat16)
    state = tx.init(params)
    state = state._replace(nu=jnp.ones(1000, jnp.bfloat16))
    _, state = jax.jit(tx.update)(jnp.zeros(1000, jnp.bfloat16), state)
    mean = float(state.nu.astype("float32").mean())
    assert 0.998 < mean < 1.0  # to nearest it would be 1; the exact value is .999


# Complex parameters


PAIRS = {
    "adam": (aj.adam(0.1), optax.adam(0.1)),
    "nesterov": (aj.adam(0.1, nesterov=True), optax.adam(0.1, nesterov=True)),
    "adamw": (aj.adamw(0.1), optax.adamw(0.1)),
    "amsgrad": (aj.amsgrad(0.1, convention="optax"), optax.amsgrad(0.1)),
    "sgd": (aj.sgd(0.1, 0.9, True), optax.sgd(0.1, 0.9, True)),
    "clip": (
        aj.chain(aj.clip_by_global_norm(0.5), aj.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    ),
}


@pytest.mark.parametrize("name", matrix([*PAIRS], quick=["adamw", "clip"]))
@jax.numpy_dtype_promotion("standard")
def test_complex_parameters_are_updated_as_in_optax(name):
    ours, theirs = PAIRS[name]

    def loss(p):
        return jnp.sum(jnp.abs(p["z"] - 1j) ** 2) + jnp.sum(p["x"] ** 2)

    def train(tx):
        @jax.jit
        def step(params, state):
            grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        p = {"z": jnp.array([1 + 2j, -0.5j, 3.0]), "x": jnp.array([1.0, -2.0])}
        state = tx.init(p)
        for _ in range(4):
            p, state = step(p, state)
        assert p["z"].dtype == jnp.complex128 and p["x"].dtype == jnp.float64
        return p

    with jax.enable_x64(True):  # in float32, Optax's bias correction is off by 1e-5
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
        jax.tree.map(close, train(ours), train(theirs))


def test_complex_leaf_in_one_pass():
    """The step of adamw gives what update and apply_updates give."""
    tx = aj.adamw(0.1)
    params = {"z": jnp.array([1 + 2j, -0.5j]), "x": jnp.array([1.0, -2.0])}
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    new, state = jax.jit(functools.partial(aj.update_and_apply, tx))(
        grads, tx.init(params), params
    )
    updates, expected = jax.jit(tx.update)(grads, tx.init(params), params)
    for got, right in ((new, aj.apply_updates(params, updates)), (state, expected)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), got, right
        )


def test_complex_gradients_are_accumulated():
    """optax.MultiSteps drops their imaginary parts."""
    inner, params = aj.adam(0.1), jnp.array([1 + 2j, -0.5j])
    tx = aj.accumulate_gradients(inner, 2)
    grads = jnp.array([3 - 1j, 0.5 + 1j])
    _, state = tx.update(grads - 1j, tx.init(params), params)
    updates, _ = tx.update(grads + 1j, state, params)
    expected, _ = inner.update(grads, inner.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_the_second_moment_of_a_complex_parameter_is_real():
    for mu_dtype in ("bfloat16", "complex64"):
        state = aj.scale_by_adam(mu_dtype=mu_dtype).init(jnp.ones(2, "complex64"))
        assert state.mu.dtype == jnp.complex64 and state.nu.dtype == jnp.float32


def test_complex_moments_of_a_real_parameter():
    """Stored as Optax stores them; the updates stay real, and the same."""
    params = {"w": jnp.array([1.0, -2.0])}
    tx, real = aj.adamw(0.1, mu_dtype="complex64"), aj.adamw(0.1)
    assert optax.tree.get(tx.init(params), "mu")["w"].dtype == jnp.complex64
    for way in (tx.update, jax.jit(functools.partial(aj.update_and_apply, tx))):
        ours, state = way(params, tx.init(params), params)
        expected, _ = real.update(params, real.init(params), params)
        if way is not tx.update:
            expected = optax.apply_updates(params, expected)
        assert ours["w"].dtype == jnp.float32
        np.testing.assert_allclose(ours["w"], expected["w"], rtol=1e-6)
        assert_same_dtypes(state, tx.init(params))


def test_a_complex_gradient_of_a_real_parameter_is_refused():
    tx = aj.scale_by_adam()
    with pytest.raises(TypeError, match="update w has dtype complex64.* float32"):
        tx.update({"w": jnp.ones(2, "complex64")}, tx.init({"w": jnp.ones(2)}))


# Leaves that are not trained


@pytest.mark.parametrize(
    "name",
    matrix(
        [name for name in EVERY if name != "of Optax"],
        quick=["adamw", "sgd", "clip_by_global_norm", "accumulate", "freeze"],
    ),
)
@jax.numpy_dtype_promotion("standard")
def test_integer_and_bool_leaves_pass_by(name):
    tx = EVERY[name]()
    params = {"w": jnp.ones(2), "steps": jnp.array([3, 4]), "flag": jnp.array(True)}
    grads = jax.grad(lambda p: (p["w"] ** 2).sum(), allow_int=True)(params)
    assert grads["steps"].dtype == jax.dtypes.float0

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: (p["w"] ** 2).sum(), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    new, state = step(*step(params, tx.init(params)))
    assert_same_dtypes(new, params)
    np.testing.assert_array_equal(new["steps"], params["steps"])
    assert bool(new["flag"])
    assert (new["w"] != params["w"]).all()  # after the second micro-batch, too
    assert_same_dtypes(state, tx.init(params))
    applied, _ = jax.jit(functools.partial(aj.update_and_apply, tx))(
        grads, tx.init(params), params
    )
    assert_same_dtypes(applied, params)
    np.testing.assert_array_equal(applied["steps"], params["steps"])


def test_an_integer_gradient_of_a_trained_parameter_is_refused():
    tx = aj.scale_by_adam()
    with pytest.raises(TypeError, match="update w has dtype int32.* float32"):
        tx.update({"w": jnp.ones(2, int)}, tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "sgd"]))
def test_python_scalars_are_parameters(name):
    tx = OPTIMIZERS[name]()
    grads = {"a": 1, "b": 0.5}
    arrays = jax.tree.map(float, grads)
    arrays = jax.tree.map(jnp.asarray, arrays)
    params = {"a": 2, "b": -1.0}
    wide = jax.tree.map(lambda x: jnp.asarray(float(x)), params)
    for update in (tx.update, jax.jit(tx.update)):
        got, state = update(grads, tx.init(params), params)
        expected, right = update(arrays, tx.init(wide), wide)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        jax.tree.map(np.testing.assert_array_equal, state, right)
    new = aj.apply_updates(params, got)
    np.testing.assert_allclose(new["b"], -1.0 + got["b"])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw"]))
def test_float8_parameters(name, dtype):
    """The moments are float32; the update is the float32 one, rounded."""
    tx = OPTIMIZERS[name]()
    params, grads = jnp.ones(3, dtype), jnp.array([0.5, -1.0, 2.0], dtype)
    wide, _ = jax.jit(tx.update)(grads.astype("float32"), tx.init(params), params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates.dtype == dtype
    np.testing.assert_array_equal(
        updates.astype("float32"), wide.astype(dtype).astype("float32")
    )
    new, _ = aj.update_and_apply(tx, grads, tx.init(params), params)
    assert new.dtype == dtype
