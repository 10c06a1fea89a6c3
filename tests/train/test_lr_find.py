"""train.lr_find on tiny networks: its tasks against loops, its options, its files."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adamw_jax import current_hyperparams, lr_finder
from train import lr_find
from train.data import text
from train.models import awd
from train.recipes import language_model as recipe
from train.recipes import text_size

pytestmark = pytest.mark.usefixtures("fast_compile")


# ---------------------------------------------------------------------------
# CIFAR-10
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(tmp_path, cifar_dir, capsys, lenient):
    options = {
        "data-dir": cifar_dir, "blocks": 1, "width": 4, "batch-size": 10, "steps": 40,
        "smoothing": 0.5, "first": 1e-3, "out": tmp_path / "runs", "name": "one",
    }  # fmt: skip
    args = ["cifar10", *(f"--{k}={v}" for k, v in options.items())]
    lr_find.main(lr_find.parse_args(args))  # more than an epoch of 30 steps
    printed, folder = capsys.readouterr().out, tmp_path / "runs" / "one"
    files = {"config.json", "lr_find.json", "lr_find.png"}
    assert {path.name for path in folder.iterdir()} == files
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["width"], settings["optimizer"]) == (4, "adamw")
    assert settings["dataset"] == "cifar10"

    results = json.loads((folder / "lr_find.json").read_text())
    arrays = [np.array(results[name]) for name in lr_finder.Curve._fields[:3]]
    curve = lr_finder.Curve(*arrays, results["diverged_at"])
    assert curve.learning_rates[:2] == pytest.approx([1e-3, 1e-3 * 1e4 ** (1 / 40)])
    assert curve.losses[0] == pytest.approx(math.log(10), abs=0.4)
    assert curve.smoothed.min() < curve.smoothed[0]  # it learns
    assert (results["suggestion"], results["steepest"]) == (
        curve.suggestion,
        curve.steepest,
    )
    assert f"Suggested learning rate: {curve.suggestion:.2g}, a tenth" in printed
    picture = folder / "lr_find.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size > 10_000

    with pytest.raises(ValueError, match="one exists; .* --overwrite"):
        lr_find.main(lr_find.parse_args(args))


def test_without_a_suggestion(tmp_path, cifar_dir, capsys, monkeypatch):
    passed = {}

    def never_falls(*args, **options):
        passed.update(options)
        losses = np.arange(61.0)
        return lr_finder.Curve(np.geomspace(1e-5, 10, 61), losses, losses, None)

    monkeypatch.setattr(lr_finder, "find", never_falls)
    config = lr_find.Cifar10(
        data_dir=cifar_dir, blocks=1, width=4, batch_size=10, out=tmp_path / "runs",
        weight_decay=0.5,
    )  # fmt: skip
    folder = lr_find.main(config)
    results = json.loads((folder / "lr_find.json").read_text())
    assert (results["suggestion"], results["steepest"]) == (None, None)
    assert len(results["losses"]) == 61
    assert "No learning rate to suggest: the loss never fell" in capsys.readouterr().out
    assert passed["steps"] == 30  # an epoch
    state = passed["optimizer"](0.1).init({"w": jnp.zeros(2)})
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
def test_bad_options(changes, message, tmp_path, cifar_dir):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "update", "max_norm"),
    [
        ("adam-l2", adam_l2, 0.12),
        pytest.param(
            "sgd", lambda w, g, k, state: g + 1.2e-6 * w, 0.25, marks=pytest.mark.slow
        ),
    ],
)
def test_a_language_model_is_a_loop(
    optimizer, update, max_norm, text_dir, tmp_path, lenient
):
    """Salesforce's SGD has AR of the output after dropout, the other recipes before."""
    steps, rates = 30, 1e-3 * 1e4 ** (np.arange(30) / 30)
    config = lr_find.LanguageModel(
        data_dir=text_dir, **TINY, optimizer=optimizer, first=1e-3, steps=steps,
        smoothing=0.0, out=tmp_path / "runs", name="one",
    )  # fmt: skip
    results = json.loads((lr_find.main(config) / "lr_find.json").read_text())

    corpus = text.wikitext2(text_dir)
    tokens, words = corpus.train, len(corpus.vocabulary)
    assert len(tokens) == 230
    columns = tokens[:228].reshape(4, 57).T
    settings = recipe.defaults("lstm", "adam-l2", small=False)
    settings = dataclasses.replace(settings, **TINY)
    net = recipe.make_network(settings, words, 0)
    graphdef, params = nnx.split(net)
    dropout = awd.Rates(input=0.65 if optimizer == "sgd" else 0.6)
    alpha, beta = (2.0, 1.0) if optimizer == "sgd" else (3.0, 1.5)

    @jax.jit
    def gradient(params, hidden, x, y, key):
        def loss_fn(params):
            net = nnx.merge(graphdef, params)
            out = net(x, hidden, awd.draw_masks(key, net, dropout, 4))
            loss = optax.softmax_cross_entropy_with_integer_labels(
                net.logits(out.dropped), y
            ).mean()
            ar = out.dropped if optimizer == "sgd" else out.raw
            loss += alpha * jnp.mean(ar**2)
            loss += beta * jnp.mean((out.raw[1:] - out.raw[:-1]) ** 2)
            return loss, out.state

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    leaves, structure = jax.tree.flatten(params)
    moments, losses = [{} for _ in leaves], []
    key = jax.random.fold_in(jax.random.key(0), 1)
    for k, rate in enumerate(rates):
        start = k % 11 * 5
        if start == 0:
            hidden = net.initial_state(4)
        key, dropout_key = jax.random.split(key)
        (loss, hidden), grads = gradient(
            jax.tree.unflatten(structure, leaves),
            hidden,
            columns[start : start + 5],
            columns[start + 1 : start + 6],
            dropout_key,
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
    assert settings.width == text_size.SMALL["width"]
    own = dataclasses.replace(config, weight_decay=0.5, width=7)
    own = lr_find.language_model_settings(own)
    assert [getattr(own, name) for name in decays] == [0.5]
    assert (own.width, own.bptt) == (7, settings.bptt)


@pytest.mark.slow
def test_the_command_for_language_models(tmp_path, text_dir, capsys, lenient):
    options = TINY | {
        "data-dir": text_dir, "model": "qrnn", "optimizer": "adamw", "steps": 40,
        "smoothing": 0.5, "out": tmp_path / "runs", "name": "one",
    }  # fmt: skip
    args = ["language_model", *(f"--{k}={v}" for k, v in options.items())]
    folder = lr_find.main(lr_find.parse_args(args))
    assert folder == tmp_path / "runs" / "one"
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
def test_bad_options_of_language_models(changes, message, tmp_path, text_dir):
    settings = {"data_dir": text_dir, "out": tmp_path / "runs"} | TINY
    with pytest.raises(ValueError, match=message):
        lr_find.main(lr_find.LanguageModel(**settings | changes))
    assert not (tmp_path / "runs").exists()
