"""Corpora from files in every layout and from Python itself; columns and chunks."""

import math
import os
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import text

TEXTS = {
    "train": " \n = A title = \n \n the cat and the dog \n a <unk> cat \n",
    "valid": " \n the bird \n",
    "test": "the dog\n\na cat and a bird",  # the last line without its end
}


def in_words(corpus, split):
    return [corpus.vocabulary[i] for i in getattr(corpus, split)]


def write(folder, form="wiki.{}.tokens", texts=TEXTS):
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in texts.items():
        (folder / form.format(split)).write_text(lines)
    return folder


# ---------------------------------------------------------------------------
# words and ids
# ---------------------------------------------------------------------------


def test_words():
    found = text.words("Don't use __init__(x) -- 'é' costs 10,000!!! ==")
    assert found == [
        "don't", "use", "__", "init", "__", "(", "x", ")", "--", "'", "é", "'",
        "costs", "10", ",", "000", "!!!", "==",
    ]  # fmt: skip


def test_encode_and_unknown():
    vocabulary = ("<pad>", "a", "<unk>", "b")
    ids = text.encode(["b", "x", "a", "y", "x"], vocabulary)
    np.testing.assert_array_equal(ids, [3, 2, 1, 2, 2])
    assert ids.dtype == np.int32
    assert text.unknown(["b", "x", "a", "y", "x"], vocabulary) == ["x", "y"]
    assert text.encode([], vocabulary).shape == (0,)


def test_detokenised():
    words = "= A = <eos> <eos> It 's 1 @,@ 200 @.@ 5 well @-@ read ( old ) men ; no ? !"
    expected = "= A =\n\nIt's 1,200.5 well-read (old) men; no?!"
    assert text.detokenised(words.split()) == expected
    assert text.detokenised(["a", "<eos>"]) == "a\n"
    assert text.detokenised([]) == ""


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


def check(corpus):
    """`TEXTS`, word by word and id by id."""
    assert corpus.vocabulary == (
        "<pad>", "<eos>", "=", "the", "cat", "A", "title", "and", "dog", "a", "<unk>",
    )  # fmt: skip
    assert " ".join(in_words(corpus, "train")) == (
        "<eos> = A title = <eos> <eos> the cat and the dog <eos> a <unk> cat <eos>"
    )
    assert " ".join(in_words(corpus, "valid")) == "<eos> the <unk> <eos>"
    assert " ".join(in_words(corpus, "test")) == (
        "the dog <eos> <eos> a cat and a <unk> <eos>"
    )
    for split in corpus[:3]:
        assert split.dtype == np.int32


@pytest.mark.parametrize("form", text.LAYOUTS)
def test_from_all_places(tmp_path, form):
    folder = write(tmp_path / "a" / "wikitext-2", form)
    archive = tmp_path / "b" / "wikitext-2-v1.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in [folder, *folder.iterdir()]:
            file.write(path, path.relative_to(tmp_path / "a"))
    renamed = tmp_path / "text.zip"
    renamed.write_bytes(archive.read_bytes())
    for place in (folder, folder.parent, str(folder), archive, archive.parent, renamed):
        check(text.wikitext2(place))


def test_validation_txt(tmp_path):
    write(tmp_path, "{}.txt")
    (tmp_path / "valid.txt").rename(tmp_path / "validation.txt")
    check(text.wikitext2(tmp_path))


def test_the_first_complete_layout_is_taken(tmp_path):
    write(tmp_path, "wiki.{}.raw")
    (tmp_path / "wiki.train.tokens").write_text("another text\n")
    check(text.wikitext2(tmp_path))


def test_line_ends_and_marks_of_windows(tmp_path):
    write(tmp_path)
    for path in tmp_path.iterdir():
        raw = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + raw)
    check(text.wikitext2(tmp_path))


def test_only_a_newline_ends_a_line(tmp_path):
    """Not what str.splitlines takes for one, as WikiText has it inside of lines."""
    write(tmp_path, texts=TEXTS | {"test": "the\u2028dog\x0ca\x85cat\n"})
    assert " ".join(in_words(text.wikitext2(tmp_path), "test")) == "the dog a cat <eos>"


def test_rare_words_are_unknown(tmp_path):
    write(tmp_path)
    corpus = text.wikitext2(tmp_path, min_count=2)
    assert corpus.vocabulary == ("<pad>", "<eos>", "=", "the", "cat", "<unk>")
    corpus = text.wikitext2(tmp_path, max_vocabulary=5)
    assert corpus.vocabulary == ("<pad>", "<eos>", "=", "the", "<unk>")
    assert " ".join(in_words(corpus, "train")) == (
        "<eos> = <unk> <unk> = <eos> <eos> "
        "the <unk> <unk> the <unk> <eos> <unk> <unk> <unk> <eos>"
    )
    corpus = text.wikitext2(tmp_path, max_vocabulary=3)
    assert corpus.vocabulary == ("<pad>", "<eos>", "<unk>")


def test_special_words_are_there_and_only_once(tmp_path):
    texts = dict.fromkeys(TEXTS, "a <pad> <pad> <eos> b a a a a")
    corpus = text.wikitext2(write(tmp_path, texts=texts))
    assert corpus.vocabulary == ("<pad>", "a", "<eos>", "b", "<unk>")
    np.testing.assert_array_equal(corpus.train, [1, 0, 0, 2, 3, 1, 1, 1, 1, 2])


words = st.text("ab", min_size=1, max_size=3)


@given(
    lines=st.lists(st.lists(words, min_size=1), min_size=1),
    max_vocabulary=st.integers(3, 20),
    min_count=st.integers(1, 4),
)
@settings(deadline=None)
def test_vocabulary(lines, max_vocabulary, min_count):
    train = [word for line in lines for word in [*line, "<eos>"]]
    ids, valid, _, vocabulary = text._corpus(
        [train, ["zz", "<eos>"], []], max_vocabulary, min_count
    )
    assert vocabulary[0] == "<pad>"
    assert {"<unk>", "<eos>"} <= set(vocabulary)
    assert len(vocabulary) == len(set(vocabulary)) <= max_vocabulary
    counts = Counter(train)
    rank = [(-counts[w], train.index(w)) for w in vocabulary[1:] if w in counts]
    assert rank == sorted(rank)
    kept = [w if w in vocabulary else "<unk>" for w in train]
    assert [vocabulary[i] for i in ids] == kept
    assert vocabulary[valid[0]] == "<unk>"
    # What was frequent enough and is left out is not more frequent than what is in.
    left_out = [n for w, n in counts.items() if w not in vocabulary and n >= min_count]
    own = [counts[w] for w in vocabulary if w not in ("<pad>", "<unk>", "<eos>")]
    assert min(own, default=min_count) >= min_count
    if left_out:
        assert len(vocabulary) == max_vocabulary
        assert max(left_out) <= min(own, default=len(train))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="'.*nowhere' does not exist.*https://"):
        text.wikitext2(tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match="neither wiki.train.tokens, nor .*train.txt, nor wikitext-2, .*https://",
    ):
        text.wikitext2(tmp_path)


@pytest.mark.parametrize(
    ("form", "lost", "message"),
    [
        ("wiki.{}.tokens", "test", "has no wiki.test.tokens"),
        ("wiki.{}.raw", "train", "has no wiki.train.raw"),
        ("{}.txt", "valid", "has no valid.txt or validation.txt"),
    ],
)
def test_missing_split(tmp_path, form, lost, message):
    folder = write(tmp_path / "wikitext-2", form)
    (folder / form.format(lost)).unlink()
    with pytest.raises(ValueError, match=f"wikitext-2 {message}"):
        text.wikitext2(tmp_path)


@pytest.mark.parametrize("split", TEXTS)
@pytest.mark.parametrize("raw", ["", " \n\n \t\n"])
def test_empty_file(tmp_path, split, raw):
    write(tmp_path, texts=TEXTS | {split: raw})
    with pytest.raises(ValueError, match=f"wiki.{split}.tokens is empty: {len(raw)} b"):
        text.wikitext2(tmp_path)


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "wiki.valid.tokens").write_bytes(b"\xef\xbb\xbfa\n\nb caf\xe9\n")
    with pytest.raises(ValueError, match="wiki.valid.tokens must be UTF-8, line 3 is"):
        text.wikitext2(tmp_path)


def test_bad_zips(tmp_path):
    path = tmp_path / "wikitext-2-v1.zip"
    path.write_bytes(b"<html>301 Moved</html>")
    with pytest.raises(ValueError, match="v1.zip must be .* a zip, .*https://"):
        text.wikitext2(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("wikitext-2/wiki.train.tokens", "a b c\n" * 1000)
    with pytest.raises(ValueError, match="v1.zip has no wiki.valid.tokens"):
        text.wikitext2(path)
    raw = bytearray(path.read_bytes())
    raw[60] ^= 255  # inside of the compressed text
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="cannot be read as a zip"):
        text.wikitext2(path)
    with pytest.raises(ValueError, match="wiki.train.tokens must be a folder or a zip"):
        text.wikitext2(write(tmp_path) / "wiki.train.tokens")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_vocabulary": 2}, "max_vocabulary must be at least 3, got 2"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
    ],
)
def test_limits_of_the_vocabulary(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        text.wikitext2(write(tmp_path), **argument)


# ---------------------------------------------------------------------------
# WikiText-2 itself, where ADAMW_JAX_DATA names the folder above its folder
# ---------------------------------------------------------------------------


def test_wikitext2_itself():
    if "ADAMW_JAX_DATA" not in os.environ:
        pytest.skip("ADAMW_JAX_DATA does not say where wikitext-2 is")
    root = Path(os.environ["ADAMW_JAX_DATA"])
    if not any((root / name).exists() for name in text.BELOW):
        pytest.skip(f"no WikiText-2 in ADAMW_JAX_DATA={root}")
    start = time.perf_counter()
    corpus = text.wikitext2(root)
    seconds = time.perf_counter() - start
    assert [len(s) for s in corpus[:3]] == [2_088_628, 217_646, 245_569]
    assert len(corpus.vocabulary) == 33_279
    # The article's data, id by id.
    assert corpus.vocabulary[:6] == ("<pad>", "the", ",", ".", "of", "<unk>")
    counts = np.bincount(corpus.train)
    assert counts[:6].tolist() == [0, 113_161, 99_913, 73_388, 56_889, 54_625]
    assert seconds < 10  # about 1
    lines = [
        len(text._find_files(root)[i][1].decode().split("\n")) - 1 for i in range(3)
    ]
    eos = corpus.vocabulary.index("<eos>")
    assert lines == [np.sum(s == eos) for s in corpus[:3]] == [36_718, 3_760, 4_358]
    rows = text.columns(corpus.train, 100)
    assert rows.shape == (20_886, 100)
    assert len(text.chunks(len(rows), 70, seed=0, epoch=0)) == 297


# ---------------------------------------------------------------------------
# Python's documentation
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topics():
    return text.pydoc_topics()


def test_pydoc_topics(topics):
    sizes = [len(split) for split in topics[:3]]
    assert 50_000 < sizes[0] < 150_000
    for size in sizes[1:]:
        assert 0.05 < size / sum(sizes) < 0.15
    assert 1000 < len(topics.vocabulary) < 4000
    unk, eos = map(topics.vocabulary.index, ("<unk>", "<eos>"))
    for split in topics[:3]:
        assert split[-1] == eos
        assert 0.01 < np.mean(split == unk) < 0.1
    counts = np.bincount(topics.train, minlength=len(topics.vocabulary))
    counts[[0, unk]] = 3
    assert counts.min() == 3
    again = text.pydoc_topics()
    assert again.vocabulary == topics.vocabulary
    for split, same in zip(again[:3], topics[:3], strict=True):
        np.testing.assert_array_equal(split, same)


def test_no_paragraph_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(text, "_corpus", lambda splits, **limits: splits)
    paragraphs = [" ".join(split).split("<eos>")[:-1] for split in text.pydoc_topics()]
    everything = sum(paragraphs, [])
    assert len(everything) == len(set(everything)) > 1000
    assert all(paragraph.strip() for paragraph in everything)
    assert min(map(len, paragraphs)) >= 2 * text.BLOCK


def test_no_text_leaks_into_training(topics):
    """Of long passages, 24 words, almost none is in both; there are many in topics."""
    train, *others = (
        np.lib.stride_tricks.sliding_window_view(split, 24) for split in topics[:3]
    )
    known = set(map(bytes, train))
    for split in others:
        assert np.mean([passage in known for passage in map(bytes, split)]) < 0.01


def test_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="came without its documentation .*pydoc_data"):
        text.pydoc_topics()


# ---------------------------------------------------------------------------
# columns and chunks
# ---------------------------------------------------------------------------


@given(tokens=st.integers(2, 500), batch_size=st.integers(1, 250))
def test_columns(tokens, batch_size):
    stream = np.arange(tokens)
    if 2 * batch_size > tokens:
        with pytest.raises(ValueError, match=f"{tokens} tokens, got {batch_size}"):
            text.columns(stream, batch_size)
        return
    table = text.columns(stream, batch_size)
    assert table.shape == (tokens // batch_size, batch_size)
    assert table.dtype == np.int32
    assert table.flags.c_contiguous
    np.testing.assert_array_equal(table.T.ravel(), stream[: table.size])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_columns_without_a_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be .* got {batch_size}"):
        text.columns(np.arange(10), batch_size)


@given(
    bptt=st.integers(5, 100),
    size=st.integers(0, 5000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
)
@settings(deadline=None)
def test_chunks_of_the_article(bptt, size, seed, epoch):
    rows = 2 * bptt + size
    table = text.chunks(rows, bptt, seed, epoch)
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
    table = text.chunks(rows, bptt, seed, epoch, "salesforce")
    lengths = iter(
        text._lengths(np.random.default_rng([seed, epoch]), bptt, rows // 5 + 1)
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
    lengths = text._lengths(np.random.default_rng(0), bptt, 4_000_000)

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
    tables = [text.chunks(20_886, 70, seed=3, epoch=epoch) for epoch in range(200)]
    assert {len(table) for table in tables} == {297}
    assert {table[0, 1] for table in tables} == {95}
    ends = np.array([table[-1].sum() for table in tables]) / 20_886
    assert 0.93 < ends.min() < ends.mean() < ends.max() < 0.99
    assert ends.mean() == pytest.approx(0.965, abs=0.003)


def test_chunks_of_a_small_text():
    np.testing.assert_array_equal(
        text.chunks(20, 5, seed=0, epoch=0), [(0, 9), (9, 5), (14, 5)]
    )
    np.testing.assert_array_equal(text.chunks(10, 5, seed=0, epoch=0), [(0, 9)])


def test_chunks_are_of_the_seed_and_the_epoch():
    same, again, epoch, seed = (
        text.chunks(5000, 70, *which) for which in [(1, 2), (1, 2), (1, 3), (2, 2)]
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
        text.chunks(**{"rows": 1000, "bptt": 70, "seed": 0, "epoch": 0} | arguments)
