"""`optax.tree` on the states: get, set, filter, map over the parameters."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers.cases import MAKERS, OPTIMIZERS, dtypes, outcome, run

LINEAR = optax.linear_schedule(0.1, 0.3, 2)  # .1, .2, .3
NAMES = (
    *("adam", "adamw", "amsgrad", "sgd", "scale_by_adam", "scale_by_amsgrad", "trace"),
    *("add_decayed_weights", "scale_by_learning_rate", "clip_by_global_norm", "chain"),
    "apply_updates",
)


@pytest.mark.parametrize("name", NAMES)
def test_signature(lib, same, name):
    """Optax's arguments, in its order and with its defaults, come first."""

    def arguments(library):
        function = inspect.signature(getattr(library, name))
        return [
            (p.name, str(p.default))
            for p in function.parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    same(arguments(lib), arguments(optax))


def state_after(tx, steps=1, dtype="float32"):
    return run(tx, {"w": jnp.ones(2, dtype)}, {"w": jnp.ones(2, dtype)}, steps)[1]


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_get_moments(lib, same, name):
    state = state_after(OPTIMIZERS[name](lib))
    same(optax.tree.get(state, "mu"), {"w": np.full(2, 0.1)})
    same(optax.tree.get(state, "nu"), {"w": np.full(2, 0.001)})
    same(optax.tree.get(state, "count"), 1)


def test_get_trace(lib, same):
    state = state_after(OPTIMIZERS["momentum"](lib), 2)
    same(optax.tree.get(state, "trace"), {"w": np.full(2, 1.9)})


def test_get_by_the_type_of_the_state(lib, same):
    state = lib.chain(lib.trace(0.9), lib.scale_by_adam()).init(jnp.ones(1))
    same(outcome(optax.tree.get, state, "trace"), np.zeros(1))
    same([type(s).__name__ for s in state], ["TraceState", "ScaleByAdamState"])
    get = functools.partial(optax.tree.get, state, "ScaleByAdamState")
    same(list(get()._fields[:3]), ["count", "mu", "nu"])


def test_states_are_of_optaxs_classes(lib, same):
    """As code that looks for Adam's state in an optimizer's asks."""
    for link, kind in (
        (lib.scale_by_adam(), optax.ScaleByAdamState),
        (lib.trace(0.9), optax.TraceState),
        (lib.clip_by_global_norm(1.0), optax.EmptyState),
    ):
        same(isinstance(link.init(jnp.ones(1)), kind), True)


def test_get_the_learning_rate(lib, differs):
    """Of AdamW with a schedule, after two updates; Optax's state has no rate."""
    rate = optax.tree.get(state_after(lib.adamw(LINEAR), 2), "learning_rate")
    differs(rate, optax=None, here=0.2)


def test_get_the_learning_rate_that_is_injected(lib, differs):
    """By name, from `inject_hyperparams` with a schedule: Optax has two of it."""
    if lib is optax:
        state = state_after(optax.inject_hyperparams(optax.adamw)(LINEAR), 2)
    else:
        state = state_after(lib.adamw(LINEAR), 2)
    differs(outcome(optax.tree.get, state, "learning_rate"), optax="KeyError", here=0.2)


def test_get_the_learning_rate_that_is_injected_around(lib, differs):
    """Ours has rates in its own state, so the wrapper's are the second ones."""
    state = state_after(optax.inject_hyperparams(lib.sgd)(0.2))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.2)
    result = outcome(optax.tree.get, state, "learning_rate")
    differs(result, optax=0.2, here="KeyError")


def test_structure_of_the_state(lib, differs):
    """The states of Adam and of the learning rate are in a tuple, or in one inside."""
    state = lib.adam(0.1).init(jnp.ones(1))
    names = [type(state).__name__, type(getattr(state, "inner_state", state)).__name__]
    differs(names, optax=["tuple", "tuple"], here=["HyperparamsState", "tuple"])


def test_get_the_count_of_a_scheduled_optimizer(lib, differs):
    """Optax keeps one count for Adam and one for the schedule."""
    result = outcome(optax.tree.get, state_after(lib.adamw(LINEAR), 2), "count")
    differs(result, optax="KeyError", here=2)


def test_set_the_learning_rate(lib, same):
    """Through `inject_hyperparams` there, as it is here; it holds."""
    make = optax.inject_hyperparams(lib.sgd) if lib is optax else lib.sgd
    tx = make(0.1)
    state = optax.tree.set(tx.init(jnp.ones(1)), learning_rate=0.5)
    for _ in range(2):
        updates, state = tx.update(jnp.ones(1), state)
        same(updates, [-0.5])


def test_set_moments(lib, same):
    tx = OPTIMIZERS["adam"](lib)
    state = optax.tree.set(tx.init(jnp.ones(1)), mu=jnp.full(1, 2.0))
    same(optax.tree.get(state, "mu"), [2.0])


@pytest.mark.parametrize("name", MAKERS)
def test_map_params(lib, same, name):
    """Every leaf that is like a parameter, and no other, is mapped."""
    tx, params = MAKERS[name](lib), {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    mapped = optax.tree.map_params(tx, lambda x: -jnp.ones_like(x), tx.init(params))
    found = [leaf.shape for leaf in jax.tree.leaves(mapped) if (leaf == -1).all()]
    moments = {"adam": 2, "adamw": 2, "amsgrad": 3, "momentum": 1, "nesterov": 1}
    moments |= {"scale_by_adam": 2, "scale_by_amsgrad": 3, "trace": 1, "chain": 2}
    same(sorted(found), sorted([(2, 3), (2,)] * moments.get(name, 0)))


def test_map_params_with_another_tree(lib, same):
    """As shardings are assigned to a state."""
    tx, params = lib.adamw(0.1, mask={"w": True}), {"w": jnp.ones(2)}
    placed = optax.tree.map_params(
        tx,
        lambda _, name: name,
        jax.eval_shape(tx.init, params),
        {"w": "here"},
        transform_non_params=lambda _: "everywhere",
    )
    same(jax.tree.leaves(placed).count("here"), 2)
    same(set(jax.tree.leaves(placed)) == {"here", "everywhere"}, True)


def test_cast_of_a_state(lib, same):
    """A state stored in bfloat16 and read again goes on: finite, and near."""
    tx = OPTIMIZERS["adamw"](lib)
    state = state_after(tx, 2)
    narrow = optax.tree.cast(state, jnp.bfloat16)
    wide = jax.tree.map(lambda x, like: x.astype(like.dtype), narrow, state)
    params = {"w": jnp.full(2, 0.8)}
    updates, _ = tx.update({"w": jnp.ones(2)}, wide, params)
    same(updates, {"w": np.full(2, -0.1 * 1.08)}, rtol=1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mean_of_two_states(lib, same, name):
    """As an average of models, or `pmean`, makes it."""
    tx = OPTIMIZERS[name](lib)
    states = [run(tx, jnp.ones(1), jnp.full(1, g))[1] for g in (1.0, 3.0)]
    mean = jax.tree.map(lambda *xs: sum(xs) / 2, *states)
    updates, _ = jax.jit(tx.update)(jnp.full(1, 2.0), mean, jnp.zeros(1))
    same(np.isfinite(updates).all() and float(updates[0]) < 0, True)


def test_a_state_through_flatten_and_unflatten(lib, same):
    tx = lib.chain(lib.clip_by_global_norm(1.0), lib.adamw(LINEAR, mu_dtype="bfloat16"))
    state = tx.init({"w": jnp.ones(2)})
    leaves, treedef = jax.tree.flatten(state)
    same(all(hasattr(leaf, "dtype") for leaf in leaves), True)
    same(dtypes(jax.tree.unflatten(treedef, leaves)), dtypes(state))
