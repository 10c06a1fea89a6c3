"""The cache against loops over one-hot words, closed forms, and itself in pieces."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiers import matrix

from train.evals import neural_cache
from train.evals.neural_cache import (
    LAMBDA,
    THETA,
    WINDOW,
    empty,
    log_probs,
    mixed,
    used,
)

WORDS = 30


def text(count, width=6, words=WORDS, seed=0):
    """States, words, and log-probabilities of all words at all positions."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, words))
    vocab = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return rng.normal(size=(count, width)), rng.integers(0, words, count), vocab


def of_targets(vocab, targets):
    return np.take_along_axis(vocab, targets[:, None], -1)[:, 0]


def close(ours, reference, tolerance=1e-12):
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------
# against loops
# ---------------------------------------------------------------------------


def attention(theta, keys, state):
    scores = theta * (keys @ state)
    terms = np.exp(scores - scores.max())
    return terms / terms.sum()


def article(states, targets, vocab, theta, lambda_, window, chunk):
    """Whatever there is of the last `window` pairs, from the second word on."""
    words, logs = np.eye(vocab.shape[1])[targets], []
    for t in range(len(targets)):
        p, seen = np.exp(vocab[t]), slice(max(0, t - window), t)
        if t:
            cache = attention(theta, states[seen], states[t]) @ words[seen]
            p = (1 - lambda_) * p + lambda_ * cache
        logs.append(np.log(p[targets[t]]))
    return np.array(logs)


def salesforce(states, targets, vocab, theta, lambda_, window, chunk):
    """pointer.py: the history is cut after a chunk, and must be longer than W."""
    words, logs = np.eye(vocab.shape[1])[targets], []
    word_history, history = words[:0], states[:0]
    for i in range(0, len(targets), chunk):
        start, part = len(history), slice(i, i + chunk)
        word_history = np.concatenate([word_history, words[part]])
        history = np.concatenate([history, states[part]])
        for index in range(len(states[part])):
            p = np.exp(vocab[i + index])
            if start + index > window:
                seen = slice(start + index - window, start + index)
                weights = attention(theta, history[seen], states[i + index])
                p = lambda_ * (weights @ word_history[seen]) + (1 - lambda_) * p
            logs.append(np.log(p[targets[i + index]]))
        word_history, history = word_history[-window:], history[-window:]
    return np.array(logs)


LOOPS = {"article": article, "salesforce": salesforce}


def ours(states, targets, vocab, theta, lambda_, window, chunk, convention, block=256):
    history = empty(window, states.shape[1], states.dtype)
    cache, _ = log_probs(history, states, targets, theta, block)
    where = used(np.arange(len(targets)), window, convention, chunk)
    return mixed(of_targets(vocab, targets), cache, where, lambda_)


@pytest.mark.parametrize("convention", LOOPS)
@pytest.mark.parametrize(
    ("window", "chunk", "block"),
    matrix(
        [(37, 100, 64), (37, 100, 256), (37, 100, 1), (37, 20, 111), (37, 37, 1000)]
        + [(1, 100, 64), (150, 100, 64), (1000, 100, 64)],
        quick=[(37, 100, 64)],
    ),
)
def test_every_word_has_the_probability_of_a_loop(
    x64, convention, window, chunk, block
):
    sample = text(333)
    options = 0.7, 0.3, window, chunk
    logs = ours(*sample, *options, convention, block)
    assert logs.dtype == jnp.float64
    close(logs, LOOPS[convention](*sample, *options))


@pytest.mark.parametrize("convention", LOOPS)
def test_perplexity_in_float32_is_that_of_a_loop_in_float64(convention):
    rng = np.random.default_rng(1)
    states, targets, vocab = text(4000, width=40, words=50)
    targets = (rng.zipf(1.5, len(targets)) - 1) % 50
    states = np.float32(states + np.eye(50, 40)[targets])
    options = THETA, LAMBDA, 1000, 1500
    logs = ours(states, targets, np.float32(vocab), *options, convention)
    assert logs.dtype == jnp.float32
    loop = LOOPS[convention](np.float64(states), targets, vocab, *options)
    perplexity = np.exp(-np.asarray(logs).mean(dtype=np.float64))
    close(perplexity, np.exp(-loop.mean()), 1e-6)
    plain = np.exp(-of_targets(vocab, targets).mean())
    assert abs(perplexity / plain - 1) > 0.01  # the cache has a say


def test_bfloat16_states_are_as_good_as_their_digits():
    states, targets, vocab = text(333)
    states = jnp.asarray(states, jnp.bfloat16)
    options = THETA, LAMBDA, 37, 100
    logs = ours(states, targets, np.float32(vocab), *options, "article")
    assert logs.dtype == jnp.float32
    close(logs, article(np.float64(states), targets, vocab, *options), 1e-5)


def test_the_constants_are_those_of_the_article():
    assert (THETA, LAMBDA, WINDOW) == (0.662, 0.1279, 3785)


# ---------------------------------------------------------------------------
# in pieces
# ---------------------------------------------------------------------------


def in_pieces(states, targets, cuts, window, size=None):
    """With a size, pieces of that size: the rest of each is padding."""
    history, logs = empty(window, states.shape[1], states.dtype), []
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(targets)]):
        key, word, count = states[start:stop], targets[start:stop], stop - start
        if size:
            rest = size - count
            key = np.pad(key, ((0, rest), (0, 0)), constant_values=np.nan)
            word = np.pad(word, (0, rest), constant_values=-1)
        piece, history = log_probs(history, key, word, 0.7, block=3)
        assert not np.isnan(piece).any()
        logs.append(piece[:count])
    return np.concatenate(logs), history


@pytest.mark.slow
@settings(deadline=None)
@example([0, 5, 6, 14], None)
@example([0, 5, 6, 14], 17)
@given(st.lists(st.integers(0, 14), max_size=6), st.sampled_from([None, 17]))
def test_pieces_of_any_size_make_the_whole(cuts, size):
    with jax.enable_x64(True):
        states, targets, _ = text(14, width=3, words=4)
        whole, last = log_probs(empty(5, 3, float), states, targets, 0.7)
        logs, history = in_pieces(states, targets, cuts, 5, size)
        close(logs, whole)
        jax.tree.map(np.testing.assert_array_equal, history, last)


@pytest.mark.parametrize("window", [7, 20, 33])
def test_the_history_is_the_last_pairs(window):
    states, targets, _ = text(20)
    states = np.float32(states)
    _, history = in_pieces(states, targets, [9], window)
    missing = max(0, window - 20)
    np.testing.assert_array_equal(history.targets[:missing], -1)
    np.testing.assert_array_equal(history.targets[missing:], targets[-window:])
    np.testing.assert_array_equal(history.states[missing:], states[-window:])


def test_no_words_at_all():
    before = empty(5, 2)
    logs, history = log_probs(before, np.zeros((0, 2), np.float32), np.zeros(0, int), 1)
    assert logs.shape == (0,)
    jax.tree.map(np.testing.assert_array_equal, history, before)


def test_padding_is_neither_found_nor_nan():
    states = np.full((6, 2), np.nan, np.float32)
    logs, history = log_probs(empty(4, 2), states, np.full(6, -1), 1.0, 4)
    np.testing.assert_array_equal(logs, -np.inf)
    np.testing.assert_array_equal(history.targets, -1)


def test_states_that_are_no_numbers_are_not_hidden():
    states, targets = np.ones((5, 2), np.float32), np.array([1, 2, 1, 2, 2])
    states[0] = np.nan
    logs, _ = log_probs(empty(3, 2), states, targets, 1.0)
    close(logs, [-np.inf, -np.inf, np.nan, np.nan, np.log(2 / 3)], 1e-6)
    many = np.full((400, 2), np.nan, np.float32)  # XLA has other sums for these
    logs, _ = log_probs(empty(100, 2), many, np.zeros(400, int), 1.0)
    assert np.isnan(logs[1:]).all()


def test_texts_side_by_side(x64):
    samples = [text(50, seed=seed) for seed in range(3)]
    states, targets, _ = map(np.stack, zip(*samples, strict=True))
    histories = jax.tree.map(lambda x: jnp.stack([x] * 3), empty(11, 6, float))
    thetas = np.array([0.1, 0.7, 2.0])
    one = functools.partial(log_probs, block=16)
    logs, _ = jax.jit(jax.vmap(one))(histories, states, targets, thetas)
    for i, theta in enumerate(thetas):
        alone, _ = log_probs(empty(11, 6, float), states[i], targets[i], theta)
        close(logs[i], alone)


def test_memory_does_not_grow_with_the_text_or_the_vocabulary():
    window, width, block = 300, 40, 64

    def temporary(count):
        states = jnp.zeros((count, width))
        targets = jnp.full(count, 2**31 - 1)
        compiled = jax.jit(log_probs, static_argnums=4).lower(
            empty(window, width), states, targets, 1.0, block
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    numbers = (window + block) * (block + width)
    short, long = temporary(8 * block), temporary(64 * block)
    assert long - short <= 64 * 8  # the starts of the blocks
    assert long <= 4 * 4 * numbers


def test_theta_does_not_compile_again():
    states, targets, _ = text(20)
    states, traces = np.float32(states), neural_cache._log_probs._cache_size()
    for theta in (0.1, 0.2, np.float32(0.3), jnp.float32(0.4)):
        log_probs(empty(13, 6), states, targets, theta)
    assert neural_cache._log_probs._cache_size() == traces + 1


# ---------------------------------------------------------------------------
# closed forms
# ---------------------------------------------------------------------------


def test_theta_zero_counts_the_words_of_the_window(x64):
    states, targets, _ = text(200)
    logs, _ = log_probs(empty(25, 6, float), states, targets, 0, 32)
    for t, log in enumerate(logs):
        seen = targets[max(0, t - 25) : t]
        share = np.mean(seen == targets[t]) if t else 0.0
        close(np.exp(log), share)


@pytest.mark.parametrize("count", [3, 300])
def test_probabilities_of_all_words_sum_to_one(x64, count):
    states, targets, vocab = text(count)
    _, history = log_probs(empty(37, 6, float), states, targets, 0.7)
    logs = [log_probs(history, states[:1], [word], 0.7)[0] for word in range(WORDS)]
    cache = np.concatenate(logs)
    close(np.exp(cache).sum(), 1)
    both = mixed(vocab[-1], cache, np.full(WORDS, True), 0.3)
    close(np.exp(both).sum(), 1)


@pytest.mark.parametrize("theta", [1e-30, 1.0, 1e3, 1e30, 3e38])
def test_no_theta_is_too_large(theta):
    states, targets, _ = text(300, width=4, words=3)
    logs, _ = log_probs(empty(37, 4), 10 * np.float32(states), targets, theta, 64)
    assert not np.isnan(logs).any()
    assert np.max(logs) <= 1e-6
    assert np.isfinite(logs).mean() > (0.9 if theta < 1e30 else 0.1)
    if theta > 1:  # only the nearest state counts
        scores = 100 * states @ states.T
        nearest = [scores[t, max(0, t - 37) : t].argmax() for t in range(1, 300)]
        words = [targets[max(0, t - 37) + k] for t, k in enumerate(nearest, 1)]
        np.testing.assert_array_equal(logs[1:] > -0.7, words == targets[1:])


def test_a_word_far_from_the_best_keeps_its_digits():
    states = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1000.0]], np.float32)
    logs, _ = log_probs(empty(5, 2), states, np.array([7, 8, 7]), 1.0)
    np.testing.assert_array_equal(logs, [-np.inf, -np.inf, -998.0])


def test_without_a_history_there_is_the_vocabulary_alone():
    vocab = np.log(np.float32([0.2, 0.3, 0.5]))
    states = np.ones((3, 2), np.float32)
    cache, _ = log_probs(empty(5, 2), states, np.array([1, 1, 2]), 1.0)
    close(np.exp(cache), [0, 1, 0], 1e-6)
    logs = mixed(vocab, cache, used(np.arange(3), 5), 0.25)
    close(np.exp(logs), [0.2, 0.75 * 0.3 + 0.25, 0.75 * 0.5], 1e-6)


@pytest.mark.parametrize(("window", "chunk"), [(3, 10), (10, 3), (5, 5), (4, 1)])
def test_where_salesforce_uses_the_cache(window, chunk):
    expected, history = [], 0
    for start in range(0, 40, chunk):
        size = min(chunk, 40 - start)
        expected += [history + index > window for index in range(size)]
        history = min(window, history + size)
    where = used(np.arange(40), window, "salesforce", chunk)
    np.testing.assert_array_equal(where, expected)
    np.testing.assert_array_equal(used(np.arange(40), window), np.arange(40) >= 1)
    later = used(np.arange(17, 40), window, "salesforce", chunk)
    np.testing.assert_array_equal(later, expected[17:])


def test_where_salesforce_uses_the_cache_on_wikitext_2():
    where = np.asarray(used(np.arange(217_645), WINDOW, "salesforce"))
    unused = np.flatnonzero(~where)
    np.testing.assert_array_equal(unused[:3786], np.arange(3786))
    np.testing.assert_array_equal(unused[3786:], np.arange(5000, 217_645, 5000))


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 1.0])
def test_mixtures(x64, share):
    p_vocab, p_cache = np.array([1e-300, 0.2, 1.0]), np.array([0, 1e-300, 0.5, 1.0])
    p_vocab, p_cache = np.repeat(p_vocab, 4), np.tile(p_cache, 3)
    with np.errstate(divide="ignore"):
        vocab, cache = np.log(p_vocab), np.log(p_cache)
        expected = np.log((1 - share) * p_vocab + share * p_cache)
    for function in (mixed, jax.jit(mixed)):
        close(function(vocab, cache, np.full(12, True), share), expected)
        unused = function(vocab, cache, np.full(12, False), share)
        np.testing.assert_array_equal(unused, vocab)


def test_a_mixture_of_what_no_float_can_hold(x64):
    vocab, cache = np.array([-2000.0, -3000.0, -np.inf]), np.array([-3000.0, -2000, 0])
    logs = mixed(vocab, cache, np.full(3, True), 0.25)
    close(logs, [np.log(0.75) - 2000, np.log(0.25) - 2000, np.log(0.25)])


# ---------------------------------------------------------------------------
# tuning
# ---------------------------------------------------------------------------

GRID = {"windows": (40, 7, 200), "thetas": (0.0, 0.3), "lambdas": (0.0, 0.2, 1.0)}


@pytest.mark.parametrize("convention", LOOPS)
# three pieces, one of 152, one
@pytest.mark.parametrize("block", matrix([8, 19, 256], quick=[19]))
def test_a_grid_is_that_of_its_points(x64, convention, block):
    states, targets, vocab = text(152)
    states += np.eye(WORDS, 6)[targets]
    options = {"convention": convention, "chunk": 50, "block": block}
    words = of_targets(vocab, targets)
    tuned = neural_cache.tune(words, states, targets, **GRID, **options)
    assert tuned.perplexities.shape == (3, 2, 3)
    assert tuned.perplexities.dtype == np.float64
    points = {}
    for window, theta, share in itertools.product(*GRID.values()):
        with np.errstate(divide="ignore"):
            loop = LOOPS[convention](states, targets, vocab, theta, share, window, 50)
        points[window, theta, share] = np.exp(-loop.mean())
    close(tuned.perplexities.ravel(), list(points.values()))
    assert tuned[1:] == min(points, key=lambda point: points[point])


def test_tuning_in_float32_agrees_with_the_evaluation():
    states, targets, vocab = text(1000)
    states, words = jnp.asarray(states, np.float32), of_targets(vocab, targets)
    grid = {"windows": [50], "thetas": np.array([0.5]), "lambdas": [0.1]}
    tuned = neural_cache.tune(words, states, targets, **grid, block=32)
    cache, _ = log_probs(empty(50, 6), states, targets, 0.5)
    logs = np.asarray(mixed(words, cache, used(np.arange(1000), 50), 0.1))
    close(tuned.perplexities, [[[np.exp(-logs.mean(dtype=np.float64))]]], 1e-6)


def test_tuning_says_how_far_it_is(monkeypatch, capsys):
    clock = itertools.count(0, 6)
    monkeypatch.setattr(neural_cache.time, "perf_counter", lambda: next(clock))
    states, targets, vocab = text(150)
    neural_cache.tune(of_targets(vocab, targets), states, targets, **GRID, block=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  cache: 64 of 150 words", "  cache: 128 of 150 words"]


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


def look_up(**changes):
    arguments = {
        "history": empty(5, 2),
        "states": np.zeros((3, 2), np.float32),
        "targets": np.zeros(3, int),
        "theta": 1.0,
    }
    return log_probs(**arguments | changes)


def mix(**changes):
    arguments = dict.fromkeys(("vocab_log_probs", "cache_log_probs"), np.zeros(3))
    return mixed(**arguments | {"used": np.full(3, True), "lambda_": 0.1} | changes)


def tune(**changes):
    arguments = {
        "vocab_log_probs": np.full(3, -1.0),
        "states": np.zeros((3, 2), np.float32),
        "targets": np.zeros(3, int),
    }
    return neural_cache.tune(**arguments | GRID | changes)


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (look_up, {"theta": -1}, "theta must be a number finite and >= 0, got -1"),
        (look_up, {"theta": np.nan}, "theta .* got nan"),
        (look_up, {"theta": jnp.inf}, "theta .* got inf"),
        (look_up, {"theta": np.ones(2)}, "theta must be a number"),
        (look_up, {"block": 0}, "block must be an integer >= 1, got 0"),
        (look_up, {"block": 2.5}, "block must be an integer >= 1, got 2.5"),
        (look_up, {"states": np.zeros((3, 4), np.float32)}, r"states must be \(N, 2\)"),
        (look_up, {"states": np.zeros((3, 2), np.float16)}, "float32 .* float16"),
        (look_up, {"states": np.zeros((3, 2), int)}, "states must be floating"),
        (look_up, {"states": np.zeros(3, np.float32)}, r"states must be \(N, D\)"),
        (look_up, {"targets": np.zeros(4, int)}, r"targets \(N,\), got .* \(4,\)"),
        (look_up, {"targets": np.zeros(3)}, "targets must be integer, got float32"),
        (empty, {"window": 0, "width": 3}, "window must be an integer >= 1, got 0"),
        (empty, {"window": 5, "width": 0}, "width must be an integer >= 1, got 0"),
        (empty, {"window": 5, "width": 3, "dtype": int}, "dtype must be floating"),
        (used, {"positions": np.ones(3)}, "positions must be integer, got float32"),
        (used, {"positions": np.arange(3), "window": 0}, "window must be .* got 0"),
        (used, {"positions": np.arange(3), "chunk": 0}, "chunk must be .* got 0"),
        (used, {"positions": np.arange(3), "convention": "paper"}, "or .*'paper'"),
        (mix, {"lambda_": 1.01}, r"lambda_ must be a number in \[0, 1\], got 1.01"),
        (mix, {"lambda_": -0.1}, "lambda_ must be .* got -0.1"),
        (mix, {"used": True}, r"must have the same shape, got \(3,\), \(3,\) and \(\)"),
        (mix, {"cache_log_probs": np.zeros(4)}, "must have the same shape"),
        (tune, {"windows": ()}, "windows must have at least one value"),
        (tune, {"windows": (5, 0)}, "windows must be an integer >= 1, got 0"),
        (tune, {"thetas": [-0.1]}, "thetas must be .* got -0.1"),
        (tune, {"lambdas": [0.1, 2]}, r"lambdas must be .* \[0, 1\], got 2"),
        (tune, {"block": 0}, "block must be an integer >= 1, got 0"),
        (tune, {"chunk": 0}, "chunk must be an integer >= 1, got 0"),
        (tune, {"convention": "paper"}, "convention must be"),
        (tune, {"targets": np.array([0, 1, -1])}, "targets must be >= 0, got -1"),
        (tune, {"targets": np.zeros(2, int)}, r"got \(3, 2\) and \(2,\)"),
        (tune, {"vocab_log_probs": np.ones(3)}, "vocab_log_probs must be <= 0, got 1"),
        (tune, {"vocab_log_probs": np.full(3, np.nan)}, "must be <= 0, got nan"),
        (tune, {"vocab_log_probs": -np.ones(4)}, r"must be \(N,\) .* got \(4,\)"),
        (tune, {"states": np.full((3, 2), np.nan)}, "states must be finite, got"),
    ],
)  # fmt: skip
def test_errors(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
