"""Corpora as streams of word ids, from files or from Python's own documentation."""

import re
import zipfile
import zlib
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data import own_text
from train.data.own_text import EOS, Unit, unit_name

PAD, UNKNOWN = "<pad>", "<unk>"


class Corpus(NamedTuple):
    train: np.ndarray  # (tokens,) int32 ids, line after line
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tuple[str, ...]  # id -> word
    unit: Unit = "spaced"  # what a token is
    note: str = ""  # how the text was split, in a sentence; empty: it came in parts


def load(
    data_dir: Path | None, unit: Unit | None = None, min_count: int | None = None
) -> Corpus:
    """The text in a file or a folder; None: `pydoc_topics`.

    Args:
        data_dir: WikiText-2 or any text in three files, see `wikitext2`; or one file,
            or a folder of .txt and .md files, which is split in three, see `own_text`.
        unit: of the tokens: "words" and punctuation marks, what is "spaced", or
            "characters". None: spaced in three files and words in a text that is split,
            but characters where there are no spaces.
        min_count: words, or characters, that occur less often in the training text
            become `<unk>`; None: 1 for three files, 2 for a text that is split, where
            no word would be `<unk>` otherwise while the network learns.
    """
    if data_dir is None:
        for option, value in (("unit", unit), ("min_count", min_count)):
            if value is not None:
                raise ValueError(
                    f"{option} must be None for Python's documentation, got {value!r}"
                )
        return pydoc_topics()
    path = Path(data_dir)
    if _in_three_files(path):
        return wikitext2(
            path, min_count=1 if min_count is None else min_count, unit=unit
        )
    parts, unit, note = own_text.load(path, unit)
    corpus = _corpus(parts, 60_000, 2 if min_count is None else min_count)
    return corpus._replace(unit=unit, note=note)


def _in_three_files(path: Path) -> bool:
    """Whether it is for `wikitext2` to read, or to refuse."""
    if path.is_file():
        siblings = [path.with_name(name) for name in NAMES]
        one_of_three = path.name in NAMES and sum(p.is_file() for p in siblings) > 1
        return one_of_three or path.suffix == ".zip"
    known = any((path / name).exists() for name in (*NAMES, *SUBFOLDERS))
    return known or not own_text.find_files(path)


# ---------------------------------------------------------------------------
# warnings
# ---------------------------------------------------------------------------

MANY_UNKNOWN = 0.2  # of the tokens of a part
MANY_COPIED = 0.1
PASSAGE = {"words": 20, "spaced": 20, "characters": 60}


def unknown_share(tokens: np.ndarray, vocabulary: tuple[str, ...]) -> float:
    """Of a text, the share that is `<unk>`."""
    return float(np.mean(tokens == vocabulary.index(UNKNOWN)))


def copied_share(train: np.ndarray, other: np.ndarray, length: int) -> float:
    """Of the passages of `length` tokens of a text, the share that train also has."""

    def passages(tokens):
        """A number for each passage, equal for equal ones."""
        n = max(0, len(tokens) - length + 1)
        numbers = np.zeros(n, np.uint64)
        for i in range(length):
            numbers *= np.uint64(0x9E3779B97F4A7C15)
            numbers += tokens[i : i + n].astype(np.uint64) + np.uint64(1)
        return numbers

    found = np.isin(passages(other), passages(train))
    return float(found.mean()) if len(found) else 0.0


def warnings(corpus: Corpus) -> list[str]:
    """What makes the perplexity of a text look better than it is, and what to do."""
    found = []
    for name, part in (("validation", corpus.valid), ("test", corpus.test)):
        share = unknown_share(part, corpus.vocabulary)
        if share > MANY_UNKNOWN:
            few = corpus.unit == "characters"
            found.append(
                f"{share:.0%} of the {name} text is {UNKNOWN}, "
                f"{unit_name(corpus.unit)} outside the vocabulary: as one they are "
                "easy to predict, and perplexity looks better than it is. Add training "
                "text of the same kind, or lower --min-count"
                f"{'' if few else ', or use --unit characters'}."
            )
        share = copied_share(corpus.train, part, PASSAGE[corpus.unit])
        if share > MANY_COPIED:
            found.append(
                f"{share:.0%} of the {name} text is in the training text too, word for "
                "word, so perplexity is that of a memory: remove the copies."
            )
    return found


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


def detokenise(words: list[str], unit: Unit = "spaced") -> str:
    """Readable text with the usual spaces, which cannot be restored exactly."""
    if unit == "characters":
        return "".join("\n" if word == EOS else word for word in words)
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
    for word in (UNKNOWN, EOS):
        counts[word] += 0
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
NAMES: list[str] = [
    form.format(name) for form in LAYOUTS for split in SPLITS for name in split
]
SUBFOLDERS = (  # of the given folder, also searched
    "wikitext-2",
    "wikitext-2-raw",
    "wikitext-2-v1.zip",
    "wikitext-2-raw-v1.zip",
)
_DOWNLOAD = f"WikiText-2 is at {WIKITEXT2_URL}."


def wikitext2(
    path: Path | str,
    max_vocabulary: int = 60_000,
    min_count: int = 1,
    unit: Unit | None = None,
) -> Corpus:
    """WikiText-2, or your own text: split at white space, `<eos>` ends each line.

    Args:
        path: a folder with `wiki.train.tokens`, `wiki.valid.tokens` and
            `wiki.test.tokens`, its parent folder, the publisher's zip, or the folder of
            that. Also `wiki.*.raw`, or `train.txt`, `valid.txt` and `test.txt`.
        max_vocabulary: the largest vocabulary, including `<pad>`, `<unk>` and `<eos>`;
            rarer words become `<unk>`. WikiText-2 has 33,279 words.
        min_count: words that occur less often in the training text become `<unk>`.
        unit: see `load`.
    """
    texts = [own_text.decode(*file) for file in _find_files(Path(path))]
    unit, note = own_text.choose_unit(texts[0], unit, "spaced")
    splits = [own_text.split_tokens(text, unit) for text in texts]
    corpus = _corpus(splits, max_vocabulary, min_count)
    return corpus._replace(unit=unit, note=note)


def _find_files(path: Path) -> list[tuple[Path, bytes]]:
    """The three files of one layout, from the first location that has all of them."""
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist. {_DOWNLOAD}")
    if path.name in NAMES and path.is_file():
        raise ValueError(
            f"path={str(path)!r} is one of the texts of {path.parent}: pass that folder"
        )
    layouts = [
        [[form.format(s) for s in split] for split in SPLITS] for form in LAYOUTS
    ]
    incomplete = []
    for location in (path, *(path / name for name in SUBFOLDERS)):
        files = _read_files(location, NAMES)
        for names in layouts:
            found = [[name for name in split if name in files] for split in names]
            if all(found):
                return [(location / name, files[name]) for name, *_ in found]
            if any(found):
                missing = next(n for n, f in zip(names, found, strict=True) if not f)
                incomplete.append(f"{location} has no {' or '.join(missing)}")
    if incomplete:
        raise ValueError(
            f"path={str(path)!r}: {incomplete[0]}. A text in one file, under another "
            f"name, is split by itself. {_DOWNLOAD}"
        )
    expected = (*(form.format("train") for form in LAYOUTS), *SUBFOLDERS)
    raise ValueError(
        f"path={str(path)!r} contains none of {', '.join(expected)}, and no other "
        f"{' or '.join(own_text.SUFFIXES)} file. {_DOWNLOAD}"
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
