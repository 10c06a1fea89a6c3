"""Leaves and values other than float arrays, in parameters, gradients and arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers.cases import (
    LINKS,
    MAKERS,
    OPTIMIZERS,
    dtypes,
    first_update,
    outcome,
    parameters,
    run,
)
from tiers import matrix

F8 = jnp.float8_e4m3fn


# ---- complex -------------------------------------------------------------------------


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "nesterov"]))
def test_complex_parameters(lib, same, name):
    """A gradient of 3 + 4i: Adam's first step is g / |g|, as |g|^2 is averaged."""
    tx, g = OPTIMIZERS[name](lib), jnp.array([3 + 4j])
    p = np.zeros(1) if name == "adamw" else np.array([1j])
    direction = {"sgd": 1.0, "momentum": 1.0, "nesterov": 1.9}.get(name, 1 / 5)
    updates = first_update(tx, jnp.asarray(p, g.dtype), g)
    same(dtypes(updates), "complex64")
    same(updates, -0.1 * direction * np.array([3 + 4j]))


def test_decay_of_complex_parameters(lib, same):
    tx = lib.add_decayed_weights(0.1)
    same(first_update(tx, jnp.array([2 + 4j]), jnp.array([1j])), [0.2 + 1.4j])


def test_norm_of_complex_gradients(lib, same):
    tree = {"a": jnp.array([3 + 4j]), "b": jnp.array([12.0])}  # of norm 13
    clipped = first_update(lib.clip_by_global_norm(1.0), tree, tree)
    same(dtypes(clipped), dtypes(tree))
    same(clipped, {"a": np.array([3 + 4j]) / 13, "b": [12 / 13]})


def test_split_real_and_imaginary(lib, same):
    """Parts as parameters of their own: a sign for each."""
    tx = optax.contrib.split_real_and_imaginary(lib.adam(0.1, eps=0.0))
    g = jnp.array([3 - 4j])
    same(first_update(tx, g, g), [-0.1 + 0.1j])


# ---- integers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_integer_leaves_under_allow_int(lib, differs, name):
    """Their gradients have the dtype float0; bools are the same."""
    still = {"table": jnp.arange(3), "flag": jnp.array([True])}
    params = {"w": jnp.ones(2), "still": still}
    grads = jax.grad(lambda p: p["w"].sum(), allow_int=True)(params)
    result = outcome(lambda: run(OPTIMIZERS[name](lib), params, grads)[0]["still"])
    theirs = "UFuncTypeError" if name == "sgd" else "TypeError"
    differs(result, optax=theirs, here=still)


def test_integer_leaves_with_integer_gradients(lib, differs):
    """Optax moves them by a float update that `apply_updates` then rounds away."""
    params = {"w": jnp.ones(2), "table": jnp.array([5])}
    tx = lib.sgd(2.0)
    differs(
        run(tx, params, jax.tree.map(jnp.ones_like, params))[0]["table"],
        optax=[3],
        here=[5],
    )


def test_apply_updates_to_integers(lib, same):
    """In the parameter's dtype, as `astype` rounds."""
    same(lib.apply_updates(jnp.array([1, 2]), jnp.array([1.5, -1.0])), [2, 1])


# ---- None and empty trees ------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_none_in_parameters_and_gradients(lib, same, name):
    """As Equinox filters a model."""
    tree = {"w": jnp.ones(2), "name": None}
    updates = first_update(MAKERS[name](lib), tree, tree)
    same(updates["name"], None)
    same(sorted(updates), ["name", "w"])


NONE_GRADIENT = {"a": jnp.ones(1), "b": jnp.ones(1)}, {"a": jnp.ones(1), "b": None}


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "clip_by_global_norm"])
def test_gradient_that_is_none_without_adam(lib, same, name):
    """Where a parameter is not None: the update is."""
    same(first_update(MAKERS[name](lib), *NONE_GRADIENT)["b"], None)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_gradient_that_is_none(lib, differs, name):
    result = outcome(lambda: first_update(MAKERS[name](lib), *NONE_GRADIENT)["b"])
    theirs = "TypeError" if name == "amsgrad" else "ValueError"
    differs(result, optax=theirs, here=None)


TREES = [{}, [], {"a": None}, {"a": {}, "b": []}]


@pytest.mark.parametrize(
    "tree", matrix([[tree] for tree in TREES], quick=[[{}], [{"a": None}]]), ids=str
)
@pytest.mark.parametrize("name", MAKERS)
def test_trees_without_leaves(lib, same, name, tree):
    (tree,) = tree  # pytest takes () for the arguments themselves
    same(first_update(MAKERS[name](lib), tree, tree), tree)


@pytest.mark.parametrize("name", MAKERS)
def test_arrays_without_elements(lib, same, name):
    updates = first_update(MAKERS[name](lib), jnp.ones((0, 3)), jnp.ones((0, 3)))
    same(updates, np.ones((0, 3)))


def test_integer_gradients_of_a_float_parameter(lib, differs):
    tx, params = lib.sgd(0.5), jnp.ones(2)

    def update():
        return tx.update(jnp.array([1, 2]), tx.init(params), params)[0]

    differs(outcome(update), optax=[-0.5, -1.0], here="TypeError")


def test_apply_updates_of_none(lib, differs):
    result = outcome(lib.apply_updates, {"a": jnp.ones(1)}, {"a": None})
    differs(result, optax="TypeError", here={"a": [1.0]})


def test_apply_updates_where_the_parameter_is_none(lib, same):
    same(lib.apply_updates({"a": None}, {"a": None}), {"a": None})


# ---- scalars, NumPy, narrow floats ---------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_python_floats(lib, same, name):
    tx = OPTIMIZERS[name](lib)
    params, state = 1.0, tx.init(1.0)
    updates, state = tx.update(1.0, state, params)
    same(params + updates, parameters(name, 1)[0])
    updates, state = tx.update(1.0, state, params + updates)


def test_python_ints(lib, same):
    """A parameter of 1 and a gradient of 1, both of type int: as floats."""
    same(first_update(lib.adam(0.1, eps=0.0), 1, 1), -0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numpy_arrays(lib, same, name):
    ones = np.ones(2, np.float32)
    same(run(OPTIMIZERS[name](lib), ones, ones, 2)[0], [parameters(name, 2)[-1]] * 2)


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_eight_bit_floats(lib, same, name):
    """The updates are in float8_e4m3fn, within a rounding or two of the exact value."""
    ones = jnp.ones(2, F8)
    updates = first_update(OPTIMIZERS[name](lib), ones, ones)
    same(dtypes(updates), "float8_e4m3fn")
    exact = parameters(name, 1)[0] - 1
    same(updates, np.full(2, exact), rtol=0.1)


def test_float32_gradients_of_bfloat16_parameters(lib, same):
    """The updates follow the gradients."""
    p, g = jnp.ones(2, jnp.bfloat16), jnp.ones(2)
    for name in ("adam", "adamw", "amsgrad"):
        same(dtypes(first_update(OPTIMIZERS[name](lib), p, g)), "float32")


def test_bfloat16_gradients_of_float32_parameters(lib, same):
    """The updates of a rule that reads the parameters are in the wider dtype."""
    p, g = jnp.ones(2), jnp.ones(2, jnp.bfloat16)
    same(dtypes(first_update(OPTIMIZERS["adamw"](lib), p, g)), "float32")


def test_apply_updates_in_bfloat16(lib, same):
    """Added in float32, rounded once to the parameter's dtype."""
    new = lib.apply_updates(jnp.ones(1, jnp.bfloat16), jnp.full(1, -0.003))
    same(dtypes(new), "bfloat16")
    same(new, [0.99609375])


# ---- arguments -----------------------------------------------------------------------


def test_a_rate_for_each_element(lib, same):
    """An array that broadcasts against the leaf, in the links."""
    rates = jnp.array([0.1, 0.2])
    tx = lib.chain(lib.scale_by_adam(eps=0.0), lib.scale_by_learning_rate(rates))
    same(first_update(tx, jnp.ones(2), jnp.ones(2)), [-0.1, -0.2])
    same(first_update(lib.add_decayed_weights(rates), jnp.ones(2), jnp.zeros(2)), rates)


def test_a_rate_for_each_element_of_an_optimizer(lib, differs):
    result = outcome(
        lambda: run(lib.sgd(jnp.array([0.1, 0.2])), jnp.ones(2), jnp.ones(2))[0]
    )
    differs(result, optax=[0.9, 0.8], here="TypeError")


def test_an_array_of_one_rate(lib, same):
    """Of shape (), as `jnp.asarray`, NumPy or `jit` give it."""
    for rate in (jnp.array(0.1), np.array(0.1), np.float32(0.1)):
        same(first_update(lib.sgd(rate), jnp.ones(2), jnp.ones(2)), [-0.1, -0.1])
    jitted = jax.jit(lambda rate: first_update(lib.adam(rate, eps=0.0), 1.0, 1.0))
    same(jitted(0.1), -0.1)


def test_a_traced_beta(lib, same):
    """Gradients of 1 and 0: the first moment is b1 (1 - b1)."""

    @jax.jit
    def second_mean(b1):
        tx = lib.scale_by_adam(b1=b1)
        _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
        return tx.update(jnp.zeros(1), state)[1].mu

    same(second_mean(0.8), [0.16])
    same(second_mean(0.5), [0.25])


def test_no_learning_rate(lib, same):
    """None, the default: the updates pass."""
    for tx in (lib.scale_by_learning_rate(), lib.scale_by_learning_rate(None)):
        same(first_update(tx, jnp.ones(2), jnp.ones(2)), [1.0, 1.0])


def test_links_accept_any_number(lib, same):
    """Negative rates and decays, a momentum of 1: the algebra is the caller's."""
    one = jnp.ones(1)
    same(first_update(lib.scale_by_learning_rate(-0.1), one, one), [0.1])
    same(first_update(lib.add_decayed_weights(-0.1), one, one), [0.9])
    same(first_update(lib.clip_by_global_norm(jnp.inf), one, one), [1.0])
    tx = lib.trace(1.0)
    state = tx.init(one)
    for total in (1.0, 2.0, 3.0):
        u, state = tx.update(one, state)
        same(u, [total])


def test_negative_learning_rate_of_an_optimizer(lib, differs):
    result = outcome(lambda: first_update(lib.sgd(-0.1), jnp.ones(1), jnp.ones(1)))
    differs(result, optax=[0.1], here="ValueError")


def test_hyperparameters_out_of_range(lib, differs):
    calls = (
        lambda: lib.adam(0.1, b1=1.0),
        lambda: lib.adam(0.1, b2=-0.1),
        lambda: lib.adamw(0.1, weight_decay=-0.1),
        lambda: lib.amsgrad(0.1, eps=-1.0),
        lambda: lib.sgd(float("nan")),
        lambda: lib.sgd(0.1, momentum=1.5),
    )
    found = [x if isinstance(x, str) else "built" for x in map(outcome, calls)]
    differs(found, optax=["built"] * 6, here=["ValueError"] * 6)


def test_max_norm_of_zero(lib, differs):
    """Zero gradients, clipped to the norm 0."""
    clip = jax.jit(
        lambda n: first_update(lib.clip_by_global_norm(n), *[jnp.zeros(1)] * 2)
    )
    differs(clip(0.0), optax=[np.nan], here=[0.0])


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LINKS])
def test_extra_arguments_are_ignored(lib, same, name):
    """Through `with_extra_args_support`, which every wrapper of Optax calls."""
    tx = optax.with_extra_args_support(MAKERS[name](lib))
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=1.0)
    same(updates, first_update(MAKERS[name](lib), jnp.ones(2), jnp.ones(2)))


def test_parameters_may_be_left_out(lib, same):
    """Where the rule does not read them."""
    for name in ("adam", "amsgrad", "sgd", "momentum", "nesterov"):
        tx = OPTIMIZERS[name](lib)
        updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
        same(1 + updates, parameters(name, 1))


def test_decay_without_parameters(lib, same):
    tx = lib.adamw(0.1)
    same(outcome(tx.update, jnp.ones(1), tx.init(jnp.ones(1))), "ValueError")


def test_message_of_a_decay_without_parameters(lib, differs):
    tx = lib.add_decayed_weights(0.1)
    result = outcome(tx.update, jnp.ones(1), tx.init(jnp.ones(1)))
    differs(result, optax="TypeError", here="ValueError")


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "b": False},
        {"w": 1, "b": 0},
        {"w": np.True_, "b": np.False_},
        {"w": jnp.array(True), "b": jnp.array(False)},
        lambda params: jax.tree.map(lambda x: x.ndim > 0, params),
    ],
    ids=["bools", "ints", "NumPy", "JAX", "function"],
)
def test_masks(lib, same, mask):
    params = {"w": jnp.ones(1), "b": jnp.array(1.0)}
    tx = lib.adamw(1.0, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    same(first_update(tx, params, zeros), {"w": [-0.5], "b": 0.0})


def test_a_mask_of_a_subtree(lib, same):
    """A prefix of the parameters' tree."""
    params = {"head": {"w": jnp.ones(1), "b": jnp.ones(1)}, "body": jnp.ones(1)}
    tx = lib.add_decayed_weights(0.5, mask={"head": False, "body": True})
    zeros = jax.tree.map(jnp.zeros_like, params)
    same(first_update(tx, params, zeros), zeros | {"body": [0.5]})
