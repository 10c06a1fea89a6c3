"""A run of Optax goes on here, and back, as if it had stayed where it was."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import matrix

import adamw_jax as aj

pytestmark = pytest.mark.usefixtures("lenient")

P = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
MASK = {"w": True, "b": False}
LABELS = {"w": "a", "b": "b"}
RATE = optax.linear_schedule(0.1, 0.02, 8)
DECAY = optax.linear_schedule(0.5, 0.1, 8)


def grads(k, params):
    return jax.tree.map(lambda p: jnp.sin(3 * p + k), params)


def run(tx, params, state, steps):
    for k in steps:
        updates, state = tx.update(grads(k, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def accumulate(optimizer, k):
    return aj.accumulate_gradients(optimizer, k)


PAIRS = {  # Optax's optimizer, and ours that continues
    "adam": (optax.adam(0.1), aj.adam(0.1)),
    "adam, scheduled": (optax.adam(RATE, 0.8, 0.95), aj.adam(RATE, 0.8, 0.95)),
    "nadam": (optax.nadam(0.1), aj.adam(0.1, nesterov=True)),
    "adamw": (optax.adamw(0.1, weight_decay=0.3), aj.adamw(0.1, weight_decay=0.3)),
    "adamw, masked and scheduled": (
        optax.adamw(RATE, weight_decay=DECAY, mask=MASK),
        aj.adamw(RATE, weight_decay=DECAY, mask=MASK),
    ),
    "amsgrad": (optax.amsgrad(RATE), aj.amsgrad(RATE, convention="optax")),
    "sgd, scheduled": (optax.sgd(RATE), aj.sgd(RATE)),
    "momentum": (optax.sgd(RATE, 0.9, True), aj.sgd(RATE, 0.9, True)),
    "inject": (
        optax.inject_hyperparams(optax.adamw)(RATE, weight_decay=0.3),
        aj.adamw(RATE, weight_decay=0.3),
    ),
    "inject in both": (
        optax.inject_hyperparams(optax.adamw)(RATE, weight_decay=0.3),
        optax.inject_hyperparams(aj.adamw, static_args=("seed",))(
            RATE, weight_decay=0.3
        ),
    ),
    "inject, momentum": (
        optax.inject_hyperparams(optax.sgd)(RATE, momentum=0.9),
        aj.sgd(RATE, momentum=0.9),
    ),
    "chain": (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(RATE)),
        aj.chain(aj.clip_by_global_norm(0.5), aj.adam(RATE)),
    ),
    "links": (
        optax.chain(
            optax.trace(0.5),
            optax.scale_by_adam(),
            optax.add_decayed_weights(DECAY),
            optax.scale_by_learning_rate(RATE),
        ),
        aj.chain(
            aj.trace(0.5),
            aj.scale_by_adam(),
            aj.add_decayed_weights(DECAY),
            aj.scale_by_learning_rate(RATE),
        ),
    ),
    "partition": (
        optax.partition({"a": optax.adam(RATE), "b": optax.sgd(RATE, 0.9)}, LABELS),
        optax.partition({"a": aj.adam(RATE), "b": aj.sgd(RATE, 0.9)}, LABELS),
    ),
    "frozen": (
        optax.partition({"a": optax.adam(RATE), "b": optax.set_to_zero()}, LABELS),
        aj.freeze_leaves(aj.adam(RATE), {"w": False, "b": True}),
    ),
    "masked": (
        optax.masked(optax.adam(RATE), MASK),
        optax.masked(aj.adam(RATE), MASK),
    ),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(RATE), 2),
        accumulate(aj.adam(RATE), 2),
    ),
    "MultiSteps, sgd": (
        optax.MultiSteps(optax.sgd(RATE), 2, use_grad_mean=False),
        aj.accumulate_gradients(aj.sgd(RATE), 2, use_grad_mean=False),
    ),
    "apply_if_finite": (
        optax.apply_if_finite(optax.adam(RATE), 3),
        optax.apply_if_finite(aj.adam(RATE), 3),
    ),
    "with ema": (
        optax.chain(optax.ema(0.5), optax.sgd(RATE)),
        aj.chain(optax.ema(0.5), aj.sgd(RATE)),
    ),
}
QUICK = ("adamw, masked and scheduled", "inject", "partition", "links")


@pytest.mark.parametrize("name", matrix(list(PAIRS), quick=QUICK))
def test_a_run_goes_on_and_back(name, x64):
    """4 steps of Optax, 4 here and 2 of Optax are 10 of Optax; in float64."""
    theirs, ours = PAIRS[name]
    p = jax.tree.map(lambda x: x.astype(jnp.float64), P)
    expected, _ = run(theirs, p, theirs.init(p), range(10))
    moved, optax_state = run(theirs, p, theirs.init(p), range(4))
    state = aj.from_optax_state(optax_state, ours.init(p))
    moved, state = run(ours, moved, state, range(4, 8))
    optax_state = aj.to_optax_state(state, theirs.init(p))
    moved, _ = run(theirs, moved, optax_state, range(8, 10))
    for leaf, x in expected.items():
        rtol = 1e-7 if "MultiSteps" in name else 1e-9  # its sums are float32
        np.testing.assert_allclose(moved[leaf], x, rtol=rtol)
    assert np.abs(expected["w"] - p["w"]).max() > 0.01


def leaves(state):
    return jax.tree_util.tree_leaves_with_path(state)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, x), (_, y) in zip(leaves(one), leaves(other), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("name", matrix(list(PAIRS), quick=QUICK))
def test_there_and_back_is_the_identity(name):
    """Every bit of Optax's state, and every bit of ours that Optax's can hold."""
    theirs, ours = PAIRS[name]
    p, optax_state = run(theirs, P, theirs.init(P), range(4))
    state = aj.from_optax_state(optax_state, ours.init(P))
    assert_same(aj.to_optax_state(state, theirs.init(P)), optax_state)
    p, state = run(ours, p, state, range(4, 6))
    back = aj.from_optax_state(aj.to_optax_state(state, theirs.init(P)), ours.init(P))
    # Sums of rounded logarithms; what schedules gave; sums of a window that is over.
    not_kept = ("log_b", "hyperparams", "last_values", "grads", "weight")
    for (path, x), (_, y) in zip(leaves(state), leaves(back), strict=True):
        path = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype
        if not any(field in path for field in not_kept):
            np.testing.assert_array_equal(x, y, err_msg=path)
    expected, one = run(ours, p, state, range(6, 8))
    moved, other = run(ours, p, back, range(6, 8))
    for leaf in P:
        np.testing.assert_allclose(moved[leaf], expected[leaf], rtol=1e-6)
    for (_, x), (_, y) in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_the_next_update_in_float32_under_jit():
    """Equal but for the rounding of Optax's bias correction, 1e-5 for b2 = .999."""
    theirs, ours = optax.adamw(RATE), aj.adamw(RATE)
    p, optax_state = run(theirs, P, theirs.init(P), range(4))
    state = aj.from_optax_state(optax_state, ours.init(P))
    for leaf in P:
        assert state.inner_state[0].mu[leaf] is optax_state[0].mu[leaf]
    g = grads(4, p)
    expected, _ = jax.jit(theirs.update)(g, optax_state, p)
    updates, state = jax.jit(ours.update, donate_argnums=1)(g, state, p)
    for leaf in P:
        np.testing.assert_allclose(updates[leaf], expected[leaf], rtol=2e-5)
    assert int(state.step) == 5


# ---- hyperparameters and counts ------------------------------------------------------


def test_an_edit_of_inject_hyperparams_is_an_override():
    make = optax.inject_hyperparams(optax.sgd)
    edited = make(0.1).init(P)
    edited.hyperparams["learning_rate"] = 0.7  # as scripts do it
    for rate in (0.1, RATE):
        state = aj.from_optax_state(edited, aj.sgd(rate).init(P))
        for _ in range(2):
            updates, state = aj.sgd(rate).update(P, state, P)
            np.testing.assert_allclose(updates["w"], -0.7 * P["w"], rtol=1e-6)
        back = aj.to_optax_state(state, make(0.1).init(P))
        assert float(back.hyperparams["learning_rate"]) == pytest.approx(0.7)
        with pytest.raises(ValueError, match="overridden, which a schedule of inject"):
            aj.to_optax_state(state, make(RATE).init(P))
        with pytest.raises(ValueError, match="overridden, for which Optax has a place"):
            aj.to_optax_state(state, optax.sgd(0.1).init(P))
    # What was not edited follows the optimizer that continues.
    state = aj.from_optax_state(make(0.1).init(P), aj.sgd(0.1).init(P))
    updates, _ = aj.sgd(0.3).update(P, state, P)
    np.testing.assert_allclose(updates["w"], -0.3 * P["w"], rtol=1e-6)


def test_hyperparameters_in_bfloat16():
    """Optax's are in the dtype of the parameters: .001 is no edit, but .999 is 1."""
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P)
    state = optax.inject_hyperparams(optax.sgd)(1e-3).init(p)
    ours = aj.from_optax_state(state, aj.sgd(1e-3).init(p))
    assert float(aj.current_hyperparams(ours)["learning_rate"]) == pytest.approx(1e-3)
    assert np.isfinite(ours.last_values).all()
    adam = optax.inject_hyperparams(optax.adam)(1e-3)
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.0"):
        aj.from_optax_state(adam.init(p), aj.adam(1e-3).init(p))
    with pytest.raises(ValueError, match="b2 is 0.99.*bfloat16 rounds to 1.0; pass hy"):
        aj.to_optax_state(
            aj.adam(1e-3, mu_dtype="bfloat16", nu_dtype="bfloat16").init(p),
            optax.inject_hyperparams(optax.adam)(1e-3, b2=0.5).init(p),
        )


def test_the_step_of_a_state_without_counts():
    theirs, ours = optax.sgd(0.1, 0.9), aj.sgd(RATE, 0.9)
    _, old = run(theirs, P, theirs.init(P), range(3))
    with pytest.raises(ValueError, match="step must be given, because optax_state"):
        aj.from_optax_state(old, ours.init(P))
    state = aj.from_optax_state(old, ours.init(P), step=3)
    updates, state = ours.update(P, state, P)
    momentum = 0.9 * old[0].trace["w"] + P["w"]
    np.testing.assert_allclose(updates["w"], -RATE(3) * momentum, rtol=1e-6)
    with pytest.raises(ValueError, match="step must be an integer >= 0, got -1"):
        aj.from_optax_state(old, ours.init(P), step=-1)


def test_counts_that_differ():
    old = optax.chain(optax.scale_by_schedule(RATE), optax.sgd(RATE)).init(P)
    old = (old[0]._replace(count=jnp.int32(3)), old[1])
    with pytest.raises(ValueError, match="schedules are at different steps, 0, 3; p"):
        aj.from_optax_state(old, aj.sgd(RATE).init(P))
    assert int(aj.from_optax_state(old, aj.sgd(RATE).init(P), step=3).step) == 3


def test_a_beta_that_was_not_constant():
    """Optax corrects with b1**count, which a cycled b1 does not have."""
    ours = aj.adam(0.1, b1=lambda k: 0.5 + 0.1 * k)
    _, state = run(ours, P, ours.init(P), range(3))
    with pytest.raises(ValueError, match=r"b1 was not constant, .*0\.21,.*0\.343$"):
        aj.to_optax_state(state, optax.adam(0.1).init(P))
    ours = aj.adam(0.1, b1=lambda k: jnp.where(k < 2, 0.1, 0.2))
    _, state = run(ours, P, ours.init(P), range(14))  # vanished
    aj.to_optax_state(state, optax.adam(0.1).init(P))
    scheduled = aj.scale_by_adam(lambda k: 0.9)
    with pytest.raises(ValueError, match="product of all b1 so far"):
        aj.from_optax_state(optax.scale_by_adam().init(P), scheduled.init(P))


# ---- what does not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (optax.adam(0.1), aj.sgd(0.1, 0.9), "has 1 ScaleByAdamState, but state has 1 "),
        (optax.sgd(0.1), aj.adam(0.1), "has no moments, but state has 1 ScaleBy"),
        (
            optax.amsgrad(0.1),
            aj.amsgrad(0.1),
            "it has 1 ScaleByAmsgradState of Optax's .*; only convention='optax' has",
        ),
        (optax.rmsprop(0.1), aj.adam(0.1), "it has 1 ScaleByRms"),
        (
            optax.partition({"a": optax.adam(0.1), "b": optax.adam(0.1)}, LABELS),
            optax.partition({"a": aj.adam(0.1), "b": aj.sgd(0.1)}, LABELS),
            "with the label b it has 1 ScaleByAdamState, but state has no moments",
        ),
        (
            optax.masked(optax.adam(0.1), MASK),
            aj.adam(0.1),
            "mu has no leaf b",
        ),
        (
            optax.inject_hyperparams(optax.adam)(0.1),
            aj.scale_by_adam(),
            "hyperparameters of inject_hyperparams, for which state has no place",
        ),
        (  # of Optax before 0.1.9, which does not say what was scheduled
            optax.GradientTransformation(
                lambda p: optax.InjectHyperparamsState(
                    jnp.int32(0), {"learning_rate": jnp.float32(0.1)}, ()
                ),
                optax.sgd(0.1).update,
            ),
            aj.sgd(0.1),
            "it has 1 InjectHyperparamsState, but state has no moments",
        ),
        (
            optax.inject_hyperparams(optax.sgd)(0.1),
            aj.chain(aj.sgd(0.1), aj.sgd(0.1)),
            "hyperparameters in it are of 1 optimizers, but those in state of 2",
        ),
    ],
)
def test_transformations_that_differ(old, new, message):
    with pytest.raises(ValueError, match=f"^optax_state does not fit: .*{message}"):
        aj.from_optax_state(old.init(P), new.init(P))


def test_shapes_and_dtypes_that_differ():
    tx = aj.adam(0.1)
    wide = P | {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"mu of leaf w has shape \(3,\), but \(2,\)"):
        aj.from_optax_state(optax.adam(0.1).init(wide), tx.init(P))
    low = aj.adam(0.1, mu_dtype=jnp.bfloat16)
    _, old = run(optax.adam(0.1), P, optax.adam(0.1).init(P), range(2))
    with pytest.raises(ValueError, match="mu of leaf b has dtype float32, and bfloat"):
        aj.from_optax_state(old, low.init(P))
    theirs = optax.adam(0.1, mu_dtype=jnp.bfloat16)
    _, old = run(theirs, P, theirs.init(P), range(2))
    assert_same(aj.from_optax_state(old, low.init(P)).inner_state[0].mu, old[0].mu)
    wider = aj.from_optax_state(old, tx.init(P)).inner_state[0].mu  # loses nothing
    np.testing.assert_array_equal(wider["w"], old[0].mu["w"].astype(jnp.float32))
    state = aj.from_optax_state(old, tx.init(P))
    assert_same(aj.to_optax_state(state, theirs.init(P)), old)


def test_moments_of_bfloat16_parameters():
    """Optax has both in bfloat16. Float32 ones go back until they have moved."""
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P)
    theirs, ours = optax.adam(0.1), aj.adam(0.1)
    _, old = run(theirs, p, theirs.init(p), range(2))
    low = aj.adam(0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
    for tx in (low, ours):
        state = aj.from_optax_state(old, tx.init(p))
        assert_same(aj.to_optax_state(state, theirs.init(p)), old)
    _, state = ours.update(p, state, p)
    with pytest.raises(ValueError, match="dtype float32, and bfloat16 of optax_st"):
        aj.to_optax_state(state, theirs.init(p))


def test_a_window_that_has_begun():
    theirs, ours = optax.MultiSteps(optax.sgd(0.1), 3), accumulate(aj.sgd(0.1), 3)
    _, old = run(theirs, P, theirs.init(P), range(4))
    with pytest.raises(ValueError, match="within a window, after 1 micro-batches"):
        aj.from_optax_state(old, ours.init(P))
    _, state = run(ours, P, ours.init(P), range(5))
    with pytest.raises(ValueError, match="within a window, after 2 micro-batches"):
        aj.to_optax_state(state, theirs.init(P))


def test_what_is_no_state():
    class Optimizer:
        opt_state = optax.adam(0.1).init(P)

    with pytest.raises(TypeError, match="optax_state must be .*, got Optimizer; pass"):
        aj.from_optax_state(Optimizer(), aj.adam(0.1).init(P))


def test_under_jit():
    with pytest.raises(ValueError, match="convert states outside of jit"):
        jax.jit(lambda s: aj.from_optax_state(s, aj.adam(0.1).init(P)))(
            optax.adam(0.1).init(P)
        )


# ---- checkpoints and Flax ------------------------------------------------------------

SAVED = {
    "adamw": PAIRS["adamw, masked and scheduled"],
    "inject": PAIRS["inject"],
    "partition": PAIRS["partition"],
    "MultiSteps": PAIRS["MultiSteps"],
    "amsgrad": PAIRS["amsgrad"],
}


@pytest.mark.parametrize("name", matrix(list(SAVED), quick=("inject", "partition")))
def test_a_checkpoint_of_flax_without_a_target(name):
    """Dicts, of fields and of numbers in place of tuples; arrays of NumPy."""
    serialization = pytest.importorskip("flax.serialization")
    theirs, ours = SAVED[name]
    _, old = run(theirs, P, theirs.init(P), range(4))
    restored = serialization.msgpack_restore(serialization.to_bytes(old))
    assert isinstance(restored, dict)
    expected = aj.from_optax_state(old, ours.init(P))
    assert_same(aj.from_optax_state(restored, ours.init(P)), expected)


def as_orbax(node):
    """What Orbax restores without a target: lists, dicts, None for empty states."""
    if hasattr(node, "_fields"):
        return {k: as_orbax(v) for k, v in node._asdict().items()} or None
    if isinstance(node, tuple):
        return [as_orbax(x) for x in node]
    return {k: as_orbax(v) for k, v in node.items()} if isinstance(node, dict) else node


@pytest.mark.parametrize("name", matrix(list(SAVED), quick=("inject", "partition")))
def test_a_checkpoint_of_orbax_without_a_target(name):
    theirs, ours = SAVED[name]
    _, old = run(theirs, P, theirs.init(P), range(4))
    expected = aj.from_optax_state(old, ours.init(P))
    assert_same(aj.from_optax_state(as_orbax(old), ours.init(P)), expected)


@pytest.mark.slow
def test_the_states_of_nnx_optimizers():
    nnx = pytest.importorskip("flax.nnx")
    ends = []
    for switch in (False, True):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(RATE), wrt=nnx.Param)
        for k in range(4):
            if switch and k == 2:
                old = optimizer.opt_state
                optimizer = nnx.Optimizer(model, aj.adamw(RATE), wrt=nnx.Param)
                optimizer.opt_state = aj.from_optax_state(old, optimizer.opt_state)
            optimizer.update(model, grads(k, nnx.state(model, nnx.Param)))
        ends.append(np.array(model.kernel[...]))
    np.testing.assert_allclose(*ends, rtol=1e-5)


@pytest.mark.slow
def test_a_population():
    theirs, ours = optax.adam(RATE), aj.adam(RATE)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), P)
    old, new = (jax.vmap(tx.init)(many) for tx in (theirs, ours))
    old = jax.vmap(lambda p, s: theirs.update(p, s, p)[1])(many, old)
    state = aj.from_optax_state(old, new)
    assert state.step.tolist() == [1, 1]
    updates, _ = jax.vmap(ours.update)(many, state, many)
    expected, _ = jax.vmap(theirs.update)(many, old, many)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=2e-5)


# ---- Optax's classes and tools -------------------------------------------------------

CLASSES = {
    "adam": (aj.adam(0.1), optax.ScaleByAdamState),
    "adamw": (aj.adamw(RATE, b1=0.9), optax.ScaleByAdamState),
    "bfloat16": (aj.adam(0.1, mu_dtype=jnp.bfloat16), optax.ScaleByAdamState),
    "amsgrad": (aj.amsgrad(0.1, convention="optax"), optax.ScaleByAmsgradState),
    "trace": (aj.sgd(0.1, 0.9), optax.TraceState),
    "schedule": (aj.scale_by_learning_rate(RATE), optax.ScaleByScheduleState),
    "decay": (aj.add_decayed_weights(DECAY), optax.ScaleByScheduleState),
    "empty": (aj.scale_by_learning_rate(0.1), optax.EmptyState),
}


def find(state, kind):
    is_kind = lambda x: isinstance(x, kind)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(x)]


@pytest.mark.parametrize("name", CLASSES)
def test_a_state_is_an_instance_of_optax_s_class(name):
    tx, kind = CLASSES[name]
    _, state = run(tx, P, tx.init(P), range(2))
    (found,) = find(state, kind)[:1]
    for field in kind._fields:
        assert hasattr(found, field)
    assert found._fields[: len(kind._fields)] == kind._fields
    for other in (
        pickle.loads(pickle.dumps(found)),
        copy.deepcopy(found),
        found._replace(),
        type(found)(**found._asdict()),
        jax.tree.map(lambda x: x, found),
    ):
        assert type(other) is type(found)
        assert_same(other, found)


def test_the_other_conventions_of_amsgrad_are_not_optax_s():
    for convention in ("torch", "paper"):
        state = aj.scale_by_amsgrad(convention=convention).init(P)
        assert not isinstance(state, optax.ScaleByAmsgradState)


TOOLS = {
    "adamw": aj.adamw(RATE, mask=MASK),
    "sgd": aj.sgd(RATE, 0.9),
    "amsgrad": aj.amsgrad(RATE),
    "partition": PAIRS["partition"][1],
    "accumulated": PAIRS["MultiSteps"][1],
    "frozen": PAIRS["frozen"][1],
    "grouped": aj.chain(
        aj.adamw(RATE, mu_dtype=jnp.bfloat16), aj.scale_by_group({"a": 1.0}, "a")
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_optax_tree_on_our_states(name):
    tx = TOOLS[name]
    state = tx.init(P)
    found = optax.tree.get_all_with_path(state, "learning_rate")
    assert len(found) == (2 if name == "partition" else 1)
    assert all(np.shape(x) == () for _, x in found)
    changed = optax.tree.set(state, learning_rate=jnp.float32(0.5))
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    for _, x in optax.tree.get_all_with_path(changed, "learning_rate"):
        assert float(x) == 0.5
    moments = "trace" if name == "sgd" else "mu"
    assert optax.tree.get(state, moments) is not None
    marked = optax.tree.map_params(
        tx, lambda x: x + 1, state, transform_non_params=lambda x: x
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    values = jax.tree.leaves(optax.tree.get(marked, moments))
    assert all(float(x.astype(jnp.float32).min()) == 1 for x in values)
    specs = optax.tree.map_params(
        tx, lambda _: "sharded", state, transform_non_params=lambda _: "replicated"
    )
    assert set(jax.tree.leaves(specs)) == {"sharded", "replicated"}
