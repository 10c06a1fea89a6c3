"""Hyperparameters in a state: read and overridden, also by group."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import matrix
from ways import needs_flax

import adamw_jax as aj

P = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}

G = {"w": jnp.array([0.1, 0.3]), "b": jnp.array([-2.0])}


def values(state):
    return {k: float(v) for k, v in aj.current_hyperparams(state).items()}


@pytest.mark.parametrize(
    ("name", "driver"),
    matrix(
        list(
            itertools.product(
                ("learning_rate", "b1", "b2", "weight_decay"),
                ("constant", "schedule", "phases"),
            )
        ),
        quick=[
            ("learning_rate", "constant"),
            ("b1", "schedule"),
            ("b2", "phases"),
            ("weight_decay", "phases"),
        ],
    ),
)
def test_override_holds_until_released(name, driver):
    constant = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
    if driver == "phases":
        tx = aj.adamw(aj.Phases([aj.Phase(steps=100, **constant)]))
    elif driver == "schedule":
        tx = aj.adamw(
            **{k: (lambda t, v=v: v + 0 * jnp.float32(t)) for k, v in constant.items()}
        )
    else:
        tx = aj.adamw(**constant)
    update = jax.jit(tx.update)
    state = tx.init(P)
    _, state = update(G, state, P)
    state = aj.override_hyperparams(state, **{name: 0.3})
    for _ in range(3):
        assert values(state)[name] == pytest.approx(0.3)
        held, state = update(G, state, P)
    # The update is that of an optimizer with the value from that step on.
    other = {k: v for k, v in constant.items() if k != name}
    plain, changed = aj.adamw(**constant), aj.adamw(**{name: 0.3}, **other)
    reference = plain.init(P)
    _, reference = plain.update(G, reference, P)
    reference = aj.override_hyperparams(changed.init(P), **{name: 0.3})._replace(
        inner_state=reference.inner_state
    )
    for _ in range(3):
        expected, reference = changed.update(G, reference, P)
    np.testing.assert_allclose(held["w"], expected["w"], rtol=1e-6)
    state = aj.override_hyperparams(state, **{name: None})
    _, state = update(G, state, P)
    if driver != "constant":  # a constant has nothing to return to
        assert values(state)[name] == pytest.approx(constant[name], rel=1e-6)


def test_override_copies():
    """The caller's array survives a donated step and may be passed twice."""
    tx = aj.adamw(1e-2)
    value = jnp.float32(0.3)
    state = aj.override_hyperparams(tx.init(P), b1=value, weight_decay=value)
    jax.jit(tx.update, donate_argnums=1)(G, state, P)
    assert float(value) == pytest.approx(0.3)


@needs_flax((0, 12, 5), "cached_partial of this Flax fails for an optimizer")
def test_nnx_optimizer(lenient):
    """Changed in place, also for a function that was compiled around its variables."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, aj.adamw(0.1, weight_decay=0.0), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    update = nnx.jit(lambda m, o, g: o.update(m, g))
    cached = nnx.cached_partial(update, model, optimizer)

    def moves_by(rate, run):
        before = np.array(model.kernel[...])
        run()
        np.testing.assert_allclose(before - model.kernel[...], rate, rtol=1e-5)
        assert values(optimizer) == values(optimizer.opt_state)
        assert values(optimizer)["learning_rate"] == pytest.approx(rate)

    moves_by(0.1, lambda: cached(grads))
    assert aj.override_hyperparams(optimizer, learning_rate=0.5) is optimizer
    moves_by(0.5, lambda: cached(grads))

    @nnx.jit
    def lower(optimizer):
        aj.override_hyperparams(optimizer, learning_rate=0.25)

    lower(optimizer)
    moves_by(0.25, lambda: update(model, optimizer, grads))
    # The state alone is a tree, of which a new one is returned.
    state = aj.override_hyperparams(optimizer.opt_state, learning_rate=0.5)
    assert values(optimizer)["learning_rate"] == 0.25
    optimizer.opt_state = state
    moves_by(0.5, lambda: update(model, optimizer, grads))


def test_a_group_of_an_nnx_optimizer(lenient):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    labels = aj.labels_by_path({"k": "kernel", "b": "bias"})
    tx = optax.chain(
        optax.partition({"k": aj.sgd(0.1), "b": aj.sgd(0.2)}, labels),
        aj.scale_by_group(
            {"K": 0.5, "B": 1.0}, lambda p: jax.tree.map(str.upper, labels(p))
        ),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    aj.override_hyperparams(optimizer, group="b", learning_rate=0.4)
    aj.override_hyperparams(optimizer, group="K", multiplier=0.25)
    before = [np.array(x[...]) for x in (model.kernel, model.bias)]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    after = (model.kernel, model.bias)
    for old, new, rate in zip(before, after, (0.025, 0.4), strict=True):
        np.testing.assert_allclose(old - new[...], rate, rtol=1e-5)


def test_train_state(lenient):
    train_state = pytest.importorskip("flax.training.train_state")
    tx = aj.chain(aj.clip_by_global_norm(1e9), aj.sgd(0.1))
    old = train_state.TrainState.create(apply_fn=None, params=P, tx=tx)
    new = aj.override_hyperparams(old, learning_rate=0.5)
    assert isinstance(new, train_state.TrainState)
    assert values(old)["learning_rate"] == pytest.approx(0.1)
    assert values(new)["learning_rate"] == 0.5
    moved = new.apply_gradients(grads=G)
    np.testing.assert_allclose(moved.params["w"], P["w"] - 0.5 * G["w"], rtol=1e-6)


def test_an_object_that_holds_the_state_is_changed_in_place():
    class Trainer:
        def __init__(self, opt_state):
            self.opt_state = opt_state

    trainer = Trainer(aj.sgd(0.1).init(P))
    assert aj.override_hyperparams(trainer, learning_rate=0.5) is trainer
    assert values(trainer.opt_state)["learning_rate"] == 0.5
    assert values(trainer)["learning_rate"] == 0.5


def test_override_inside_jit_and_vmap():
    tx = aj.adamw(aj.one_cycle(1e-2, steps=10), weight_decay=0.0)

    def first_update(lr):
        state = aj.override_hyperparams(tx.init(P), learning_rate=lr)
        return tx.update(G, state, P)[0]["b"]

    updates = jax.jit(jax.vmap(first_update))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(updates, [[0.1], [0.2]], rtol=1e-6)


def two(make, *labels):
    """An optimizer for each leaf of P."""
    return make(
        dict(zip(labels, (aj.sgd(0.1), aj.sgd(lambda t: 0.2)), strict=True)),
        dict(zip(("w", "b"), labels, strict=True)),
    )


GROUPED = {  # the optimizer, and the rates by group that each leaf is multiplied by
    "partition": (two(optax.partition, "a", "b"), {"w": {"a": 0.1}, "b": {"b": 0.2}}),
    "multi_transform": (
        two(optax.multi_transform, "a", "b"),
        {"w": {"a": 0.1}, "b": {"b": 0.2}},
    ),
    "integers": (two(optax.partition, 0, 1), {"w": {"0": 0.1}, "b": {"1": 0.2}}),
    "nested": (
        optax.partition(
            {"x": two(optax.partition, "a", "b"), "y": aj.sgd(0.3)},
            {"w": "x", "b": "y"},
        ),
        {"w": {"x/a": 0.1}, "b": {"y": 0.3}},
    ),
    "chain": (
        aj.chain(aj.sgd(0.1), optax.clip(1e9), aj.sgd(0.2)),
        {"w": {"0": 0.1, "2": 0.2}, "b": {"0": 0.1, "2": 0.2}},
    ),
    "named_chain": (
        optax.named_chain(("one", aj.sgd(0.1)), ("two", aj.sgd(0.2))),
        {"w": {"one": 0.1, "two": 0.2}, "b": {"one": 0.1, "two": 0.2}},
    ),
    "equal labels": (
        optax.chain(two(optax.partition, "a", "b"), two(optax.partition, "b", "c")),
        {"w": {"a": 0.1, "1/b": 0.1}, "b": {"0/b": 0.2, "c": 0.2}},
    ),
    "frozen": (
        aj.freeze_leaves(two(optax.partition, "a", "b"), {"w": False, "b": True}),
        {"w": {"a": 0.1}, "b": {}},
    ),
    "one label": (
        optax.partition(
            {"train": aj.sgd(0.1), "stop": optax.set_to_zero()},
            {"w": "train", "b": "stop"},
        ),
        {"w": {"train": 0.1}, "b": {}},
    ),
}


def expected_updates(rates):
    return {
        leaf: np.prod([-rate for rate in by_group.values()]) * G[leaf]
        if by_group
        else np.zeros_like(G[leaf])
        for leaf, by_group in rates.items()
    }


@pytest.mark.parametrize("name", GROUPED)
def test_one_of_several_optimizers(name):
    """Each group is read and changed without the others."""
    tx, rates = GROUPED[name]
    state, update = tx.init(P), jax.jit(tx.update)
    groups = {group: x for by_group in rates.values() for group, x in by_group.items()}
    assert groups.keys() <= set(aj.hyperparam_groups(state))
    for group, rate in groups.items():
        seen = aj.current_hyperparams(state, group=group)
        assert float(seen["learning_rate"]) == pytest.approx(rate)
        changed = aj.override_hyperparams(state, group=group, learning_rate=0.7)
        updates, changed = update(G, changed, P)
        now = {
            leaf: {g: 0.7 if g == group else x for g, x in by_group.items()}
            for leaf, by_group in rates.items()
        }
        for leaf, expected in expected_updates(now).items():
            np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6)
        released = aj.override_hyperparams(changed, group=group, learning_rate=None)
        updates, _ = update(G, released, P)
        for leaf, expected in expected_updates(rates).items():
            np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6)


def test_groups_inside_jit():
    tx, _ = GROUPED["partition"]

    @jax.jit
    def update(state, rate):
        state = aj.override_hyperparams(state, group="b", learning_rate=rate)
        updates, state = tx.update(G, state, P)
        return updates, aj.current_hyperparams(state, group="b")["learning_rate"]

    updates, rate = update(tx.init(P), 0.4)
    np.testing.assert_allclose(updates["b"], -0.4 * G["b"], rtol=1e-6)
    np.testing.assert_allclose(rate, 0.4, rtol=1e-6)


def test_errors_name_the_groups():
    tx, _ = GROUPED["nested"]
    state = tx.init(P)
    with pytest.raises(ValueError, match="of 3 optimizers; .* one of x/a, x/b, y$"):
        aj.current_hyperparams(state)
    with pytest.raises(ValueError, match="of 3 optimizers; .* one of x/a, x/b, y$"):
        aj.override_hyperparams(state, learning_rate=1.0)
    with pytest.raises(ValueError, match="no group 'a'; the groups are: x/a, x/b, y$"):
        aj.current_hyperparams(state, group="a")
    with pytest.raises(ValueError, match="no hyperparameter b1; .* learning_rate$"):
        aj.override_hyperparams(state, group="y", b1=0.5)
    with pytest.raises(ValueError, match="of 0 optimizers$"):
        aj.current_hyperparams(optax.sgd(1e-2).init(P))
    with pytest.raises(ValueError, match="no group 'a'; the groups are: none"):
        aj.current_hyperparams(aj.sgd(1e-2).init(P), group="a")
    assert aj.hyperparam_groups(aj.sgd(1e-2).init(P)) == ()
    with pytest.raises(ValueError, match="none can be called group"):
        aj.with_hyperparams(lambda group: optax.scale(group), group=1.0)


@pytest.mark.slow
def test_groups_of_an_optimizer_of_pytorch():
    """One group's rate changes: PyTorch's optimizer, and the one built from it."""
    torch = pytest.importorskip("torch")
    start = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
    weights = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [weights["w"]], "lr": 0.1},
            {"params": [weights["b"]], "lr": 0.2, "betas": (0.8, 0.9)},
        ]
    )

    def step(k):
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(np.sin(np.array(G[name]) + k))
        theirs.step()

    for k in range(2):
        step(k)
    params = {k: jnp.asarray(v.detach().numpy().copy()) for k, v in weights.items()}
    tx, state = aj.optimizer_from_torch_state_dict(
        theirs.state_dict(), params, names=["w", "b"]
    )
    first, second = aj.hyperparam_groups(state)
    for group, rate in ((first, 0.1), (second, 0.2)):
        seen = aj.current_hyperparams(state, group=group)
        assert float(seen["learning_rate"]) == pytest.approx(rate)
    state = aj.override_hyperparams(state, group=second, learning_rate=0.05)
    theirs.param_groups[1]["lr"] = 0.05
    for k in range(2, 5):
        step(k)
        grads = jax.tree.map(lambda g, k=k: jnp.sin(g + k), G)
        params, state = aj.update_and_apply(tx, grads, state, params)
    for name, weight in weights.items():
        np.testing.assert_allclose(params[name], weight.detach().numpy(), rtol=1e-5)


def test_partitioned_states_and_optax_tree():
    """As for `optax.inject_hyperparams` in `optax.partition`: all, or a filter."""
    tx, _ = GROUPED["partition"]
    state = tx.init(P)
    found = optax.tree.get_all_with_path(state, "learning_rate")
    assert [float(x) for _, x in found] == pytest.approx([0.1, 0.2])
    with pytest.raises(KeyError, match="multiple values"):
        optax.tree.get(state, "learning_rate")

    def is_b(path, _):
        return any(getattr(key, "key", None) == "b" for key in path)

    rate = optax.tree.get(state, "learning_rate", filtering=is_b)
    assert float(rate) == pytest.approx(0.2)
    for filtering, expected in ((None, (0.5, 0.5)), (is_b, (0.1, 0.5))):
        changed = optax.tree.set(state, filtering, learning_rate=jnp.float32(0.5))
        for _ in range(2):  # an edit stays
            updates, changed = jax.jit(tx.update)(G, changed, P)
        for leaf, rate in zip(("w", "b"), expected, strict=True):
            np.testing.assert_allclose(updates[leaf], -rate * G[leaf], rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 0.5}, "no hyperparameter momentum; the state holds b1, b2"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and >= 0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\)"),
    ],
)
def test_bad_override(kwargs, message):
    state = aj.adamw(1e-2).init(P)
    with pytest.raises(ValueError, match=message):
        aj.override_hyperparams(state, **kwargs)
