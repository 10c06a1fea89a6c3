"""Text as streams of word ids, from files or from Python's own documentation."""

import codecs
import re
import zipfile
import zlib
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "<eos>"


class Corpus(NamedTuple):
    train: np.ndarray  # (tokens,) int32 ids, all lines one after the other
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tuple[str, ...]  # id -> word


# ---------------------------------------------------------------------------
# words and ids
# ---------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words, numbers and runs of one mark: the tokens of `pydoc_topics`."""
    token = r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|([^\w\s]|_)\1*"
    return [match[0] for match in re.finditer(token, text.lower())]


def encode(words: list[str], vocabulary: tuple[str, ...]) -> np.ndarray:
    """int32 ids; a word that is not in the vocabulary is `<unk>`."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    known = map(ids.get, words, repeat(ids[UNKNOWN]))
    return np.fromiter(known, np.int32, len(words))


def unknown(words: list[str], vocabulary: tuple[str, ...]) -> list[str]:
    """The words that `encode` would make `<unk>`, each once, as they come."""
    known = set(vocabulary)
    return [word for word in dict.fromkeys(words) if word not in known]


def detokenised(words: list[str]) -> str:
    """Text to read, with the usual spaces; they cannot be restored exactly."""
    text = " ".join(words)
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # WikiText's 1 @,@ 000 and well @-@ read
    text = re.sub(r" ([,.;:)?!]|'s\b)", r"\1", text)
    text = re.sub(r"\( ", "(", text)
    return re.sub(rf" ?{EOS} ?", "\n", text)


def _corpus(splits: list[list[str]], max_vocabulary: int, min_count: int) -> Corpus:
    """Ids by falling frequency in the training text, ties by first appearance."""
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    special = {PAD, UNKNOWN, EOS}  # always in the vocabulary
    if max_vocabulary < len(special):
        raise ValueError(
            f"max_vocabulary must be at least {len(special)}, got {max_vocabulary}"
        )
    counts = Counter(splits[0])
    counts[UNKNOWN] += 0
    ranked = [word for word, _ in counts.most_common()]
    common = [w for w in ranked if counts[w] >= min_count and w not in special]
    kept = {UNKNOWN, EOS, *common[: max_vocabulary - len(special)]}
    vocabulary = (PAD, *(word for word in ranked if word in kept))
    train, valid, test = (encode(split, vocabulary) for split in splits)
    return Corpus(train, valid, test, vocabulary)


# ---------------------------------------------------------------------------
# WikiText-2, or any other text in three files
# ---------------------------------------------------------------------------

WIKITEXT2_URL = "https://wikitext.smerity.com/wikitext-2-v1.zip"  # its author's copy
LAYOUTS = ("wiki.{}.tokens", "wiki.{}.raw", "{}.txt")
SPLITS = (("train",), ("valid", "validation"), ("test",))
BELOW = (
    "wikitext-2",
    "wikitext-2-raw",
    "wikitext-2-v1.zip",
    "wikitext-2-raw-v1.zip",
)  # where else to look, in a folder
_GET_IT = f"WikiText-2 is at {WIKITEXT2_URL}."


def wikitext2(
    path: Path | str, max_vocabulary: int = 60_000, min_count: int = 1
) -> Corpus:
    """WikiText-2, or a text of one's own: split at white space, `<eos>` ends a line.

    Args:
        path: a folder with `wiki.train.tokens`, `wiki.valid.tokens` and
            `wiki.test.tokens`; or the folder above it, or the publisher's zip, or its
            folder. Also `wiki.*.raw`, or `train.txt`, `valid.txt` and `test.txt`.
        max_vocabulary: the most words, `<pad>`, `<unk>` and `<eos>` among them; the
            rarer ones become `<unk>`. WikiText-2 has 33,279.
        min_count: words less frequent than this in the training text become `<unk>`.
    """
    files = _find_files(Path(path))
    splits = [_lines(*file) for file in files]
    return _corpus(splits, max_vocabulary, min_count)


def _lines(path: Path, raw: bytes) -> list[str]:
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path} must be UTF-8, line {line:,} is not: {error}"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: {len(raw):,} bytes without a word")
    if not text.endswith("\n"):
        text += "\n"
    return text.replace("\n", f" {EOS} ").split()


def _find_files(path: Path) -> list[tuple[Path, bytes]]:
    """The three files of one layout, from the first place that has all of them."""
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist. {_GET_IT}")
    layouts = [
        [[form.format(s) for s in split] for split in SPLITS] for form in LAYOUTS
    ]
    incomplete = []
    for place in (path, *(path / name for name in BELOW)):
        files = _read_place(place, [n for names in layouts for s in names for n in s])
        for names in layouts:
            found = [[name for name in split if name in files] for split in names]
            if all(found):
                return [(place / name, files[name]) for name, *_ in found]
            if any(found):
                missing = next(n for n, f in zip(names, found, strict=True) if not f)
                incomplete.append(f"{place} has no {' or '.join(missing)}")
    if incomplete:
        raise ValueError(f"path={str(path)!r}: {incomplete[0]}. {_GET_IT}")
    wanted = (*(form.format("train") for form in LAYOUTS), *BELOW)
    raise ValueError(
        f"path={str(path)!r} holds neither {', nor '.join(wanted)}. {_GET_IT}"
    )


def _read_place(place: Path, names: list[str]) -> dict[str, bytes]:
    """Those of the files that a folder or a zip has."""
    if not place.is_file():
        paths = [place / name for name in names]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    try:
        with zipfile.ZipFile(place) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            return {n: archive.read(members[n]) for n in names if n in members}
    except (  # the last two: a method of compression it does not know, or encrypted
        EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{place} must be a folder or a zip, and cannot be read as a zip: {error}. "
            f"{_GET_IT}"
        ) from error


# ---------------------------------------------------------------------------
# the text of Python's help(), which comes with Python
# ---------------------------------------------------------------------------

BLOCK = 20  # paragraphs on end that stay together


def pydoc_topics() -> Corpus:
    """The prose of `pydoc_data.topics`, about 75,000 words; it varies with Python.

    Topics quote each other, so a paragraph is taken only where it first comes: else the
    text to be predicted would be in the training text. Words seen less than three times
    in that are `<unk>`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"this Python came without its documentation ({error}): install the "
            "package of it that has pydoc_data, or give a text of your own"
        ) from error
    paragraphs = dict.fromkeys(
        (*words(paragraph), EOS)
        for text in topics.values()
        for paragraph in re.split(r"\n\s*\n", text)
        if _is_prose(paragraph)
    )
    splits = [[], [], []]
    for i, paragraph in enumerate(paragraphs):
        splits[{4: 2, 9: 1}.get(i // BLOCK % 10, 0)] += paragraph
    return _corpus(splits, max_vocabulary=60_000, min_count=3)


def _is_prose(paragraph: str) -> bool:
    """Not code, not a table and not a line below a title."""
    plain = sum(c.isalpha() or c.isspace() for c in paragraph)
    return plain > 0.7 * len(paragraph)


# ---------------------------------------------------------------------------
# streams to batches
# ---------------------------------------------------------------------------

FIRST_EXTRA = 25  # tokens by which the first chunk of the article's epoch is longer
SPREAD = 5  # of the lengths: for a bptt of 70, as the next one
SHORTEST = 5


def columns(tokens: np.ndarray, batch_size: int) -> np.ndarray:
    """(rows, batch_size) int32: each column goes on where the one before it ends."""
    rows = len(tokens) // max(batch_size, 1)
    if batch_size < 1 or rows < 2:
        raise ValueError(
            f"batch_size must be in [1, {len(tokens) // 2}], for 2 rows or more of the "
            f"{len(tokens):,} tokens, got {batch_size}"
        )
    cut = np.asarray(tokens[: rows * batch_size], np.int32)
    return np.ascontiguousarray(cut.reshape(batch_size, rows).T)


def chunks(
    rows: int,
    bptt: int,
    seed: int,
    epoch: int,
    style: Literal["article", "salesforce"] = "article",
) -> np.ndarray:
    """(steps, 2) int32: first row and length of each chunk of an epoch, end to end.

    Lengths are about `bptt`, one in twenty about half of it. The targets of a chunk lie
    one row later, so the last one may start at `rows - 2`.

    Args:
        rows: of the stream in `columns`.
        bptt: the usual length, at least 5.
        seed: of the run.
        epoch: each has lengths of its own.
        style: "article": the first length is bptt + 25, and the number of chunks is
            always rows // bptt - 1, which leaves out the end of the stream (3 to 4 % of
            WikiText-2). "salesforce": all lengths are random, to the end.
    """
    if style not in ("article", "salesforce"):
        raise ValueError(f"style must be 'article' or 'salesforce', got {style!r}")
    if bptt < SHORTEST:
        raise ValueError(f"bptt must be at least {SHORTEST}, got {bptt}")
    needed = 2 * bptt if style == "article" else 3
    if rows < needed:
        raise ValueError(
            f"rows must be at least {needed} for bptt={bptt} in the style {style!r}, "
            f"got {rows}: a smaller batch_size gives more"
        )
    rng = np.random.default_rng([seed, epoch])
    if style == "article":
        lengths = _lengths(rng, bptt, rows // bptt - 1)
        lengths[0] = bptt + FIRST_EXTRA
        # The schedule counts on every chunk, but the stream may end before the last,
        # all but never with a bptt of 70, always with one of 5. So chunks are cut where
        # they would leave less than the shortest length to each of those to come.
        to_come = np.arange(len(lengths))[::-1]
        ends = np.minimum(np.cumsum(lengths), rows - 1 - SHORTEST * to_come)
    else:
        lengths = _lengths(rng, bptt, rows // SHORTEST + 1)
        ends = np.minimum(np.cumsum(lengths), rows - 1)
    starts = np.concatenate([[0], ends[:-1]])
    table = np.stack([starts, ends - starts], 1).astype(np.int32)
    return table if style == "article" else table[starts < rows - 2]


def _lengths(rng, bptt: int, n: int) -> np.ndarray:
    centres = np.where(rng.random(n) < 0.95, bptt, bptt / 2)
    lengths = rng.normal(centres, SPREAD).astype(np.int64)
    return np.clip(lengths, SHORTEST, bptt + FIRST_EXTRA)  # no program for a longer one
