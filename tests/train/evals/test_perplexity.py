"""Perplexity against a plain loop: one token after the other, a batch of one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiers import matrix

from train.evals import neural_cache, perplexity
from train.models import awd

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

WORDS, EMBEDDING, WIDTH, ROWS, BLOCK = 37, 4, 6, 8, 4
SEGMENT = 3 * ROWS  # tokens, of three columns
KINDS = ("lstm", "qrnn")
TEXT = np.random.default_rng(0).integers(0, WORDS, 200).astype(np.int32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several blocks and segments with little text."""
    monkeypatch.setattr(perplexity, "ROWS", ROWS)
    monkeypatch.setattr(perplexity, "BLOCK", BLOCK)


@functools.cache
def network(kind, remembers, dtype):
    """With large weights, so that words matter; or with a memory that hardly fades."""
    net = awd.AWD(WORDS, EMBEDDING, WIDTH, 2, kind=kind, rngs=nnx.Rngs(0))
    net.bias[...] = jax.random.normal(jax.random.key(1), (WORDS,))
    net.embedding[...] = 5 * net.embedding[...]
    for layer in net.layers if remembers else ():
        gate = slice(layer.width, 2 * layer.width)  # in a QRNN it lets what is new in
        layer.bias[gate] = 9.0 if kind == "lstm" else -5.0
    graph, params = nnx.split(net)
    return graph, jax.tree.map(lambda p: p.astype(dtype), params)


def initial_state(graph, params):
    return nnx.merge(graph, params, copy=True).initial_state(1)


@functools.cache
def plain_loop(kind, remembers, dtype):
    """Log-probabilities, last layer and states, after each token of the text."""
    graph, params = network(kind, remembers, dtype)

    @jax.jit
    def step(token, state):
        out = nnx.merge(graph, params, copy=True)(token[None, None], state)
        return out.raw[0, 0], out.state

    state, told, raws, states = initial_state(graph, params), [], [], []
    embedding, bias = np.asarray(params["embedding"][...]), np.asarray(params["bias"])
    for token, target in zip(TEXT[:-1], TEXT[1:], strict=True):
        raw, state = step(token, state)
        logits = np.asarray(raw) @ embedding.T + bias
        told.append(logits[target] - np.log(np.exp(logits).sum()))
        raws.append(np.asarray(raw))
        states.append(jax.tree.map(np.asarray, state))
    return np.array(told), np.array(raws), states


def exact(kind, remembers=False):
    """Of float64, and read until nothing changes."""
    args = kind, remembers, np.dtype("float64")
    return (*network(*args), *plain_loop(*args))


@functools.cache
def reader(kind, columns, remembers=False):
    graph, _ = network(kind, remembers, np.dtype("float64"))
    return perplexity.reader(graph, columns, tolerance=0)


# ---------------------------------------------------------------------------
# the numbers
# ---------------------------------------------------------------------------

LENGTHS = (2, 3, 4, 12, 13, 14, SEGMENT, SEGMENT + 1, SEGMENT + 2, 3 * SEGMENT + 5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "columns"),
    matrix(list(itertools.product(KINDS, (1, 3, 7))), quick=[("qrnn", 3)]),
)
def test_what_a_plain_loop_tells(kind, columns):
    """Texts shorter than the columns, of about a segment, of many."""
    graph, params, expected, _, _ = exact(kind)
    state = initial_state(graph, params)
    for length in LENGTHS:
        text = TEXT[:length]
        found = perplexity.log_probs(
            reader(kind, columns), params, state, text, columns
        )
        assert found.shape == (length - 1,) and found.dtype == np.float64
        np.testing.assert_allclose(found, expected[: length - 1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_in_the_order_of_the_text(kind):
    """States that tell each target, and what is padding; also from a given state."""
    graph, params, told, raws, states = exact(kind)
    begin, length = 10, 2 * SEGMENT + 5  # the last segment has four targets
    text = TEXT[begin : begin + length]
    parts = list(
        perplexity.segments(reader(kind, 3), params, states[begin - 1], text, 3)
    )
    assert [len(part.targets) for part in parts] == [SEGMENT] * 3
    log_probs, raw, targets = (
        np.concatenate([part[i] for part in parts]) for i in range(3)
    )
    there = slice(begin, begin + length - 1)
    np.testing.assert_array_equal(targets[: length - 1], text[1:])
    assert (targets[length - 1 :] == -1).all() and len(targets[length - 1 :]) == 20
    np.testing.assert_allclose(log_probs[: length - 1], told[there], rtol=1e-12)
    np.testing.assert_allclose(raw[: length - 1], raws[there], rtol=1e-9, atol=1e-15)
    from_nothing = perplexity.log_probs(
        reader(kind, 3), params, initial_state(graph, params), text, 3
    )
    assert not np.allclose(from_nothing[:3], told[begin : begin + 3], rtol=1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", matrix(list(KINDS), quick=["lstm"]))
def test_the_state_after_a_segment(kind):
    _, params, _, _, states = exact(kind)
    state = initial_state(*network(kind, False, np.dtype("float64")))
    _, state = reader(kind, 3)(params, state, TEXT[:SEGMENT], TEXT[1 : SEGMENT + 1])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-15),
        state,
        states[SEGMENT - 1],
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_memory_takes_more_passes_and_is_as_exact(kind):
    """As many as there are columns and no more."""
    columns = 7
    graph, params, told, _, _ = exact(kind, remembers=True)
    state, text = initial_state(graph, params), TEXT[: 2 * columns * ROWS + 1]
    read = reader(kind, columns, remembers=True)
    parts = list(perplexity.segments(read, params, state, text, columns))
    assert [int(part.passes) for part in parts] == [columns, columns]
    found = np.concatenate([part.log_probs for part in parts])
    np.testing.assert_allclose(found, told[: len(found)], rtol=1e-12)
    # it does remember: without the earlier columns it would say something else
    alone = perplexity.log_probs(read, params, state, text[-9:], columns)
    assert abs(alone - found[-8:]).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "remembers"),
    matrix(list(itertools.product(KINDS, (False, True))), quick=[("lstm", True)]),
)
def test_the_default_tolerance(monkeypatch, kind, remembers):
    """Float32 and the sizes of the module: exact to rounding, mostly in few passes."""
    monkeypatch.undo()
    monkeypatch.setattr(perplexity, "BLOCK", BLOCK)
    assert (perplexity.COLUMNS, perplexity.ROWS) == (64, 1024)
    args = kind, remembers, np.dtype("float32")
    graph, params = network(*args)
    state = initial_state(graph, params)
    read = perplexity.reader(graph)
    (segment,) = perplexity.segments(read, params, state, TEXT)
    assert 1 < segment.passes and (remembers or segment.passes <= 30)
    assert segment.states.shape == (256, EMBEDDING)
    found = np.asarray(segment.log_probs)[: len(TEXT) - 1]
    np.testing.assert_allclose(found, plain_loop(*args)[0], atol=5e-6)
    np.testing.assert_array_equal(
        perplexity.log_probs(read, params, state, TEXT), found
    )


# ---------------------------------------------------------------------------
# what it needs, and what it refuses
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_block_has_logits(kind):
    """Nothing has the size of the tokens of a segment times that of the vocabulary."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (out.aval.size for out in eqn.outvars)
            for inner in jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    columns, rows = 3, 16 * BLOCK
    graph, params = network(kind, False, np.dtype("float32"))
    tokens = jax.ShapeDtypeStruct((columns * rows,), jnp.int32)
    args = params, initial_state(graph, params), tokens, tokens
    read = perplexity.reader(graph, columns)
    largest = max(sizes(jax.make_jaxpr(read)(*args).jaxpr))
    assert largest <= max(BLOCK * columns * WORDS, rows * columns * EMBEDDING)


def test_one_program_for_texts_of_any_length():
    """That are longer than a segment; of a shorter one it depends on the blocks."""
    graph, params = network("lstm", False, np.dtype("float32"))
    read, state = perplexity.reader(graph, 3), initial_state(graph, params)
    for length in (SEGMENT + 1, 2 * SEGMENT + 2, 100, 200, SEGMENT - 1):
        perplexity.log_probs(read, params, state, TEXT[:length], 3)
    assert read._cache_size() == 1


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_of_one_token_is_refused(length):
    graph, params = network("lstm", False, np.dtype("float32"))
    read, state = perplexity.reader(graph, 3), initial_state(graph, params)
    message = f"text must have at least 2 tokens, got {length}"
    with pytest.raises(ValueError, match=message):
        perplexity.log_probs(read, params, state, TEXT[:length], 3)


def test_numbers_that_are_none_end_too():
    """A network that diverged: passes that never agree would never end."""
    graph, params = network("lstm", False, np.dtype("float32"))
    params = jax.tree.map(lambda p: p * np.float32(np.nan), params)
    state = initial_state(graph, params)
    (segment,) = perplexity.segments(
        perplexity.reader(graph, 3), params, state, TEXT[:20], 3
    )
    assert segment.passes <= 3 and np.isnan(segment.log_probs).all()


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


def made_up_segments(n, size=20):
    """Segments of `n` targets, padded; and what is in them, without padding."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(n, 5)).astype(np.float32)
    log_probs = -rng.exponential(2, n).astype(np.float32)
    targets = rng.integers(0, 4, n).astype(np.int32)
    parts = []
    for start in range(0, n, size):
        stop = min(start + size, n)
        padding = size - (stop - start)
        parts.append(
            perplexity.Segment(
                np.pad(log_probs[start:stop], (0, padding), constant_values=-9),
                np.pad(states[start:stop], ((0, padding), (0, 0))),
                np.pad(targets[start:stop], (0, padding), constant_values=-1),
                np.int32(1),
            )
        )
    return parts, log_probs, states, targets


@pytest.mark.parametrize(
    "convention", matrix(["article", "salesforce"], quick=["article"])
)
def test_evaluation_without_the_cache_and_with_it(convention):
    """As `tune` computes it for the whole text at once."""
    n = 47
    parts, log_probs, states, targets = made_up_segments(n)
    found = perplexity.evaluate(
        parts, n, theta=0.5, lambda_=0.2, window=9, convention=convention
    )
    assert found["tokens"] == n
    plain = np.exp(-log_probs.mean(dtype=np.float64))
    assert found["perplexity"] == pytest.approx(plain, rel=1e-6)
    tuned = neural_cache.tune(
        log_probs, states, targets, [9], [0.5], [0.2], convention=convention
    )
    assert found["with_cache"] == pytest.approx(tuned.perplexities.item(), rel=1e-5)
    assert found["with_cache"] != pytest.approx(plain, rel=1e-3)
    assert found["tokens_in_full_chunks"] == 0
    assert found["perplexity_of_full_chunks"] is None


def test_full_chunks_of_the_article(monkeypatch):
    """As its code counts: what does not fill one at the end is left out."""
    parts, log_probs, *_ = made_up_segments(47)
    monkeypatch.setattr(perplexity, "ARTICLE_CHUNK", 20)
    found = perplexity.evaluate(parts, 47, window=9)
    assert (found["tokens"], found["tokens_in_full_chunks"]) == (47, 40)
    full = np.exp(-log_probs[:40].mean(dtype=np.float64))
    assert found["perplexity_of_full_chunks"] == pytest.approx(full, rel=1e-6)
    assert found["perplexity_of_full_chunks"] != found["perplexity"]
    monkeypatch.setattr(perplexity, "ARTICLE_CHUNK", 47)
    whole = perplexity.evaluate(parts, 47, window=9)
    assert whole["tokens_in_full_chunks"] == 47
    for key in ("perplexity", "with_cache"):
        assert whole[f"{key}_of_full_chunks"] == whole[key]
