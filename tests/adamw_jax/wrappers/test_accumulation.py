"""Gradient accumulation: equal to the large batch, and nothing computed in vain."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiers import matrix

import adamw_jax as aj

P = {"a": jnp.array([1.0, -2.0]), "b": {"w": jnp.full((2, 3), 0.5, "float32")}}
rng = np.random.default_rng(0)


def grads_like(params, seed):
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(noise.normal(size=p.shape), p.dtype), params
    )


def by_updates(tx, grads, state, params, **extra_args):
    updates, state = tx.update(grads, state, params, **extra_args)
    return aj.apply_updates(params, updates), state


WAYS = {"updates": by_updates, "at once": aj.update_and_apply}
both_ways = pytest.mark.parametrize("step", WAYS.values(), ids=list(WAYS))


@functools.cache  # compiled once for a test
def jitted(step, tx):
    return jax.jit(functools.partial(step, tx))


def run(tx, grads, step=by_updates, params=P):
    """Parameters after each micro-batch, and the last state."""
    state, rows = tx.init(params), []
    for g in grads:
        params, state = jitted(step, tx)(g, state, params)
        rows.append(params)
    return rows, state


def assert_same(one, other):
    """To the bit, the sign of zeros included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(np.signbit(x), np.signbit(y))


# ---- the same as the large batch ----------------------------------------------------

SIZES = (3, 1, 5, 2)  # of the micro-batches of a window
X = rng.normal(size=(6, sum(SIZES), 4))  # [window, example, feature]
Y = rng.normal(size=(6, sum(SIZES)))
ENDS = np.cumsum((0, *SIZES))
OPTIMIZERS = {
    "adamw": lambda: aj.adamw(aj.one_cycle(0.1, steps=6), weight_decay=0.1),
    "amsgrad": lambda: aj.amsgrad(0.1, l2=0.1),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), aj.sgd(0.1, momentum=0.9)
    ),
}


def squares(p, x, y):
    return ((x @ p["w"] + p["c"] - y) ** 2).sum()


@both_ways
@pytest.mark.parametrize(
    ("name", "mean"),
    matrix(
        list(itertools.product(OPTIMIZERS, (True, False))),
        quick=[("adamw", True), ("adamw", False)],
    ),
)
def test_equal_to_the_large_batch(x64, lenient, step, name, mean):
    """With unequal micro-batches: of means, weighted by examples, or of sums."""
    inner = OPTIMIZERS[name]()
    tx = aj.accumulate_gradients(inner, len(SIZES), mean)
    start = {"w": jnp.ones(4), "c": jnp.zeros(())}

    def gradient(p, x, y):
        return jax.grad(lambda p: squares(p, x, y) / (len(x) if mean else 1))(p)

    @jax.jit
    def large(p, state, x, y):
        return by_updates(inner, gradient(p, x, y), state, p)

    @jax.jit
    def small(p, state, x, y):
        weight = len(x) if mean else 1.0
        return step(tx, gradient(p, x, y), state, p, weight=weight)

    expected, state = start, inner.init(start)
    p, accumulated = start, tx.init(start)
    for x, y in zip(X, Y, strict=True):
        expected, state = large(expected, state, x, y)
        for first, end in zip(ENDS[:-1], ENDS[1:], strict=True):
            p, accumulated = small(p, accumulated, x[first:end], y[first:end])
        for leaf, other in zip(
            jax.tree.leaves(p), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-12)
    assert int(accumulated.step) == len(X)
    assert max(float(abs(p[k] - start[k]).max()) for k in p) > 0.1


@both_ways
def test_windows_of_one_are_the_inner_transformation(step):
    inner = aj.adamw(aj.one_cycle(0.1, steps=4), weight_decay=0.1)
    tx = aj.accumulate_gradients(inner, 1)
    grads = [grads_like(P, i) for i in range(4)]
    alone, inner_state = run(inner, grads, step)
    together, state = run(tx, grads, step)
    assert_same(together, alone)
    assert_same(state.inner_state, inner_state)


def trajectory(every_k, skip, values, weights, last, at_once):
    """Of SGD with momentum, which a wrong call of the inner one would show."""
    tx = aj.accumulate_gradients(
        aj.sgd(0.5, momentum=0.5), lambda step: every_k[step], skip_nonfinite=skip
    )
    step = aj.update_and_apply if at_once else by_updates

    def body(carry, x):
        g, weight, last = x
        p, state = step(tx, g, carry[1], carry[0], weight=weight, last=last)
        return (p, state), (p, state.updated, state.step, state.skipped)

    p = jnp.zeros(())
    return jax.lax.scan(body, (p, tx.init(p)), (values, weights, last))[1]


COMPILED = jax.jit(trajectory, static_argnums=(1, 5))


def reference(every_k, skip, values, weights, last):
    p = buffer = 0.0
    step = skipped = 0
    window, rows = [], []
    for g, weight, ends in zip(values, weights, last, strict=True):
        window.append((g, weight))
        skipped += skip and not math.isfinite(g)
        updated = False
        if len(window) >= every_k[min(step, len(every_k) - 1)] or ends:
            kept = [
                (g, w) for g, w in window if w > 0 and not (skip and not np.isfinite(g))
            ]
            if kept:
                mean = sum(g * w for g, w in kept) / sum(w for _, w in kept)
                buffer = 0.5 * buffer + mean
                p, step, updated = p - 0.5 * buffer, step + 1, True
            window = []
        rows.append((p, updated, step, skipped))
    return [np.array(column) for column in zip(*rows, strict=True)]


LENGTH = 12
NUMBERS = st.floats(-10, 10, width=32)


@given(
    st.lists(st.integers(0, 5), min_size=LENGTH, max_size=LENGTH),
    st.booleans(),
    st.lists(
        st.one_of(NUMBERS, st.sampled_from([math.nan, math.inf])),
        min_size=LENGTH,
        max_size=LENGTH,
    ),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=LENGTH, max_size=LENGTH),
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_against_a_loop(every_k, skip, values, weights, last, at_once):
    """Any windows, weights and non-finite gradients, and any early ends."""
    with jax.enable_x64(True):
        arrays = [np.array(x) for x in (every_k, values, weights, last)]
        k, *rest = arrays
        with np.errstate(invalid="ignore"):
            expected = reference(k, skip, *rest)
        got = COMPILED(jnp.asarray(k), skip, *map(jnp.asarray, rest), at_once)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(one, other)


# ---- nothing in vain ----------------------------------------------------------------


def primitives(jaxpr, inside=False):
    """Pairs of a primitive's name and whether it is in the branch of a cond."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside
        for inner in jax.tree.leaves(eqn.params):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                inner = getattr(inner, "jaxpr", inner)
                yield from primitives(inner, inside or eqn.primitive.name == "cond")


@both_ways
def test_the_inner_update_is_in_a_branch(step):
    """The square root is Adam's alone."""
    tx = aj.accumulate_gradients(aj.adamw(1e-3), 4)
    jaxpr = jax.make_jaxpr(functools.partial(step, tx))(P, tx.init(P), P)
    where = [inside for name, inside in primitives(jaxpr.jaxpr) if name == "sqrt"]
    assert where == [True] * len(jax.tree.leaves(P))
    alone = aj.adamw(1e-3)
    jaxpr = jax.make_jaxpr(alone.update)(P, alone.init(P), P)
    assert ("sqrt", False) in set(primitives(jaxpr.jaxpr))


def compiled(step, tx, params):
    def call(params, state, grads):
        return step(tx, grads, state, params)

    state = tx.init(params)
    args = params, state, params
    return jax.jit(call, donate_argnums=(0, 1)).lower(*args).compile(), state


def test_at_once_nothing_is_copied():
    """Of arrays as large as the parameters, but for a constant of the wrong way."""
    p = {k: jnp.ones(10_000) for k in "abc"}
    tx = aj.accumulate_gradients(aj.adamw(1e-3), 4)
    program, _ = compiled(aj.update_and_apply, tx, p)
    leaf = p["a"].nbytes
    assert program.memory_analysis().temp_size_in_bytes < leaf / 4
    assert "f32[10000]{0} copy(" not in program.as_text()
    slow, _ = compiled(by_updates, tx, p)
    assert slow.memory_analysis().temp_size_in_bytes > leaf  # can be seen there


@both_ways
def test_donation(step):
    p = jax.tree.map(jnp.array, P)
    tx = aj.accumulate_gradients(aj.adamw(1e-3), 2)
    program, state = compiled(step, tx, p)
    old = [x for x in jax.tree.leaves((p, state)) if x.ndim]
    program(p, state, P)
    assert all(x.is_deleted() for x in old)


@both_ways
def test_one_trace(step):
    traces, tx = [], aj.accumulate_gradients(aj.adamw(1e-3), 2)

    @jax.jit
    def call(g, state, p):
        traces.append(None)
        return step(tx, g, state, p)

    p, state = P, tx.init(P)
    for i in range(5):
        p, state = call(grads_like(P, i), state, p)
        state = aj.override_hyperparams(state, learning_rate=0.1 * i)
    assert len(traces) == 1


@pytest.mark.parametrize("params", [P, jax.tree.map(jnp.negative, P)])
def test_updates_that_are_not_due_are_neutral(params):
    params = params | {"zeros": jnp.array([0.0, -0.0])}
    tx = aj.accumulate_gradients(aj.adamw(1e-3), 2)
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    for u in jax.tree.leaves(updates):
        assert (u == 0).all() and np.signbit(u).all()
    assert_same(aj.apply_updates(params, updates), params)
    assert_same(optax.apply_updates(params, updates), params)
    assert_same(new.inner_state, state.inner_state)
    at_once, again = jitted(aj.update_and_apply, tx)(params, state, params)
    assert_same(at_once, params)
    assert_same(again, new)


# ---- NaN ----------------------------------------------------------------------------


NONFINITE = (math.nan, math.inf, -math.inf)


def spoil(grads, value):
    return grads | {"a": grads["a"].at[0].set(value)}


@both_ways
def test_nan_stays_in_its_window(step):
    """apply_if_finite refuses the window; the next is as if it had not been."""
    tx = aj.accumulate_gradients(optax.apply_if_finite(aj.adamw(0.1), 5), 3)
    good = [grads_like(P, i) for i in range(6)]
    expected, _ = run(tx, good[3:], step)
    for value, where in itertools.product(NONFINITE, range(3)):
        bad = [spoil(g, value) if i == where else g for i, g in enumerate(good)]
        rows, state = run(tx, bad, step)
        assert_same(rows[2], P)
        assert_same(rows[5], expected[2])
        assert int(state.inner_state.total_notfinite) == 1


def test_the_inner_transformation_gets_the_nan():
    rows, state = run(
        aj.accumulate_gradients(aj.sgd(0.1), 2), [spoil(P, math.nan), P, P, P]
    )
    assert np.isnan(rows[1]["a"][0]) and np.isfinite(rows[1]["a"][1])
    assert int(state.skipped) == 0


@both_ways
def test_micro_batches_that_are_left_out(step):
    """All leaves of them; the mean is that of the others."""
    g = [grads_like(P, i) for i in range(3)]
    tx = aj.accumulate_gradients(aj.sgd(1.0), 3, skip_nonfinite=True)
    expected = jax.tree.map(lambda p, a, b: p - (a + b) / 2, P, g[0], g[2])
    for value in NONFINITE:
        rows, state = run(tx, [g[0], spoil(g[1], value), g[2]], step)
        for x, y in zip(*map(jax.tree.leaves, (rows[2], expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
        counts = int(state.skipped), int(state.step), int(state.micro_step)
        assert counts == (1, 1, 0)


@both_ways
def test_a_window_of_which_nothing_is_left(step):
    tx = aj.accumulate_gradients(
        aj.adamw(aj.one_cycle(0.1, steps=5)), 2, skip_nonfinite=True
    )
    bad = spoil(P, math.nan)
    rows, state = run(tx, [bad, bad], step)
    assert_same(rows[1], P)
    assert_same(state.inner_state, tx.init(P).inner_state)
    assert not aj.has_updated(state)
    assert (int(state.skipped), int(state.step), int(state.micro_step)) == (2, 0, 0)
    rows, state = run(tx, [bad, bad, P, bad], step)  # and the next window is its own
    assert_same(rows[3], run(tx, [P, bad], step)[0][1])
    assert aj.has_updated(state)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("at", [0, 4999, -1])
def test_one_bad_number_in_a_large_leaf(value, at):
    """A maximum would drop NaN there: XLA's does on a CPU, in arrays of some size."""
    tx = aj.accumulate_gradients(aj.sgd(1.0), 2, skip_nonfinite=True)
    p = {"w": jnp.zeros(10_000)}
    bad = {"w": jnp.ones(10_000).at[at].set(value)}
    _, state = jax.jit(tx.update)(bad, tx.init(p), p)
    assert int(state.skipped) == 1


def test_finite_but_large_gradients_are_taken():
    tx = aj.accumulate_gradients(aj.sgd(1.0), 1, skip_nonfinite=True)
    p = {"a": jnp.zeros(2), "empty": jnp.zeros((0, 3))}
    g = {"a": jnp.array([3e38, -3e38]), "empty": jnp.zeros((0, 3))}
    _, state = tx.update(g, tx.init(p), p)
    assert int(state.skipped) == 0 and aj.has_updated(state)


def test_a_micro_batch_of_weight_zero_may_be_nan():
    """The mean over no tokens at all."""
    tx = aj.accumulate_gradients(aj.sgd(1.0), 2)
    p = jnp.zeros(2)
    _, state = tx.update(jnp.full(2, jnp.nan), tx.init(p), p, weight=0)
    updates, state = tx.update(jnp.array([1.0, 2.0]), state, p, weight=7)
    np.testing.assert_array_equal(updates, [-1, -2])
    assert int(state.skipped) == 0


# ---- windows ------------------------------------------------------------------------


def test_a_schedule_counts_inner_updates():
    """Windows of 3, then 1, then 2."""
    seen = []

    def every_k(step):
        seen.append((step.dtype, step.shape))
        return jnp.array([3, 1, 2])[step]

    tx = aj.accumulate_gradients(aj.sgd(1.0), every_k)
    state, closed = tx.init(P), []
    for _ in range(8):
        _, state = jitted(by_updates, tx)(P, state, P)
        closed.append(bool(aj.has_updated(state)))
    assert closed == [False, False, True, True, False, True, False, True]
    assert int(state.step) == 4
    assert set(seen) == {(jnp.dtype("int32"), ())}


def test_a_window_that_shrinks_below_what_is_there():
    """With an optimizer built anew around the state, as at a later stage."""
    state = aj.accumulate_gradients(aj.sgd(1.0), 8).init(P)
    for _ in range(5):
        _, state = aj.accumulate_gradients(aj.sgd(1.0), 8).update(P, state, P)
    updates, state = aj.accumulate_gradients(aj.sgd(1.0), 2).update(P, state, P)
    assert aj.has_updated(state) and int(state.micro_step) == 0
    np.testing.assert_allclose(updates["a"], -P["a"], rtol=1e-6)


def test_schedules_and_phases_count_windows():
    phases = aj.one_cycle(0.1, steps=3)
    tx = aj.accumulate_gradients(aj.adamw(phases), 2)
    state, rates = tx.init(P), []
    for _ in range(6):
        _, state = jitted(by_updates, tx)(P, state, P)
        rates.append(float(aj.current_hyperparams(state)["learning_rate"]))
    # The first micro-batch of a window updates nothing: the last update's values.
    expected = [phases.at(step)["learning_rate"] for step in (0, 0, 0, 1, 1, 2)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@both_ways
def test_an_override_holds_within_a_window(step):
    tx = aj.accumulate_gradients(aj.sgd(aj.one_cycle(0.1, steps=9)), 2)
    p, state = step(tx, P, tx.init(P), P)
    state = aj.override_hyperparams(state, learning_rate=0.5)
    p, state = step(tx, P, state, p)
    np.testing.assert_allclose(p["a"], 0.5 * P["a"], rtol=1e-6)
    assert aj.current_hyperparams(state)["learning_rate"] == 0.5


@both_ways
def test_last_closes_a_window_early(step):
    """The mean is over what is there."""
    tx = aj.accumulate_gradients(aj.sgd(1.0), 4)
    g = [grads_like(P, i) for i in range(3)]
    call = jax.jit(lambda g, s, p, last: step(tx, g, s, p, last=last))
    p, state = P, tx.init(P)
    for i in range(3):
        p, state = call(g[i], state, p, i == 2)
    np.testing.assert_allclose(
        p["a"], P["a"] - sum(x["a"] for x in g) / 3, rtol=1e-6, atol=1e-6
    )
    assert (int(state.step), int(state.micro_step)) == (1, 0)


@both_ways
def test_flush(step):
    """When the last micro-batch is over; a second time it does nothing."""
    tx = aj.accumulate_gradients(aj.adamw(0.1), 4)
    zeros = jax.tree.map(jnp.zeros_like, P)
    _, state = run(tx, [P, P])
    flush = jax.jit(lambda state, p: step(tx, zeros, state, p, weight=0.0, last=True))
    flushed, state = flush(state, P)
    inner = aj.adamw(0.1)
    assert_same(flushed, run(inner, [P])[0][0])
    assert aj.has_updated(state)
    again, new = flush(state, flushed)
    assert_same(again, flushed)
    assert not aj.has_updated(new)
    assert_same(new.inner_state, state.inner_state)


# ---- dtypes -------------------------------------------------------------------------


def test_bfloat16_gradients_are_summed_in_float32():
    """In bfloat16 the sum of ones would stop at 256."""
    p = jnp.zeros(3, jnp.bfloat16)
    tx = aj.accumulate_gradients(aj.sgd(1.0), 1000, use_grad_mean=False)

    def body(state, _):
        updates, state = tx.update(jnp.ones(3, jnp.bfloat16), state, p)
        return state, updates

    _, updates = jax.lax.scan(body, tx.init(p), length=1000)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates[-1], -1000)


@both_ways
def test_an_inner_state_keeps_its_types(lenient, step):
    """Optax's Adam has bfloat16 moments, and makes them float32."""
    p = jnp.ones(3, jnp.bfloat16)
    tx = aj.accumulate_gradients(optax.adamw(0.1), 2)
    state = tx.init(p)
    new, after = run(tx, [p, p, p, p], step, p)
    assert new[0].dtype == jnp.bfloat16 and (new[3] < new[1]).all()
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert x.dtype == y.dtype


def test_float64_only_where_the_parameter_is(x64):
    p = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
    tx = aj.accumulate_gradients(aj.adamw(1e-3), 1)
    updates, state = tx.update(p, tx.init(p), p, weight=3)
    for tree in (updates, state.grads):
        assert tree["a"].dtype == jnp.float32 and tree["b"].dtype == jnp.float64


# ---- trees, links, devices ----------------------------------------------------------


@both_ways
def test_none_gradients(step):
    tx = aj.accumulate_gradients(aj.adamw(0.1), 2)
    p = P | {"frozen": jnp.ones(3), "nothing": None}
    g = P | {"frozen": None, "nothing": None}
    rows, state = run(tx, [g, g], step, p)
    assert_same(rows[1]["frozen"], p["frozen"])
    assert_same(rows[1]["a"], run(tx, [P, P], step)[0][1]["a"])
    assert rows[1]["nothing"] is None
    assert tx.update(g, tx.init(p), p)[0]["frozen"] is None
    thawed, _ = step(tx, P | {"frozen": jnp.ones(3), "nothing": None}, state, p)
    assert_same(thawed, p)  # a structure that may change with a new window


@pytest.mark.parametrize("outside", [True, False])
def test_with_freeze(outside):
    mask, inner = aj.mask_by_path("^b/"), aj.adamw(0.1)
    tx = (
        aj.freeze_leaves(aj.accumulate_gradients(inner, 2), mask)
        if outside
        else aj.accumulate_gradients(aj.freeze_leaves(inner, mask), 2)
    )
    rows, state = run(tx, [P, P])
    assert_same(rows[1]["b"], P["b"])
    alone = {"a": P["a"]}
    expected, _ = run(inner, [alone], params=alone)
    np.testing.assert_allclose(rows[1]["a"], expected[0]["a"], rtol=1e-6)
    sums = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "micro_step"))[0].grads
    assert len(jax.tree.leaves(sums)) == (1 if outside else 2)  # no sum of the frozen
    assert aj.has_updated(state)


def test_a_masked_inner_transformation(lenient):
    tx = aj.accumulate_gradients(
        optax.masked(aj.sgd(0.1), {"a": True, "b": {"w": False}}), 2
    )
    updates, state = tx.update(P, tx.init(P), P)
    updates, _ = tx.update(P, state, P)
    np.testing.assert_allclose(updates["a"], -0.1 * P["a"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"]["w"], P["b"]["w"])


@both_ways
def test_clipping_in_front_and_inside(step):
    """In front each micro-batch is clipped, inside their mean: here that is small."""
    clip = optax.clip_by_global_norm(1.0)
    p, g = jnp.zeros(1), [jnp.array([9.0]), jnp.array([-8.0])]
    front = optax.chain(clip, aj.accumulate_gradients(aj.sgd(1.0), 2))
    inside = aj.accumulate_gradients(optax.chain(clip, aj.sgd(1.0)), 2)
    np.testing.assert_allclose(run(front, g, step, p)[0][1], 0.0)
    np.testing.assert_allclose(run(inside, g, step, p)[0][1], -0.5)


@both_ways
def test_other_arguments_reach_the_inner_transformation(step):
    def update(updates, state, params=None, *, value, flag, **extra_args):
        assert flag == "static" and not extra_args
        return jax.tree.map(lambda u: -value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = aj.accumulate_gradients(inner, 1)
    call = jax.jit(lambda v: step(tx, P, tx.init(P), P, value=v, flag="static")[0])
    np.testing.assert_allclose(call(0.5)["a"], 0.5 * P["a"])


def test_params_are_optional():
    tx = aj.accumulate_gradients(aj.adam(0.1), 2)
    updates, state = tx.update(P, tx.init(P))
    updates, _ = tx.update(P, state)
    np.testing.assert_allclose(updates["a"], -0.1 * jnp.sign(P["a"]), rtol=1e-6)


@pytest.mark.slow
@both_ways
def test_two_devices(step):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    alone = jnp.arange(8.0)
    p = jax.device_put(alone, sharding)
    tx = aj.accumulate_gradients(aj.adamw(0.1), 2, skip_nonfinite=True)
    assert tx.init(p).grads.sharding == sharding
    rows, state = run(tx, [p, p, p], step, p)
    assert all(row.sharding == sharding for row in rows)
    assert state.grads.sharding == sharding
    assert state.inner_state.inner_state[0].mu.sharding == sharding
    expected, _ = run(tx, [alone] * 3, step, alone)
    np.testing.assert_array_equal(rows[2], expected[2])


def test_explicit_sharding(lenient):
    """With the mesh in the types, where the branches of a cond must agree on it."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        p = jax.device_put(jnp.arange(8.0), jax.P("x"))
        tx = aj.accumulate_gradients(aj.adamw(0.1), 2, skip_nonfinite=True)
        for step in WAYS.values():
            rows, _ = run(tx, [p, p], step, p)
            expected, _ = run(tx, [jnp.arange(8.0)] * 2, step, jnp.arange(8.0))
            np.testing.assert_array_equal(rows[1], expected[1])


@both_ways
def test_vmap(step):
    """Members whose windows close at different times."""
    tx = aj.accumulate_gradients(aj.sgd(0.1), 3)

    def train(last):
        p, state = jnp.ones(2), tx.init(jnp.ones(2))
        for i in range(3):
            p, state = step(tx, p + i, state, p, last=last == i)
        return p

    lasts = jnp.arange(3)
    together = jax.jit(jax.vmap(train))(lasts)
    np.testing.assert_allclose(together, [train(x) for x in lasts], rtol=1e-6)
    assert len(np.unique(together[:, 0])) == 3


def test_abstract_init():
    tx = aj.accumulate_gradients(aj.adamw(0.1), 2)
    abstract, concrete = jax.eval_shape(tx.init, P), tx.init(P)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    _, new = jax.eval_shape(tx.update, P, concrete, P)
    for tree in (concrete, new):
        for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(tree), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_a_checkpoint_within_a_window(tmp_path, lenient):
    from train.run import checkpoint

    tx = aj.accumulate_gradients(aj.adamw(aj.one_cycle(0.1, steps=3)), 3)
    grads = [grads_like(P, i) for i in range(6)]
    through, _ = run(tx, grads)
    rows, state = run(tx, grads[:4])
    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 4, (rows[-1], state))
    with checkpoint.open_folder(tmp_path) as checkpoints:
        p, state = checkpoint.restore(checkpoints, (P, tx.init(P)))
    for g in grads[4:]:
        p, state = jitted(by_updates, tx)(g, state, p)
    assert_same(p, through[-1])


def test_nnx_optimizer(lenient):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = aj.accumulate_gradients(aj.adamw(0.5, weight_decay=0.0), 2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    before, step = model.kernel[...], nnx.jit(lambda o, m, g: o.update(m, g))
    step(optimizer, model, grads)
    np.testing.assert_array_equal(before, model.kernel[...])
    assert not aj.has_updated(optimizer.opt_state)
    step(optimizer, model, grads)
    np.testing.assert_allclose(before - model.kernel[...], 0.5, rtol=1e-5)
    assert aj.has_updated(optimizer.opt_state)


# ---- errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every_k", "error", "message"),
    [
        (0, ValueError, "every_k must be at least 1, got 0"),
        (-3, ValueError, "every_k must be at least 1, got -3"),
        (2.0, TypeError, "every_k must be an integer .* got 2.0"),
        (True, TypeError, "every_k must be an integer .* got True"),
        (None, TypeError, "every_k must be an integer .* got None"),
        ("4", TypeError, "every_k must be an integer .* got '4'"),
        (np.array([2]), TypeError, "every_k must be an integer"),
        (lambda step: 2.0, TypeError, "every_k must be .* got 2.0 at step 0"),
        (lambda step: step, ValueError, "every_k must be at least 1, got .*0"),
    ],
)
def test_bad_windows(every_k, error, message):
    with pytest.raises(error, match=message):
        aj.accumulate_gradients(aj.sgd(0.1), every_k)


@pytest.mark.parametrize(
    ("weight", "error"),
    [(-1.0, ValueError), (math.nan, ValueError), ("x", TypeError), ([1], TypeError)],
)
def test_bad_weights(weight, error):
    tx = aj.accumulate_gradients(aj.sgd(0.1), 2)
    with pytest.raises(error, match="^weight must be"):
        tx.update(P, tx.init(P), P, weight=weight)


def test_gradients_that_do_not_match():
    tx = aj.accumulate_gradients(aj.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"state.grads .* b/w: shape \(4,\)"):
        tx.update({"a": P["a"], "b": {"w": jnp.ones(4)}}, tx.init(P), P)
    with pytest.raises(ValueError, match="updates has no leaf b/w"):
        tx.update({"a": P["a"]}, tx.init(P), P)
    with pytest.raises(TypeError, match="parameter key has dtype key<fry>"):
        tx.init({"key": jax.random.key(0)})


def test_update_and_apply_with_a_link_behind():
    """That link gets updates, and accumulation goes the ordinary way."""
    tx = optax.chain(aj.accumulate_gradients(aj.sgd(0.1), 2), optax.scale(0.5))
    grads = [grads_like(P, i) for i in range(4)]
    rows, state = run(tx, grads, aj.update_and_apply)
    expected, expected_state = run(tx, grads)
    assert_same((rows, state), (expected, expected_state))


def test_has_updated_of_another_state():
    with pytest.raises(ValueError, match="one AccumulateState, got 0"):
        aj.has_updated(aj.adamw(0.1).init(P))
