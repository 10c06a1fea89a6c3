"""Corpora from files in every layout, and from Python itself."""

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

from train.data import chunks, text

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
    assert text.unknown_words(["b", "x", "a", "y", "x"], vocabulary) == ["x", "y"]
    assert text.encode([], vocabulary).shape == (0,)


def test_detokenise():
    words = "= A = <eos> <eos> It 's 1 @,@ 200 @.@ 5 well @-@ read ( old ) men ; no ? !"
    expected = "= A =\n\nIt's 1,200.5 well-read (old) men; no?!"
    assert text.detokenise(words.split()) == expected
    assert text.detokenise(["a", "<eos>"]) == "a\n"
    assert text.detokenise([]) == ""


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
    ids, valid, _, vocabulary, *_ = text._corpus(
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
        match="none of wiki.train.tokens, .*train.txt, wikitext-2, .*https://",
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
    notes = write(tmp_path, "{}.txt") / "notes.txt"
    notes.write_text("a b c\n")
    with pytest.raises(ValueError, match="notes.txt must be a folder or a zip"):
        text.wikitext2(notes)
    with pytest.raises(ValueError, match="is one of the texts of .*pass that"):
        text.load(write(tmp_path) / "wiki.train.tokens")


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
    if not any((root / name).exists() for name in text.SUBFOLDERS):
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
    rows = chunks.columns(corpus.train, 100)
    assert rows.shape == (20_886, 100)
    assert len(chunks.chunk_table(len(rows), 70, seed=0, epoch=0)) == 297


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
    with pytest.raises(ValueError, match="lacks its documentation .*pydoc_data"):
        text.pydoc_topics()
