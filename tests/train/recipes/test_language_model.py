"""The recipes of language models, and their program against plain loops and PyTorch."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from tiny_language_model import SALESFORCE, WORDS, close, same_bits
from tiny_language_model import TINY as TINY_RUN

import adamw_jax as aj
from train.data import chunks, text
from train.models import awd
from train.recipes import language_model
from train.recipes.optimizer import make_optimizer
from train.references import awd as torch_awd

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

KINDS = ("lstm", "qrnn")
TINY = language_model.Config(
    **{
        field.name: getattr(TINY_RUN, field.name)
        for field in dataclasses.fields(language_model.Config)
    }
)


# ---------------------------------------------------------------------------
# the recipes
# ---------------------------------------------------------------------------

# What the commands of the publications give, by model and language_model.
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
    assert {
        len(chunks.chunk_table(rows, 70, s, e)) for s in (0, 1) for e in range(50)
    } == {297}
    config = language_model.defaults(model, small=False)
    cycle = language_model.make_schedule(config, 297)
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
    cycle = language_model.make_schedule(config, 308)
    assert cycle.total_steps == 750 * 308
    assert cycle.at(0)["learning_rate"] == cycle.at(231_000)["learning_rate"] == 30
    tx = make_optimizer(config, cycle)
    params = jnp.array([5.0])
    state = tx.init(params)
    for g in (1e-3, -2e-3):  # nothing is kept from the step before
        updates, state = tx.update(jnp.array([g]), state, params)
        np.testing.assert_allclose(updates, -30 * (g + 1.2e-6 * 5), rtol=1e-5)


def test_a_constant_b1_of_zero_is_zero():
    config = dataclasses.replace(TINY, schedule="constant", b1=(0.0, 0.0))
    tx = make_optimizer(config, language_model.make_schedule(config, 4))
    assert aj.current_hyperparams(tx.init(jnp.ones(2)))["b1"] == 0


@pytest.mark.parametrize("model", KINDS)
def test_the_network_of_the_article(model):
    config = language_model.defaults(model, small=False)
    assert config.lengths == 6
    net = nnx.eval_shape(lambda: language_model.make_network(config, 33_279, 0))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
    assert count == {"lstm": 33_556_479, "qrnn": 33_355_029}[model]
    assert language_model.dropout_rates(config) == awd.Rates(
        words=0.1,
        input=0.6 if model == "lstm" else 0.4,
        hidden=0.2,
        output=0.4,
        weights=0.5 if model == "lstm" else 0.1,
    )


def test_other_optimizers_follow_the_rate():
    config = dataclasses.replace(TINY, optimizer="optax.lion", l2=0.0)
    cycle = language_model.make_schedule(config, 4)
    assert set(cycle.at(0)) == {"learning_rate"}  # nothing else drives them
    tx = make_optimizer(config, cycle)
    params = jnp.ones(1)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jnp.ones(1), state, params)
        np.testing.assert_allclose(updates, -cycle.at(step)["learning_rate"], rtol=1e-6)


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------

ROWS = 80
COLUMNS = np.random.default_rng(0).integers(0, WORDS, (ROWS, 4)).astype(np.int32)
PADDED = np.pad(COLUMNS, ((0, 40), (0, 0)), constant_values=WORDS - 1)  # is never read
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
    params, hidden = state.params, jax.tree.map(np.zeros_like, state.hidden)
    m = v = jax.tree.map(np.zeros_like, params)
    losses, kept = [], 1.0

    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params, hidden, x, y, key):
        net = nnx.merge(graph, params, copy=True)
        rates = language_model.dropout_rates(config)
        masks = awd.draw_masks(key, net, rates, config.batch_size)
        out = net(x, hidden, masks)
        logits = net.logits(out.dropped)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        ar = out.dropped if config.ar == "dropped" else out.raw
        total = loss + config.alpha * jnp.square(ar).mean()
        total += config.beta * jnp.square(out.raw[1:] - out.raw[:-1]).mean()
        return total, (loss, out.state)

    @jax.jit
    def one_step(params, m, v, hidden, x, y, key, rate, b1, b2, kept, root):
        (_, (loss, hidden)), g = gradient(params, hidden, x, y, key)
        norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        factor = jnp.minimum(1, config.clip / (norm + 1e-6))
        g = jax.tree.map(lambda g, p: factor * g + config.l2 * p, g, params)
        if config.optimizer == "sgd":
            params = jax.tree.map(lambda p, g: p - rate * g, params, g)
            return params, m, v, hidden, loss
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, g)
        params = jax.tree.map(
            lambda p, m, v: p - rate * m / (1 - kept) / (jnp.sqrt(v / root) + 1e-8),
            params,
            m,
            v,
        )
        return params, m, v, hidden, loss

    for step, (start, length) in enumerate(table):
        x = COLUMNS[start : start + length]
        y = COLUMNS[start + 1 : start + 1 + length]
        values = {"b1": 0.0, "b2": 0.0} | programs.schedule.at(step)
        rate, b1, b2 = (values[name] for name in ("learning_rate", "b1", "b2"))
        if config.scale_by_length:
            rate *= length / config.bptt
        kept *= b1
        numbers = map(np.float32, (rate, b1, b2, kept, 1 - b2 ** (step + 1)))
        step_key = jax.random.fold_in(key, step)
        params, m, v, hidden, loss = one_step(
            params, m, v, hidden, x, y, step_key, *numbers
        )
        losses.append(float(loss))
    return params, hidden, losses


def pairs(*quick):
    """All pairs of a model and a variant; those that are not named are slow."""
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow)
        for pair in itertools.product(KINDS, VARIANTS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "variant"), pairs(("lstm", "article")))
def test_the_program_is_a_plain_loop_in_one_call_or_in_pieces(model, variant):
    """Of chunks that are not padded; hidden states carried, from zeros at the first."""
    config = dataclasses.replace(TINY, model=model, **VARIANTS[variant])
    programs, train = program_of(config)
    assert set(chunks.padded_lengths(ROWS, 8, 2, config.chunks)) - {6, 13}
    state = jax.jit(programs.init)(3)
    # whatever the epoch before has left
    state = state._replace(
        hidden=jax.tree.map(lambda h: np.asarray(h) + np.float32(0.5), state.hidden),
        sums=np.ones(3, np.float32),
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
@pytest.mark.parametrize(("model", "variant"), pairs(("lstm", "salesforce")))
def test_twenty_steps_of_the_program_are_those_of_pytorch(model, variant):
    """In float64, with the same masks. (A constant beta1, where PyTorch is exact.)"""
    constant = {"schedule": "constant", "b1": (0.7, 0.7), "learning_rate": 5e-3}
    config = dataclasses.replace(
        TINY, model=model, **{"lengths": 1} | constant | VARIANTS[variant]
    )
    programs, train = program_of(config)
    state = jax.tree.map(
        lambda x: np.float64(x) if x.dtype == np.float32 else x,
        jax.jit(programs.init)(0),
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
    rates = language_model.dropout_rates(config)
    draw_masks = jax.jit(lambda key: awd.draw_masks(key, net, rates, 4))
    hidden, their_losses, norms = twin.initial_state(4), [], []
    for step, (start, length) in enumerate(table):
        rows = torch.tensor(COLUMNS[start : start + length + 1]).long()
        masks = draw_masks(jax.random.fold_in(key, step))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["lstm", pytest.param("qrnn", marks=pytest.mark.slow)]
)
def test_two_devices_compute_what_one_does(monkeypatch, model):
    config = dataclasses.replace(TINY, model=model, layers=1, lengths=1)
    programs = language_model.build(config, WORDS, ROWS)
    results = []
    for n in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:n]), ("data",))
        monkeypatch.setattr(language_model.devices, "data_mesh", lambda mesh=mesh: mesh)
        columns = jax.device_put(PADDED, language_model.shardings()[1](1))
        program = language_model.compile_programs(programs, columns, TABLE)
        state = program.init(np.int32(0))
        leaf = jax.tree.leaves(state.hidden)[0]
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 4 // n
        weights = state.params["embedding"][...]
        zero, end = np.int32(0), np.int32(len(TABLE))
        state, losses = program.train(state, columns, TABLE, zero, end, zero)
        assert weights.is_deleted()  # the state is donated
        assert state.params["embedding"][...].is_fully_replicated
        results.append(jax.tree.map(np.asarray, (state, losses)))
    close(*results, 1e-5)


def test_products_in_bfloat16():
    """Parameters, states and sums stay float32."""
    config = dataclasses.replace(TINY, lengths=1, dtype="bfloat16")
    programs = language_model.build(config, WORDS, ROWS)
    state = jax.eval_shape(programs.init, 0)
    traced = str(jax.make_jaxpr(programs.train)(state, PADDED, TABLE, 0, 8, 0))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general\[(.*?)\] ", traced, re.S)
    assert len(products) > 10
    assert "bf16" in traced and {kind for kind, _ in products} <= {"f32", "bf16"}
    out, losses = jax.eval_shape(programs.train, state, PADDED, TABLE, 0, 8, 0)
    dtypes = {str(x.dtype) for x in jax.tree.leaves((out.params, out.hidden, losses))}
    assert dtypes == {"float32"}


# ---------------------------------------------------------------------------
# averaging
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_average_is_the_mean_of_what_came_after_it_began():
    config = dataclasses.replace(TINY, **SALESFORCE, average_after=5, lengths=1)
    programs, train = program_of(config)
    state, iterates = jax.jit(programs.init)(0), []
    for step in range(len(TABLE)):
        if step == 3:
            assert state.averaged == -1
            assert language_model.evaluation_params(state) is state.params
            state = state._replace(averaged=jnp.int32(0))
            assert language_model.evaluation_params(state) is state.params
        state, _ = train(state, PADDED, TABLE, step, step + 1, 0)
        if step >= 3:
            iterates.append(jax.tree.map(np.asarray, state.params))
            assert state.averaged == len(iterates)
            assert language_model.evaluation_params(state) is state.average
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
def test_averaging_starts_when_salesforces_does(after):
    config, starts = dataclasses.replace(TINY, average_after=after), []
    for seed in range(8):
        losses = np.random.default_rng(seed).normal(0, 1, 15) - 0.3 * np.arange(15)
        state, start = language_model.State(*[None] * 6, averaged=jnp.int32(-1)), None
        for epoch in range(len(losses)):
            so_far = losses[: epoch + 1].tolist()
            state = language_model.start_averaging(config, state, so_far)
            if start is None and int(state.averaged) == 0:
                start = epoch
                state = state._replace(averaged=jnp.int32(7))
        assert start == salesforces_epochs(losses, after)
        assert int(state.averaged) == (-1 if start is None else 7)
        starts.append(start)
    assert len(set(starts)) > 1  # there is something to compare
    never = dataclasses.replace(TINY, average_after=None)
    assert language_model.start_averaging(never, state, [0.0, 99.0]) is state


@pytest.mark.slow
def test_the_embedded_text_is_learned():
    """The first steps of the default run, without --data-dir; its rates in an epoch."""
    config = dataclasses.replace(language_model.defaults(), epochs=1, lengths=1)
    corpus = text.pydoc_topics()
    columns = chunks.columns(corpus.train, config.batch_size)
    words = len(corpus.vocabulary)
    programs = language_model.build(config, words, len(columns))
    table = chunks.chunk_table(len(columns), config.bptt, 0, 0)
    padded = np.pad(columns, ((0, 61), (0, 0)))
    state = jax.jit(programs.init)(0)
    _, losses = jax.jit(programs.train)(state, padded, table, 0, 25, 0)
    assert losses[0] == pytest.approx(np.log(words), rel=0.02)
    assert losses[20:25].mean() < losses[0] - 1
