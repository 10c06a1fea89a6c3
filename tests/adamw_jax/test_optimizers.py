"""The optimizers: conventions of decay, Optax's signatures and numbers."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import adam_loop, constant, sgd_loop, trajectory
from tiers import examples, matrix

import adamw_jax as aj

rng = np.random.default_rng(2)
P0 = 0.25 * rng.normal(size=12)
GRADS = rng.normal(size=(40, 12))


def path(tx):
    loop = jax.jit(functools.partial(trajectory, tx))
    return np.asarray(loop(jnp.asarray(P0, float), jnp.asarray(GRADS, float)))


SAME_AS_OPTAX = {
    "adam": lambda lib: lib.adam(1e-2, 0.8, 0.99, 1e-4),
    "nadam": lambda lib: lib.adam(1e-2, nesterov=True),
    "adamw": lambda lib: lib.adamw(1e-2, weight_decay=0.1),
    "adamw defaults": lambda lib: lib.adamw(1e-2),
    "nadamw": lambda lib: lib.adamw(1e-2, 0.8, weight_decay=0.1, nesterov=True),
    "sgd": lambda lib: lib.sgd(1e-2),
    "momentum": lambda lib: lib.sgd(1e-2, 0.9),
    "nesterov": lambda lib: lib.sgd(1e-2, 0.9, True),
    "scheduled": lambda lib: lib.adamw(optax.linear_schedule(1e-2, 0.0, 40)),
}


@pytest.mark.parametrize(
    "name",
    matrix(list(SAME_AS_OPTAX), quick=["adam", "nadamw", "scheduled"]),
)
def test_numbers_of_optax(x64, lenient, name):
    ours, theirs = (path(SAME_AS_OPTAX[name](lib)) for lib in (aj, optax))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


PAIRS = ["adam", "adamw", "amsgrad", "sgd", "scale_by_adam", "scale_by_amsgrad"]
PAIRS += ["trace", "add_decayed_weights", "scale_by_learning_rate"]
PAIRS += ["clip_by_global_norm"]


@pytest.mark.parametrize("name", PAIRS)
def test_signatures_of_optax(name):
    """Swapping the import is enough: same names, order, kinds and defaults."""
    ours = list(inspect.signature(getattr(aj, name)).parameters.values())
    theirs = list(inspect.signature(getattr(optax, name)).parameters.values())
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    their_positional = [p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in their_positional]
    by_name = {p.name: p for p in ours}
    for theirs_p in theirs:
        assert by_name[theirs_p.name].default == theirs_p.default, theirs_p.name
    extra = [p for p in ours if p.name not in {q.name for q in theirs}]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@pytest.mark.parametrize(
    ("dampened", "decay"),
    matrix(
        list(
            itertools.product((False, True), ({}, {"l2": 0.1}, {"weight_decay": 0.1}))
        ),
        quick=[(True, {}), (False, {"l2": 0.1}), (True, {"weight_decay": 0.1})],
    ),
)
def test_sgd_with_cycled_momentum(x64, dampened, decay):
    phases = aj.one_cycle(1e-2, steps=40)
    expected = sgd_loop(
        P0,
        GRADS,
        lambda t: phases.at(t)["learning_rate"],
        lambda t: phases.at(t)["b1"],
        dampened=dampened,
        **decay,
    )
    ours = path(aj.sgd(phases, dampened=dampened, **decay))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "name",
    matrix(
        ["adam", "adamw", "amsgrad l2", "amsgrad decoupled"],
        quick=["adamw", "amsgrad l2"],
    ),
)
def test_one_cycle_against_numpy(x64, name):
    """The article's run: rate and b1 cycled, b2 = .99, exact correction."""
    phases = aj.one_cycle(1e-2, steps=40, b2=0.99)
    tx, decay = {
        "adam": lambda: (aj.adam(phases, l2=0.1), {"l2": 0.1}),
        "adamw": lambda: (aj.adamw(phases, weight_decay=0.1), {"weight_decay": 0.1}),
        "amsgrad l2": lambda: (aj.amsgrad(phases, l2=0.1), {"l2": 0.1}),
        "amsgrad decoupled": lambda: (
            aj.amsgrad(phases, weight_decay=0.1),
            {"weight_decay": 0.1},
        ),
    }[name]()
    expected = adam_loop(
        P0,
        GRADS,
        lambda t: phases.at(t)["learning_rate"],
        lambda t: phases.at(t)["b1"],
        constant(0.99),
        maximum="raw" if "amsgrad" in name else None,
        **decay,
    )
    np.testing.assert_allclose(path(tx), expected, rtol=0, atol=1e-13)


def test_the_articles_adam(x64):
    """As in PyTorch 0.4: the current beta to the power t, eps on the raw root."""
    phases = aj.one_cycle(1e-2, steps=40, b2=0.99)
    m, v, p, expected = 0.0, 0.0, P0, []
    for t, g in enumerate(GRADS):
        now = phases.at(t)
        p = p * (1 - 0.1 * now["learning_rate"])  # fastai's step, before Adam's
        m = now["b1"] * m + (1 - now["b1"]) * g
        v = 0.99 * v + (1 - 0.99) * g * g
        size = np.sqrt(1 - 0.99 ** (t + 1)) / (1 - now["b1"] ** (t + 1))
        p = p - now["learning_rate"] * size * m / (np.sqrt(v) + 1e-3)
        expected.append(p)
    tx = aj.adamw(
        phases, eps=1e-3, weight_decay=0.1, bias_correction="torch", epsilon_hat=True
    )
    np.testing.assert_allclose(path(tx), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "kind"),
    matrix(
        list(
            itertools.product(
                (aj.adamw, aj.amsgrad, aj.sgd), ("constant", "phases", "schedule")
            )
        ),
        quick=[(aj.adamw, "phases"), (aj.amsgrad, "constant"), (aj.sgd, "schedule")],
    ),
)
def test_loshchilov_and_hutter(x64, make, kind):
    """p <- p - eta_t (alpha u + lambda p): no learning rate on the decay."""
    alpha, decay = 1e-2, 3e-3
    phases = aj.Phases([aj.Phase(steps=40, learning_rate=(alpha, 1e-3, "cosine"))])
    learning_rate, base = {
        "constant": (alpha, None),
        "phases": (phases, None),
        "schedule": (phases.schedule("learning_rate"), alpha),
    }[kind]
    eta = (lambda t: 1.0) if kind == "constant" else None
    eta = eta or (lambda t: phases.at(t)["learning_rate"] / alpha)
    tx = make(
        learning_rate,
        weight_decay=decay,
        decay_scale="schedule",
        base_learning_rate=base,
    )
    loop = sgd_loop if make is aj.sgd else adam_loop
    maximum = {"maximum": "raw"} if make is aj.amsgrad else {}
    expected = loop(
        P0, GRADS, lambda t: alpha * eta(t), weight_decay=decay / alpha, **maximum
    )
    np.testing.assert_allclose(path(tx), expected, rtol=0, atol=1e-13)


def test_decay_by_the_schedule_does_not_move_with_the_rate():
    """Without gradient only the decay acts: the same for any base rate."""
    for lr in (1e-4, 1e-2):
        tx = aj.adamw(lr, weight_decay=0.01, decay_scale="schedule")
        p = jnp.ones(2)
        updates, _ = tx.update(jnp.zeros(2), tx.init(p), p)
        np.testing.assert_allclose(updates, -0.01, rtol=1e-6)


def test_phases_drive_the_decay():
    phases = aj.Phases([aj.Phase(steps=4, learning_rate=1.0, weight_decay=(0.0, 0.4))])
    zeros, p = jnp.zeros(2), jnp.ones(2)
    for tx in (
        aj.adamw(phases),
        aj.amsgrad(phases),
        aj.sgd(phases),
        aj.sgd(phases, l2=phases),
    ):
        state = tx.init(p)
        for k in range(4):
            updates, state = tx.update(zeros, state, p)
            np.testing.assert_allclose(updates, -0.1 * k, atol=1e-6)
    # Adam normalises an L2 gradient away.
    tx = aj.adam(phases)
    state = tx.init(p)
    _, state = tx.update(zeros, state, p)
    updates, _ = tx.update(zeros, state, p)
    assert (updates < -0.5).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aj.amsgrad(1e-3, l2=0.1, weight_decay=0.1), "l2 or weight_decay, not"),
        (
            lambda: aj.sgd(1e-3, l2=0.1, weight_decay=0.1),
            "l2 or weight_decay, not both",
        ),
        (lambda: aj.sgd(1e-3, nesterov=True), "need a momentum"),
        (lambda: aj.sgd(1e-3, dampened=True), "need a momentum"),
        (lambda: aj.sgd(1e-3, 1.0), r"momentum must be in \[0, 1\)"),
        (lambda: aj.adam(1e-3, l2=-1.0), "l2 must be"),
        (lambda: aj.adamw(1e-3, weight_decay=-1.0), "weight_decay must be"),
        (lambda: aj.adamw(1e-3, decay_scale="lr"), "decay_scale must be one of"),
        (lambda: aj.adamw(1e-3, base_learning_rate=1.0), "=1.0 goes with decay_scale"),
        (
            lambda: aj.adamw(lambda t: 1e-3, decay_scale="schedule"),
            "needs base_learning_rate",
        ),
        (
            lambda: aj.adamw(0.0, decay_scale="schedule"),
            "base_learning_rate must be > 0",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (aj.adam, "l2"),
        (aj.adamw, "weight_decay"),
        (aj.amsgrad, "l2"),
        (aj.amsgrad, "weight_decay"),
        (aj.sgd, "l2"),
        (aj.sgd, "weight_decay"),
    ],
)
def test_masks_and_options_reach_their_link(make, decay):
    p, zeros = (
        {"a": jnp.ones(1), "b": jnp.ones(1)},
        {"a": jnp.zeros(1), "b": jnp.zeros(1)},
    )
    tx = make(0.1, **{decay: 0.5}, mask={"a": True, "b": False})
    updates, _ = tx.update(zeros, tx.init(p), p)
    assert updates["a"][0] < -1e-3 and updates["b"][0] == 0.0


def test_storage_options_reach_the_moments():
    p = jnp.ones(3)
    for make in (aj.adam, aj.adamw, aj.amsgrad):
        state = make(1e-2, mu_dtype="bfloat16", nu_dtype="float16", seed=7).init(p)
        moments = next(s for s in state.inner_state if hasattr(s, "mu"))
        assert (moments.mu.dtype, moments.nu.dtype) == (jnp.bfloat16, jnp.float16)
        np.testing.assert_array_equal(moments.key, jax.random.PRNGKey(7))
        off = make(1e-2, mu_dtype="bfloat16", stochastic_rounding=False).init(p)
        assert next(s for s in off.inner_state if hasattr(s, "mu")).key is None
    state = aj.sgd(1e-2, 0.9, accumulator_dtype="bfloat16").init(p)
    assert state.inner_state[0].trace.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "convention", matrix(["torch", "paper", "optax"], quick=["paper"])
)
def test_amsgrad_passes_its_convention_on(x64, convention):
    options = {"convention": convention, "bias_correction_mu": False}
    whole = path(aj.amsgrad(1e-2, **options))
    parts = path(
        optax.chain(aj.scale_by_amsgrad(**options), aj.scale_by_learning_rate(1e-2))
    )
    np.testing.assert_allclose(whole, parts, rtol=0, atol=1e-14)


# ---- whether a decay is set does not depend on the type of its value ----------------


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (aj.adam, "l2"),
        (aj.amsgrad, "l2"),
        (aj.amsgrad, "weight_decay"),
        (aj.sgd, "l2"),
        (aj.sgd, "weight_decay"),
    ],
)
def test_a_traced_decay(x64, make, decay, value):
    """A sweep that compiles over a decay; 0 is one as well."""
    loop = sgd_loop if make is aj.sgd else adam_loop
    maximum = {"maximum": "raw"} if make is aj.amsgrad else {}
    expected = loop(P0, GRADS, constant(1e-2), **{decay: value}, **maximum)
    p, g = jnp.asarray(P0, float), jnp.asarray(GRADS, float)
    traced = jax.jit(lambda x: trajectory(make(1e-2, **{decay: x}), p, g))(value)
    np.testing.assert_allclose(traced, expected, rtol=0, atol=1e-13)
    tx = make(1e-2, **{decay: value})
    assert "weight_decay" in tx.init(p).hyperparams  # to be overridden, also from 0
    np.testing.assert_allclose(path(tx), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [aj.adam, aj.amsgrad, aj.sgd])
def test_no_decay_is_none(make):
    """Without a decay there is none in the state, and params are not needed."""
    tx = make(jnp.float32(1e-2))
    state = tx.init(jnp.ones(2))
    assert "weight_decay" not in state.hyperparams
    tx.update(jnp.ones(2), state)


# ---- optax.inject_hyperparams around ours -------------------------------------------

INJECTED = {
    "adam": (aj.adam, optax.adam, {}),
    "adamw": (aj.adamw, optax.adamw, {"weight_decay": 0.1}),
    "amsgrad": (aj.amsgrad, optax.amsgrad, {}),
    "sgd": (aj.sgd, optax.sgd, {}),
    "momentum": (aj.sgd, optax.sgd, {"momentum": 0.9}),
}


def edit_dict(state, rate):
    state.hyperparams["learning_rate"] = jnp.asarray(rate, float)
    return state


def edit_tree(state, rate):
    return optax.tree.set(state, learning_rate=jnp.asarray(rate, float))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "name", matrix(list(INJECTED), quick=["adamw", "amsgrad", "momentum"])
)
def test_edits_of_injected_hyperparams(x64, lenient, name, jit):
    """Both ways to edit them, in turns; Optax's own optimizer is the reference."""
    ours, theirs, options = INJECTED[name]
    convention = {"convention": "optax"} if ours is aj.amsgrad else {}
    transformations = (
        optax.inject_hyperparams(functools.partial(ours, **convention))(0.1, **options),
        optax.inject_hyperparams(theirs)(0.1, **options),
    )
    edits = {1: (edit_tree, 0.2), 2: (edit_dict, 0.3), 4: (edit_dict, 0.05)}
    edits |= {5: (edit_tree, 0.4), 6: (edit_tree, 0.3), 7: (edit_dict, 0.1)}
    paths = []
    for tx in transformations:
        p = jnp.asarray(P0, float)
        update, state = jax.jit(tx.update) if jit else tx.update, tx.init(p)
        paths.append([])
        for step in range(9):
            if step in edits:
                edit, rate = edits[step]
                state = edit(state, rate)
            updates, state = update(jnp.asarray(GRADS[step], float), state, p)
            p = p + updates
            paths[-1].append(np.asarray(p))
    np.testing.assert_allclose(*paths, rtol=0, atol=1e-12)


def test_an_injected_schedule(x64, lenient):
    """It is Optax's to evaluate, and Optax ignores edits of it."""
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    paths = []
    for make in (aj.sgd, optax.sgd):
        tx = optax.inject_hyperparams(make)(schedule)
        p = jnp.asarray(P0, float)
        state = tx.init(p)
        for g in GRADS[:8]:
            state = edit_dict(state, 7.0)
            updates, state = tx.update(jnp.asarray(g, float), state, p)
            p = p + updates
        paths.append(p)
    np.testing.assert_allclose(*paths, rtol=0, atol=1e-12)


@pytest.mark.parametrize("jit", [False, True])
def test_injected_hyperparams_of_bfloat16_parameters(jit, lenient):
    """Optax casts them to the dtype of the parameters, unless it is told another."""
    p = jnp.ones(3, jnp.bfloat16)
    tx = optax.inject_hyperparams(aj.adamw)(1e-2, weight_decay=0.0)
    init = jax.jit(tx.init) if jit else tx.init
    with pytest.raises((TypeError, ValueError), match="b[12] must be"):
        init(p)
    tx = optax.inject_hyperparams(aj.adamw, hyperparam_dtype=jnp.float32)(
        1e-2, weight_decay=0.0
    )
    wide = p.astype("float32")
    updates, _ = tx.update(wide, tx.init(p), p)
    np.testing.assert_allclose(updates, -1e-2, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "sgd", "momentum"])
def test_injected_hyperparams_without_params(name, lenient):
    ours, _, options = INJECTED[name]
    tx = optax.inject_hyperparams(ours)(1e-2, **options)
    updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -1e-2, rtol=1e-5)
    assert not {"l2", "weight_decay"} & set(state.hyperparams)


MASKED = [
    (aj.adam, "l2"),
    (aj.adamw, "weight_decay"),
    (aj.amsgrad, "weight_decay"),
    (aj.sgd, "l2"),
    (aj.sgd, "weight_decay"),
]


@pytest.mark.parametrize(
    "mask",
    [
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        aj.mask_by(lambda path, leaf: np.ndim(leaf) > 1),
        lambda params: jax.tree.map(lambda x: jnp.ndim(x) == 0, params),
    ],
    ids=["False", "mask_by", "True"],
)
@pytest.mark.parametrize(("make", "decay"), MASKED)
def test_an_injected_mask_is_refused(make, decay, mask, lenient):
    """Optax calls it with the step, so that everything or nothing would decay."""
    tx = optax.inject_hyperparams(make)(0.1, **{decay: 0.5}, mask=mask)
    with pytest.raises(ValueError, match="static_args='mask'"):
        tx.init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})


@pytest.mark.parametrize(("make", "decay"), MASKED)
def test_a_static_mask(make, decay, lenient):
    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    p = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, p)
    for option in ({"w": True, "b": False}, mask):
        static = ["mask"] if callable(option) else []
        tx = optax.inject_hyperparams(make, static_args=static)(
            0.1, **{decay: 0.5}, mask=option
        )
        updates, state = tx.update(zeros, tx.init(p), p)
        # Adam divides an L2 gradient by its own size.
        size = 1.0 if decay == "l2" and make is aj.adam else 0.5
        np.testing.assert_allclose(updates["w"], -0.1 * size, rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], 0.0)


# ---- properties ---------------------------------------------------------------------

shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 3)])
dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
leaves = st.one_of(st.none(), st.builds(jnp.zeros, shapes, dtypes))
trees = st.recursive(
    leaves,
    lambda t: st.one_of(
        st.lists(t, max_size=3),
        st.lists(t, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("abc"), t, max_size=3),
    ),
    max_leaves=6,
)
optimizers = st.sampled_from(
    [
        aj.adam(1e-2, l2=0.1),
        aj.adamw(1e-2, mu_dtype=jnp.bfloat16),
        aj.adamw(aj.one_cycle(1e-2, steps=5), nu_dtype=jnp.bfloat16),
        aj.amsgrad(1e-2, weight_decay=0.1),
        aj.sgd(1e-2, 0.9, weight_decay=0.1),
        optax.chain(aj.sgd(1e-2), aj.round_updates_stochastically()),
    ]
)


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.slow
@examples(25, derandomize=True)
@given(
    trees.filter(lambda tree: tree is not None),
    optimizers,
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_tree(params, tx, seed, wide):
    """Structure, shapes and dtypes survive; each leaf moves as if it were alone."""
    with jax.enable_x64(wide):
        rng = np.random.default_rng(seed)
        if wide:
            params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        params, grads = (
            jax.tree.map(
                lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
            )
            for _ in range(2)
        )
        check_any_tree(params, grads, tx)


def check_any_tree(params, grads, tx):
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params)
    for p, g, u in zip(*map(jax.tree.leaves, (params, grads, updates)), strict=True):
        alone, _ = tx.update(g, tx.init(p), p)
        np.testing.assert_allclose(
            np.asarray(u, float), np.asarray(alone, float), rtol=1e-2, atol=1e-2
        )
    params = zeros_like(params)
    state = tx.init(params)
    updates, new = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for old_leaf, new_leaf in zip(
        jax.tree.leaves(state), jax.tree.leaves(new), strict=True
    ):
        assert (old_leaf.shape, old_leaf.dtype) == (new_leaf.shape, new_leaf.dtype)
    moved = aj.apply_updates(params, updates)
    for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert (p.shape, p.dtype) == (q.shape, q.dtype)
        np.testing.assert_array_equal(np.asarray(p, float), np.asarray(q, float))


@jax.jit
def updates_under(b1, b2, g):
    """The updates for a constant gradient with the given betas, one pair a step."""
    tx = aj.scale_by_adam(lambda t: b1[t], lambda t: b2[t], eps=0.0)
    return jax.lax.scan(
        lambda state, _: tx.update(g, state)[::-1], tx.init(g), None, length=len(b1)
    )[1]


@examples(40, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)), min_size=1, max_size=30
    ),
    st.floats(-5, 5).map(lambda x: 10.0**x),
)
def test_constant_gradient_under_any_betas(betas, size):
    """A constant gradient gives its sign, for any sequence of b1 and b2."""
    betas += betas[-1:] * (30 - len(betas))  # one length, so one program
    b1, b2 = (jnp.asarray(column, jnp.float32) for column in zip(*betas, strict=True))
    updates = updates_under(b1, b2, jnp.array([size, -size], jnp.float32))
    np.testing.assert_allclose(updates, [[1.0, -1.0]] * 30, rtol=5e-6)


def test_phases_for_one_hyperparameter_alone():
    """The message is a program that runs."""
    phases = aj.one_cycle(0.1, steps=10, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"weight_decay=phases.schedule\('weight_dec"):
        aj.adamw(0.1, weight_decay=phases)
    state = aj.adamw(0.1, weight_decay=phases.schedule("weight_decay")).init(
        jnp.ones(2)
    )
    assert float(aj.current_hyperparams(state)["learning_rate"]) == pytest.approx(0.1)
