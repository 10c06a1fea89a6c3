"""The learning-rate range test against loops, and on networks with state."""

import itertools
import math
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adamw_jax import lr_finder

STEPS = 80
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS, 16, 6))
Y = X @ RNG.normal(size=(6, 1)) + 0.1 * RNG.normal(size=(STEPS, 16, 1))
BATCHES = list(zip(X, Y, strict=True))


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def find(loss_fn=mean_square, batches=BATCHES, **changes):
    options = {"optimizer": optax.sgd, "first": 1e-3, "last": 0.1, "smoothing": 0.9}
    return lr_finder.find(
        loss_fn, {"w": jnp.zeros((6, 1))}, batches, **options | changes
    )


# ---------------------------------------------------------------------------
# against loops
# ---------------------------------------------------------------------------


def loop(update, last, smoothing):
    """The whole procedure for linear regression in NumPy, as fastai has it."""
    w, state, average, best = np.zeros((6, 1)), {}, 0.0, 1e9
    rates, losses, smoothed = [], [], []
    for k in range(STEPS):
        rate = 1e-3 * (last / 1e-3) ** (k / STEPS)
        error = X[k] @ w - Y[k]
        loss = np.mean(error**2)
        w = w - rate * update(w, 2 * X[k].T @ error / len(error), k, state)
        average = smoothing * average + (1 - smoothing) * loss
        debiased = average / (1 - smoothing ** (k + 1))
        if math.isnan(debiased) or debiased > 4 * best:
            return rates, losses, smoothed, rate
        if debiased < best and k > 10:
            best = debiased
        rates.append(rate)
        losses.append(loss)
        smoothed.append(debiased)
    return rates, losses, smoothed, None


def sgd(w, g, k, state):
    return g


def articles_adamw(w, g, k, state):
    state["m"] = 0.95 * state.get("m", 0) + 0.05 * g
    state["v"] = 0.99 * state.get("v", 0) + 0.01 * g**2
    m, v = state["m"] / (1 - 0.95 ** (k + 1)), state["v"] / (1 - 0.99 ** (k + 1))
    return m / (np.sqrt(v) + 1e-8) + 0.1 * w


@pytest.mark.parametrize(
    ("optimizer", "update", "last", "smoothing", "diverges"),
    [
        (optax.sgd, sgd, 10.0, 0.9, True),
        (optax.sgd, sgd, 0.1, 0.95, False),
        (lr_finder.default_optimizer, articles_adamw, 10.0, 0.0, True),
        (lr_finder.default_optimizer, articles_adamw, 10.0, 0.9, False),
    ],
)
def test_the_procedure(x64, optimizer, update, last, smoothing, diverges):
    curve = find(optimizer=optimizer, last=last, smoothing=smoothing)
    expected = loop(update, last, smoothing)
    assert [len(part) for part in curve[:3]] == [len(part) for part in expected[:3]]
    for ours, theirs in zip(curve[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert (curve.diverged_at is not None) == diverges
    assert curve.diverged_at == (expected[3] and pytest.approx(expected[3], rel=1e-12))


def test_a_loss_that_is_not_finite_ends_it():
    def loss_fn(params, batch):  # the square root of a negative number, at some point
        return jnp.sqrt(1 - jnp.sum(params["w"] ** 2)) + jnp.sum(params["w"])

    curve = find(loss_fn, itertools.repeat(0), steps=50, last=1.0, smoothing=0.5)
    assert curve.diverged_at is not None
    assert 0 < len(curve.losses) < 50
    assert np.isfinite(curve[:3]).all()


@pytest.mark.parametrize(("low", "points"), [(11, 40), (12, 12)])
def test_the_first_eleven_losses_are_not_the_best(low, points):
    losses = np.where(np.arange(40) < low, 1.0, 4.1).astype(np.float32)
    curve = find(lambda params, loss: loss + 0 * params["w"].sum(), losses, smoothing=0)
    assert len(curve.losses) == points


def test_a_negative_loss():
    curve = find(lambda *args: mean_square(*args) - 100)
    assert curve.diverged_at is None
    np.testing.assert_allclose(curve.losses + 100, find().losses, atol=1e-4)
    worse = find(lambda *args: mean_square(*args) - 1e-2, last=10.0)
    assert worse.diverged_at == pytest.approx(find(last=10.0).diverged_at, rel=0.5)


class Net(nnx.Module):
    """With both kinds of state: statistics and keys."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@pytest.mark.slow
def test_a_network_with_state_is_a_loop_over_nnx(lenient):
    net, steps = Net(nnx.Rngs(0)), 25
    graphdef, params, state = nnx.split(net, nnx.Param, ...)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params))

    def loss_fn(params, state, batch):
        net = nnx.merge(graphdef, params, state, copy=True)
        loss = jnp.mean((net(batch[0]) - batch[1]) ** 2)
        return loss, nnx.split(net, nnx.Param, ...)[2]

    def find(loss_fn):
        return lr_finder.find(
            loss_fn,
            *(params, BATCHES, state),
            optimizer=optax.sgd,
            **{"first": 1e-3, "last": 0.1, "steps": steps, "smoothing": 0.5},
        )

    curve = find(chex.assert_max_traces(loss_fn, n=1))
    chex.assert_trees_all_equal(nnx.to_pure_dict(params), before)
    again = find(loss_fn)
    np.testing.assert_array_equal(again.losses, curve.losses)  # the state is unchanged

    rates = jnp.asarray(np.geomspace(1e-3, 0.1, steps + 1), jnp.float32)
    optimizer = nnx.Optimizer(net, optax.sgd(lambda k: rates[k]), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    expected = [step(net, optimizer, x, y) for x, y in BATCHES[:steps]]
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-4)


# ---------------------------------------------------------------------------
# arguments
# ---------------------------------------------------------------------------


def test_no_batch_is_taken_in_vain():
    batches = iter(BATCHES)
    curve = find(batches=batches, steps=STEPS, last=10.0)
    assert len(list(batches)) == STEPS - len(curve.losses) - 1  # the one that diverged
    assert find(batches=itertools.cycle(BATCHES), steps=100).losses.size == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 19}, "steps must be at least 20, got 19"),
        ({"steps": 81}, "steps must be at most the number of batches, 80, got 81"),
        (
            {"batches": iter(BATCHES)},
            "steps must be given for batches without a length",
        ),
        ({"first": 0.0}, "first must be above 0, got 0.0"),
        ({"last": 1e-3}, "last must be above first=0.001, got 0.001"),
        ({"last": math.inf}, "last must be above first=0.001, got inf"),
        ({"smoothing": 1.0}, r"smoothing must be None or in \[0, 1\), got 1.0"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer must be a function .* got Gradient"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        find(**changes)


def test_few_steps_with_much_smoothing_warn():
    with pytest.warns(UserWarning, match="steps=80 and smoothing=0.98 .* 1.2 powers"):
        find(smoothing=0.98)  # 50 steps of 40 per power of ten


# ---------------------------------------------------------------------------
# smoothing by the number of steps
# ---------------------------------------------------------------------------


def true_loss(log, steepest):
    """A fall of 1.5 around `steepest`, and a rise from 1.5 decades above it on."""
    fall = 1.5 / (1 + 10 ** (-1.5 * (log - steepest)))
    return 2.3 - fall + 0.5 * 10 ** np.clip(2 * (log - steepest - 1.5), -30, 3)


def find_in(losses, **options):
    """The curve of a test that measures these losses, whatever the rate."""
    return find(
        lambda params, loss: loss + 0 * params["w"].sum(),
        losses.astype(np.float32),
        **{"first": 1e-5, "last": 10.0, "smoothing": None} | options,
    )


def in_decades(rate):
    return np.log10(rate)


# The largest error in decades, with noise of a twentieth of the fall. 20 steps have 3.3
# in a decade.
@pytest.mark.parametrize(
    ("steps", "tolerance"), [(20, 0.5), (50, 0.3), (100, 0.2), (300, 0.1), (1000, 0.1)]
)
@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_curves_whose_steepest_descent_is_known(steps, tolerance, noise):
    """A short test finds what a long one finds, and noise moves it little.

    The logistic fall is steepest at its middle, `true`. Its minimum, where
    95 % of the fall is done, is read from the curve without noise on a fine grid.
    """
    logs, true = -5 + 6 * np.arange(steps) / steps, -2.3
    rng = np.random.default_rng(steps)
    curve = find_in(true_loss(logs, true) + noise * rng.normal(size=steps))
    fine = np.linspace(-5, -0.5, 10001)
    exact = true_loss(fine, true)
    low = exact.min() + (exact[0] - exact.min()) / 20
    minimum = fine[(exact <= low).argmax()]
    assert in_decades(curve.steepest) == pytest.approx(true, abs=tolerance)
    assert in_decades(10 * curve.suggestion) == pytest.approx(minimum, abs=tolerance)


def test_the_average_of_the_past_lags_where_that_of_both_does_not():
    """The case of 100 batches and fastai's 0.98: a factor of five."""
    losses = true_loss(-5 + 6 * np.arange(100) / 100, -2.3)
    both = find_in(losses)
    with pytest.warns(UserWarning, match="steps=100 and smoothing=0.98"):
        past = find_in(losses, smoothing=0.98)
    assert past.suggestion > 3 * both.suggestion


def test_the_average_of_both_directions():
    """Against a loop over the definition, with the rise cut at the first losses."""
    losses = true_loss(-5 + 6 * np.arange(60) / 60, -2.3)
    curve, weight = find_in(losses), 1 - 20 / 60
    cut = np.minimum(curve.losses, curve.losses[:7].max())
    for k, value in enumerate(curve.smoothed):
        weights = weight ** np.abs(k - np.arange(len(cut)))
        assert value == pytest.approx((weights * cut).sum() / weights.sum())
    assert curve.diverged_at is not None and curve.skip == 6


# ---------------------------------------------------------------------------
# suggestions and their picture
# ---------------------------------------------------------------------------


def make_curve(shape, points=61, diverged_at=None):
    """`shape` is a function of the logarithm of the rate, from -5 to 1."""
    logs = np.linspace(-5, 1, points)
    smoothed = np.array([shape(log) for log in logs])
    return lr_finder.Curve(10**logs, smoothed, smoothed, diverged_at)


def test_the_suggestion_is_a_tenth_of_the_minimum():
    sharp = make_curve(lambda log: abs(log + 1) if log < -1 else 5 * (log + 1))
    # 2.9 of 3 down: the first point with at least 95 %
    assert sharp.suggestion == pytest.approx(10**-2.1)
    # 2.3 down to 2, then flat, with noise that is lowest at its very end
    flat = make_curve(lambda log: 2.3 - 0.1 * min(max(log + 4, 0), 3) - 1e-4 * log, 601)
    assert flat.learning_rates[flat.smoothed.argmin()] == 10
    flat = flat._replace(diverged_at=10.1)
    assert flat.suggestion == pytest.approx(10**-2.15, rel=0.03)


def test_the_steepest_point_is_not_that_of_noise():
    noise = iter(np.random.default_rng(0).normal(0, 0.05, 601))
    curve = make_curve(
        lambda log: 1 / (1 + np.exp(4 * (log + 2))) + max(0, log) + next(noise), 601
    )
    assert curve.steepest == pytest.approx(1e-2, rel=0.5)
    # from -4 to -3.9, the only fall after ten points
    assert make_curve(lambda log: abs(log + 3.9)).steepest == pytest.approx(
        10**-3.95, rel=0.1
    )


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (make_curve(lambda log: log), "the loss never fell"),
        (make_curve(lambda log: 1.0), "the loss never fell"),
        (make_curve(lambda log: -log), "the loss fell to the end"),
        (make_curve(lambda log: -log, 11, 1e-3), "the loss diverged after 11 steps"),
        (make_curve(lambda log: 1.0, 0, 1e-5), "the loss diverged after 0 steps"),
    ],
)
def test_curves_that_suggest_nothing(curve, why):
    assert curve.why_not().startswith(why)
    for name in ("suggestion", "steepest"):
        with pytest.raises(ValueError, match=f"no learning rate to suggest: {why}"):
            getattr(curve, name)
    assert lines(curve.plot()).keys() <= {"batch", "smoothed"}


def lines(figure):
    return {line.get_label(): line.get_data() for line in figure.axes[0].lines}


@pytest.mark.parametrize("smoothing", [0.9, None])
def test_the_picture(smoothing):
    """What the suggestion is read from, and all of it inside the axes."""
    curve = find(last=10.0, smoothing=smoothing)
    figure = curve.plot()
    drawn, skip = lines(figure), {0.9: 10, None: 8}[smoothing]
    for label, values in (("batch", curve.losses), ("smoothed", curve.smoothed)):
        np.testing.assert_array_equal(drawn[label][0], curve.learning_rates[skip:])
        np.testing.assert_array_equal(drawn[label][1], values[skip:])
    (lowest,) = drawn[f"minimum, {10 * curve.suggestion:.2g}"][0]
    assert lowest == pytest.approx(10 * curve.suggestion)
    (value,) = drawn[f"minimum, {10 * curve.suggestion:.2g}"][1]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < curve.losses[skip:].min() and value < top
    marks = {"suggestion": curve.suggestion, "steepest": curve.steepest}
    for name, rate in marks.items():
        assert drawn[f"{name}, {rate:.2g}"][0] == [rate, rate]


@pytest.mark.slow
def test_matplotlib_is_imported_to_draw_only():
    code = "import sys, adamw_jax; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
