"""Hyperparameters in the state: readable, driven by one counter, overridable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import adam_loop, constant, sgd_loop

import adamw_jax as aj
from adamw_jax._tree import find_states

P = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
G = {"w": jnp.array([0.1, 0.3]), "b": jnp.array([-2.0])}


def values(state):
    return {k: float(v) for k, v in aj.current_hyperparams(state).items()}


def test_values_in_force_are_those_of_the_last_update():
    """For SGD without momentum the update shows the rate in use."""
    phases = aj.one_cycle_torch(1.0, 20, cycle_momentum=False)
    tx = aj.sgd(phases)
    state = tx.init(P)
    assert values(state) == pytest.approx(phases.at(0))

    @jax.jit
    def step(state):
        updates, state = tx.update(G, state, P)
        return aj.current_hyperparams(state)["learning_rate"], updates, state

    for k in range(20):
        seen, updates, state = step(state)
        assert float(seen) == pytest.approx(phases.at(k)["learning_rate"], rel=1e-5)
        np.testing.assert_allclose(updates["w"], -seen * G["w"], rtol=1e-6)


def test_values_in_the_state_are_those_of_optax(lenient):
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    ours, theirs = aj.sgd(schedule), optax.inject_hyperparams(optax.sgd)(schedule)
    states = [ours.init(P), theirs.init(P)]
    for _ in range(5):
        mine, optaxs = (state.hyperparams["learning_rate"] for state in states)
        np.testing.assert_array_equal(mine, optaxs)
        states = [
            tx.update(G, state)[1]
            for tx, state in zip((ours, theirs), states, strict=True)
        ]


def test_all_four_from_one_counter():
    phases = aj.Phases(
        [
            aj.Phase(
                steps=8,
                learning_rate=(0.1, 0.2),
                b1=(0.9, 0.8),
                b2=(0.9, 0.99, "cosine"),
                weight_decay=(1e-3, 1e-1, "exponential"),
            )
        ]
    )
    tx = aj.adamw(phases)
    state = tx.init(P)
    one_later = tx.update(G, state, P)[1]
    counters = [
        x
        for x, y in zip(*map(jax.tree.leaves, (state, one_later)), strict=True)
        if x.dtype == jnp.int32 and int(y) == int(x) + 1
    ]
    assert len(counters) == 2  # the phases' step, and Adam's count of its updates
    for k in range(8):
        _, state = tx.update(G, state, P)
        assert values(state) == pytest.approx(phases.at(k), rel=1e-5)
        assert int(state.step) == k + 1


# ---- a schedule is read once per update, at its own step ----------------------------


def test_a_schedule_that_is_nan_one_step_ahead():
    """It is NaN from step 4 on, of which nobody asks."""
    tx = aj.sgd(lambda s: 0.1 * jnp.sqrt(1 - s / 3))
    state = tx.init(P)
    for k in range(4):
        updates, state = tx.update(G, state, P)
        expected = -0.1 * np.sqrt(1 - k / 3) * np.array(G["w"])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6, atol=1e-9)
    assert np.isfinite(state.last_values).all()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_one_nan_in_a_schedule_does_not_stick(name, jit):
    rates = {"learning_rate": 0.1, "weight_decay": 0.5}
    rates[name] = lambda s, v=rates[name]: jnp.where(s == 2, jnp.nan, v)
    tx = aj.sgd(**rates)
    update, state = jax.jit(tx.update) if jit else tx.update, tx.init(P)
    for k in range(6):
        updates, state = update(G, state, P)
        expected = -0.1 * (np.array(G["w"]) + 0.5 * np.array(P["w"]))
        expected = expected * np.nan if k == 2 else expected
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    assert np.isfinite(state.last_values).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda table: aj.sgd(table),
        lambda table: aj.sgd(0.1, momentum=table, weight_decay=table),
        lambda table: aj.adamw(table, table, table, weight_decay=table),
        lambda table: aj.amsgrad(0.1, weight_decay=table),
        lambda table: aj.adam(table, l2=table, nesterov=True),
        lambda table: aj.accumulate_gradients(
            aj.adamw(table), lambda s: jnp.int32(1 + 0 * int(table(s)))
        ),
    ],
    ids=["sgd", "momentum", "adamw", "amsgrad", "adam", "accumulated"],
)
@pytest.mark.parametrize(
    "apply",
    [aj.update_and_apply, lambda tx, *args: tx.update(*args)],
    ids=["update_and_apply", "update"],
)
def test_a_table_of_n_entries_survives_n_eager_steps(make, apply):
    reads, table = [], [0.5, 0.25, 0.125, 0.0625]

    def schedule(step):
        reads.append(int(step))
        return table[int(step)]

    with jax.disable_jit():  # lax.cond of the accumulation is eager as well
        tx = make(schedule)
        state = tx.init(P)
        for step in range(4):
            reads.clear()
            _, state = apply(tx, G, state, P)
            assert set(reads) == {step}


def test_a_schedule_is_read_once_per_update():
    reads = []

    def schedule(step):
        reads.append(int(step))
        return 0.1

    tx = aj.adamw(schedule)
    state = tx.init(P)
    del reads[:]
    for _ in range(3):
        _, state = tx.update(G, state, P)
    assert reads == [0, 1, 2]
    aj.update_and_apply(tx, G, state, P)
    assert reads == [0, 1, 2, 3]


def test_readable_by_optax_too():
    state = aj.adamw(aj.one_cycle(1e-2, steps=10)).init(P)
    assert optax.tree.get(state, "learning_rate") == pytest.approx(1e-3)
    assert optax.tree.get(state, "b1") == pytest.approx(0.95)
    assert optax.tree.get(state, "count") == 0


def test_editing_the_state_by_hand_is_not_ignored():
    tx = aj.adamw(lambda t: 0.1 + 0 * jnp.float32(t))
    state = tx.init(P)
    edited = state._replace(hyperparams=state.hyperparams | {"learning_rate": 0.0})
    for _ in range(3):
        updates, edited = tx.update(G, edited, P)
        np.testing.assert_array_equal(updates["w"], 0.0)
    assert values(edited)["learning_rate"] == 0.0


@pytest.mark.parametrize("jit", [False, True])
def test_an_edit_after_an_update_is_not_ignored(jit):
    """Also an edit to the value of the first update, or to that of an update ahead."""
    rates = [0.4, 0.3, 0.2, 0.1]
    tx = aj.sgd(lambda t: jnp.array(rates)[t])
    update = jax.jit(tx.update) if jit else tx.update
    for new in rates:
        state = tx.init(P)
        for _ in range(2):
            _, state = update(G, state, P)
        if new == rates[1]:
            continue  # the value that is there: no edit
        hyperparams = state.hyperparams | {"learning_rate": jnp.float32(new)}
        state = state._replace(hyperparams=hyperparams)
        for _ in range(2):
            updates, state = update(G, state, P)
            np.testing.assert_allclose(updates["w"], -new * G["w"], rtol=1e-6)


def test_an_array_that_changes_replaces_an_edit():
    """As when an optimizer is built in each step from a rate that is passed to it."""

    @jax.jit
    def update(rate, state):
        updates, state = aj.sgd(rate).update(G, state, P)
        return updates["b"] / -G["b"], state

    def edit(state, rate):
        return state._replace(hyperparams={"learning_rate": jnp.float32(rate)})

    state = aj.sgd(jnp.float32(0.1)).init(P)
    for rate, edited, expected in (
        (0.1, None, 0.1),
        (0.1, 0.7, 0.7),  # an edit,
        (0.1, None, 0.7),  # that holds
        (0.2, None, 0.2),  # until the rate changes
        (0.2, None, 0.2),
        (0.3, 0.7, 0.3),  # also at the same time
        (0.3, None, 0.3),
    ):
        state = state if edited is None else edit(state, edited)
        used, state = update(jnp.float32(rate), state)
        np.testing.assert_allclose(used, expected, rtol=1e-6)
    state = aj.override_hyperparams(state, learning_rate=0.5)
    for rate in (0.3, 0.4):  # what an override ignores
        used, state = update(jnp.float32(rate), state)
        np.testing.assert_allclose(used, 0.5, rtol=1e-6)
    state = aj.override_hyperparams(state, learning_rate=None)
    used, state = update(jnp.float32(0.4), state)
    np.testing.assert_allclose(used, 0.4, rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_an_optimizer_built_anew_around_an_old_state(traced):
    """As in Optax, the new optimizer's value wins, unless it was overridden."""
    state = aj.adamw(1e-3, weight_decay=0.0).init(P)
    overridden = aj.override_hyperparams(state, learning_rate=0.3)

    def first(lr, state):
        return aj.adamw(lr, weight_decay=0.0).update(G, state, P)[0]["b"]

    first = jax.jit(first) if traced else first
    np.testing.assert_allclose(first(0.1, state), [0.1], rtol=1e-5)
    np.testing.assert_allclose(first(0.1, overridden), [0.3], rtol=1e-5)


def test_a_schedule_is_called_with_an_int32():
    seen = []

    def schedule(step):
        seen.append((step.dtype, step.shape))
        return 1e-2 * step.astype(jnp.float32)

    tx = aj.adamw(schedule)
    tx.update(G, tx.init(P), P)
    assert set(seen) == {(jnp.dtype("int32"), ())}


def test_state_keeps_its_types_when_gradients_are_wider(x64):
    tx = aj.adamw(aj.one_cycle(1e-2, steps=5))
    p = jnp.ones(3, jnp.float32)
    state = tx.init(p)
    _, new = tx.update(jnp.ones(3, jnp.float64), state, p)
    for old, changed in zip(*map(jax.tree.leaves, (state, new)), strict=True):
        assert old.dtype == changed.dtype


def test_apply_if_finite_with_bfloat16_parameters(lenient):
    """It needs updates of the gradients' dtype: cast them, as documented."""
    tx = optax.apply_if_finite(aj.adamw(1e-2), 3)
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P)
    state = tx.init(p)
    for g in (G, jax.tree.map(lambda x: x * jnp.nan, G)):
        updates, state = jax.jit(tx.update)(g, state, p)
    np.testing.assert_array_equal(updates["w"], 0.0)


def test_map_params_of_optax(lenient):
    """`optax.tree.map_params`, which gives a state the sharding of the parameters."""
    for tx in (
        aj.adamw(1e-2, mask={"w": True, "b": False}, mu_dtype=jnp.bfloat16),
        aj.adamw(1e-2, mask=aj.mask_by_path("w")),
        aj.freeze_leaves(aj.adamw(1e-2), aj.mask_by_path("w")),
        optax.chain(
            aj.amsgrad(1e-2), aj.scale_by_group({"a": 1.0}, {"w": "a", "b": "a"})
        ),
    ):
        state = tx.init(P)
        marked = optax.tree.map_params(tx, lambda x: x + 1, state)
        assert jax.tree.structure(marked) == jax.tree.structure(state)


def test_state_of_a_population():
    """One override changes all members of a state that a vmapped init made."""
    tx = aj.sgd(0.1)
    states = jax.vmap(lambda _: tx.init(P))(jnp.arange(3))
    states = aj.override_hyperparams(states, learning_rate=0.7)
    np.testing.assert_allclose(
        aj.current_hyperparams(states)["learning_rate"], [0.7] * 3
    )
    different = jnp.array([0.1, 0.2, 0.3])
    states = aj.override_hyperparams(states, learning_rate=different)
    updates, _ = jax.vmap(lambda s: tx.update(G, s, P))(states)
    np.testing.assert_allclose(updates["b"][:, 0], 2 * different, rtol=1e-6)
    states = aj.override_hyperparams(states, learning_rate=0.7)
    _, states = jax.vmap(lambda s: tx.update(G, s, P))(states)
    np.testing.assert_allclose(
        aj.current_hyperparams(states)["learning_rate"], [0.7] * 3
    )


def test_a_callable_mask_is_never_a_schedule():
    """inject_hyperparams calls it with the step and switches all decay off."""

    def mask(params):
        return {"w": True, "b": False}

    tx = aj.adamw(1e-2, weight_decay=0.5, mask=mask)
    zeros = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    updates, _ = tx.update(zeros, tx.init(P), P)
    np.testing.assert_allclose(updates["w"], -1e-2 * 0.5 * P["w"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_an_optax_schedule_runs(lenient):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    tx = aj.adamw(schedule, b1=optax.linear_schedule(0.95, 0.85, 10))
    state = tx.init(P)
    for k in range(12):
        _, state = jax.jit(tx.update)(G, state, P)
        assert values(state)["learning_rate"] == pytest.approx(float(schedule(k)))


def test_chain_with_optax():
    tx = optax.chain(optax.clip_by_global_norm(0.1), aj.sgd(aj.one_cycle(1.0, steps=9)))
    state = tx.init(P)
    updates, state = jax.jit(tx.update)(G, state, P)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1 * 0.1, rel=1e-5)
    state = aj.override_hyperparams(state, learning_rate=2.0)
    assert values(state)["learning_rate"] == 2.0


def test_extra_arguments_reach_the_inner_transformation():
    def scale_by_value():
        def update(updates, state, params=None, *, value, **extra):
            return jax.tree.map(lambda u: u * value, updates), state

        return optax.GradientTransformationExtraArgs(lambda p: (), update)

    tx = aj.with_hyperparams(
        lambda learning_rate: optax.chain(
            scale_by_value(), aj.scale_by_learning_rate(learning_rate)
        ),
        learning_rate=0.5,
    )
    updates, _ = tx.update(G, tx.init(P), P, value=4.0)
    np.testing.assert_allclose(updates["w"], -2.0 * G["w"])


# ---- several optimizers in one state -------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aj.adamw(aj.Phases([aj.Phase(steps=1, b1=0.9)])), "do not set it"),
        (lambda: aj.sgd(aj.one_cycle(1.0, steps=9, b2=0.9)), "set b2, which is not"),
        (lambda: aj.adamw(aj.one_cycle(1.0, steps=9), b1=0.8), "b1=0.8 was set, but"),
        (
            lambda: aj.sgd(aj.one_cycle(1.0, steps=9), 0.8),
            "momentum=0.8 was set, but the phases drive b1",
        ),
        (
            lambda: aj.adamw(
                aj.one_cycle(1.0, steps=9, weight_decay=0.1), weight_decay=0.2
            ),
            "weight_decay=0.2 was set",
        ),
        (lambda: aj.adamw(1e-3, b1=aj.one_cycle(1.0, steps=9)), "learning_rate=0.001"),
        (lambda: aj.sgd(1e-3, aj.one_cycle(1.0, steps=9)), "learning_rate=0.001"),
        (
            lambda: aj.adamw(aj.one_cycle(1.0, steps=9), b1=jnp.float32(0.8)),
            "b1=.*0.8.* was set",
        ),
        (
            lambda: aj.amsgrad(aj.one_cycle(1.0, steps=9, weight_decay=0.1), l2=0.2),
            "l2 or weight_decay=0.2 was set",
        ),
        (
            lambda: aj.with_hyperparams(
                lambda learning_rate, b1: optax.identity(),
                learning_rate=aj.one_cycle(1.0, steps=9),
                b1=aj.one_cycle(1.0, steps=10),
            ),
            "different phases",
        ),
        (lambda: aj.adamw(1e-3, b2=1 - 1e-9), r"b2 must be in \[0, 1\)"),
        (lambda: aj.adamw(-1e-3), "learning_rate must be finite and >= 0, got -0.001"),
        (lambda: aj.adamw(float("nan")), "learning_rate must be .* nan"),
        (lambda: aj.adamw(jnp.float32(-1)), "learning_rate must be .*-1"),
        (
            lambda: aj.adamw(1e-3, b1=lambda t: jnp.float32(1.5)),
            r"b1 must be in \[0, 1\)",
        ),
        (lambda: aj.adamw(1e-3, eps=-1.0), "eps must be"),
    ],
)
def test_bad_drivers_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_ends_below_zero_does_not_stop_an_eager_run():
    tx = aj.sgd(lambda t: 0.1 - 0.1 * jnp.float32(t) - 1e-9)
    state = tx.init(P)
    for _ in range(3):
        _, state = tx.update(G, state, P)


# ---- states that were cast, averaged or sharded -------------------------------------

CYCLE = aj.one_cycle(1e-2, steps=40)
OPTIMIZERS = {
    "adam": lambda: aj.adam(1e-2, l2=0.1),
    "adamw": lambda: aj.adamw(CYCLE, weight_decay=0.1),
    "amsgrad": lambda: aj.amsgrad(1e-2, weight_decay=0.1),
    "sgd": lambda: aj.sgd(1e-2, 0.9, weight_decay=0.1),
}
CAST = 10  # updates before the cast


def store(t, moment):
    """The moments are in bfloat16 from the cast on."""
    return moment if t < CAST - 1 else moment.astype(jnp.bfloat16).astype(float)


LOOPS = {
    "adam": lambda p, g: adam_loop(p, g, constant(1e-2), l2=0.1, store=store),
    "adamw": lambda p, g: adam_loop(
        p,
        g,
        lambda t: CYCLE.at(t)["learning_rate"],
        lambda t: CYCLE.at(t)["b1"],
        weight_decay=0.1,
        store=store,
    ),
    "amsgrad": lambda p, g: adam_loop(
        p, g, constant(1e-2), weight_decay=0.1, maximum="raw", store=store
    ),
    "sgd": lambda p, g: sgd_loop(p, g, constant(1e-2), constant(0.9), weight_decay=0.1),
}
P0 = np.random.default_rng(0).normal(size=6).astype(np.float32)
GRADS = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)


def cast_floats(state, dtype=jnp.bfloat16):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_was_cast_to_bfloat16(name, fused):
    """After 10 of 40 steps. The moments are rounded, the hyperparameters are not."""
    tx = OPTIMIZERS[name]()

    @jax.jit
    def run(p, state, grads):
        def step(carry, g):
            p, state = carry
            if fused:
                return aj.update_and_apply(tx, g, state, p), None
            updates, state = tx.update(g, state, p)
            return (aj.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (p, state), grads)[0]  # dtypes must not change

    p, state = run(jnp.asarray(P0), tx.init(jnp.asarray(P0)), GRADS[:CAST])
    p, state = run(p, cast_floats(state), GRADS[CAST:])
    expected = LOOPS[name](P0, GRADS)[-1]
    distance = np.abs(expected - P0).max()
    np.testing.assert_allclose(p, expected, rtol=0, atol=0.02 * distance)
    assert values(state)["learning_rate"] == pytest.approx(
        CYCLE.at(39)["learning_rate"] if name == "adamw" else 1e-2, rel=2**-8
    )


@pytest.mark.parametrize("when", ["before the cast", "after the cast"])
def test_an_overridden_beta_is_not_rounded_to_1(when):
    """Next to .999 bfloat16 has 1 - 2^-8, and 1, which divides by zero."""
    tx = aj.adamw(1e-2, weight_decay=0.0)
    state = tx.init(P)
    if when == "before the cast":
        state = cast_floats(aj.override_hyperparams(state, b2=0.999))
    else:
        state = aj.override_hyperparams(cast_floats(state), b2=0.999)
    for _ in range(3):
        updates, state = tx.update(G, state, P)
        np.testing.assert_allclose(updates["w"], [-1e-2] * 2, rtol=1e-2)


def average(a, b):
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


def by_pmean(a, b):
    both = jax.tree.map(lambda *x: jnp.stack(x), a, b)
    mean = jax.vmap(lambda s: jax.lax.pmean(s, "replicas"), axis_name="replicas")(both)
    return jax.tree.map(lambda x: x[0], mean)


def by_optax(a, b):
    return optax.incremental_update(a, b, 0.5)


@pytest.mark.parametrize("mean", [average, by_pmean, by_optax])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "rounded", "accumulated"])
def test_an_average_of_two_states(name, mean, lenient):
    """The moments are the means, and the hyperparameters stay what they are."""
    table = [0.1, 0.2, 0.3, 0.4]
    make = OPTIMIZERS | {
        "rounded": lambda: aj.adamw(1e-2, mu_dtype=jnp.bfloat16),
        "accumulated": lambda: aj.accumulate_gradients(aj.sgd(0.5), 2),
    }
    schedule = aj.sgd(lambda step: jnp.array(table)[step])  # an integer step, please
    for tx in (make[name](), schedule):
        one, other = tx.init(P), tx.init(P)
        for _ in range(2):
            _, one = tx.update(G, one, P)
            _, other = tx.update(jax.tree.map(lambda g: 3 * g, G), other, P)
        mixed = mean(one, other)
        for x, y, z in zip(*map(jax.tree.leaves, (mixed, one, other)), strict=True):
            if x.shape:
                half = (np.array(y, float) + np.array(z, float)) / 2
                np.testing.assert_allclose(x, half, rtol=1e-2)
        assert values(mixed) == pytest.approx(values(one))
        # Two equal states: the mean goes on as each of them would.
        updates, same = jax.jit(tx.update)(G, mean(one, one), P)
        expected, after = tx.update(G, one, P)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
        assert values(same) == pytest.approx(values(after))
        for s in find(same):
            assert np.isfinite(s.last_values).all()  # -inf would be an override
        updates, _ = tx.update(G, mixed, P)
        assert np.isfinite(updates["w"]).all()


def find(state):
    return find_states(state, aj.HyperparamsState)


def test_an_average_of_states_with_an_override():
    tx = aj.sgd(lambda t: jnp.array([0.1, 0.2, 0.3, 0.4])[t])
    state = aj.override_hyperparams(tx.init(P), learning_rate=0.5)
    state = average(tx.update(G, state, P)[1], tx.update(G, state, P)[1])
    for _ in range(2):
        updates, state = tx.update(G, state, P)
        np.testing.assert_allclose(updates["w"], -0.5 * G["w"], rtol=1e-6)
    state = aj.override_hyperparams(state, learning_rate=None)
    updates, state = tx.update(G, state, P)  # the fourth
    np.testing.assert_allclose(updates["w"], -0.4 * G["w"], rtol=1e-6)


@pytest.mark.parametrize("mean", [average, by_pmean])
def test_an_average_of_states_with_a_nan(mean):
    """The schedule was NaN in both, which is no edit."""
    tx = aj.sgd(lambda t: jnp.where(t == 0, 0.1, jnp.where(t == 1, jnp.nan, 0.3)))
    state = tx.init(P)
    for _ in range(2):
        _, state = tx.update(G, state, P)
    assert np.isnan(values(state)["learning_rate"])
    updates, state = tx.update(G, mean(state, state), P)
    np.testing.assert_allclose(updates["w"], -0.3 * G["w"], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_of_sharding_by_rank(name):
    """Vectors are split over the devices, scalars are on each of them."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = OPTIMIZERS[name]()
    state = tx.init(jnp.asarray(P0))
    own = state._replace(inner_state=())
    assert {x.shape for x in jax.tree.leaves(own)} == {()}
    rule = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P("x") if x.ndim else jax.P()), state
    )
    sharded = jax.device_put(state, rule)
    update = jax.jit(tx.update, out_shardings=(None, rule))
    updates, sharded = update(jnp.asarray(GRADS[0]), sharded, jnp.asarray(P0))
    expected, state = tx.update(jnp.asarray(GRADS[0]), state, jnp.asarray(P0))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    for x, sharding in zip(*map(jax.tree.leaves, (sharded, rule)), strict=True):
        assert x.sharding == sharding


@pytest.mark.parametrize("ulps", [-4, 4])
def test_the_last_bits_of_a_schedule_are_no_edit(ulps):
    """A compiler may compute it twice, with two results that differ in these."""
    tx = aj.sgd(lambda step: 0.1 / (step.astype(jnp.float32) + 1))
    _, state = tx.update(G, tx.init(P), P)
    rate = state.hyperparams["learning_rate"]
    nearly = rate * (1 + ulps * jnp.finfo(jnp.float32).eps)
    assert nearly != rate
    state = state._replace(hyperparams={"learning_rate": nearly})
    _, state = jax.jit(tx.update)(G, state, P)
    assert values(state) == pytest.approx({"learning_rate": 0.05})
    assert np.isfinite(state.last_values).all()


def test_the_state_of_another_optimizer_is_named():
    with pytest.raises(TypeError, match="got a tuple: from_optax_state converts"):
        aj.adamw(0.1).update(G, optax.adamw(0.1).init(P), P)
    with pytest.raises(TypeError, match="must be that of tx.init.*got a dict"):
        aj.adamw(0.1).update(G, P, aj.adamw(0.1).init(P))
    with pytest.raises(ValueError, match="momentum, got that of another .* b1, b2"):
        aj.sgd(0.1, 0.9).update(G, aj.adamw(0.1).init(P), P)
