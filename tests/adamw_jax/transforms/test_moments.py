"""Adam's and AMSGrad's rules against float64 loops, Optax and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inputs import GRADS, P0, b1_schedule, b2_schedule, run
from reference import adam_loop, constant
from tiers import matrix

import adamw_jax as aj

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
            ("torch", True, "scheduled"),
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


@pytest.mark.parametrize(
    ("mu", "nu"),
    matrix(
        list(itertools.product((False, True), (False, True))),
        quick=[(False, True), (True, False)],
    ),
)
def test_amsgrad_flags_of_optax(x64, lenient, mu, nu):
    flags = {"bias_correction_mu": mu, "bias_correction_nu": nu}
    ours = run(aj.scale_by_amsgrad(convention="optax", **flags), learning_rate=1e-2)
    theirs = run(optax.scale_by_amsgrad(**flags), learning_rate=1e-2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_amsgrad_without_correction(x64):
    none = run(aj.scale_by_amsgrad(bias_correction="none"), learning_rate=1e-2)
    paper = run(aj.scale_by_amsgrad(convention="paper"), learning_rate=1e-2)
    np.testing.assert_array_equal(none, paper)


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
    "name",
    matrix(
        list(OPTAX_PAIRS),
        quick=["adam eps_root", "nadam", "nesterov", "amsgrad paper"],
    ),
)
def test_against_optax(x64, lenient, name):
    """Where both define the same update, to float64 rounding."""
    make = OPTAX_PAIRS[name]
    ours, theirs = (
        run(make(aj), learning_rate=1e-2),
        run(make(optax), learning_rate=1e-2),
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


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
