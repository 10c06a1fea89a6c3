"""Columns of a text, its chunks, and the lengths to which these are padded."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import chunks


@given(tokens=st.integers(2, 500), batch_size=st.integers(1, 250))
def test_columns(tokens, batch_size):
    stream = np.arange(tokens)
    if 2 * batch_size > tokens:
        with pytest.raises(ValueError, match=f"{tokens} tokens, got {batch_size}"):
            chunks.columns(stream, batch_size)
        return
    table = chunks.columns(stream, batch_size)
    assert table.shape == (tokens // batch_size, batch_size)
    assert table.dtype == np.int32
    assert table.flags.c_contiguous
    np.testing.assert_array_equal(table.T.ravel(), stream[: table.size])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_columns_without_a_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be .* got {batch_size}"):
        chunks.columns(np.arange(10), batch_size)


@given(
    bptt=st.integers(5, 100),
    size=st.integers(0, 5000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
)
@settings(deadline=None)
def test_chunks_of_the_article(bptt, size, seed, epoch):
    rows = 2 * bptt + size
    table = chunks.chunk_table(rows, bptt, seed, epoch)
    starts, lengths = table.T
    assert table.dtype == np.int32
    assert len(table) == rows // bptt - 1
    assert starts[0] == 0
    np.testing.assert_array_equal(starts[1:], (starts + lengths)[:-1])
    assert starts[-1] + lengths[-1] <= rows - 1
    assert lengths.min() >= 5
    assert lengths[0] == min(bptt + 25, rows - 1 - 5 * (len(table) - 1))


@given(
    bptt=st.integers(5, 100),
    rows=st.integers(3, 5000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
)
@settings(deadline=None)
def test_chunks_of_salesforce(bptt, rows, seed, epoch):
    """The loop of the original, with our draws."""
    table = chunks.chunk_table(rows, bptt, seed, epoch, "salesforce")
    lengths = iter(
        chunks._draw_lengths(np.random.default_rng([seed, epoch]), bptt, rows // 5 + 1)
    )
    expected, i = [], 0
    while i < rows - 2:
        length = min(next(lengths), rows - 1 - i)
        expected.append((i, length))
        i += length
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize(("bptt", "known"), [(70, 67.74), (35, None)])
def test_lengths_are_those_of_the_article(bptt, known):
    """Their mean and mean square, from the normal distribution function."""
    lengths = chunks._draw_lengths(np.random.default_rng(0), bptt, 4_000_000)

    def mean(centre, power):  # of max(5, int(N(centre, 5))) ** power
        above = {k: 0.5 * math.erfc((k - centre) / 5 / 2**0.5) for k in range(6, 200)}
        steps = (p * (k**power - (k - 1) ** power) for k, p in above.items())
        return 5**power + sum(steps)

    for power in (1, 2):
        expected = 0.95 * mean(bptt, power) + 0.05 * mean(bptt / 2, power)
        if power == 1 and known:
            assert expected == pytest.approx(known, abs=0.02)
        drawn = lengths**power
        standard_error = drawn.std() / len(drawn) ** 0.5
        assert drawn.mean() == pytest.approx(expected, abs=4 * standard_error)


def test_epochs_of_wikitext2():
    """As many steps as the article's progress bar, and no chunk cut short."""
    tables = [
        chunks.chunk_table(20_886, 70, seed=3, epoch=epoch) for epoch in range(200)
    ]
    assert {len(table) for table in tables} == {297}
    assert {table[0, 1] for table in tables} == {95}
    ends = np.array([table[-1].sum() for table in tables]) / 20_886
    assert 0.93 < ends.min() < ends.mean() < ends.max() < 0.99
    assert ends.mean() == pytest.approx(0.965, abs=0.003)


def test_chunks_of_a_small_text():
    np.testing.assert_array_equal(
        chunks.chunk_table(20, 5, seed=0, epoch=0), [(0, 9), (9, 5), (14, 5)]
    )
    np.testing.assert_array_equal(chunks.chunk_table(10, 5, seed=0, epoch=0), [(0, 9)])


def test_chunks_are_of_the_seed_and_the_epoch():
    same, again, epoch, seed = (
        chunks.chunk_table(5000, 70, *which)
        for which in [(1, 2), (1, 2), (1, 3), (2, 2)]
    )
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, epoch)
    assert not np.array_equal(same, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bptt": 4}, "bptt must be at least 5, got 4"),
        ({"rows": 139}, "rows must be at least 140 for bptt=70 .*'article', got 139"),
        ({"rows": 2, "style": "salesforce"}, "rows must be at least 3 .* got 2"),
        ({"style": "fastai"}, "style must be 'article' or 'salesforce', got 'fastai'"),
    ],
)
def test_bad_chunks(arguments, message):
    with pytest.raises(ValueError, match=message):
        chunks.chunk_table(
            **{"rows": 1000, "bptt": 70, "seed": 0, "epoch": 0} | arguments
        )


# ---------------------------------------------------------------------------
# the plan of a run
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["article", "salesforce"])
def test_a_plan_has_the_chunks_of_every_epoch(style):
    plan = chunks.plan(160, 8, 5, 4, style)
    expected = [chunks.chunk_table(160, 8, 5, epoch, style) for epoch in range(4)]
    assert plan.ends.tolist() == np.cumsum([len(table) for table in expected]).tolist()
    assert {table.shape for table in plan.tables} == {(33, 2)}  # of all seeds, too
    step = 0
    for epoch, (table, ours) in enumerate(zip(expected, plan.tables, strict=True)):
        np.testing.assert_array_equal(ours[: len(table)], table)
        assert (ours[len(table) :] == 0).all()
        for row in range(len(table)):
            assert plan.epoch(step) == epoch
            assert plan.position(step) == (row, len(table))
            step += 1
    assert plan.epoch(step) == 4  # all are finished


@pytest.mark.parametrize(("rows", "bptt"), [(20, 5), (160, 8), (300, 70)])
def test_padded_columns_hold_every_padded_chunk(rows, bptt):
    """Its targets, a row later, too: a slice that ran over the end would be moved."""
    padded = chunks.pad_columns(np.ones((rows, 2), np.int32), bptt)
    longest = chunks.padded_lengths(rows, bptt, 1)[-1]
    for epoch in range(20):
        starts = chunks.chunk_table(rows, bptt, 0, epoch)[:, 0]
        assert starts.max() + 1 + longest <= len(padded)
    assert (padded[:rows] == 1).all() and (padded[rows:] == 0).all()


# ---------------------------------------------------------------------------
# the lengths that are compiled
# ---------------------------------------------------------------------------


def padding(lengths, drawn):
    """Of chunks to the next of the lengths; all must fit."""
    lengths = np.sort(lengths)
    return (lengths[np.searchsorted(lengths, drawn)] - drawn).sum()


def drawn_lengths(rows, bptt, style="article"):
    tables = [chunks.chunk_table(rows, bptt, 0, e, style) for e in range(100)]
    return np.concatenate(tables)[:, 1]


@pytest.mark.parametrize("style", ["article", "salesforce"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_other_lengths_need_less_padding(style, n):
    """All sets of that many are tried."""
    lengths = chunks.padded_lengths(103, 5, n, style)
    drawn = drawn_lengths(103, 5, style)
    assert len(lengths) == n and lengths[-1] == 30 >= drawn.max()
    assert (np.diff(lengths) > 0).all()
    best = min(
        padding(np.array([*others, 30]), drawn)
        for others in itertools.combinations(range(1, 30), n - 1)
    )
    assert padding(lengths, drawn) == best


def test_padded_lengths_of_the_article():
    """They pad little, and there is a length for every chunk of every seed."""
    rows, bptt = 20_886, 70
    lengths = chunks.padded_lengths(rows, bptt, 6)
    drawn = drawn_lengths(rows, bptt)
    assert (len(lengths), lengths[-1]) == (6, 95)
    share = padding(lengths, drawn) / drawn.sum()
    assert 0.02 < share < 0.05
    two = chunks.padded_lengths(rows, bptt, 2)
    assert padding(two, drawn) > 1.5 * padding(lengths, drawn)
    for seed in range(1, 4):
        assert chunks.chunk_table(rows, bptt, seed, 0)[:, 1].max() <= 95
    # as many as there are: nothing is padded
    assert padding(chunks.padded_lengths(rows, bptt, 95), drawn) == 0
