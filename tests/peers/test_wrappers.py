"""Optax's wrappers around the optimizers, and chains of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers.cases import (
    OPTIMIZERS,
    dtypes,
    first_update,
    outcome,
    parameters,
    run,
    types,
)
from tiers import matrix

ONE = np.ones(1, np.float32)


def tree():
    return {"a": jnp.ones(1), "b": jnp.ones(1)}


# ---- chains --------------------------------------------------------------------------


def test_chain(lib, same):
    """Clipped from a norm of 5 to 1, then a rate of .5."""
    tx = lib.chain(lib.clip_by_global_norm(1.0), lib.sgd(0.5))
    same(first_update(tx, jnp.ones(2), jnp.array([3.0, -4.0])), [-0.3, 0.4])


def test_chain_with_links_of_optax(lib, same):
    tx = lib.chain(optax.clip(1.0), lib.trace(0.9), optax.scale(-0.5))
    same(run(tx, jnp.zeros(2), jnp.array([3.0, -0.5]), 2)[0], [-1.45, 0.725])


def test_optax_chain_of_the_optimizer(lib, same):
    tx = optax.chain(optax.clip(1.0), lib.sgd(0.5, momentum=0.9))
    same(run(tx, jnp.zeros(2), jnp.array([3.0, -0.5]), 2)[0], [-1.45, 0.725])


def test_named_chain(lib, same):
    tx = optax.named_chain(
        ("clip", lib.clip_by_global_norm(1.0)), ("sgd", lib.sgd(0.5))
    )
    params, state = run(tx, jnp.zeros(2), jnp.array([3.0, -4.0]))
    same(params, [-0.3, 0.4])
    same(sorted(state), ["clip", "sgd"])


def test_chain_passes_extra_arguments(lib, same):
    """To the links that take them."""
    scale = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda u, s, params=None, *, factor=1.0, **_: (
            jax.tree.map(lambda x: factor * x, u),
            s,
        ),
    )
    tx = lib.chain(lib.scale_by_learning_rate(0.5), scale)
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), factor=3.0)
    same(updates, -1.5 * ONE)


def test_extra_arguments_without_a_rate(lib, same):
    tx = lib.chain(lib.scale_by_learning_rate(), lib.sgd(0.5))
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), value=1.0)
    same(updates, -0.5 * ONE)


def test_state_of_a_chain(lib, same):
    """A tuple with the state of each link."""
    tx = lib.chain(lib.clip_by_global_norm(1.0), lib.trace(0.9))
    state = tx.init(jnp.ones(1))
    same(type(state).__name__, "tuple")
    same([type(link).__name__ for link in state], ["EmptyState", "TraceState"])


def test_chain_of_nothing(lib, same):
    """Refused: here when it is built, there when it is called."""
    result = outcome(lambda: first_update(lib.chain(), jnp.ones(1), jnp.ones(1)))
    same(result, "ValueError")


# ---- some leaves ---------------------------------------------------------------------


def test_masked(lib, same):
    """The other leaves keep their gradients."""
    tx = optax.masked(lib.adam(0.1, eps=0.0), {"a": True, "b": False})
    updates = first_update(tx, tree(), tree())
    same(updates, {"a": -0.1 * ONE, "b": ONE})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_partition(lib, same, name):
    """Two optimizers, three steps."""
    tx = optax.partition(
        {"x": OPTIMIZERS[name](lib), "y": lib.sgd(1.0)}, {"a": "x", "b": "y"}
    )
    params, _ = run(tx, tree(), tree(), 3)
    same(params, {"a": parameters(name, 3)[-1] * ONE, "b": -2.0 * ONE})


def test_selective_transform_and_freeze(lib, same):
    mask = {"a": True, "b": False}
    frozen = {"a": ONE, "b": 0.9 * ONE}
    same(
        run(optax.selective_transform(lib.sgd(0.1), freeze_mask=mask), tree(), tree())[
            0
        ],
        frozen,
    )
    same(run(lib.chain(lib.sgd(0.1), optax.freeze(mask)), tree(), tree())[0], frozen)


def test_a_mask_by_function_in_partition(lib, same):
    """The mask sees the part's parameters, with MaskedNode for the others."""
    mask = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    params = {"a": jnp.ones((1, 1)), "b": jnp.ones(1), "c": jnp.ones((1, 1))}
    tx = optax.partition(
        {"x": lib.adamw(1.0, weight_decay=0.5, mask=mask), "y": lib.sgd(1.0)},
        {"a": "x", "b": "x", "c": "y"},
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    same(first_update(tx, params, zeros), {"a": [[-0.5]], "b": [0.0], "c": [[0.0]]})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flatten(lib, same, name):
    params = {"a": jnp.ones(()), "b": jnp.ones((2, 1))}
    same(
        run(optax.flatten(OPTIMIZERS[name](lib)), params, params, 2)[0],
        jax.tree.map(lambda x: np.full(x.shape, parameters(name, 2)[-1]), params),
    )


# ---- hyperparameters -----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inject_hyperparams(lib, same, name):
    factory, arguments = {
        "adam": (lib.adam, {"eps": 0.0}),
        "adamw": (lib.adamw, {"eps": 0.0, "weight_decay": 0.1}),
        "amsgrad": (lib.amsgrad, {"eps": 0.0}),
        "sgd": (lib.sgd, {}),
        "momentum": (lib.sgd, {"momentum": 0.9}),
        "nesterov": (lib.sgd, {"momentum": 0.9, "nesterov": True}),
    }[name]
    tx = optax.inject_hyperparams(factory)(0.1, **arguments)
    params, state = run(tx, jnp.ones(1), jnp.ones(1), 2)
    same(params, parameters(name, 2)[-1] * ONE)
    same(state.hyperparams["learning_rate"], 0.1)


def test_inject_hyperparams_edited_twice(lib, same):
    """In `jit`, with one program."""
    tx = optax.inject_hyperparams(lib.adamw)(0.1, eps=0.0, weight_decay=0.0)
    state, update = tx.init(jnp.ones(1)), jax.jit(tx.update)
    for rate in (0.1, 0.2, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = update(jnp.ones(1), state, jnp.ones(1))
        same(updates, -rate * ONE)


def test_inject_hyperparams_with_a_schedule(lib, same):
    tx = optax.inject_hyperparams(lib.sgd)(lambda step: 0.1 * (step + 1))
    state = tx.init(jnp.ones(1))
    for rate in (0.1, 0.2, 0.3):
        updates, state = tx.update(jnp.ones(1), state)
        same(updates, -rate * ONE)


def test_inject_hyperparams_of_links(lib, same):
    @optax.inject_hyperparams
    def make(rate, b1, norm):
        return lib.chain(
            lib.clip_by_global_norm(norm),
            lib.scale_by_adam(b1=b1, eps=0.0),
            lib.scale_by_learning_rate(rate),
        )

    tx = make(rate=0.1, b1=0.9, norm=1.0)
    same(run(tx, jnp.ones(1), 3 * jnp.ones(1), 2)[0], 0.8 * ONE)


def test_vmap_over_the_learning_rate(lib, same):
    def final(rate):
        return run(lib.adam(rate, eps=0.0), jnp.ones(1), jnp.ones(1), 2)[0][0]

    same(jax.jit(jax.vmap(final))(jnp.array([0.1, 0.2])), [0.8, 0.6])


# ---- accumulation --------------------------------------------------------------------


@pytest.mark.parametrize("name", matrix([*OPTIMIZERS], quick=["adamw", "momentum"]))
def test_multi_steps(lib, same, name):
    """Micro-batches of .5 and 1.5; two windows of two."""
    tx = optax.MultiSteps(OPTIMIZERS[name](lib), 2).gradient_transformation()
    params, state = jnp.ones(1), tx.init(jnp.ones(1))
    for step, g in enumerate((0.5, 1.5, 0.5, 1.5)):
        updates, state = tx.update(jnp.full(1, g), state, params)
        params = optax.apply_updates(params, updates)
        steps = (step + 1) // 2
        same(params, parameters(name, steps)[-1] * ONE if steps else ONE)


def test_multi_steps_of_bfloat16(lib, same):
    tx = optax.MultiSteps(lib.adamw(0.1), 2)
    params = jnp.ones(1, jnp.bfloat16)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    same(types(new), types(state))
    same(types(updates), "bfloat16[1]")


@pytest.mark.parametrize("bad", matrix([np.nan, np.inf, 10.0], quick=[10.0]))
def test_multi_steps_that_skip(lib, same, bad):
    """A micro-batch that is not finite, or larger than 25 in its squared norm."""

    def skip(updates, gradient_step, params):
        finite = optax.skip_not_finite(updates, gradient_step, params)
        large = optax.skip_large_updates(updates, gradient_step, params, 25.0)
        return finite[0] | large[0], (finite[1], large[1])

    tx = optax.MultiSteps(lib.sgd(1.0), 2, should_skip_update_fn=skip)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    for g in (1.0, bad, 3.0):
        updates, state = tx.update(jnp.full(1, g), state, params)
        params = optax.apply_updates(params, updates)
    same(params, -2.0 * ONE)


# ---- conditions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    matrix(
        [(n, dtype) for n in OPTIMIZERS for dtype in ("float32", "bfloat16")],
        quick=[("adamw", "bfloat16"), ("momentum", "float32")],
    ),
)
def test_apply_if_finite(lib, same, name, dtype):
    """The second of three gradients is NaN: as if it were not there."""
    tx = optax.apply_if_finite(OPTIMIZERS[name](lib), 2)
    params, update = jnp.ones(1, dtype), jax.jit(tx.update)
    state = tx.init(params)
    for g in (1.0, np.nan, 1.0):
        updates, state = update(jnp.full(1, g, dtype), state, params)
        params = params + updates
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    same(params, parameters(name, 2)[-1] * ONE, rtol=tolerance)
    same(state.total_notfinite, 1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    matrix(
        [(n, d) for n in ("adamw", "momentum") for d in ("float32", "bfloat16")],
        quick=[("adamw", "bfloat16")],
    ),
)
def test_conditionally_mask(lib, same, name, dtype):
    """Every second update is zero."""
    tx = optax.conditionally_mask(OPTIMIZERS[name](lib), lambda step: step % 2 == 0)
    params, update = jnp.ones(1, dtype), jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        updates, state = update(jnp.ones(1, dtype), state, params)
        params = params + updates
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    same(params, parameters(name, 2)[-1] * ONE, rtol=tolerance)


@pytest.mark.parametrize(
    ("link", "dtype"),
    matrix(
        [
            (link, dtype)
            for link in ("scale_by_adam", "trace", "clip_by_global_norm")
            for dtype in ("float32", "bfloat16")
        ],
        quick=[("scale_by_adam", "bfloat16"), ("trace", "float32")],
    ),
)
def test_conditionally_transform(lib, same, link, dtype):
    """A link that acts on every second gradient, of 4; the others pass."""
    inner = {
        "scale_by_adam": lib.scale_by_adam(eps=0.0),
        "trace": lib.trace(0.5),
        "clip_by_global_norm": lib.clip_by_global_norm(1.0),
    }[link]
    tx = optax.conditionally_transform(inner, lambda step: step % 2 == 0)
    state, update = tx.init(jnp.ones(1, dtype)), jax.jit(tx.update)
    acting = {"scale_by_adam": [1, 1], "trace": [4, 6], "clip_by_global_norm": [1, 1]}
    for right in (acting[link][0], 4, acting[link][1]):
        updates, state = update(jnp.full(1, 4, dtype), state)
        same(updates, right * ONE, rtol=2e-5 if dtype == "float32" else 2e-2)
        same(dtypes(updates), dtype)


# ---- slow weights, averages ----------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lookahead(lib, same, name):
    """The slow parameters go half the way of two fast steps."""
    tx = optax.lookahead(OPTIMIZERS[name](lib), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.ones(1))
    params, _ = run(tx, params, jnp.ones(1), 2)
    slow = (1 + parameters(name, 2)[-1]) / 2
    same(params.slow, slow * ONE)
    same(params.fast, slow * ONE)


@pytest.mark.parametrize("name", matrix(["sgd", "adam", "adamw"], quick=["adamw"]))
def test_schedule_free(lib, same, name):
    """z is stepped, x is the mean of all z, and (1 - b1) z + b1 x is returned."""
    inner = lib.adam(0.1, b1=0.0, eps=0.0) if name == "adam" else OPTIMIZERS[name](lib)
    tx = optax.contrib.schedule_free(inner, 0.1, b1=0.9)
    y, state = run(tx, jnp.ones(1), jnp.ones(1), 3)
    z, zs, p = 1.0, [], 1.0
    for _ in range(3):
        z -= 0.1 * (1 + (0.1 * p if name == "adamw" else 0))
        zs.append(z)
        p = 0.1 * z + 0.9 * np.mean(zs)
    same(state.z, z * ONE)
    same(y, p * ONE)
    same(optax.contrib.schedule_free_eval_params(state, y), np.mean(zs) * ONE)


def test_ema_of_the_updates(lib, same):
    tx = lib.chain(lib.sgd(0.5), optax.ema(0.9))
    same(run(tx, 2 * jnp.ones(1), jnp.ones(1), 2)[0], ONE)


# ---- contrib, monitors, constraints --------------------------------------------------


def test_sam(lib, same):
    """The gradient of p^2 / 2 at 1 + .1, applied at 1."""
    tx = optax.contrib.sam(
        lib.sgd(0.5),
        optax.chain(optax.contrib.normalize(), lib.sgd(0.1)),
        opaque_mode=True,
    )
    params = jnp.ones(1)
    updates, _ = tx.update(
        params, tx.init(params), params, grad_fn=lambda params, step: params
    )
    same(params + updates, [1 - 0.5 * 1.1])


def test_reduce_on_plateau(lib, same):
    """A loss that stays: half the rate after two steps of patience."""
    tx = lib.chain(lib.sgd(1.0), optax.contrib.reduce_on_plateau(0.5, patience=2))
    state, sizes = tx.init(jnp.ones(1)), []
    for _ in range(5):
        updates, state = tx.update(jnp.ones(1), state, jnp.ones(1), value=1.0)
        sizes.append(float(updates[0]))
    same(sizes, [-1.0, -1.0, -0.5, -0.5, -0.25])


@pytest.mark.slow
def test_mechanize(lib, same):
    tx = optax.contrib.mechanize(lib.sgd(1.0))
    params, state = run(tx, jnp.ones(2), jnp.ones(2), 2)
    same(np.isfinite(params).all() and float(params[0]) < 1, True)


def test_keep_params_nonnegative(lib, same):
    tx = lib.chain(lib.sgd(1.0), optax.keep_params_nonnegative())
    same(run(tx, jnp.array([0.5, 2.0]), jnp.ones(2))[0], [0.0, 1.0])


def test_zero_nans(lib, same):
    tx = lib.chain(optax.zero_nans(), lib.adam(0.1, eps=0.0))
    same(first_update(tx, jnp.ones(2), jnp.array([np.nan, 1.0]))[1], -0.1)


def test_snapshot(lib, same):
    tx = lib.chain(lib.sgd(0.5), optax.snapshot("size", optax.tree.norm))
    _, state = run(tx, jnp.ones(2), jnp.array([3.0, 4.0]))
    same(optax.tree.get(state, "size"), 2.5)


def test_monitor(lib, same):
    ema = optax.measure_with_ema(optax.tree.norm, decay=0.5)
    tx = lib.chain(lib.sgd(0.5), optax.monitor({"size": optax.tree.norm, "mean": ema}))
    _, state = run(tx, jnp.ones(2), jnp.array([3.0, 4.0]), 2)
    measurements = optax.tree.get(state, "measurements")
    same({k: float(v) for k, v in measurements.items()}, {"size": 2.5, "mean": 2.5})


@pytest.mark.slow
def test_add_noise_around(lib, same):
    """Noise of variance 0."""
    tx = lib.chain(optax.add_noise(0.0, 0.5, jax.random.key(0)), lib.sgd(0.1))
    same(run(tx, jnp.ones(1), jnp.ones(1))[0], 0.9 * ONE)


@pytest.mark.slow
def test_perturbations(lib, same):
    """A loss smoothed by Gumbel noise, differentiated, and followed."""
    smooth = optax.perturbations.make_perturbed_fun(jnp.sum, num_samples=4, sigma=0.1)
    tx, params = lib.sgd(0.1), jnp.ones(2)
    grads = jax.grad(lambda p: smooth(jax.random.key(0), p))(params)
    same(run(tx, params, grads)[0], np.asarray(params - 0.1 * grads))


def test_a_line_search_after_it(lib, same):
    """p^2 from 1 along -2: half of the step leads to the minimum."""
    search = optax.scale_by_backtracking_linesearch(5, decrease_factor=0.5)
    tx, params = lib.chain(lib.sgd(1.0), search), jnp.ones(1)

    def loss(p):
        return (p**2).sum()

    value, grad = jax.value_and_grad(loss)(params)
    updates, _ = tx.update(
        grad, tx.init(params), params, value=value, grad=grad, value_fn=loss
    )
    same(params + updates, 0.0 * ONE)
