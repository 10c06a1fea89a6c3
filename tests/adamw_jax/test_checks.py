"""Numbers that are refused, in one sentence that names the argument and the value."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_jax as aj

NOT_NUMBERS = ["0.1", b"0.1", 1j, np.complex64(1), [0.1], True, {}, np.array("0.1")]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("eps", lambda x: aj.scale_by_adam(eps=x)),
        ("b1", lambda x: aj.scale_by_amsgrad(b1=x)),
        ("learning_rate", lambda x: aj.adamw(x)),
        ("learning_rate", lambda x: aj.scale_by_learning_rate(x)),
        ("decay", lambda x: aj.trace(x)),
        ("weight_decay", lambda x: aj.add_decayed_weights(x)),
        ("max_norm", lambda x: aj.clip_by_global_norm(x)),
        ("steps", lambda x: aj.Phase(steps=x, b1=0.9)),
    ],
)
def test_what_is_no_number(name, make, value):
    with pytest.raises(TypeError, match=f"{name} must be a (scalar )?number, got "):
        make(value)


@pytest.mark.parametrize(
    "value", [math.nan, 10**400, -(10**400)], ids=["nan", "10**400", "-10**400"]
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("eps", lambda x: aj.scale_by_adam(eps=x)),
        ("learning_rate", lambda x: aj.adamw(x)),
        ("learning_rate", lambda x: aj.scale_by_learning_rate(x)),
        ("decay", lambda x: aj.trace(x)),
        ("weight_decay", lambda x: aj.add_decayed_weights(x)),
        ("l2", lambda x: aj.add_l2_gradient(x)),
        ("max_norm", lambda x: aj.clip_by_global_norm(x)),
        ("epochs", lambda x: aj.Phase(epochs=x, b1=0.9)),
    ],
)
def test_numbers_without_a_value(name, make, value):
    with pytest.raises(ValueError, match=f"{name} must .*, got ") as caught:
        make(value)
    assert len(str(caught.value)) < 150  # not 400 digits


@pytest.mark.parametrize("value", [math.nan, -1e-3])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("eps", lambda x: aj.scale_by_adam(eps=x)),
        ("eps_root", lambda x: aj.scale_by_amsgrad(eps_root=x)),
        ("eps", lambda x: aj.adamw(1e-3, eps=x)),
        ("max_norm", lambda x: aj.clip_by_global_norm(x)),
        ("eps", lambda x: aj.clip_by_global_norm(1.0, eps=x)),
    ],
)
def test_the_range_of_an_array_is_checked_at_init(name, make, value):
    """At `update` it may come from a state, and be the end of a schedule."""
    p = jnp.ones(2)
    for tx in (make(jnp.float32(value)), make(jnp.bfloat16(value))):
        with pytest.raises(ValueError, match=f"{name} must be .*>= 0, got "):
            tx.init(p)
        with pytest.raises(ValueError, match=f"{name} must be .*>= 0, got "):
            jax.jit(tx.init)(p)
    jax.jit(lambda x: make(x).init(p))(value)  # without a value yet
    tx = make(jnp.float32(1e-3))
    tx.update(p, tx.init(p), p)


def test_an_infinite_norm_in_an_array():
    tx = aj.clip_by_global_norm(jnp.float32(math.inf))
    np.testing.assert_array_equal(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0], 1)


@pytest.mark.parametrize("make", [aj.adam, aj.adamw, aj.amsgrad, aj.sgd])
def test_a_negative_rate_says_how_to_ascend(make):
    rates = [-0.1, np.float32(-0.1), lambda step: -0.1]
    # Where all hyperparameters are arrays they may be injected, one for each update.
    rates += [] if make is aj.sgd else [jnp.float32(-0.1)]
    for rate in rates:
        with pytest.raises(ValueError, match=r"got .*-0\.1.*: set maximize=True"):
            make(rate)
    with pytest.raises(ValueError, match="learning_rate must be finite and >= 0, got"):
        make(math.inf)
    with pytest.raises(TypeError, match="learning_rate must be a number, got None"):
        make(None)  # Optax leaves out the rate, and with it the sign


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: aj.sgd(0.1, x), r"momentum must be in \[0, 1\), got"),
        (lambda x: aj.adamw(0.1, b1=x), r"b1 must be in \[0, 1\), got"),
        (lambda x: aj.adam(0.1, b2=x), r"b2 must be in \[0, 1\), got"),
        (lambda x: aj.adam(0.1, l2=lambda t: -x(t)), "l2 must be finite and >= 0"),
        (lambda x: aj.adamw(0.1, weight_decay=lambda t: -x(t)), "weight_decay must be"),
        (lambda x: aj.sgd(0.1, weight_decay=lambda t: -x(t)), "weight_decay must be"),
    ],
)
def test_an_optimizer_checks_the_first_value_of_a_schedule(make, message):
    """The links accept more."""
    with pytest.raises(ValueError, match=message):
        make(lambda step: 1.0)


def test_an_injected_schedule_that_ends_below_zero_does_not_stop_a_run(lenient):
    """Optax builds the optimizer at every update, from the values in its state."""
    p, paths = jnp.array([1.0, -2.0]), []
    rates = jnp.array([0.1, -1e-6, -1e-6])
    for make in (aj.sgd, optax.sgd):
        tx = optax.inject_hyperparams(make)(lambda step: rates[step])
        state, path = tx.init(p), []
        for _ in range(3):
            updates, state = tx.update(p, state, p)
            path.append(updates)
        paths.append(path)
    np.testing.assert_allclose(*paths, rtol=1e-6)
