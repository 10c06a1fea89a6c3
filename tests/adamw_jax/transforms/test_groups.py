"""Groups of leaves: learning rates of their own, and freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inputs import FLAX, flat

import adamw_jax as aj

LABELS = aj.labels_by_path({"body": "^(Conv|BatchNorm|layers)", "head": "^Embed"})


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_discriminative_rates(name):
    """Each group moves as if it were trained alone at its own learning rate."""

    def make(lr):
        if name == "sgd":
            return aj.sgd(lr, 0.9, weight_decay=0.1)
        return (
            aj.adamw(lr, weight_decay=0.1) if name == "adamw" else aj.adam(lr, l2=0.1)
        )

    grouped = optax.chain(
        make(0.09), aj.scale_by_group({"body": 1 / 9, "head": 1.0}, LABELS)
    )
    ends = {}
    for key, tx in {"grouped": grouped, "body": make(0.01), "head": make(0.09)}.items():
        p, state = FLAX, tx.init(FLAX)
        for k in range(3):
            g = jax.tree.map(lambda x, k=k: jnp.sin(x + k), p)
            updates, state = tx.update(g, state, p)
            p = aj.apply_updates(p, updates)
        ends[key] = flat(p)
    for path, leaf in ends["grouped"].items():
        group = "head" if path.startswith("Embed") else "body"
        np.testing.assert_allclose(leaf, ends[group][path], rtol=1e-5)


def test_group_rates_follow_phases():
    phases = aj.one_cycle(9e-3, steps=20)
    tx = optax.chain(
        aj.sgd(phases, momentum=None),
        aj.scale_by_group({"body": 1 / 9, "head": 1.0}, LABELS),
    )
    ones = jax.tree.map(jnp.ones_like, FLAX)
    state = tx.init(FLAX)
    momentum = {}
    for k in range(20):
        updates, state = tx.update(ones, state, FLAX)
        beta, rate = phases.at(k)["b1"], phases.at(k)["learning_rate"]
        for group, path in (("body", "Conv_0/kernel"), ("head", "Embed_0/embedding")):
            momentum[group] = beta * momentum.get(group, 0.0) + 1
            factor = 1 / 9 if group == "body" else 1.0
            np.testing.assert_allclose(
                flat(updates)[path], -rate * factor * momentum[group], rtol=1e-5
            )


@pytest.mark.parametrize(
    ("multipliers", "labels", "message"),
    [
        ({"body": -1.0}, LABELS, r"multipliers\['body'\] must be"),
        ({"body": 1.0}, LABELS, "Embed_0/embedding has the label 'head'"),
        ({"body": 1.0, "head": 1.0, "tail": 1.0}, LABELS, "no leaf has the label tail"),
        ({"body": 1.0}, aj.labels_by_path({"body": "Conv"}), "leaf .* matches none of"),
        ({"body": 1.0}, {"Conv_0": "body"}, "labels has no leaf"),
    ],
)
def test_bad_groups(multipliers, labels, message):
    with pytest.raises(ValueError, match=message):
        aj.scale_by_group(multipliers, labels).init(FLAX)


P = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
WB = {"w": "body", "b": "head"}


def rates(state, *groups):
    return [
        float(aj.current_hyperparams(state, group=g)["learning_rate"]) for g in groups
    ]


@pytest.mark.parametrize("chain", [optax.chain, aj.chain])
def test_rates_of_groups_are_read(chain):
    """For SGD without momentum the updates show the rates in use."""
    phases = aj.one_cycle_torch(1.0, 10, cycle_momentum=False)
    tx = chain(aj.sgd(phases), aj.scale_by_group({"body": 0.25, "head": 2.0}, WB))
    state, update = tx.init(P), jax.jit(tx.update)
    assert aj.hyperparam_groups(state) == ("body", "head")
    for k in range(10):
        updates, state = update(P, state, P)
        rate = phases.at(k)["learning_rate"]
        assert rates(state, "body", "head") == pytest.approx(
            [rate / 4, 2 * rate], rel=1e-5
        )
        np.testing.assert_allclose(updates["w"], -rate / 4 * P["w"], rtol=1e-5)
        assert float(aj.current_hyperparams(state)["learning_rate"]) == pytest.approx(
            rate, rel=1e-5
        )


def test_a_multiplier_is_overridden_until_released():
    tx = optax.chain(aj.sgd(0.5), aj.scale_by_group({"body": 0.1, "head": 1.0}, WB))
    state, update = tx.init(P), jax.jit(tx.update)
    for value, expected in ((0.4, 0.4), (0.0, 0.0), (None, 0.1)):
        state = aj.override_hyperparams(state, group="body", multiplier=value)
        for _ in range(2):
            updates, state = update(P, state, P)
            np.testing.assert_allclose(
                updates["w"], -0.5 * expected * P["w"], rtol=1e-6
            )
            np.testing.assert_allclose(updates["b"], -0.5 * P["b"], rtol=1e-6)
        found = aj.current_hyperparams(state, group="body")["multiplier"]
        assert float(found) == pytest.approx(expected)
    with pytest.raises(ValueError, match="body of scale_by_group has a multiplier onl"):
        aj.override_hyperparams(state, group="body", learning_rate=0.1)
    with pytest.raises(ValueError, match="multiplier must be finite and >= 0, got -1"):
        aj.override_hyperparams(state, group="body", multiplier=-1.0)


def test_multipliers_of_an_optimizer_that_is_built_anew():
    """New ones win over those of the state, as a new learning rate does."""

    @jax.jit
    def update(k, state):
        return aj.scale_by_group({"body": k, "head": 1.0}, WB).update(P, state, P)

    state = aj.scale_by_group({"body": jnp.float32(0.1), "head": 1.0}, WB).init(P)
    for k in (0.1, 0.3, 0.2):
        updates, state = update(k, state)
        np.testing.assert_allclose(updates["w"], k * P["w"], rtol=1e-6)
    overridden = aj.override_hyperparams(state, group="body", multiplier=0.7)
    updates, _ = update(0.4, overridden)
    np.testing.assert_allclose(updates["w"], 0.7 * P["w"], rtol=1e-6)
    # Without an optimizer there is nothing but the multiplier.
    assert aj.current_hyperparams(state, group="body").keys() == {"multiplier"}
    updates, _ = aj.scale_by_group({"body": 0.9, "head": 1.0}, WB).update(P, state, P)
    np.testing.assert_allclose(updates["w"], 0.9 * P["w"], rtol=1e-6)


def test_which_optimizer_a_group_scales():
    groups = aj.scale_by_group({"x": 0.5}, "x")
    within = optax.partition(
        {"body": aj.chain(aj.sgd(0.1), groups), "head": aj.sgd(0.2)}, WB
    )
    state = within.init(P)
    assert aj.hyperparam_groups(state) == ("body", "body/x", "head")
    assert rates(state, "body/x") == pytest.approx([0.05])
    around = aj.with_hyperparams(
        lambda learning_rate: optax.chain(optax.scale(-learning_rate), groups),
        learning_rate=0.1,
    )
    assert rates(around.init(P), "x") == pytest.approx([0.05])
    two = optax.partition({"body": aj.sgd(1.0), "head": aj.sgd(2.0)}, WB)
    both = optax.chain(two, groups)
    assert aj.current_hyperparams(both.init(P), group="x").keys() == {"multiplier"}


def test_a_multiplier_is_not_rounded_to_the_dtype_of_the_updates():
    """In bfloat16 1/9 is 0.2 % off; here the product is rounded, once."""
    u = jnp.linspace(1, 2, 64, dtype=jnp.bfloat16)
    tx = aj.scale_by_group({"x": 1 / 9}, "x")
    out, _ = tx.update(u, tx.init(u), u)
    assert out.dtype == jnp.bfloat16
    exact = np.array(u, np.float32) / np.float32(9)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_multipliers_for_leaves_of_another_part():
    """Inside a partition not all labels occur; misspelled ones are refused outside."""
    groups = aj.scale_by_group({"body": 0.5, "head": 1.0}, WB)
    tx = optax.partition(
        {"a": aj.chain(aj.sgd(1.0), groups), "z": aj.sgd(1.0)}, {"w": "a", "b": "z"}
    )
    updates, _ = tx.update(P, tx.init(P), P)
    np.testing.assert_allclose(updates["w"], -0.5 * P["w"])
    for wrapped in (
        optax.masked(groups, {"w": True, "b": False}),
        aj.freeze_leaves(groups, {"w": False, "b": True}),
    ):
        wrapped.init(P)


@pytest.mark.parametrize(
    "inner",
    [
        aj.adamw(1e-2, weight_decay=0.1, mask=aj.mask_by_path("kernel$")),
        aj.amsgrad(1e-2, l2=0.1),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1e-3), aj.sgd(1e-2, 0.9)),
    ],
    ids=["adamw", "amsgrad", "optax", "clipped"],
)
def test_frozen_leaves_do_not_move_by_one_bit(inner, lenient):
    p0 = FLAX | {"Conv_0": {"kernel": jnp.array([-0.0, 0.0, 1e-30, 3.7])}}
    tx = aj.freeze_leaves(inner, aj.mask_by_path("^(Conv|BatchNorm)"))
    p, state = p0, tx.init(p0)
    assert not any(x.shape == (3, 3, 1, 4) for x in jax.tree.leaves(state))
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.ones_like, p), state, p)
        p = jax.jit(optax.apply_updates)(p, updates)
    for path, leaf in flat(p).items():
        same = np.asarray(leaf).tobytes() == np.asarray(flat(p0)[path]).tobytes()
        assert same == path.startswith(("Conv", "BatchNorm")), path


def test_frozen_leaves_do_not_count_in_a_norm(lenient):
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = aj.freeze_leaves(optax.clip_by_global_norm(1.0), {"a": True, "b": False})
    updates, _ = tx.update({"a": jnp.full(1, 1e6), "b": jnp.ones(1)}, tx.init(p), p)
    np.testing.assert_allclose(updates["b"], 1.0)


def test_a_frozen_leaf_without_a_gradient():
    p = {"a": jnp.ones(1), "b": {"w": jnp.ones(1)}}
    tx = aj.freeze_leaves(aj.adamw(1e-2), {"a": False, "b": True})
    g = {"a": jnp.ones(1), "b": {"w": None}}
    updates, _ = tx.update(g, tx.init(p), p)
    assert updates["b"]["w"] is None
    assert aj.apply_updates(p, updates)["b"]["w"] is p["b"]["w"]


def test_extra_arguments_pass_a_freeze():
    inner = optax.GradientTransformationExtraArgs(
        lambda p: (),
        lambda u, s, p=None, *, k, **_: (jax.tree.map(lambda x: k * x, u), s),
    )
    tx = aj.freeze_leaves(inner, {"a": True, "b": False})
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    np.testing.assert_array_equal(tx.update(p, tx.init(p), p, k=3.0)[0]["b"], 3.0)


def test_hyperparameters_of_a_frozen_optimizer():
    tx = aj.freeze_leaves(aj.adamw(1e-2), aj.mask_by_path("^Conv"))
    state = aj.override_hyperparams(tx.init(FLAX), learning_rate=0.5)
    assert float(aj.current_hyperparams(state)["learning_rate"]) == 0.5
    updates, _ = tx.update(FLAX, state, FLAX)
    np.testing.assert_allclose(updates["Embed_0"]["embedding"], -0.50005, rtol=1e-5)
