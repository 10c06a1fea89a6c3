"""Corpora as streams of word ids, from files or from Python's own documentation."""

import codecs
import re
import zipfile
import zlib
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "<eos>"


class Corpus(NamedTuple):
    train: np.ndarray  # (tokens,) int32 ids, line after line
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tuple[str, ...]  # id -> word


def load(data_dir: Path | None) -> Corpus:
    """The text in a folder, see `wikitext2`; None: `pydoc_topics`."""
    return pydoc_topics() if data_dir is None else wikitext2(data_dir)


# ---------------------------------------------------------------------------
# words and ids
# ---------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The tokens of `pydoc_topics`: lower-case words, numbers, runs of one symbol."""
    token = r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|([^\w\s]|_)\1*"
    return [match[0] for match in re.finditer(token, text.lower())]


def encode(words: list[str], vocabulary: tuple[str, ...]) -> np.ndarray:
    """int32 ids. A word outside the vocabulary becomes `<unk>`."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    known = map(ids.get, words, repeat(ids[UNKNOWN]))
    return np.fromiter(known, np.int32, len(words))


def unknown_words(words: list[str], vocabulary: tuple[str, ...]) -> list[str]:
    """The distinct words that `encode` turns into `<unk>`, in order of appearance."""
    known = set(vocabulary)
    return [word for word in dict.fromkeys(words) if word not in known]


def detokenise(words: list[str]) -> str:
    """Readable text with the usual spaces, which cannot be restored exactly."""
    text = " ".join(words)
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # WikiText's 1 @,@ 000 and well @-@ read
    text = re.sub(r" ([,.;:)?!]|'s\b)", r"\1", text)
    text = re.sub(r"\( ", "(", text)
    return re.sub(rf" ?{EOS} ?", "\n", text)


def _corpus(splits: list[list[str]], max_vocabulary: int, min_count: int) -> Corpus:
    """Ids by decreasing frequency in the training text, ties by first appearance."""
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
SUBFOLDERS = (  # of the given folder, also searched
    "wikitext-2",
    "wikitext-2-raw",
    "wikitext-2-v1.zip",
    "wikitext-2-raw-v1.zip",
)
_DOWNLOAD = f"WikiText-2 is at {WIKITEXT2_URL}."


def wikitext2(
    path: Path | str, max_vocabulary: int = 60_000, min_count: int = 1
) -> Corpus:
    """WikiText-2, or your own text: split at white space, `<eos>` ends each line.

    Args:
        path: a folder with `wiki.train.tokens`, `wiki.valid.tokens` and
            `wiki.test.tokens`, its parent folder, the publisher's zip, or the folder of
            that. Also `wiki.*.raw`, or `train.txt`, `valid.txt` and `test.txt`.
        max_vocabulary: the largest vocabulary, including `<pad>`, `<unk>` and `<eos>`;
            rarer words become `<unk>`. WikiText-2 has 33,279 words.
        min_count: words that occur less often in the training text become `<unk>`.
    """
    files = _find_files(Path(path))
    splits = [_split_words(*file) for file in files]
    return _corpus(splits, max_vocabulary, min_count)


def _split_words(path: Path, raw: bytes) -> list[str]:
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
    """The three files of one layout, from the first location that has all of them."""
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist. {_DOWNLOAD}")
    layouts = [
        [[form.format(s) for s in split] for split in SPLITS] for form in LAYOUTS
    ]
    candidates: list[str] = [
        name for names in layouts for split in names for name in split
    ]
    incomplete = []
    for location in (path, *(path / name for name in SUBFOLDERS)):
        files = _read_files(location, candidates)
        for names in layouts:
            found = [[name for name in split if name in files] for split in names]
            if all(found):
                return [(location / name, files[name]) for name, *_ in found]
            if any(found):
                missing = next(n for n, f in zip(names, found, strict=True) if not f)
                incomplete.append(f"{location} has no {' or '.join(missing)}")
    if incomplete:
        raise ValueError(f"path={str(path)!r}: {incomplete[0]}. {_DOWNLOAD}")
    expected = (*(form.format("train") for form in LAYOUTS), *SUBFOLDERS)
    raise ValueError(
        f"path={str(path)!r} contains none of {', '.join(expected)}. {_DOWNLOAD}"
    )


def _read_files(location: Path, names: list[str]) -> dict[str, bytes]:
    """The named files that a folder or a zip contains."""
    if not location.is_file():
        paths = [location / name for name in names]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    try:
        with zipfile.ZipFile(location) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            return {n: archive.read(members[n]) for n in names if n in members}
    except (  # the last two: an unknown compression method, or encrypted
        EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{location} must be a folder or a zip, but cannot be read as a zip: "
            f"{error}. {_DOWNLOAD}"
        ) from error


# ---------------------------------------------------------------------------
# the text of Python's help(), which comes with Python
# ---------------------------------------------------------------------------

BLOCK = 20  # consecutive paragraphs that stay in one split


def pydoc_topics() -> Corpus:
    """The prose of `pydoc_data.topics`: 75,000 words or so, depending on the Python.

    Topics quote each other, so each paragraph counts only where it first appears:
    otherwise the test text would leak into the training text. Words that occur less
    than three times there become `<unk>`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"this Python lacks its documentation ({error}): install the package that "
            "has pydoc_data, or use your own text"
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
    """Neither code nor a table nor the underline of a title."""
    plain = sum(c.isalpha() or c.isspace() for c in paragraph)
    return plain > 0.7 * len(paragraph)
