"""train.language_model on tiny text: recipes, the program, restarts, refusals."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from matplotlib.image import imread

import adamw_jax as aj
from train import language_model
from train.data import text
from train.evals import kneser_ney, perplexity
from train.models import awd
from train.references import awd as torch_awd
from train.run import checkpoint, record

pytestmark = pytest.mark.usefixtures("lenient")

KINDS = ("lstm", "qrnn")
WORDS = 20
TINY = dataclasses.replace(
    language_model.defaults(),
    **{"embedding": 8, "width": 12, "epochs": 3, "batch_size": 4, "bptt": 8},
    **{"lengths": 2, "window": 50, "learning_rate": 2e-2, "name": "run"},
)
STEPS = 19  # of an epoch: 160 rows // 8 - 1


def write_text(folder, words=WORDS):
    """Three files; every word has few successors, so that something can be learned."""
    folder.mkdir(exist_ok=True)
    chances = np.random.default_rng(0).dirichlet(np.full(words, 0.1), words)
    sizes = {"train": 582, "valid": 110, "test": 70}  # a tenth more with <eos>
    for seed, (name, size) in enumerate(sizes.items()):
        rng, word, written = np.random.default_rng(seed), 0, []
        for i in range(size):
            word = rng.choice(words, p=0.98 * chances[word] + 0.02 / words)
            written.append(f"w{word}" + (" " if (i + 1) % 10 else "\n"))
        (folder / f"{name}.txt").write_text("".join(written))
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True, scope="module")
def quick(cache):
    """Programs run only for moments here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(tmp_path, data_dir):
    def start(config=TINY, **changes):
        changes = {"out": tmp_path, "data_dir": data_dir} | changes
        return language_model.main(dataclasses.replace(config, **changes))

    return start


def log(folder):
    return record.read_lines(folder / "metrics.jsonl")


def lines_of_training(folder):
    """What must be the same in two runs: all but times."""
    timed = ("seconds", "tokens_per_second")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in log(folder)
        if line["event"] in ("epoch", "end")
    ]


def final_state(folder, seed=0):
    with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sharding info not provided")
            return checkpoints.load(None)


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(ours, expected, tolerance):
    ours, expected = jax.tree.leaves(ours), jax.tree.leaves(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------
# the recipes
# ---------------------------------------------------------------------------

# What the commands of the publications give, by model and recipe.
ARTICLES = {
    **{"embedding": 400, "epochs": 90, "batch_size": 100, "bptt": 70},
    **{"words_dropout": 0.1, "hidden_dropout": 0.2, "output_dropout": 0.4},
    **{"learning_rate": 5e-3, "div": 10, "pct": 7.5 / 90, "b1": (0.8, 0.7)},
    **{"b2": 0.99, "clip": 0.12, "chunks": "article", "scale_by_length": False},
    **{"ar": "raw", "schedule": "plateau", "average_after": None, "dtype": "float32"},
    **{"theta": 0.662, "lambda_": 0.1279, "window": 3785, "pointer": "article"},
}
LSTM = {
    **{"width": 1150, "layers": 3, "input_dropout": 0.6, "weight_dropout": 0.5},
    **{"alpha": 3, "beta": 1.5, "optimizer": "adam", "l2": 1.2e-6, "weight_decay": 0},
}
QRNN = LSTM | {
    **{"width": 1550, "layers": 4, "input_dropout": 0.4, "weight_dropout": 0.1},
    **{"alpha": 2, "beta": 1, "l2": 1e-6},
}
SALESFORCES = {
    **{"learning_rate": 30, "schedule": "constant", "b1": (0, 0), "clip": 0.25},
    **{"average_after": 5, "scale_by_length": True, "chunks": "salesforce"},
    **{"ar": "dropped", "alpha": 2, "beta": 1, "optimizer": "sgd", "l2": 1.2e-6},
    **{"pointer": "salesforce", "weight_decay": 0},
}
DECOUPLED = {"l2": 0, "weight_decay": 0.03}
RECIPES = {
    ("lstm", "adam-l2"): LSTM,
    ("lstm", "adamw"): LSTM | DECOUPLED | {"optimizer": "adamw"},
    ("lstm", "amsgrad-l2"): LSTM | {"optimizer": "amsgrad"},
    ("lstm", "amsgradw"): LSTM | DECOUPLED | {"optimizer": "amsgrad"},
    ("lstm", "salesforce"): LSTM
    | SALESFORCES
    | {"epochs": 750, "batch_size": 80, "input_dropout": 0.65},
    ("qrnn", "adam-l2"): QRNN,
    ("qrnn", "adamw"): QRNN | DECOUPLED | {"optimizer": "adamw"},
    ("qrnn", "amsgrad-l2"): QRNN | {"optimizer": "amsgrad"},
    ("qrnn", "amsgradw"): QRNN | DECOUPLED | {"optimizer": "amsgrad"},
    ("qrnn", "salesforce"): QRNN | SALESFORCES | {"epochs": 500, "batch_size": 40},
}


def test_all_recipes_are_here():
    both = itertools.product(KINDS, language_model.RECIPES)
    assert set(RECIPES) == set(both)


@pytest.mark.parametrize(("model", "recipe"), RECIPES)
def test_recipes_are_those_of_the_papers(model, recipe):
    config = vars(language_model.defaults(model, recipe, small=False))
    assert (config["model"], config["recipe"]) == (model, recipe)
    for key, value in (ARTICLES | RECIPES[model, recipe]).items():
        assert config[key] == pytest.approx(value), key


@pytest.mark.parametrize(("model", "recipe"), RECIPES)
def test_small_recipes_differ_in_sizes_and_rates(model, recipe):
    """The optimizer, its decay, the schedule, AR and the variant stay the recipe's."""
    small = vars(language_model.defaults(model, recipe))
    full = vars(language_model.defaults(model, recipe, small=False))
    language_model.check(language_model.Config(**small))
    changed = {key for key, value in small.items() if value != full[key]}
    rates = {f"{name}_dropout" for name in ("words", "input", "hidden", "output")}
    if recipe == "salesforce":  # so short a run has to begin to average soon
        rates |= {"average_after", "pointer"}
    assert changed <= rates | {
        *("weight_dropout", "embedding", "width", "layers", "epochs", "batch_size"),
        *("bptt", "alpha", "beta", "lengths", "learning_rate"),
    }
    assert small["width"] == 256 and small["embedding"] == 128
    rate = 30.0 if recipe == "salesforce" else 1e-2
    assert small["learning_rate"] == rate and small["alpha"] == 2


@pytest.mark.parametrize("model", KINDS)
def test_the_articles_four_phases(model):
    """297 steps an epoch of WikiText-2; the rates of the article's code."""
    rows = 2_088_628 // 100
    assert {len(text.chunks(rows, 70, s, e)) for s in (0, 1) for e in range(50)} == {
        297
    }
    config = language_model.defaults(model, small=False)
    cycle = language_model.cycle_of(config, 297)
    assert cycle.total_steps == 26_730
    expected = {
        0: (5e-4, 0.8),
        1: (5.0202020e-4, 0.7999551),
        2227: (4.9989899e-3, 0.7 + 0.05 / 2227.5),
        2228: (5e-3, 0.7),
        13364: (5e-3, 0.7),
        13366: (4.99959596e-3, 0.700009),
        24503: (5e-4, 0.8),
        26729: (5.594e-10, 0.8),
    }
    for step, (rate, b1) in expected.items():
        values = cycle.at(step)
        relative = 1e-7 if step < 26_729 else 1e-3
        assert values["learning_rate"] == pytest.approx(rate, rel=relative), step
        assert values["b1"] == pytest.approx(b1, rel=1e-6), step
        assert values["b2"] == 0.99


def test_salesforces_constant_rate():
    config = language_model.defaults("lstm", "salesforce", small=False)
    cycle = language_model.cycle_of(config, 308)
    assert cycle.total_steps == 750 * 308
    assert cycle.at(0)["learning_rate"] == cycle.at(231_000)["learning_rate"] == 30
    tx = language_model.make_optimizer(config, cycle)
    params = jnp.array([5.0])
    state = tx.init(params)
    for g in (1e-3, -2e-3):  # nothing is kept from the step before
        updates, state = tx.update(jnp.array([g]), state, params)
        np.testing.assert_allclose(updates, -30 * (g + 1.2e-6 * 5), rtol=1e-5)


def test_a_constant_b1_of_zero_is_zero():
    config = dataclasses.replace(TINY, schedule="constant", b1=(0.0, 0.0))
    tx = language_model.make_optimizer(config, language_model.cycle_of(config, 4))
    assert aj.current_hyperparams(tx.init(jnp.ones(2)))["b1"] == 0


@pytest.mark.parametrize("model", KINDS)
def test_the_network_of_the_article(model):
    config = language_model.defaults(model, small=False)
    net = nnx.eval_shape(lambda: language_model.network(config, 33_279, 0))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
    assert count == {"lstm": 33_556_479, "qrnn": 33_355_029}[model]
    assert language_model.rates_of(config) == awd.Rates(
        words=0.1,
        input=0.6 if model == "lstm" else 0.4,
        hidden=0.2,
        output=0.4,
        weights=0.5 if model == "lstm" else 0.1,
    )


def test_other_optimizers_follow_the_rate():
    config = dataclasses.replace(TINY, optimizer="optax.lion", l2=0.0)
    cycle = language_model.cycle_of(config, 4)
    assert set(cycle.at(0)) == {"learning_rate"}  # nothing else drives them
    tx = language_model.make_optimizer(config, cycle)
    params = jnp.ones(1)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jnp.ones(1), state, params)
        np.testing.assert_allclose(updates, -cycle.at(step)["learning_rate"], rtol=1e-6)


# ---------------------------------------------------------------------------
# the lengths that are compiled
# ---------------------------------------------------------------------------


def padding(lengths, drawn):
    """Of chunks to the next of the lengths; all must fit."""
    lengths = np.sort(lengths)
    return (lengths[np.searchsorted(lengths, drawn)] - drawn).sum()


def drawn_lengths(config, rows):
    epochs = (
        text.chunks(rows, config.bptt, 0, e, config.chunks)[:, 1] for e in range(100)
    )
    return np.concatenate(list(epochs))


@pytest.mark.parametrize("style", ["article", "salesforce"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_other_lengths_need_less_padding(style, n):
    """All sets of that many are tried."""
    config = dataclasses.replace(TINY, bptt=5, lengths=n, chunks=style)
    lengths = language_model.padded_lengths(config, 103)
    drawn = drawn_lengths(config, 103)
    assert len(lengths) == n and lengths[-1] == 30 >= drawn.max()
    assert (np.diff(lengths) > 0).all()
    best = min(
        padding(np.array([*others, 30]), drawn)
        for others in itertools.combinations(range(1, 30), n - 1)
    )
    assert padding(lengths, drawn) == best


def test_lengths_of_the_article():
    """The defaults pad little, and there is a length for every chunk of every seed."""
    rows = 20_886
    config = language_model.defaults(small=False)
    lengths = language_model.padded_lengths(config, rows)
    drawn = drawn_lengths(config, rows)
    assert (config.lengths, len(lengths), lengths[-1]) == (6, 6, 95)
    share = padding(lengths, drawn) / drawn.sum()
    assert 0.02 < share < 0.05
    fewer = dataclasses.replace(config, lengths=2)
    assert padding(language_model.padded_lengths(fewer, rows), drawn) > 1.5 * padding(
        lengths, drawn
    )
    for seed in range(1, 4):
        assert text.chunks(rows, 70, seed, 0)[:, 1].max() <= 95
    # as many as there are: nothing is padded
    every = dataclasses.replace(config, lengths=95)
    assert padding(language_model.padded_lengths(every, rows), drawn) == 0


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------

ROWS = 80
COLUMNS = np.random.default_rng(0).integers(0, WORDS, (ROWS, 4)).astype(np.int32)
PADDED = np.pad(COLUMNS, ((0, 40), (0, 0)), constant_values=WORDS - 1)  # is never read
SALESFORCE = {
    **{"scale_by_length": True, "ar": "dropped", "optimizer": "sgd", "clip": 0.25},
    **{"learning_rate": 3.0, "b1": (0.0, 0.0), "schedule": "constant"},
}
VARIANTS = {"article": {}, "salesforce": SALESFORCE}


def table_of(lengths):
    lengths = np.array(lengths)
    starts = np.cumsum(lengths) - lengths
    assert starts[-1] + lengths[-1] < ROWS
    return np.stack([starts, lengths], 1).astype(np.int32)


TABLE = table_of([13, 6, 6, 13, 6, 6, 13, 6])


def program_of(config):
    programs = language_model.build(config, WORDS, ROWS)
    return programs, jax.jit(programs.train)


def plain_loop(config, programs, state, table, seed):
    """The chunks one after the other without padding, and the update written out.

    Of parameters, hidden state and losses; with dense cross-entropy.
    """
    graph = nnx.graphdef(programs.net)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    params, hidden = state.params, jax.tree.map(jnp.zeros_like, state.hidden)
    m = v = jax.tree.map(jnp.zeros_like, params)
    losses, kept = [], 1.0

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params, hidden, x, y, key):
        net = nnx.merge(graph, params, copy=True)
        masks = awd.draw_masks(
            key, net, language_model.rates_of(config), config.batch_size
        )
        out = net(x, hidden, masks)
        logits = net.logits(out.dropped)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        ar = out.dropped if config.ar == "dropped" else out.raw
        total = loss + config.alpha * jnp.square(ar).mean()
        total += config.beta * jnp.square(out.raw[1:] - out.raw[:-1]).mean()
        return total, (loss, out.state)

    for step, (start, length) in enumerate(table):
        x = COLUMNS[start : start + length]
        y = COLUMNS[start + 1 : start + 1 + length]
        step_key = jax.random.fold_in(key, step)
        (_, (loss, hidden)), g = gradient(params, hidden, x, y, step_key)
        losses.append(float(loss))
        norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(g)))
        factor = min(1, config.clip / (norm + 1e-6))
        values = programs.cycle.at(step)
        rate = values["learning_rate"]
        if config.scale_by_length:
            rate *= length / config.bptt
        g = jax.tree.map(lambda g, p, f=factor: f * g + config.l2 * p, g, params)
        if config.optimizer == "sgd":
            params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, g)
            continue
        b1, b2 = values["b1"], values["b2"]
        kept *= b1
        root = 1 - b2 ** (step + 1)
        m = jax.tree.map(lambda m, g, b1=b1: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g, b2=b2: b2 * v + (1 - b2) * g**2, v, g)
        params = jax.tree.map(
            lambda p, m, v, rate=rate, kept=kept, root=root: (
                p - rate * m / (1 - kept) / (jnp.sqrt(v / root) + 1e-8)
            ),
            params,
            m,
            v,
        )
    return params, hidden, losses


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", KINDS)
def test_the_program_is_a_plain_loop_in_one_call_or_in_pieces(model, variant):
    """Of chunks that are not padded; hidden states carried, from zeros at the first."""
    config = dataclasses.replace(TINY, model=model, **VARIANTS[variant])
    programs, train = program_of(config)
    assert set(language_model.padded_lengths(config, ROWS)) - {6, 13}
    state = programs.initial_state(3)
    # whatever was left by the epoch before
    state = state._replace(
        hidden=jax.tree.map(lambda h: h + 0.5, state.hidden), sums=jnp.ones(3)
    )
    n = len(TABLE)
    table = np.pad(TABLE, ((0, 3), (0, 0)))
    whole, losses = train(state, PADDED, table, 0, n, 3)
    params, hidden, expected = plain_loop(config, programs, state, TABLE, 3)
    assert losses.shape == (n + 3,) and (losses[n:] == 0).all()
    np.testing.assert_allclose(losses[:n], expected, rtol=1e-5)
    close(whole.params, params, 1e-5)
    close(whole.hidden, hidden, 1e-5)
    assert whole.step == n and whole.average is None
    tokens = TABLE[:, 1]
    assert whole.sums[0] == tokens.sum()
    assert whole.sums[1] == pytest.approx((tokens * expected).sum(), rel=1e-5)
    assert whole.sums[2] > whole.sums[1]

    for cuts in ([0, 1, n], range(n + 1)):
        pieces, parts = state, np.zeros(n + 3, np.float32)
        for first, beyond in itertools.pairwise(cuts):
            pieces, some = train(pieces, PADDED, table, first, beyond, 3)
            parts += some
        same_bits(pieces, whole)
        np.testing.assert_array_equal(parts, losses)

    # another seed, or a later step, has other masks
    other, _ = train(state, PADDED, table, 0, 1, 4)
    later, _ = train(state._replace(step=jnp.int32(1)), PADDED, table, 0, 1, 3)
    first, _ = train(state, PADDED, table, 0, 1, 3)
    for one in (other, later):
        assert not np.array_equal(one.params["bias"], first.params["bias"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", KINDS)
def test_twenty_steps_of_the_program_are_those_of_pytorch(model, variant):
    """In float64, with the same masks. (A constant beta1, where PyTorch is exact.)"""
    constant = {"schedule": "constant", "b1": (0.7, 0.7), "learning_rate": 5e-3}
    config = dataclasses.replace(
        TINY, model=model, **{"lengths": 1} | constant | VARIANTS[variant]
    )
    programs, train = program_of(config)
    state = jax.tree.map(
        lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
        programs.initial_state(0),
    )
    table = table_of([5, 3, 2, 6, 1, 4, 3, 5, 4, 2] * 2)
    ours, losses = train(state, PADDED, table, 0, 20, 0)

    twin = torch_awd.AWD(
        WORDS, config.embedding, config.width, config.layers, model
    ).double()
    torch_awd.load(twin, state.params)
    rate, l2 = config.learning_rate, config.l2
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(twin.parameters(), rate, weight_decay=l2)
    else:
        optimizer = torch.optim.Adam(
            twin.parameters(), rate, betas=(0.7, 0.99), weight_decay=l2
        )
    net = nnx.merge(nnx.graphdef(programs.net), state.params)
    key = jax.random.fold_in(jax.random.key(0), 1)
    hidden, their_losses, norms = twin.initial_state(4), [], []
    for step, (start, length) in enumerate(table):
        rows = torch.tensor(COLUMNS[start : start + length + 1]).long()
        masks = awd.draw_masks(
            jax.random.fold_in(key, step), net, language_model.rates_of(config), 4
        )
        raw, dropped, hidden = twin(rows[:-1], hidden, torch_awd.as_masks(masks))
        hidden = jax.tree.map(torch.Tensor.detach, hidden)
        loss = torch.nn.functional.cross_entropy(
            twin.logits(dropped).flatten(0, 1), rows[1:].flatten()
        )
        their_losses.append(loss.item())
        ar = raw if variant == "article" else dropped
        total = loss + config.alpha * ar.square().mean()
        if length > 1:
            total += config.beta * (raw[1:] - raw[:-1]).square().mean()
        optimizer.zero_grad()
        total.backward()
        norms.append(
            torch.nn.utils.clip_grad_norm_(twin.parameters(), config.clip).item()
        )
        scale = length / 8 if variant == "salesforce" else 1
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()
    np.testing.assert_allclose(losses, their_losses, rtol=1e-9)
    theirs = torch_awd.read(twin, "data")
    for path, leaf in nnx.to_flat_state(ours.params):
        assert leaf.dtype == np.float64
        np.testing.assert_allclose(
            leaf[...], theirs[path], rtol=1e-9, atol=1e-9, err_msg=str(path)
        )
    close(ours.hidden, jax.tree.map(np.asarray, hidden), 1e-9)
    assert max(norms) > config.clip  # there was something to clip


@pytest.mark.parametrize("model", KINDS)
def test_two_devices_compute_what_one_does(monkeypatch, model):
    config = dataclasses.replace(TINY, model=model, lengths=1)
    programs = language_model.build(config, WORDS, ROWS)
    results = []
    for n in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:n]), ("data",))
        monkeypatch.setattr(language_model.devices, "data_mesh", lambda mesh=mesh: mesh)
        columns = jax.device_put(PADDED, language_model.places()[1](1))
        program = language_model.compiled(programs, columns, TABLE)
        state = program.initial_state(np.int32(0))
        leaf = jax.tree.leaves(state.hidden)[0]
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 4 // n
        weights = state.params["embedding"][...]
        zero, end = np.int32(0), np.int32(len(TABLE))
        state, losses = program.train(state, columns, TABLE, zero, end, zero)
        assert weights.is_deleted()  # the state is donated
        assert state.params["embedding"][...].is_fully_replicated
        results.append(jax.tree.map(np.asarray, (state, losses)))
    close(*results, 1e-5)


def test_products_in_bfloat16(run, tmp_path):
    """Parameters, states and sums stay float32, and as much is learned."""
    config = dataclasses.replace(TINY, lengths=1, dtype="bfloat16")
    programs = language_model.build(config, WORDS, ROWS)
    state = jax.eval_shape(programs.initial_state, 0)
    traced = str(jax.make_jaxpr(programs.train)(state, PADDED, TABLE, 0, 8, 0))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general\[(.*?)\] ", traced, re.S)
    assert len(products) > 10
    assert "bf16" in traced and {kind for kind, _ in products} <= {"f32", "bf16"}
    out, losses = jax.eval_shape(programs.train, state, PADDED, TABLE, 0, 8, 0)
    dtypes = {str(x.dtype) for x in jax.tree.leaves((out.params, out.hidden, losses))}
    assert dtypes == {"float32"}
    wide, narrow = (
        run(config, epochs=2, dtype=dtype, name=dtype)["runs"][0]["valid"]["perplexity"]
        for dtype in ("float32", "bfloat16")
    )
    assert narrow == pytest.approx(wide, rel=0.02) and narrow != wide


# ---------------------------------------------------------------------------
# averaging
# ---------------------------------------------------------------------------


def test_the_average_is_the_mean_of_what_came_after_it_began():
    config = dataclasses.replace(TINY, **SALESFORCE, average_after=5, lengths=1)
    programs, train = program_of(config)
    state, iterates = programs.initial_state(0), []
    for step in range(len(TABLE)):
        if step == 3:
            assert state.averaged == -1
            assert language_model.parameters_of(state) is state.params
            state = state._replace(averaged=jnp.int32(0))
            assert language_model.parameters_of(state) is state.params
        state, _ = train(state, PADDED, TABLE, step, step + 1, 0)
        if step >= 3:
            iterates.append(jax.tree.map(np.asarray, state.params))
            assert state.averaged == len(iterates)
            assert language_model.parameters_of(state) is state.average
            mean = jax.tree.map(lambda *p: np.mean(p, 0), *iterates)
            close(state.average, mean, 1e-5)
    assert not np.allclose(state.average["bias"], state.params["bias"], atol=1e-3)


def salesforces_epochs(losses, nonmono):
    """main.py: after which epoch it switches to ASGD, if ever."""
    best_val_loss = []
    for epoch, val_loss in enumerate(losses):
        if len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono]):
            return epoch
        best_val_loss.append(val_loss)
    return None


@pytest.mark.parametrize("after", [1, 2, 5])
def test_averaging_begins_when_salesforces_does(tmp_path, after):
    config = dataclasses.replace(TINY, average_after=after)
    path, began = tmp_path / "metrics.jsonl", []
    for seed in range(8):
        losses = np.random.default_rng(seed).normal(0, 1, 15) - 0.3 * np.arange(15)
        state = language_model.State(*[None] * 6, averaged=jnp.int32(-1))
        first = None
        for epoch, loss in enumerate(losses):
            args = config, state, tmp_path, seed, loss
            after_epoch = language_model.begin_average(*args)
            if first is None and int(after_epoch.averaged) == 0:
                first = epoch
                state = after_epoch._replace(averaged=jnp.int32(7))
            line = {"event": "epoch", "seed": seed, "valid_loss": loss}
            record.append_line(path, line)
        assert first == salesforces_epochs(losses, after)
        assert int(state.averaged) == (-1 if first is None else 7)
        began.append(first)
    assert len(set(began)) > 1  # there is something to compare
    never = dataclasses.replace(TINY, average_after=None)
    assert language_model.begin_average(never, state, tmp_path, 0, 99.0) is state


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


def test_a_run_from_end_to_end(run, tmp_path, data_dir, capsys):
    results = run(seeds=2, epochs=8)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "vocabulary.json", "metrics.jsonl", "curves.png"),
        *("checkpoints", "results.json"),
    }
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["n"] == 2 and results["words"] == WORDS + 3
    assert "NaN" not in (folder / "results.json").read_text()
    corpus = text.wikitext2(data_dir)
    words = json.loads((folder / "vocabulary.json").read_text())["words"]
    assert tuple(words) == corpus.vocabulary
    assert results["tokens"] == [len(split) for split in corpus[:3]] == [641, 121, 77]
    for split in ("valid", "test"):
        values = results[split]["perplexity"]
        assert values["runs"] == [end[split]["perplexity"] for end in results["runs"]]
        assert values["mean"] == pytest.approx(statistics.mean(values["runs"]))
        assert values["std"] == pytest.approx(statistics.stdev(values["runs"]))
        tokens = getattr(corpus, split)
        assert results[split]["n-gram"] == kneser_ney.perplexity(
            corpus.train, tokens, WORDS + 3, words.index("<eos>")
        )
        end = results["runs"][0][split]
        assert end["tokens"] == len(tokens) - 1
        assert end["tokens_in_full_chunks"] == 0  # it is shorter than one
        assert end["perplexity_of_full_chunks"] is None
        assert end["with_cache"] != end["perplexity"]
    assert results["valid"]["perplexity"]["mean"] < 0.8 * WORDS  # a guess has 23

    lines = log(folder)
    assert [line["event"] for line in lines] == (
        ["start"] + (["epoch"] * 8 + ["end"]) * 2
    )
    first, last, end = lines[1], lines[8], lines[9]
    assert (first["step"], last["step"], last["epoch"]) == (STEPS, 8 * STEPS, 8)
    assert last["loss"] < first["loss"] < np.log(WORDS + 3) + 0.2
    assert last["valid_loss"] < first["valid_loss"] and last["total"] > last["loss"]
    assert np.exp(last["valid_loss"]) == pytest.approx(end["valid"]["perplexity"])
    seconds = [x["seconds"] for x in lines if x["event"] == "epoch"]
    assert results["train_seconds"] == pytest.approx(sum(seconds) / 2)
    covered = 4 * text.chunks(160, 8, 0, 7)[:, 1].sum()
    assert last["tokens_per_second"] == pytest.approx(covered / last["seconds"])
    cycle = language_model.cycle_of(dataclasses.replace(TINY, epochs=8), STEPS)
    assert last["learning_rate"] == cycle.at(8 * STEPS - 1)["learning_rate"]
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "language_model" and "jax" in config["versions"]
    assert imread(folder / "curves.png").std() > 0.05
    out = capsys.readouterr().out
    assert out.count("valid ") >= 16 and "tokens/s" in out and "left" in out
    assert "epochs 8" in out and "Kneser-Ney" in out
    assert f"{results['test']['perplexity']['mean']:.2f} ±" in out
    assert "The article's" not in out  # that is of another text

    # the same command again trains nothing and says the same
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(seeds=2, epochs=8) == results
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "is finished already" in capsys.readouterr().out

    # with more seeds it goes on; fewer are of those that were asked for
    more = run(seeds=3, epochs=8)
    assert more["n"] == 3
    for split in ("valid", "test"):
        now, then = (x[split]["perplexity"]["runs"] for x in (more, results))
        assert now[:2] == then and now[2] not in then
    assert run(epochs=8)["n"] == 1


def test_what_is_judged_is_what_was_trained(run, tmp_path, data_dir):
    """From the checkpoint: the text by a plain loop, and the cache word by word."""
    results = run(theta=0.5, lambda_=0.2, window=9)
    state = final_state(tmp_path / "run")
    programs = language_model.build(TINY, WORDS + 3, 160)
    like = jax.eval_shape(programs.initial_state, 0)
    leaves = jax.tree.leaves(state["params"])
    params = jax.tree.unflatten(jax.tree.structure(like.params), leaves)
    net = nnx.merge(nnx.graphdef(programs.net), params)
    tokens = text.wikitext2(data_dir).test
    raw = net(tokens[:-1, None], net.initial_state(1)).raw
    p = np.asarray(jax.nn.softmax(net.logits(raw)), np.float64)[:, 0]
    h, targets = np.asarray(raw, np.float64)[:, 0], tokens[1:]
    plain = p[np.arange(len(targets)), targets]
    mixed = plain.copy()
    for i in range(1, len(targets)):
        window = slice(max(0, i - 9), i)
        share = np.exp(0.5 * h[window] @ h[i])
        found = share[targets[window] == targets[i]].sum() / share.sum()
        mixed[i] = 0.8 * plain[i] + 0.2 * found
    judged = results["runs"][0]["test"]
    assert judged["perplexity"] == pytest.approx(np.exp(-np.log(plain).mean()), 1e-5)
    assert judged["with_cache"] == pytest.approx(np.exp(-np.log(mixed).mean()), 1e-5)


def test_full_chunks_of_the_article(run, monkeypatch):
    """As its code counts: what does not fill one at the end is left out."""
    monkeypatch.setattr(language_model, "ARTICLE_CHUNK", 50)
    judged = run()["runs"][0]["valid"]
    assert (judged["tokens"], judged["tokens_in_full_chunks"]) == (120, 100)
    assert judged["perplexity_of_full_chunks"] != judged["perplexity"]
    monkeypatch.setattr(language_model, "ARTICLE_CHUNK", 120)
    whole = run(overwrite=True)["runs"][0]["valid"]
    assert whole["tokens_in_full_chunks"] == 120
    for key in ("perplexity", "with_cache"):
        assert whole[f"{key}_of_full_chunks"] == whole[key]


def test_two_runs_of_a_seed_are_bit_identical_and_two_seeds_differ(run, tmp_path):
    run(seeds=2, out=tmp_path / "a")
    run(seeds=2, out=tmp_path / "b")
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert lines_of_training(one) == lines_of_training(other)
    same_bits(final_state(one), final_state(other))
    lines = [x for x in lines_of_training(one) if x["event"] == "epoch"]
    losses = {line["seed"]: line["loss"] for line in lines}
    assert losses[0] != losses[1]
    # weights, lengths and masks of the second seed do not depend on the first
    run(seed=1, out=tmp_path / "c")
    same_bits(final_state(one, 1), final_state(tmp_path / "c" / "run", 1))


def test_every_epoch_has_its_chunks_and_begins_with_nothing(run, tmp_path, data_dir):
    """The command trains what calls of the program by epochs do."""
    run(seed=5)
    config = dataclasses.replace(TINY, seed=5)
    corpus = text.wikitext2(data_dir)
    columns = text.columns(corpus.train, 4)
    programs = language_model.build(config, WORDS + 3, len(columns))
    padded, train = np.pad(columns, ((0, 34), (0, 0))), jax.jit(programs.train)
    state, lines = programs.initial_state(5), log(tmp_path / "run")
    for epoch in range(3):
        table = text.chunks(160, 8, 5, epoch)
        table = np.pad(table, ((0, 33 - len(table)), (0, 0)))
        state, _ = train(state, padded, table, 0, STEPS, 5)
        loss = state.sums[1] / state.sums[0]
        assert lines[1 + epoch]["loss"] == pytest.approx(float(loss), rel=1e-5)
    saved = final_state(tmp_path / "run", 5)
    close(saved["params"], nnx.to_pure_dict(state.params), 1e-4)


def test_averaging_in_the_command(run, tmp_path, data_dir):
    """The validation loss gets worse, so that it begins; the average is judged."""
    config = dataclasses.replace(TINY, **AVERAGED)
    results = run(config)
    state = final_state(tmp_path / "run")
    lines = [x for x in log(tmp_path / "run") if x["event"] == "epoch"]
    losses = [line["valid_loss"] for line in lines]
    steps = np.diff([0, *(line["step"] for line in lines)])
    began = salesforces_epochs(losses, 1)
    assert began is not None and began < len(losses) - 1
    assert int(state["averaged"]) == steps[began + 1 :].sum()
    programs = language_model.build(config, WORDS + 3, 160)
    like = jax.eval_shape(programs.initial_state, 0)
    valid = text.wikitext2(data_dir).valid
    structure = jax.tree.structure(like.params)
    average, params = (
        jax.tree.unflatten(structure, jax.tree.leaves(state[key]))
        for key in ("average", "params")
    )
    by_average, by_params = (
        np.exp(
            -perplexity.log_probs(
                programs.read, which, programs.net.initial_state(1), valid
            ).mean()
        )
        for which in (average, params)
    )
    judged = results["runs"][0]["valid"]["perplexity"]
    assert judged == pytest.approx(by_average, rel=1e-5)
    assert judged != pytest.approx(by_params, rel=1e-3)
    assert np.exp(losses[-1]) == pytest.approx(by_average, rel=1e-5)


AVERAGED = {**SALESFORCE, "chunks": "salesforce", "average_after": 1, "epochs": 6}


def test_a_folder_is_never_overwritten_without_being_asked(run, tmp_path, data_dir):
    run(epochs=1)
    folder = tmp_path / "run"
    before = (folder / "metrics.jsonl").read_bytes()
    message = r"learning_rate = 0.02, now 0.1; epochs = 1, now 2"
    with pytest.raises(ValueError, match=message):
        run(epochs=2, learning_rate=0.1)
    other = write_text(tmp_path / "other", words=12)
    with pytest.raises(ValueError, match="vocabulary = '[0-9a-f]+', now '[0-9a-f]+'"):
        run(epochs=1, data_dir=other)
    moved = write_text(tmp_path / "moved")  # the same text in another place
    assert run(epochs=1, data_dir=moved)["n"] == 1
    (moved / "valid.txt").write_text("w1 w2 w3\n")
    with pytest.raises(ValueError, match=r"tokens = \[641, 121, 77\], now \[641, 4,"):
        run(epochs=1, data_dir=moved)
    assert (folder / "metrics.jsonl").read_bytes() == before
    run(epochs=2, overwrite=True)
    assert len(log(folder)) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    message = "not the folder of a run of train.language_model"
    with pytest.raises(ValueError, match=message):
        run(name="mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    with record.alone(folder):
        with pytest.raises(ValueError, match="another process is at work"):
            run(epochs=2, seeds=2)


def test_the_name_of_the_folder(run, tmp_path, data_dir):
    """Runs of the same recipe on two texts do not meet."""
    config = language_model.defaults("qrnn", "adamw")
    tiny = {key: getattr(TINY, key) for key in ("embedding", "width", "bptt")}
    run(config, **tiny, batch_size=4, epochs=1, lengths=1, layers=1, name=None)
    assert [path.name for path in tmp_path.iterdir()] == [f"qrnn-adamw-{data_dir.stem}"]
    assert language_model.name_of(config) == "qrnn-adamw"


def test_other_devices_are_mentioned(run, tmp_path, capsys):
    run(epochs=1)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = log(tmp_path / "run")
    lines[0]["devices"] = "1 x abacus"
    record.rewrite_lines(path, lines)
    results = run(epochs=1, seeds=2)
    assert "Begun with other devices" in capsys.readouterr().out
    assert results["devices"] == "1 x abacus and 2 x cpu"


def test_divergence_stops_the_run_and_keeps_what_there_is(run, tmp_path):
    changes = {"optimizer": "sgd", "learning_rate": 1e6, "div": 1.0, "epochs": 1}
    message = r"seed 0 diverged at step \d+, where the learning rate was 1e\+06"
    for _ in range(2):  # and so it does again
        with pytest.raises(FloatingPointError, match=message):
            run(**changes)
        lines = log(tmp_path / "run")
        assert lines[-1]["event"] == "diverged" and lines[-1]["step"] < STEPS
        assert not lines[-1]["loss"] < 2 * np.log(WORDS + 3)
    assert imread(tmp_path / "run" / "curves.png").std() > 0.01
    assert not (tmp_path / "run" / "results.json").exists()


def test_divergence_in_the_last_step_of_an_epoch(run, tmp_path, monkeypatch):
    """Its loss is that before its update; the validation loss tells."""
    compiled = language_model.compiled

    def compiled_badly(*args):
        program = compiled(*args)

        def train(state, *args):
            state, losses = program.train(state, *args)
            bad = np.nan if int(state.step) == 3 * STEPS else 1.0
            params = jax.tree.map(lambda p: p * np.float32(bad), state.params)
            return state._replace(params=params), losses

        return program._replace(train=train)

    monkeypatch.setattr(language_model, "compiled", compiled_badly)
    with pytest.raises(FloatingPointError, match="seed 0 diverged"):
        run()
    assert [x["event"] for x in log(tmp_path / "run")][-1] == "diverged"


def test_after_a_divergence_it_goes_on_from_the_last_checkpoint(
    run, tmp_path, monkeypatch
):
    """Every other program is as it was: what is made up is a loss."""
    run(out=tmp_path / "whole")
    monkeypatch.setattr(language_model, "STRETCH", 1e-9)
    compiled = language_model.compiled

    def compiled_badly(*args):
        program = compiled(*args)

        def train(state, columns, table, first, beyond, number):
            epoch = int(state.step) // STEPS
            state, losses = program.train(state, columns, table, first, beyond, number)
            bad = epoch == 1 and int(beyond) == 8
            return state, losses.at[7].set(np.nan) if bad else losses

        return program._replace(train=train)

    monkeypatch.setattr(language_model, "compiled", compiled_badly)
    with pytest.raises(FloatingPointError, match=f"step {STEPS + 7},"):
        run(save_every=0.0)
    folder = tmp_path / "run"
    with checkpoint.open_folder(folder / "checkpoints" / "0") as checkpoints:
        assert checkpoints.latest.step == STEPS + 7
    assert [line["event"] for line in log(folder)] == ["start", "epoch", "diverged"]
    monkeypatch.undo()
    run()
    assert "diverged" not in [line["event"] for line in log(folder)]
    assert lines_of_training(folder) == lines_of_training(tmp_path / "whole" / "run")
    same_bits(final_state(folder), final_state(tmp_path / "whole" / "run"))


def test_any_optax_optimizer(run, tmp_path):
    results = run(
        optimizer="optax.lion",
        learning_rate=1e-3,
        l2=0.0,
        optimizer_args={"b2": 0.98},
        epochs=1,
    )
    assert results["changed"]["optimizer"] == "optax.lion"
    assert "mu" in str(jax.tree.structure(final_state(tmp_path / "run")["opt"]))


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboardX")
    run(tensorboard=True, epochs=1)
    (events,) = (tmp_path / "run" / "tensorboard" / "0").iterdir()
    for key in (b"valid_loss", b"learning_rate", b"b1"):
        assert key in events.read_bytes()


def test_the_embedded_text_is_learned():
    """The first steps of the default run, without --data-dir; its rates in an epoch."""
    config = dataclasses.replace(language_model.defaults(), epochs=1, lengths=1)
    corpus = text.pydoc_topics()
    columns = text.columns(corpus.train, config.batch_size)
    words = len(corpus.vocabulary)
    programs = language_model.build(config, words, len(columns))
    table = text.chunks(len(columns), config.bptt, 0, 0)
    padded = np.pad(columns, ((0, 61), (0, 0)))
    state = programs.initial_state(0)
    _, losses = jax.jit(programs.train)(state, padded, table, 0, 25, 0)
    assert losses[0] == pytest.approx(np.log(words), rel=0.02)
    assert losses[20:25].mean() < losses[0] - 1


# ---------------------------------------------------------------------------
# what it refuses
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam.*got 'lion'"),
        ({"optimizer": "optax.lyon"}, "cannot import 'optax.lyon'"),
        ({"optimizer": "optax.lion"}, "l2 must be 0 with optax.lion.*1.2e-06"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 with adam.*0.1"),
        ({"optimizer": "adamw"}, "l2 must be 0 with adamw.*1.2e-06"),
        ({"optimizer_args": {"bee": 1.0}}, "optimizer_args.*bee"),
        ({"optimizer": "optax.lbfgs", "l2": 0.0}, "not a gradient"),
        ({"optimizer": "math.pow", "l2": 0.0}, "optimizer.*math.pow"),
        ({"words_dropout": 1.0}, r"words_dropout must be in \[0, 1\), got 1.0"),
        ({"input_dropout": -0.1}, "input_dropout must be.*got -0.1"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be.*got 1.5"),
        ({"output_dropout": math.nan}, "output_dropout must be.*got nan"),
        ({"weight_dropout": 1.0}, "weight_dropout must be.*got 1.0"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lengths": 0}, "lengths must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"theta": -1.0}, "theta must be at least 0, got -1.0"),
        ({"theta": math.inf}, "theta must be.*got inf"),
        ({"lambda_": 1.1}, r"lambda_ must be in \[0, 1\], got 1.1"),
        ({"average_after": 0}, "average_after must be None or at least 1, got 0"),
        ({"seed": 2**31 - 1, "seeds": 2}, "seed must be in"),
        ({"batch_size": 3}, "batch_size must be a multiple of the 2 devices.*got 3"),
        ({"batch_size": 0}, "batch_size must be a multiple.*got 0"),
        ({"batch_size": 322}, r"batch_size must be in \[1, 320\].*641 tokens, got 322"),
        ({"bptt": 4}, "bptt must be at least 5, got 4"),
        ({"cudnn": True}, "cudnn must be False, unless"),
        ({"bptt": 81}, "rows must be at least 162 for bptt=81.*got 160: a smaller b"),
        ({"learning_rate": -1.0}, "learning_rate must be.*got -1.0"),
        ({"pct": 0.5}, "pct must be.*got 0.5"),
        ({"div": 0.0}, "div must be.*got 0.0"),
        ({"b1": (1.0, 0.5)}, r"b1.* must be.*got 1.0"),
        ({"l2": -1.0}, "l2 must be.*got -1.0"),
        ({"chunks": "chunky"}, "chunks must be one of article, salesforce, got"),
        ({"data_dir": Path("nowhere")}, "'nowhere' does not exist"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(
    run, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gru"}, "model must be.*got 'gru'"),
        ({"recipe": "adam"}, "recipe must be.*got 'adam'"),
        ({"dtype": "float16"}, "dtype must be.*got 'float16'"),
        ({"ar": "wet"}, "ar must be.*got 'wet'"),
        ({"schedule": "cosine"}, "schedule must be.*got 'cosine'"),
        ({"pointer": "grave"}, "pointer must be.*got 'grave'"),
        (
            {"optimizer": "optax.lion", "l2": 0.0, "b2": 0.5},
            "b2 must be left at its",
        ),
        ({"optimizer": "optax.lion", "l2": 0.0, "b1": (0.9, 0.8)}, "b1 must be left"),
        ({"optimizer": "sgd", "b2": 0.5}, "b2 must be left at its"),
        (
            {"optimizer": "optax.constant_schedule", "l2": 0.0},
            "not a gradient",
        ),
        ({"optimizer": "math.pi", "l2": 0.0}, "optimizer.*math.pi"),
        ({"optimizer": "..lion", "l2": 0.0}, "cannot import '..lion'"),
    ],
)
def test_what_the_command_line_would_refuse_is_refused_in_code(
    run, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())


def test_another_text_of_the_same_words_is_refused(run, tmp_path):
    folder = write_text(tmp_path / "text")
    run(data_dir=folder, epochs=1)
    lines = (folder / "valid.txt").read_text().splitlines(True)
    (folder / "valid.txt").write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="Choose another --name"):
        run(data_dir=folder, epochs=1, seeds=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("valid.txt", None, "has no valid.txt"),
        ("test.txt", b" \n\n", "test.txt is empty"),
        ("train.txt", b"w1 w2\n\xff", "line 2 is not"),
    ],
)
def test_bad_text_is_refused_before_a_folder_is_made(
    run, tmp_path, name, content, message
):
    folder = write_text(tmp_path / "text")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(data_dir=folder, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_shortest_text(run, tmp_path):
    """A word and the end of its line to judge by: one token to predict."""
    folder = write_text(tmp_path / "text")
    (folder / "valid.txt").write_text("w1\n")
    (folder / "test.txt").write_text("w1 unheard-of\n")
    results = run(data_dir=folder, epochs=1)
    assert results["runs"][0]["valid"]["tokens"] == 1
    assert results["runs"][0]["valid"]["with_cache"] == pytest.approx(
        results["runs"][0]["valid"]["perplexity"]
    )
    assert results["runs"][0]["test"]["tokens"] == 2


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "model", "recipe", "small"),
    [
        ([], "lstm", "adam-l2", True),
        (["qrnn"], "qrnn", "adam-l2", True),
        (["--model", "qrnn"], "qrnn", "adam-l2", True),
        (["--recipe", "adamw", "--data-dir", "x"], "lstm", "adamw", False),
        (["qrnn", "--data-dir=x", "--recipe=salesforce"], "qrnn", "salesforce", False),
        (["--data_dir", "x"], "lstm", "adam-l2", False),
    ],
)
def test_model_recipe_and_data_change_the_other_defaults(args, model, recipe, small):
    config = language_model.config_of(args)
    data_dir = None if small else Path("x")
    expected = language_model.defaults(model, recipe, small)
    assert config == dataclasses.replace(expected, data_dir=data_dir)
    given = ["--epochs", "7", "--b1", "0.9", "0.6", "--optimizer-args", "eps", "1e-6"]
    more = {"epochs": 7, "b1": (0.9, 0.6), "optimizer_args": {"eps": 1e-6}}
    assert language_model.config_of([*args, *given]) == dataclasses.replace(
        config, **more
    )


@pytest.mark.parametrize("args", [["gru"], ["--recipe", "sgd"], ["--bppt", "7"]])
def test_what_the_command_line_refuses(args, capsys):
    with pytest.raises(SystemExit):
        language_model.config_of(args)
    assert args[-1] in capsys.readouterr().err or "bppt" in args[0]


# ---------------------------------------------------------------------------
# kill -9
# ---------------------------------------------------------------------------


def child(data_dir, out, moment):
    """The command in a process of its own, which kills itself at a moment.

    A step is a call of the program, and each is saved: also in the middle of an epoch.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    language_model.STRETCH = 1e-9
    append_line, save = record.append_line, checkpoint.save

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def append(path, line):
        here = line["event"], line.get("epoch")
        if (moment, *here) == ("in the line", "epoch", 3):
            with path.open("a") as file:
                file.write(json.dumps(line)[:40])
            kill()
        if (moment, *here) == ("before the end", "end", None):
            kill()
        append_line(path, line)
        if (moment, *here) == ("after the line", "epoch", 5):
            kill()

    saved = 0

    def save_and_kill(checkpoints, step, state):
        nonlocal saved
        saved += 1
        if moment == "before the checkpoint" and saved == 8:
            kill()
        save(checkpoints, step, state)
        if moment == "in the checkpoint" and saved == 30:
            folder = Path(checkpoints.directory)
            while not any("tmp" in path.name for path in folder.iterdir()):
                assert not (folder / str(step)).exists(), "too late"
            kill()

    record.append_line, checkpoint.save = append, save_and_kill
    config = dataclasses.replace(TINY, **AVERAGED, save_every=0.0)
    changes = {"data_dir": Path(data_dir), "out": Path(out)}
    language_model.main(dataclasses.replace(config, **changes))


MOMENTS = (  # in this order, each on what the one before has left
    "before the checkpoint",
    "in the line",
    "in the checkpoint",
    "after the line",
    "before the end",
)


def test_a_killed_run_ends_with_the_same_bits(run, tmp_path, data_dir, cache):
    """In the middle of an epoch, and while an average is being taken."""

    def start(moment):
        args = str(data_dir), str(tmp_path / "killed"), moment
        code = f"import test_language_model as t; t.child(*{args!r})"
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        killed = -signal.SIGKILL if moment else 0
        assert done.returncode == killed, done.stdout + done.stderr
        return done.stdout

    # the whole run in this process, in stretches of its own
    whole_results = run(TINY, **AVERAGED)
    killed = tmp_path / "killed" / "run"
    for moment in MOMENTS:
        start(moment)
        assert not (killed / "results.json").exists()
    out = start(None)
    assert "tokens/s" not in out  # the last step was saved already
    whole = tmp_path / "run"
    assert lines_of_training(killed) == lines_of_training(whole)
    same_bits(final_state(killed), final_state(whole))
    assert final_state(killed)["averaged"] > 0
    starts = [line for line in log(killed) if line["event"] == "start"]
    assert len(starts) == len(MOMENTS) + 1
    results = json.loads((killed / "results.json").read_text())
    for key in ("valid", "test", "words", "tokens"):
        assert results[key] == whole_results[key]


def test_hyperparameters_are_in_the_restored_state(run, tmp_path):
    run(epochs=1)
    programs = language_model.build(TINY, WORDS + 3, 160)
    like = jax.jit(programs.initial_state)(0)
    folder = tmp_path / "run" / "checkpoints" / "0"
    with checkpoint.open_folder(folder) as checkpoints:
        state = checkpoint.restore(checkpoints, like)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert set(aj.current_hyperparams(state.opt)) >= {"learning_rate", "b1", "b2"}
