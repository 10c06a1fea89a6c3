"""The update rules against float64 loops, Optax and closed forms."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import adam_loop, constant, sgd_loop, trajectory
from tiers import matrix

import adamw_jax as aj

rng = np.random.default_rng(1)
P0 = 0.25 * rng.normal(size=20)
GRADS = rng.normal(size=(60, 20))
GRADS[0] *= 10


def run(tx, p0=P0, grads=GRADS, dtype=jnp.float64, learning_rate=None):
    """Parameters after every step of a jitted loop over the given gradients."""
    if learning_rate is not None:
        tx = optax.chain(tx, aj.scale_by_learning_rate(learning_rate))

    loop = jax.jit(functools.partial(trajectory, tx))
    return np.asarray(loop(jnp.asarray(p0, dtype), jnp.asarray(grads, dtype)))


def b1_schedule(t):
    return 0.95 - 0.1 * jnp.asarray(t, float) / 60


def b2_schedule(t):
    return 0.9 + 0.09 * jnp.asarray(t, float) / 60


@pytest.mark.parametrize(
    ("correction", "epsilon_hat", "betas"),
    matrix(
        list(
            itertools.product(
                ("exact", "torch", "none"), (False, True), ("constant", "scheduled")
            )
        ),
        quick=[
            ("exact", False, "scheduled"),
            ("exact", True, "constant"),
            ("torch", True, "scheduled"),
            ("torch", False, "constant"),
            ("none", False, "scheduled"),
            ("none", True, "constant"),
        ],
    ),
)
def test_adam_against_numpy(x64, correction, epsilon_hat, betas):
    b1, b2 = (0.9, 0.99) if betas == "constant" else (b1_schedule, b2_schedule)
    tx = aj.scale_by_adam(
        b1, b2, 1e-3, 1e-6, bias_correction=correction, epsilon_hat=epsilon_hat
    )
    expected = adam_loop(
        P0,
        GRADS,
        constant(1e-2),
        b1 if callable(b1) else constant(b1),
        b2 if callable(b2) else constant(b2),
        1e-3,
        1e-6,
        correction=correction,
        epsilon_hat=epsilon_hat,
    )
    np.testing.assert_allclose(
        run(tx, learning_rate=1e-2), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("betas", matrix(["constant", "scheduled"], ["scheduled"]))
@pytest.mark.parametrize(
    ("convention", "maximum", "correction"),
    [
        ("torch", "raw", "exact"),
        ("paper", "raw", "none"),
        ("optax", "corrected", "exact"),
    ],
)
def test_amsgrad_against_numpy(x64, convention, maximum, correction, betas):
    b1, b2 = (0.9, 0.99) if betas == "constant" else (b1_schedule, b2_schedule)
    tx = aj.scale_by_amsgrad(b1, b2, 1e-5, convention=convention)
    expected = adam_loop(
        P0,
        GRADS,
        constant(1e-2),
        b1 if callable(b1) else constant(b1),
        b2 if callable(b2) else constant(b2),
        1e-5,
        correction=correction,
        maximum=maximum,
    )
    np.testing.assert_allclose(
        run(tx, learning_rate=1e-2), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("epsilon_hat", [False, True])
@pytest.mark.parametrize(("eps", "eps_root"), [(1e-2, 0.0), (1e-3, 1e-2)])
def test_amsgrad_epsilons(x64, eps, eps_root, epsilon_hat):
    """epsilon_hat is the article's: PyTorch 0.4, eps added to the uncorrected root."""
    tx = aj.scale_by_amsgrad(0.9, 0.99, eps, eps_root, epsilon_hat=epsilon_hat)
    expected = adam_loop(
        P0,
        GRADS,
        constant(1e-2),
        b2=constant(0.99),
        eps=eps,
        eps_root=eps_root,
        maximum="raw",
        epsilon_hat=epsilon_hat,
    )
    np.testing.assert_allclose(
        run(tx, learning_rate=1e-2), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("mu", [False, True])
@pytest.mark.parametrize("nu", [False, True])
def test_amsgrad_flags_of_optax(x64, lenient, mu, nu):
    flags = {"bias_correction_mu": mu, "bias_correction_nu": nu}
    ours = run(aj.scale_by_amsgrad(convention="optax", **flags), learning_rate=1e-2)
    theirs = run(optax.scale_by_amsgrad(**flags), learning_rate=1e-2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_amsgrad_without_correction(x64):
    none = run(aj.scale_by_amsgrad(bias_correction="none"), learning_rate=1e-2)
    paper = run(aj.scale_by_amsgrad(convention="paper"), learning_rate=1e-2)
    np.testing.assert_array_equal(none, paper)


def test_scheduled_decay_is_read_at_the_step_of_its_update(x64):
    for make in (aj.add_decayed_weights, aj.add_l2_gradient):
        tx, p = make(lambda t: 0.1 * jnp.float64(t)), jnp.ones(1)
        state = tx.init(p)
        for k in range(3):
            updates, state = tx.update(jnp.zeros(1), state, p)
            np.testing.assert_allclose(updates, 0.1 * k)


def test_flip_sign():
    tx = aj.scale_by_learning_rate(0.5, flip_sign=False)
    np.testing.assert_array_equal(tx.update(jnp.ones(1), tx.init(None))[0], 0.5)


def test_amsgrad_conventions_differ():
    ends = [
        run(aj.scale_by_amsgrad(convention=c), learning_rate=1e-2, dtype=jnp.float32)[
            -1
        ]
        for c in ("torch", "paper", "optax")
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(ends[i] - ends[j]).max() > 1e-2


@pytest.mark.parametrize(
    ("nesterov", "dampened", "momentum"),
    matrix(
        list(itertools.product((False, True), (False, True), (0.9, b1_schedule))),
        quick=[
            (False, False, b1_schedule),
            (False, True, 0.9),
            (True, False, 0.9),
            (True, True, b1_schedule),
        ],
    ),
)
def test_momentum_against_numpy(x64, nesterov, dampened, momentum):
    tx = aj.trace(momentum, nesterov, dampened=dampened)
    mu = momentum if callable(momentum) else constant(momentum)
    expected = sgd_loop(
        P0, GRADS, constant(1e-2), mu, nesterov=nesterov, dampened=dampened
    )
    np.testing.assert_allclose(
        run(tx, learning_rate=1e-2), expected, rtol=0, atol=1e-13
    )


OPTAX_PAIRS = {
    "adam": lambda lib: lib.scale_by_adam(0.8, 0.99, 1e-4),
    "adam eps_root": lambda lib: lib.scale_by_adam(eps_root=1e-3),
    "nadam": lambda lib: lib.scale_by_adam(0.8, 0.99, nesterov=True),
    "trace": lambda lib: lib.trace(0.9),
    "nesterov": lambda lib: lib.trace(0.9, nesterov=True),
    "decay": lambda lib: optax.chain(
        lib.scale_by_adam(), lib.add_decayed_weights(0.1, mask=True)
    ),
    "amsgrad optax": lambda lib: lib.scale_by_amsgrad(
        0.8, 0.99, **({} if lib is optax else {"convention": "optax"})
    ),
    "amsgrad paper": lambda lib: lib.scale_by_amsgrad(
        bias_correction_mu=False, bias_correction_nu=False
    ),
}


@pytest.mark.parametrize("name", OPTAX_PAIRS)
def test_against_optax(x64, lenient, name):
    """Where both define the same update, to float64 rounding."""
    make = OPTAX_PAIRS[name]
    ours, theirs = (
        run(make(aj), learning_rate=1e-2),
        run(make(optax), learning_rate=1e-2),
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "b2", matrix([0.9, 0.99, 0.999, 0.9999, 0.99999], quick=[0.9, 0.99999])
)
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("make", [aj.scale_by_adam, aj.scale_by_amsgrad])
def test_first_update_is_the_sign(b2, driven, make):
    """In float32, where Optax is off by 7e-6 to 7e-4."""
    if driven:
        b2 = (lambda b2: lambda t: jnp.float32(b2))(b2)
    tx = make(b2=b2, eps=0.0)
    g = jnp.array([3.7, -0.02, 1e-4, 5e3])
    u, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(u, np.sign(g), rtol=3e-7)


@pytest.mark.parametrize(
    "b", matrix([0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999], quick=[0.0, 0.9, 0.99999])
)
@pytest.mark.parametrize("driven", [False, True])
def test_correction_at_every_step(b, driven):
    """c = 1 - b^t in float32, to 3e-7 over 100,000 steps, for b a number or traced."""
    from adamw_jax.transforms.moments import _beta_at, _init_log_product

    nominal = float(np.float32(b)) if driven else b  # as a traced float32
    beta = (lambda t: jnp.float32(b)) if driven else b
    state = _init_log_product(beta, jnp.zeros(1))

    @jax.jit
    def corrections(state):
        def step(state, t):
            at = _beta_at("b1", beta, "exact", t, state, jnp.float32)
            return at.log_product, at.correction

        return jax.lax.scan(step, state, jnp.arange(100_000))[1]

    t = np.arange(1, 100_001)
    exact = -np.expm1(t * math.log(nominal)) if nominal else np.ones(len(t))
    np.testing.assert_allclose(corrections(state), exact, rtol=3e-7)


@pytest.mark.parametrize("seed", matrix(range(3), quick=[0]))
def test_constant_gradient_invariance(x64, seed):
    """A constant gradient gives a constant update under any schedule of the betas."""
    rng = np.random.default_rng(seed)
    b1, b2 = jnp.asarray(rng.uniform(size=(2, 100)))
    tx = aj.scale_by_adam(lambda t: b1[t], lambda t: b2[t], eps=0.0)
    grads = np.tile(rng.normal(size=5), (100, 1))
    updates = np.diff(
        run(tx, np.zeros(5), grads, learning_rate=1.0), axis=0, prepend=0.0
    )
    np.testing.assert_allclose(updates, -np.sign(grads), atol=1e-10)


def test_constant_gradient_invariance_float32():
    cycle = aj.one_cycle(1.0, steps=200)
    tx = aj.scale_by_adam(cycle.schedule("b1"), 0.9, eps=0.0)
    g = jnp.array([0.3, -20.0])
    state = tx.init(g)
    update = jax.jit(tx.update)
    for _ in range(200):
        u, state = update(g, state)
        np.testing.assert_allclose(u, np.sign(g), rtol=1e-6)


def test_torch_correction_is_wrong_under_a_cycle():
    """Why there is an exact mode: PyTorch's step is 23 % too short here (T = 50)."""
    b1 = aj.one_cycle_torch(1.0, 50).schedule("b1")
    sizes = {}
    for mode in ("exact", "torch"):
        tx = aj.scale_by_adam(b1, 0.9, eps=0.0, bias_correction=mode)
        state, sizes[mode] = tx.init(jnp.ones(1)), []
        for _ in range(10):
            u, state = tx.update(jnp.ones(1), state)
            sizes[mode].append(float(u[0]))
    np.testing.assert_allclose(sizes["exact"], 1.0, rtol=1e-6)
    assert sizes["torch"][-1] == pytest.approx(0.771, abs=1e-3)


def test_amsgrad_counterexample_p1():
    """Reddi et al., theorem: f_t(x) = C x every third step, else -x; optimum -1."""
    big = jnp.arange(1, 2001) % 3 == 1
    assert _drift(4.0, -1.0, big, 0.0, 1 / 17, aj.scale_by_adam) > 0.9
    assert _drift(4.0, -1.0, big, 0.0, 1 / 17, aj.scale_by_amsgrad) < -0.9


def test_amsgrad_counterexample_p2():
    """Their figure: f_t(x) = 1010 x every 101st step, else -10 x."""
    big = jnp.arange(1, 100_001) % 101 == 1
    assert _drift(1010.0, -10.0, big, 0.9, 0.99, aj.scale_by_adam) > 0.98
    assert _drift(1010.0, -10.0, big, 0.9, 0.99, aj.scale_by_amsgrad) < -0.98


def _drift(high, low, big, b1, b2, make):
    """The final x in [-1, 1], from 0, with learning rate .5 / sqrt(t)."""
    tx = optax.chain(
        make(b1, b2),
        aj.scale_by_learning_rate(lambda t: 0.5 / jnp.sqrt(t.astype(jnp.float32) + 1)),
    )

    @jax.jit
    def loop(big):
        def step(carry, big):
            x, state = carry
            u, state = tx.update(jnp.where(big, high, low), state, x)
            return (jnp.clip(x + u, -1.0, 1.0), state), None

        x = jnp.float32(0)
        return jax.lax.scan(step, (x, tx.init(x)), big)[0][0]

    return float(loop(big))


@pytest.mark.parametrize(("steps", "worst"), [(20, 0.37), (1000, 0.015)])
def test_error_of_pytorchs_correction(steps, worst):
    """The figures of scale_by_adam's docstring."""
    b1 = [aj.one_cycle_torch(1.0, steps).at(k)["b1"] for k in range(steps)]
    exact = 1 - np.cumprod(b1)
    torch = 1 - np.power(b1, np.arange(1, steps + 1))
    assert np.abs(exact / torch - 1).max() == pytest.approx(worst, abs=0.006)


@pytest.mark.parametrize(("b2", "error"), [(0.999, 1e-5), (0.99999, 1e-3)])
def test_error_of_the_naive_correction(b2, error):
    """The same for 1 - b^t in float32, at its worst over the first 1000 steps."""
    t = np.arange(1, 1001)
    naive = np.asarray(1 - jnp.float32(b2) ** jnp.asarray(t, jnp.float32), float)
    assert error < np.abs(naive / -np.expm1(t * math.log(b2)) - 1).max() < 3 * error


def test_differences_between_the_amsgrads():
    """The figures of scale_by_amsgrad's docstring."""
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(200, 500)), jnp.float32)
    grads = grads.at[0].multiply(10)

    def updates(convention):
        tx = aj.scale_by_amsgrad(convention=convention)
        return jax.lax.scan(
            lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads
        )

    torch, optax_, paper = (updates(c)[1] for c in ("torch", "optax", "paper"))
    assert float(jnp.median(torch[-1] / optax_[-1])) == pytest.approx(6, abs=0.6)
    assert float(jnp.median(paper[0] / torch[0])) == pytest.approx(3, abs=0.3)


# ---- low precision ------------------------------------------------------------------


def _final_moment(
    steps, gradient, moment, shape=(100_000,), p_dtype="float32", **kwargs
):
    tx = aj.scale_by_adam(**kwargs)
    g = jnp.full(shape, gradient, p_dtype)

    @jax.jit
    def loop(g):
        state = tx.init(g)
        return jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], state)

    return np.asarray(getattr(loop(g), moment), np.float64)


@pytest.mark.parametrize(("b1", "nearest"), [(0.9, 0.984), (0.99, 0.805)])
def test_bfloat16_mu(b1, nearest):
    """The mean is right under a constant gradient of 1; to nearest, it is not."""
    steps = 1000
    mu = _final_moment(steps, 1.0, "mu", b1=b1, mu_dtype=jnp.bfloat16)
    assert abs(mu.mean() - 1) < 0.01
    mu = _final_moment(
        steps, 1.0, "mu", (8,), b1=b1, mu_dtype=jnp.bfloat16, stochastic_rounding=False
    )
    assert mu.mean() == pytest.approx(nearest, abs=1e-3)


@pytest.mark.parametrize("nu_dtype", [None, jnp.bfloat16])
def test_nu_decays_with_bfloat16_parameters(nu_dtype):
    """One unit gradient, then 2000 zeros: nu = .001 * .999^2000 (Optax: .001)."""
    tx = aj.scale_by_adam(nu_dtype=nu_dtype)
    g = jnp.ones(20_000, jnp.bfloat16)
    _, state = tx.update(g, tx.init(g))
    assert state.nu.dtype == (nu_dtype or jnp.float32)
    step = jax.jit(lambda _, s: tx.update(jnp.zeros_like(g), s)[1])
    state = jax.lax.fori_loop(0, 2000, step, state)
    nu = np.asarray(state.nu, np.float64).mean()
    assert nu == pytest.approx(1e-3 * 0.999**2000, rel=0.05 if nu_dtype else 1e-4)


def test_float16_storage():
    mu = _final_moment(300, 1.0, "mu", mu_dtype=jnp.float16, p_dtype="float16")
    assert abs(mu.mean() - 1) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_finite(dtype):
    """inject_hyperparams gives NaN here: b2 = .999 is 1 in bfloat16."""
    tx = aj.adamw(1e-3)
    p = jnp.ones(4, dtype)
    state = tx.init(p)
    for g in (jnp.zeros(4, dtype), jnp.ones(4, dtype)):
        updates, state = tx.update(g, state, p)
        chex.assert_tree_all_finite(updates)
    np.testing.assert_allclose(aj.current_hyperparams(state)["b2"], 0.999, rtol=1e-7)


def test_bfloat16_parameters_keep_small_updates():
    p0 = jnp.ones(20_000, jnp.bfloat16)
    constant = optax.GradientTransformation(
        lambda p: (), lambda u, s, p=None: (jnp.full(p.shape, -1e-3), s)
    )
    ends = {}
    for name, tx in {
        "nearest": constant,
        "stochastic": optax.chain(constant, aj.round_updates_stochastically()),
    }.items():

        @jax.jit
        def loop(p, tx=tx):
            def step(_, carry):
                updates, state = tx.update(p0, carry[1], carry[0])
                return aj.apply_updates(carry[0], updates), state

            return jax.lax.fori_loop(0, 300, step, (p, tx.init(p)))[0]

        ends[name] = float(loop(p0).astype(jnp.float32).mean())
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.7, abs=0.01)


def test_stochastic_rounding_depends_on_seed_and_resumes():
    def states(seed, steps, state=None):
        tx = aj.scale_by_adam(mu_dtype=jnp.bfloat16, seed=seed)
        g = jnp.full(100, 0.3)
        state = tx.init(g) if state is None else state
        for _ in range(steps):
            _, state = tx.update(g, state)
        return state

    whole = states(0, 10)
    resumed = states(99, 6, states(0, 4))  # the key lives in the state
    np.testing.assert_array_equal(whole.mu, resumed.mu)
    assert (np.asarray(whole.mu) != np.asarray(states(1, 10).mu)).any()


@pytest.mark.parametrize("make", [aj.scale_by_adam, aj.scale_by_amsgrad])
def test_random_bits_are_never_used_twice(make):
    """Not in another leaf, the other moment, or another step."""
    half_way, g = 0.5 + 2.0**-9, 1.0 + 2.0**-8  # of mu, and of nu, between bfloat16s
    narrow = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
    tx = make(0.5, 1 - half_way / g**2, **narrow)
    grads = {"a": jnp.full(400, g), "b": jnp.full(400, g)}
    start, seen = tx.init(grads), []
    for count in range(2):
        _, state = tx.update(grads, start._replace(count=jnp.int32(count)))
        for moment in (state.mu["a"], state.nu["a"], state.mu["b"], state.nu["b"]):
            seen.append(np.asarray(moment, np.float32) > half_way)
    for i, one in enumerate(seen):
        assert 0.4 < one.mean() < 0.6
        for other in seen[:i]:
            assert 0.4 < (one == other).mean() < 0.6


def test_random_bits_of_updates_differ_between_leaves_and_steps():
    tx = aj.round_updates_stochastically()
    p = {k: jnp.ones(500, jnp.bfloat16) for k in "ab"}
    u = {k: jnp.full(500, -1.95e-3) for k in "ab"}  # half of a spacing
    first, state = tx.update(u, tx.init(p), p)
    second, _ = tx.update(u, state, p)
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert 0.3 < float((one == other).mean()) < 0.7


def test_bits_of_another_dtype():
    with pytest.raises(TypeError, match="uint16"):
        aj.stochastic_round(jnp.ones(1), jnp.bfloat16, jnp.zeros(1, jnp.uint32))


def test_updates_are_added_in_float32():
    """In bfloat16 the update itself would already be rounded: 1.0039 -> 1.0."""
    p = jnp.array([1.0], jnp.bfloat16)
    u = jnp.array([2.0**-8 + 2.0**-12])
    assert float(aj.apply_updates(p, u)[0]) == 1 + 2.0**-7


def test_apply_updates_keeps_other_dtypes_exact():
    p = {"i": jnp.array([2**24 + 1]), "c": jnp.array([1 + 2j])}
    q = aj.apply_updates(p, {"i": jnp.array([0]), "c": jnp.array([-0.0 + 0j])})
    assert q["i"][0] == 2**24 + 1 and q["c"][0] == 1 + 2j


def test_numpy_float64_leaves_without_x64():
    tx = aj.adamw(1e-2)
    p = {"w": np.ones(3)}
    updates, _ = tx.update(p, tx.init(p), p)
    assert updates["w"].dtype == jnp.float32


def test_python_numbers_as_leaves():
    tx = aj.adamw(1e-2, weight_decay=0.0)
    updates, _ = tx.update({"w": 2.0}, tx.init({"w": 1.0}), {"w": 1.0})
    np.testing.assert_allclose(updates["w"], -1e-2, rtol=1e-6)


def test_a_beta_must_not_turn_from_number_to_array():
    state = aj.scale_by_adam(0.9).init(jnp.ones(1))
    with pytest.raises(ValueError, match="b1 must be a number both at init and at"):
        aj.scale_by_adam(jnp.float32(0.9)).update(jnp.ones(1), state)


def test_gradient_through_an_update():
    """Meta-learning: the derivative with respect to b1, at 0 too, through the root."""

    def second(b1):
        tx = aj.scale_by_adam(b1, eps_root=1e-8)
        state = tx.init(jnp.ones(1))
        for g in (1.0, 3.0):
            u, state = tx.update(jnp.array([g]), state)
        return u[0]

    for b1 in (0.0, 0.5):
        slope = (second(jnp.float32(b1 + 1e-2)) - second(jnp.float32(b1))) / 1e-2
        grad = float(jax.grad(second)(jnp.float32(b1)))
        assert grad == pytest.approx(float(slope), rel=0.05)


def test_stochastic_rounding_of_special_values():
    x = jnp.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 3.4e38])
    bits = jnp.full(x.shape, 2**16 - 1, jnp.uint16)
    rounded = np.asarray(aj.stochastic_round(x, jnp.bfloat16, bits), np.float32)
    np.testing.assert_array_equal(rounded[:5], x[:5])


def test_float32_leaves_stay_float32_under_x64(x64):
    p = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
    tx = aj.adamw(aj.one_cycle(1e-3, steps=10))
    updates, state = tx.update(p, tx.init(p), p)
    adam = state.inner_state[0]
    for tree in (updates, adam.mu, adam.nu):
        assert tree["a"].dtype == jnp.float32 and tree["b"].dtype == jnp.float64


# ---- trees, tracing, errors ---------------------------------------------------------

ALL = {
    "adam": lambda: aj.adam(1e-2, l2=0.1),
    "adamw": lambda: aj.adamw(aj.one_cycle(1e-2, steps=10)),
    "amsgrad": lambda: aj.amsgrad(1e-2, weight_decay=0.1, mu_dtype=jnp.bfloat16),
    "sgd": lambda: aj.sgd(1e-2, 0.9, weight_decay=0.1),
    "rounded": lambda: optax.chain(
        aj.sgd(1e-2, 0.9), aj.round_updates_stochastically()
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_none_leaves_pass_through(name):
    """A frozen leaf has a None gradient; its parameter and moments stay."""
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    state = tx.init(p)
    g = {"a": jnp.ones(2), "b": None, "c": None}
    updates, new = jax.jit(tx.update)(g, state, p)
    assert updates["b"] is None and updates["c"] is None
    p1 = aj.apply_updates(p, updates)
    assert p1["b"] is p["b"] and (p1["a"] != p["a"]).all()
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ALL)
def test_one_trace(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2)}
    state = tx.init(p)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return aj.apply_updates(p, updates), state

    for i in range(3):
        if i == 2 and name != "rounded":
            state = aj.override_hyperparams(state, learning_rate=0.5)
        p, state = step(p, state, {"a": jnp.full(2, float(i))})


@pytest.mark.parametrize("name", ALL)
def test_donation(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    state = tx.init(p)
    old = [x for x in jax.tree.leaves(state) if x.shape]

    def step(p, state):
        updates, state = tx.update(p, state, p)
        return aj.apply_updates(p, updates), state

    jax.jit(step, donate_argnums=(0, 1))(p, state)
    assert all(x.is_deleted() for x in old)


@pytest.mark.parametrize("name", ALL)
def test_abstract_init(name):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}
    abstract = jax.eval_shape(tx.init, p)
    concrete = tx.init(p)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, c in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)


@pytest.mark.parametrize("name", ALL)
def test_state_follows_sharding(name):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    tx = ALL[name]()
    p = jax.device_put(jnp.arange(8.0), sharding)
    state = tx.init(p)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (8,)]
    assert all(x.sharding == sharding for x in moments)
    updates, new = jax.jit(tx.update)(p, state, p)
    assert updates.sharding == sharding
    alone, _ = jax.jit(tx.update)(
        jnp.arange(8.0), tx.init(jnp.arange(8.0)), jnp.arange(8.0)
    )
    np.testing.assert_array_equal(updates, alone)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [1e-3, 1e-2]),
        ("b1", [0.5, 0.9]),
        ("b2", [0.9, 0.999]),
        ("eps", [1e-8, 1e-2]),
        ("weight_decay", [0.0, 0.5]),
    ],
)
def test_vmap_over_hyperparameters(name, values):
    p, grads = jnp.array([1.0, -2.0]), jnp.array([[1.0, 2.0], [0.5, -3.0]])

    def train(value):
        tx = aj.adamw(**({"learning_rate": 1e-2} | {name: value}))
        state, q = tx.init(p), p
        for g in grads:
            updates, state = tx.update(g, state, q)
            q = aj.apply_updates(q, updates)
        return q

    together = jax.jit(jax.vmap(train))(jnp.array(values))
    alone = jnp.stack([train(value) for value in values])
    assert (together[0] != together[1]).all()
    np.testing.assert_allclose(together, alone, rtol=1e-6)


SCALARS = [
    (aj.scale_by_adam, "b1"),
    (aj.scale_by_adam, "b2"),
    (aj.scale_by_adam, "eps"),
    (aj.scale_by_adam, "eps_root"),
    (aj.scale_by_amsgrad, "b1"),
    (aj.trace, "decay"),
    (aj.add_decayed_weights, "weight_decay"),
    (aj.add_l2_gradient, "l2"),
    (aj.scale_by_learning_rate, "learning_rate"),
]


@pytest.mark.parametrize(("make", "name"), SCALARS)
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_numbers(make, name, bad):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{bad}"):
        make(**{name: bad})


@pytest.mark.parametrize(("make", "name"), SCALARS)
@pytest.mark.parametrize("bad", ["x", None, [1.0], True, np.ones(3), jnp.ones(3)])
def test_bad_types(make, name, bad):
    with pytest.raises(TypeError, match=rf"^{name} must be"):
        make(**{name: bad})


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (aj.scale_by_adam, {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        (aj.scale_by_adam, {"b2": 1.5}, r"b2 must be in \[0, 1\), got 1.5"),
        (aj.trace, {"decay": 1}, r"decay must be in \[0, 1\), got 1"),
        (aj.scale_by_adam, {"bias_correction": "yes"}, "bias_correction .* 'yes'"),
        (aj.scale_by_amsgrad, {"convention": "keras"}, "convention .* 'keras'"),
        (
            aj.scale_by_amsgrad,
            {"convention": "optax", "epsilon_hat": True},
            "epsilon_hat",
        ),
    ],
)
def test_bad_choices(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("bad", ["int8", "nonsense"])
def test_bad_dtypes(name, bad):
    with pytest.raises(TypeError, match=f"{name} must be None or a float dtype"):
        aj.scale_by_adam(**{name: bad})


def test_integer_parameter_is_named():
    with pytest.raises(TypeError, match="parameter layer/steps has dtype int32"):
        aj.scale_by_adam().init({"layer": {"steps": jnp.arange(3)}})


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": jnp.ones(2)}, "no leaf b/w"),
        ({"a": jnp.ones(2), "b": {"w": jnp.ones(3), "x": jnp.ones(1)}}, "leaf b/x"),
        ({"a": jnp.ones(2), "b": {"w": jnp.ones(4)}}, r"b/w: shape \(4,\) .* \(3,\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, "leaf b"),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "amsgrad", "sgd"])
def test_gradients_that_do_not_match(name, grads, message):
    tx = ALL[name]()
    p = {"a": jnp.ones(2), "b": {"w": jnp.ones(3)}}
    state = tx.init(p)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, state, p)


def test_params_are_needed():
    tx = aj.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_adam_does_not_need_params():
    """As with optax.adam: swapping the import must be enough."""
    tx = aj.adam(1e-3)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
