"""The learning-rate finder against loops, on networks with state, and as a command."""

import dataclasses
import itertools
import json
import math
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adamw_jax import current_hyperparams
from train import language_model, lr_find
from train.data import text
from train.models import awd

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
    return lr_find.find(loss_fn, {"w": jnp.zeros((6, 1))}, batches, **options | changes)


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
        (lr_find.OPTIMIZERS["adamw"], articles_adamw, 10.0, 0.0, True),
        (lr_find.OPTIMIZERS["adamw"], articles_adamw, 10.0, 0.9, False),
    ],
)
def test_the_procedure(x64, optimizer, update, last, smoothing, diverges):
    found = find(optimizer=optimizer, last=last, smoothing=smoothing)
    expected = loop(update, last, smoothing)
    assert [len(part) for part in found[:3]] == [len(part) for part in expected[:3]]
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert (found.diverged_at is not None) == diverges
    assert found.diverged_at == (expected[3] and pytest.approx(expected[3], rel=1e-12))


def test_a_loss_that_is_not_finite_ends_it():
    def loss_fn(params, batch):  # the square root of a negative number, at some point
        return jnp.sqrt(1 - jnp.sum(params["w"] ** 2)) + jnp.sum(params["w"])

    found = find(loss_fn, itertools.repeat(0), steps=50, last=1.0, smoothing=0.5)
    assert found.diverged_at is not None
    assert 0 < len(found.losses) < 50
    assert np.isfinite(found[:3]).all()


@pytest.mark.parametrize(("low", "points"), [(11, 40), (12, 12)])
def test_the_first_eleven_losses_are_not_the_best(low, points):
    losses = np.where(np.arange(40) < low, 1.0, 4.1).astype(np.float32)
    found = find(lambda params, loss: loss + 0 * params["w"].sum(), losses, smoothing=0)
    assert len(found.losses) == points


def test_a_negative_loss():
    found = find(lambda *args: mean_square(*args) - 100)
    assert found.diverged_at is None
    np.testing.assert_allclose(found.losses + 100, find().losses, atol=1e-4)
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


def test_a_network_with_state_is_a_loop_over_nnx(lenient):
    net, steps = Net(nnx.Rngs(0)), 25
    graphdef, params, state = nnx.split(net, nnx.Param, ...)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params))
    traces = []

    def loss_fn(params, state, batch):
        traces.append(1)
        net = nnx.merge(graphdef, params, state, copy=True)
        loss = jnp.mean((net(batch[0]) - batch[1]) ** 2)
        return loss, nnx.split(net, nnx.Param, ...)[2]

    options = {"first": 1e-3, "last": 0.1, "steps": steps, "smoothing": 0.5}
    found = lr_find.find(
        loss_fn, params, BATCHES, state, optimizer=optax.sgd, **options
    )
    assert len(traces) == 1  # compiled once
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(params), before)
    again = lr_find.find(
        loss_fn, params, BATCHES, state, optimizer=optax.sgd, **options
    )
    np.testing.assert_array_equal(again.losses, found.losses)  # the state is as it was

    rates = jnp.asarray(np.geomspace(1e-3, 0.1, steps + 1), jnp.float32)
    optimizer = nnx.Optimizer(net, optax.sgd(lambda k: rates[k]), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    expected = [step(net, optimizer, x, y) for x, y in BATCHES[:steps]]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)


# ---------------------------------------------------------------------------
# what it is given
# ---------------------------------------------------------------------------


def test_it_takes_no_more_batches_than_it_needs():
    given = iter(BATCHES)
    found = find(batches=given, steps=STEPS, last=10.0)
    assert len(list(given)) == STEPS - len(found.losses) - 1  # the one that diverged
    assert find(batches=itertools.cycle(BATCHES), steps=100).losses.size == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 19}, "steps must be at least 20, got 19"),
        ({"steps": 81}, "steps must be at most the number of batches, 80, got 81"),
        ({"batches": iter(BATCHES)}, "steps must be given: .* no length"),
        ({"first": 0.0}, "first must be above 0, got 0.0"),
        ({"last": 1e-3}, "last must be above first=0.001, got 0.001"),
        ({"last": math.inf}, "last must be above first=0.001, got inf"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer must be a function .* got Gradient"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        find(**changes)


def test_few_steps_with_much_smoothing_are_warned_of():
    with pytest.warns(UserWarning, match="steps=80 and smoothing=0.98 .* 1.2 powers"):
        find(smoothing=0.98)  # 50 steps of 40 per power of ten


# ---------------------------------------------------------------------------
# suggestions and their picture
# ---------------------------------------------------------------------------


def curve(shape, points=61, diverged_at=None):
    """`shape` is a function of the logarithm of the rate, from -5 to 1."""
    logs = np.linspace(-5, 1, points)
    smoothed = np.array([shape(log) for log in logs])
    return lr_find.Found(10**logs, smoothed, smoothed, diverged_at)


def test_the_suggestion_is_a_tenth_of_the_minimum():
    sharp = curve(lambda log: abs(log + 1) if log < -1 else 5 * (log + 1))
    assert sharp.suggestion == pytest.approx(
        10**-2.1
    )  # 2.9 of 3 down, the first >= 95 %
    # 2.3 down to 2, then flat, with noise that is lowest at its very end
    flat = curve(lambda log: 2.3 - 0.1 * min(max(log + 4, 0), 3) - 1e-4 * log, 601)
    assert flat.learning_rates[flat.smoothed.argmin()] == 10
    flat = flat._replace(diverged_at=10.1)
    assert flat.suggestion == pytest.approx(10**-2.15, rel=0.03)


def test_the_steepest_point_is_not_that_of_noise():
    noise = iter(np.random.default_rng(0).normal(0, 0.05, 601))
    found = curve(
        lambda log: 1 / (1 + np.exp(4 * (log + 2))) + max(0, log) + next(noise), 601
    )
    assert found.steepest == pytest.approx(1e-2, rel=0.5)
    assert curve(lambda log: abs(log + 3.9)).steepest == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (curve(lambda log: log), "the loss never fell"),
        (curve(lambda log: 1.0), "the loss never fell"),
        (curve(lambda log: -log), "the loss fell to the end"),
        (curve(lambda log: -log, 11, 1e-3), "the loss diverged after 11 steps"),
        (curve(lambda log: 1.0, 0, 1e-5), "the loss diverged after 0 steps"),
    ],
)
def test_curves_that_suggest_nothing(found, why):
    assert found.why_not().startswith(why)
    for name in ("suggestion", "steepest"):
        with pytest.raises(ValueError, match=f"no learning rate to suggest: {why}"):
            getattr(found, name)
    assert lines(found.plot()).keys() <= {"each batch", "smoothed"}


def lines(figure):
    return {line.get_label(): line.get_data() for line in figure.axes[0].lines}


def test_the_picture():
    found = find(last=10.0)
    drawn = lines(found.plot())
    for label, values in (("each batch", found.losses), ("smoothed", found.smoothed)):
        np.testing.assert_array_equal(drawn[label][0], found.learning_rates[10:-5])
        np.testing.assert_array_equal(drawn[label][1], values[10:-5])
    marks = {"suggestion": found.suggestion, "steepest": found.steepest}
    for name, rate in marks.items():
        assert drawn[f"{name}, {rate:.2g}"][0] == [rate, rate]


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command(tmp_path, cifar_dir, capsys, monkeypatch, lenient):
    options = {
        "data-dir": cifar_dir, "blocks": 1, "width": 4, "batch-size": 10, "steps": 40,
        "smoothing": 0.5, "first": 1e-3, "out": tmp_path / "runs", "name": "one",
    }  # fmt: skip
    command = ["lr_find", "cifar10", *(f"--{k}={v}" for k, v in options.items())]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_module("train.lr_find", run_name="__main__")  # more than an epoch of 30
    printed, folder = capsys.readouterr().out, tmp_path / "runs" / "one"
    files = {"config.json", "lr_find.json", "lr_find.png"}
    assert {path.name for path in folder.iterdir()} == files
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["width"], settings["optimizer"]) == (4, "adamw")
    assert settings["dataset"] == "cifar10"

    results = json.loads((folder / "lr_find.json").read_text())
    arrays = [np.array(results[name]) for name in lr_find.Found._fields[:3]]
    found = lr_find.Found(*arrays, results["diverged_at"])
    assert found.learning_rates[:2] == pytest.approx([1e-3, 1e-3 * 1e4 ** (1 / 40)])
    assert found.losses[0] == pytest.approx(math.log(10), abs=0.4)
    assert found.smoothed.min() < found.smoothed[0]  # it learns
    assert (results["suggestion"], results["steepest"]) == (
        found.suggestion,
        found.steepest,
    )
    assert f"Suggested learning rate: {found.suggestion:.2g}, a tenth" in printed
    picture = folder / "lr_find.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size > 10_000

    with pytest.raises(ValueError, match="one exists; .* --overwrite"):
        runpy.run_module("train.lr_find", run_name="__main__")


def test_without_a_suggestion(tmp_path, cifar_dir, capsys, monkeypatch):
    given = {}

    def never_falls(*args, **options):
        given.update(options)
        return curve(lambda log: log)

    monkeypatch.setattr(lr_find, "find", never_falls)
    config = lr_find.Cifar10(
        cifar_dir, blocks=1, width=4, batch_size=10, out=tmp_path / "runs",
        weight_decay=0.5,
    )  # fmt: skip
    folder = lr_find.main(config)
    results = json.loads((folder / "lr_find.json").read_text())
    assert (results["suggestion"], results["steepest"]) == (None, None)
    assert len(results["losses"]) == 61
    assert "No learning rate to suggest: the loss never fell" in capsys.readouterr().out
    assert given["steps"] == 30  # an epoch
    state = given["optimizer"](0.1).init({"w": jnp.zeros(2)})
    assert current_hyperparams(state)["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 301}, r"batch_size must be in \[1, 300\], got 301"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, .* got 'lion'"),
        ({"weight_decay": -0.1}, "weight_decay must be None or at least 0, got -0.1"),
        ({"steps": 5}, "steps must be at least 20, got 5"),
    ],
)
def test_bad_settings(changes, message, tmp_path, cifar_dir):
    settings = {"data_dir": cifar_dir, "out": tmp_path / "runs"}
    with pytest.raises(ValueError, match=message):
        lr_find.main(lr_find.Cifar10(**settings | {"blocks": 1, "width": 4} | changes))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------
# language models
# ---------------------------------------------------------------------------

TINY = {"embedding": 6, "width": 8, "layers": 2, "batch_size": 4, "bptt": 5}


@pytest.fixture
def text_dir(tmp_path):
    """230 tokens to train with: 11 chunks of 5 in 4 columns."""
    folder, rng = tmp_path / "text", np.random.default_rng(0)
    folder.mkdir()
    for split, lines in (("train", 23), ("valid", 2), ("test", 2)):
        words = rng.choice(list("abcdefghij"), (lines, 9))
        content = "\n".join(" ".join(line) for line in words)
        (folder / f"{split}.txt").write_text(content + "\n")
    return folder


def adam_l2(w, g, k, state, b1=0.8, b2=0.99):
    g = g + 1.2e-6 * w
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    m, v = state["m"] / (1 - b1 ** (k + 1)), state["v"] / (1 - b2 ** (k + 1))
    return m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize(
    ("optimizer", "update", "max_norm"),
    [("adam-l2", adam_l2, 0.12), ("sgd", lambda w, g, k, state: g + 1.2e-6 * w, 0.25)],
)
def test_a_language_model_is_a_loop(
    optimizer, update, max_norm, text_dir, tmp_path, lenient
):
    """Salesforce's SGD has AR of the output after dropout, the other recipes before."""
    steps, rates = 30, 1e-3 * 1e4 ** (np.arange(30) / 30)
    config = lr_find.LanguageModel(
        text_dir, **TINY, optimizer=optimizer, first=1e-3, steps=steps, smoothing=0.0,
        out=tmp_path / "runs", name="one",
    )  # fmt: skip
    results = json.loads((lr_find.main(config) / "lr_find.json").read_text())

    corpus = text.wikitext2(text_dir)
    tokens, words = corpus.train, len(corpus.vocabulary)
    assert len(tokens) == 230
    columns = tokens[:228].reshape(4, 57).T
    settings = language_model.defaults("lstm", "adam-l2", small=False)
    settings = dataclasses.replace(settings, **TINY)
    net = language_model.network(settings, words, 0)
    graphdef, params = nnx.split(net)
    dropout = awd.Rates(input=0.65 if optimizer == "sgd" else 0.6)
    alpha, beta = (2.0, 1.0) if optimizer == "sgd" else (3.0, 1.5)

    @jax.jit
    def gradient(params, hidden, x, y, key):
        def loss_of(params):
            net = nnx.merge(graphdef, params)
            out = net(x, hidden, awd.draw_masks(key, net, dropout, 4))
            loss = optax.softmax_cross_entropy_with_integer_labels(
                net.logits(out.dropped), y
            ).mean()
            ar = out.dropped if optimizer == "sgd" else out.raw
            loss += alpha * jnp.mean(ar**2)
            loss += beta * jnp.mean((out.raw[1:] - out.raw[:-1]) ** 2)
            return loss, out.state

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    leaves, structure = jax.tree.flatten(params)
    moments, losses = [{} for _ in leaves], []
    key = jax.random.fold_in(jax.random.key(0), 1)
    for k, rate in enumerate(rates):
        start = k % 11 * 5
        if start == 0:
            hidden = net.initial_state(4)
        key, now = jax.random.split(key)
        (loss, hidden), grads = gradient(
            jax.tree.unflatten(structure, leaves),
            hidden,
            columns[start : start + 5],
            columns[start + 1 : start + 6],
            now,
        )
        losses.append(float(loss))
        grads = [np.float64(g) for g in jax.tree.leaves(grads)]
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1, max_norm / (norm + 1e-6)) for g in grads]
        leaves = [
            np.float32(w - rate * update(np.float64(w), g, k, state))
            for w, g, state in zip(leaves, grads, moments, strict=True)
        ]
    points = len(results["losses"])
    assert points >= 25  # more than two times through the text
    np.testing.assert_allclose(results["learning_rates"], rates[:points], rtol=1e-5)
    np.testing.assert_allclose(results["losses"], losses[:points], rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "optimizer", "decays"),
    [
        ("lstm", "adam-l2", {"l2": 1.2e-6}),
        ("qrnn", "adam-l2", {"l2": 1e-6}),
        ("lstm", "amsgrad-l2", {"l2": 1.2e-6}),
        ("lstm", "adamw", {"weight_decay": 0.03}),
        ("qrnn", "amsgradw", {"weight_decay": 0.03}),
        ("lstm", "sgd", {"l2": 1.2e-6}),
    ],
)
def test_the_recipe_of_an_optimizer(model, optimizer, decays):
    config = lr_find.LanguageModel(model=model, optimizer=optimizer)
    settings = lr_find.language_model_settings(config)
    for name in ("l2", "weight_decay"):
        assert getattr(settings, name) == decays.get(name, 0)
    adam = {} if optimizer == "sgd" else {"b1": 0.8, "b2": 0.99}
    assert settings.optimizer_args == adam
    assert settings.width == language_model.SMALL["width"]
    own = dataclasses.replace(config, weight_decay=0.5, width=7)
    own = lr_find.language_model_settings(own)
    assert [getattr(own, name) for name in decays] == [0.5]
    assert (own.width, own.bptt) == (7, settings.bptt)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_for_language_models(
    tmp_path, text_dir, capsys, monkeypatch, lenient
):
    options = TINY | {
        "data-dir": text_dir, "model": "qrnn", "optimizer": "adamw", "steps": 40,
        "smoothing": 0.5, "out": tmp_path / "runs", "name": "one",
    }  # fmt: skip
    command = [f"--{k}={v}" for k, v in options.items()]
    monkeypatch.setattr(sys, "argv", ["lr_find", "language_model", *command])
    runpy.run_module("train.lr_find", run_name="__main__")
    folder = tmp_path / "runs" / "one"
    files = {"config.json", "lr_find.json", "lr_find.png"}
    assert {path.name for path in folder.iterdir()} == files
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["dataset"], settings["layers"]) == ("language_model", 2)
    assert settings["settings"]["weight_dropout"] == 0.1  # the recipe's of a QRNN
    results = json.loads((folder / "lr_find.json").read_text())
    assert min(results["smoothed"]) < results["smoothed"][0]  # it learns
    printed = capsys.readouterr().out
    assert "AWD-QRNN of 2 layers, widths 6 and 8, adamw" in printed
    assert f"Suggested learning rate: {results['suggestion']:.2g}, a tenth" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gru"}, "model must be lstm or qrnn, got 'gru'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, .* got 'lion'"),
        ({"weight_decay": -0.1}, "weight_decay must be None or at least 0, got -0.1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be a multiple of the 2 devices"),
        ({"bptt": 0}, r"bptt must be in \[1, 56\] with batch_size=4, got 0"),
        ({"bptt": 57}, r"bptt must be in \[1, 56\] with batch_size=4, got 57"),
        ({"steps": 5}, "steps must be at least 20, got 5"),
        ({"last": 1e-5}, "last must be above first=0.0001, got 1e-05"),
    ],
)
def test_bad_settings_of_language_models(changes, message, tmp_path, text_dir):
    settings = {"data_dir": text_dir, "out": tmp_path / "runs"} | TINY
    with pytest.raises(ValueError, match=message):
        lr_find.main(lr_find.LanguageModel(**settings | changes))
    assert not (tmp_path / "runs").exists()
