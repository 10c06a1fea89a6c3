"""Kneser-Ney against an implementation over dictionaries, and closed forms."""

import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import text
from train.evals import kneser_ney

EOS = 1


def direct(train, test, vocabulary_size, eos, order):
    """Chen and Goodman's formulas over tuples: all counts first, then word by word."""
    front = [eos] * (order - 1)
    stream = [*front, *train]
    counts = [defaultdict(int) for _ in range(order + 1)]  # by length
    for i in range(order - 1, len(stream)):
        counts[order][tuple(stream[i - order + 1 : i + 1])] += 1
    for k in range(order - 1, 0, -1):
        for gram in counts[k + 1]:
            counts[k][gram[1:]] += 1
    discounts = {k: discounts_of(counts[k].values()) for k in range(1, order + 1)}
    after = [defaultdict(list) for _ in range(order + 1)]
    for k in range(1, order + 1):
        for gram, count in counts[k].items():
            after[k][gram[:-1]].append(count)

    def probability(gram):
        k = len(gram)
        if k == 0:
            return 1 / vocabulary_size
        lower = probability(gram[1:])
        seen = after[k].get(gram[:-1])
        if not seen:
            return lower
        d = discounts[k]
        count = counts[k].get(gram, 0)
        gamma = sum(d[min(c, 3)] for c in seen) / sum(seen)
        return max(count - d[min(count, 3)], 0) / sum(seen) + gamma * lower

    stream = [*front, *test]
    return [
        np.log(probability(tuple(stream[i - order + 1 : i + 1])))
        for i in range(order - 1, len(stream))
    ]


def discounts_of(counts):
    n = [list(counts).count(c) for c in range(5)]
    if 0 in n[1:4]:
        return 0, 0.5, 1, 1.5
    y = n[1] / (n[1] + 2 * n[2])
    d = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
    return (0, *d) if min(d) > 0 else (0, 0.5, 1, 1.5)


def stream(seed, tokens, vocabulary_size):
    """Words of Zipf's law, each leaning on the one before it."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, vocabulary_size + 1)
    draws = rng.choice(vocabulary_size, tokens, p=frequency / frequency.sum())
    follow = rng.random(tokens) < 0.6
    for i in range(1, tokens):
        if follow[i]:
            draws[i] = (3 * draws[i - 1] + 1) % vocabulary_size
    return draws.astype(np.int32)


@pytest.mark.parametrize("order", range(1, 6))
def test_is_the_direct_implementation(order):
    train, test = stream(0, 3000, 40), stream(1, 500, 60)  # a third of words are new
    ours = kneser_ney.log_probs(train, test, 60, EOS, order)
    assert ours.dtype == np.float64
    assert ours.shape == test.shape
    expected = direct(train, test, 60, EOS, order)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    perplexity = kneser_ney.perplexity(train, test, 60, EOS, order)
    assert perplexity == pytest.approx(np.exp(-np.mean(expected)))


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(train=tokens, test=tokens, order=st.integers(1, 5))
@settings(deadline=None)
def test_a_few_words(train, test, order):
    """Counts of counts that are zero, contexts of the front, words never seen."""
    ours = kneser_ney.log_probs(np.array(train), np.array(test), 6, EOS, order)
    np.testing.assert_allclose(ours, direct(train, test, 6, EOS, order), rtol=1e-12)
    assert np.all(np.isfinite(ours))


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("tokens", [3000, 12])
def test_sums_to_one(order, tokens):
    """After contexts seen often, once, in part, and never."""
    size = 60
    train = stream(0, tokens, 40)
    contexts = [*train[:12].reshape(3, 4), (*train[1:4], 59), (59, 58, 57, 56), [1] * 4]
    for context in contexts:
        every = np.concatenate([[*context, word] for word in range(size)])
        log_p = kneser_ney.log_probs(train, every, size, EOS, order)
        assert np.exp(log_p[4::5]).sum() == pytest.approx(1, abs=1e-12)


def test_unigram_in_closed_form():
    """Four words once, two twice, one three and one four times; two never."""
    train = [2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 9, 9]
    y = 4 / (4 + 2 * 2)
    d = [0, 1 - 2 * y * 2 / 4, 2 - 3 * y * 1 / 2, 3 - 4 * y * 1 / 1]
    left = (4 * d[1] + 2 * d[2] + 2 * d[3]) / 15
    counts = [0, 0, 1, 1, 1, 1, 2, 2, 3, 4]
    expected = [(c - d[min(c, 3)]) / 15 + left / 10 for c in counts]
    log_p = kneser_ney.log_probs(np.array(train), np.arange(10), 10, EOS, order=1)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "train",
    [
        [2],
        [2, 2, 2, 2, 3, 3, 3],  # no word once or twice
        [2, 3, 4, 4, 4],  # none twice, which would divide by zero
        [2, 3, 3],  # none three times
        [2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6],  # so many of these that 2 is too little
    ],
)
def test_discounts_that_cannot_be_estimated(train):
    counts = np.bincount(train, minlength=8)
    taken = np.select([counts == 0, counts == 1, counts == 2], [0, 0.5, 1], 1.5)
    expected = (counts - taken + taken.sum() / 8) / len(train)
    log_p = kneser_ney.log_probs(np.array(train), np.arange(8), 8, EOS, order=1)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-12)
    assert expected.sum() == pytest.approx(1)


def test_both_streams_begin_after_eos():
    """So a first word is as likely as later at the start of a line."""
    train = stream(0, 3000, 40)
    first = kneser_ney.log_probs(train, np.array([2]), 60, EOS, order=2)
    later = kneser_ney.log_probs(train, np.array([7, EOS, 2]), 60, EOS, order=2)
    assert first[0] == later[2]
    start = kneser_ney.log_probs(np.array([2, 3]), np.array([2, 3]), 60, EOS)
    other = kneser_ney.log_probs(np.array([2, 3]), np.array([3, 2]), 60, EOS)
    assert np.all(start > other)


def test_nothing_is_learned_from_the_test_text():
    train, test = stream(0, 3000, 40), stream(1, 500, 60)
    long = kneser_ney.log_probs(train, test, 60, EOS)
    short = kneser_ney.log_probs(train, test[:50], 60, EOS)
    np.testing.assert_array_equal(long[:50], short)


def test_of_python_s_documentation():
    """Longer contexts help, and the text cannot have leaked: 10.5 if it had."""
    corpus = text.pydoc_topics()
    size, eos = len(corpus.vocabulary), corpus.vocabulary.index("<eos>")
    start = time.perf_counter()
    one, two, three, five = (
        kneser_ney.perplexity(corpus.train, corpus.valid, size, eos, order)
        for order in (1, 2, 3, 5)
    )
    assert time.perf_counter() - start < 10  # about 0.3
    assert 30 < five < three < two < one
    assert 150 < one < 350
    assert 50 < two < 120
    assert three < 90
    assert five < 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0}, "order must be at least 1, got 0"),
        ({"train": np.array([], int)}, "train must not be empty"),
        ({"test": np.array([], int)}, "test must not be empty"),
        ({"train": np.array([2, 5])}, r"ids must be in .0, 5., .* got 1 to 5"),
        ({"test": np.array([-1])}, r"ids must be in .0, 5., .* got -1 to 3"),
        ({"eos": 9}, "got 2 to 9"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"train": np.array([2, 3]), "test": np.array([2]), "vocabulary_size": 5}
    with pytest.raises(ValueError, match=message):
        kneser_ney.perplexity(**good | {"eos": EOS} | arguments)
