"""Your own text: files read strictly, as words or characters, in three parts."""

import codecs
import itertools
import re
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

EOS = "<eos>"  # ends a line
SUFFIXES = (".txt", ".md")  # of the files of a folder
VALID, TEST = 0.1, 0.1  # shares of the text; the rest trains
SHORTEST = 500  # tokens that can be split: 50 for each of validation and test

# A token: a word or a punctuation mark, what stands between spaces, or a character.
Unit = Literal["words", "spaced", "characters"]


class Split(NamedTuple):
    parts: list[list[str]]  # tokens to train on, to validate on and to test on
    unit: Unit
    note: str  # what was read, and how it was split: a sentence


# ---------------------------------------------------------------------------
# bytes to text
# ---------------------------------------------------------------------------

_MARKS = (  # of byte order; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROLS = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_MOST_CONTROLS = 0.01  # of the characters of a text


def decode(path: Path, raw: bytes) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says.

    Raises:
        ValueError: it is in another encoding, binary, or empty.
    """
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if encoding == "UTF-8" and b"\0" in raw:
        raise ValueError(
            f"{path} must be UTF-8, byte {raw.index(0):,} is NUL: it is UTF-16 without "
            "a byte-order mark, or no text at all"
        )
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path} must be {encoding}, line {line:,} is not: {error}"
        ) from error
    controls = len(_CONTROLS.findall(text)) + text.count("\0")
    if "\0" in text or controls > _MOST_CONTROLS * len(text):
        raise ValueError(
            f"{path} must be a text, but {controls:,} of its {len(text):,} characters "
            "are control characters: it is a binary file"
        )
    if not text.strip():
        raise ValueError(f"{path} is empty: {len(raw):,} bytes without a word")
    return text


# ---------------------------------------------------------------------------
# text to tokens
# ---------------------------------------------------------------------------

# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
# With their punctuation.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
# Characters between spaces, on average, from which a text in these scripts has not been
# cut into words (Chinese words have 1.6, Thai words 4), and a text in any script.
_LONG, _VERY_LONG = 5, 30


def without_spaces(text: str) -> str:
    """Why a text has no spaces between its words, or nothing if it has them."""
    pieces = text.split()
    characters = sum(map(len, pieces))
    share = len(_UNSPACED.findall(text)) / characters
    if (
        share > 0.5
        and np.mean([len(p) for p in pieces if _UNSPACED.search(p)]) >= _LONG
    ):
        return f"{share:.0%} of it is in a script without spaces"
    mean = characters / len(pieces)
    if mean > _VERY_LONG:
        return f"it has a space every {mean:,.0f} characters only"
    return ""


def choose_unit(text: str, unit: Unit | None, default: Unit) -> tuple[Unit, str]:
    """`unit`, unless it is None; a sentence if characters are chosen."""
    if unit not in (None, *get_args(Unit)):
        allowed = ", ".join(get_args(Unit))
        raise ValueError(f"unit must be None or one of {allowed}, got {unit!r}")
    why = "" if unit else without_spaces(text)
    if why:
        return "characters", f"Tokens are characters: {why} (--unit words overrules)."
    return unit or default, ""


def unit_name(unit: Unit) -> str:
    return "characters" if unit == "characters" else "words"


def split_tokens(text: str, unit: Unit) -> list[str]:
    """The tokens of a text; `EOS` ends each line, the last one too."""
    if not text.endswith("\n"):
        text += "\n"
    if unit == "characters":
        return [EOS if c == "\n" else c for c in _unix(text)]
    if unit == "words":
        text = split_words(text)
    return text.replace("\n", f" {EOS} ").split()


def split_words(text: str) -> str:
    """The text with spaces around its punctuation: don't (10,5)! -> don't ( 10 , 5 ) !

    A run of one symbol stays together, and so does `<unk>`.
    """
    symbols = "".join(
        re.escape(c) for c in sorted({*text}) if unicodedata.category(c)[0] in "PS"
    )
    if not symbols:
        return text
    word = rf"[^\s{symbols}]+(?:['’][^\s{symbols}]+)*"
    token = rf"<unk>|{word}|([{symbols}])\1*"
    return re.sub(token, lambda match: f" {match[0]} ", text)


def _unix(text: str) -> str:
    """With the line ends of Unix instead of those of Windows and old Macs."""
    return re.sub("\r\n?", "\n", text)


# ---------------------------------------------------------------------------
# a file or a folder
# ---------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """The file itself, or the .txt and .md files of a folder and those below.

    Hidden ones are left out. They are in the order of their names, 2 before 10.
    """
    if path.is_file():
        return [path]

    def order(file: Path) -> list[Any]:
        parts = re.split(r"(\d+)", str(file.relative_to(path)).casefold())
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts if p]

    found = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(
            part.startswith((".", "__MACOSX")) for part in file.relative_to(path).parts
        )
    ]
    return sorted(found, key=lambda file: (order(file), str(file)))


def load(path: Path, unit: Unit | None = None) -> Split:
    """Reads a file or a folder and cuts it into three parts, in its order.

    Args:
        path: one file of text, or a folder with .txt and .md files.
        unit: of the tokens; None: `detect_unit`.

    Raises:
        ValueError: there is no text, a file cannot be read, or it is too short.
    """
    files = find_files(path)
    texts = []
    for file in files:
        if zipfile.is_zipfile(file):
            raise ValueError(
                f"{file} must be plain text, but is an archive or a document: save it "
                "as text (.txt)"
            )
        raw = file.read_bytes()
        # An empty file among others has nothing to say; alone it is refused.
        if len(files) == 1 or raw.removeprefix(codecs.BOM_UTF8).strip():
            texts.append(_unix(decode(file, raw)))
    if not texts:
        raise ValueError(f"{path} is empty: its {len(files):,} files have no word")
    unit, chosen = choose_unit("\n".join(texts), unit, "words")
    parts, where = split([split_tokens(text, unit) for text in texts], path, unit)
    named = f"{path}, {len(texts):,} files" if path.is_dir() else f"{path}"
    sizes = ", ".join(f"{len(part):,}" for part in parts)
    note = (
        f"{named}, split in order, at {where}: {sizes} {unit_name(unit)} to train, "
        f"validate and test. {chosen}"
    )
    return Split(parts, unit, note.strip())


def split(
    streams: list[list[str]], path: Path, unit: Unit
) -> tuple[list[list[str]], str]:
    """Cuts tokens into the first 80 %, the next 10 % and the last 10 %, at a boundary.

    Cuts between files where one ends within 2 % of the text, else at an empty line,
    else at the end of a line, else between two tokens.

    Returns:
        The parts, and the name of the weakest boundary.
    """
    stream, name = list(itertools.chain(*streams)), unit_name(unit)
    if len(stream) < SHORTEST:
        raise ValueError(
            f"{path} has {len(stream):,} {name}, ends of lines included; at least "
            f"{SHORTEST} are needed to train, validate and test"
        )
    ends = [i + 1 for i, token in enumerate(stream) if token == EOS]
    boundaries = {
        "the ends of files": list(itertools.accumulate(map(len, streams))),
        "empty lines": [i for i in ends if i > 1 and stream[i - 2] == EOS],
        "the ends of lines": ends,
    }
    cuts, levels = [0], []
    for share in (1 - VALID - TEST, 1 - TEST):
        target = round(share * len(stream))
        cut, level = target, len(boundaries)
        for i, positions in enumerate(boundaries.values()):
            nearest = min((abs(p - target), p) for p in [*positions, 0])[1]
            if abs(nearest - target) <= 0.02 * len(stream):
                cut, level = nearest, i
                break
        cuts.append(cut)
        levels.append(level)
    cuts.append(len(stream))
    parts = [stream[a:b] for a, b in itertools.pairwise(cuts)]
    return parts, [*boundaries, f"any {name[:-1]}"][max(levels)]
