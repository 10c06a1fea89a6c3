"""A person's own text: bytes to text, text to tokens, one text to three parts."""

import codecs
import random
import zipfile

import numpy as np
import pytest

from train.data import own_text, text

EOS = "<eos>"


def prose(lines, seed=0, words=40):
    """Lines of eight words or so, an empty one after every fifth."""
    rng = random.Random(seed)
    return "".join(
        " ".join(f"w{rng.randrange(words)}" for _ in range(rng.randrange(6, 11)))
        + ("\n\n" if i % 5 == 4 else "\n")
        for i in range(lines)
    )


# ---------------------------------------------------------------------------
# bytes to text
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_byte_order_marks(tmp_path, mark, encoding):
    assert (
        own_text.decode(tmp_path, mark + "naïve 文\n".encode(encoding)) == "naïve 文\n"
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("plain words".encode("utf-16-le"), "byte 1 is NUL: it is UTF-16 without"),
        ("plain words".encode("utf-16-be"), "byte 0 is NUL"),
        (b"half a text\0", "byte 11 is NUL"),
        (b"\x89PNG\r\n\x1a\n\xff\xd8", "must be UTF-8, line 1 is not"),
        (b"one\ntwo\ncaf\xe9\n", "must be UTF-8, line 3 is not"),
        (b"\x01\x02\x03abc\x04" * 9, "36 of its 63 characters are control"),
        (codecs.BOM_UTF16_LE + b"a", "must be UTF-16, line 1 is not"),
        (codecs.BOM_UTF16_LE + b"a\0\0\0", "1 of its 2 characters are control"),
        (b"", "is empty: 0 bytes"),
        (codecs.BOM_UTF8, "is empty: 0 bytes"),
        (b" \r\n\t\n", "is empty: 5 bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, raw, message):
    path = tmp_path / "notes.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"^{path} .*{message}"):
        text.load(path)
    # beside a readable one too, unless it is empty
    (tmp_path / "other.txt").write_text(prose(100))
    if "empty" in message:
        assert "1 files" in text.load(tmp_path).note
    else:
        with pytest.raises(ValueError, match=f"^{path} must be"):
            text.load(tmp_path)


def test_a_document_is_no_text(tmp_path):
    path = tmp_path / "thesis.docx"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w>")
    with pytest.raises(ValueError, match="thesis.docx must be plain text, but is an"):
        text.load(path)


# ---------------------------------------------------------------------------
# text to tokens
# ---------------------------------------------------------------------------


def test_words_and_marks():
    line = 'I don\'t, l’été (10,5) -- foo_bar... "B2B" <unk> 100%!!'
    assert own_text.split_tokens(line, "words") == [
        "I", "don't", ",", "l’été", "(", "10", ",", "5", ")", "--", "foo", "_", "bar",
        "...", '"', "B2B", '"', "<unk>", "100", "%", "!!", EOS,
    ]  # fmt: skip
    # vowel signs, which are no letters, stay in their word
    hindi = "हिन्दी भाषा।"
    assert own_text.split_tokens(hindi, "words") == ["हिन्दी", "भाषा", "।", EOS]
    assert own_text.split_tokens("no marks\n\nhere\n", "words") == [
        "no", "marks", EOS, EOS, "here", EOS,
    ]  # fmt: skip


def test_spaced_and_characters():
    assert own_text.split_tokens("a, b\r\n\nc", "spaced") == [
        "a,",
        "b",
        EOS,
        EOS,
        "c",
        EOS,
    ]
    for end in ("\n", "\r\n", "\r"):
        found = own_text.split_tokens(f"我 爱{end}{end}你", "characters")
        assert found == ["我", " ", "爱", EOS, EOS, "你", EOS]
    assert text.detokenise(["我", " ", "爱", EOS, "你"], "characters") == "我 爱\n你"


CHINESE = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n"
THAI = "ประเทศไทยเป็นประเทศที่ตั้งอยู่ในเอเชียตะวันออกเฉียงใต้\nเมืองหลวงคือกรุงเทพมหานคร\n"


@pytest.mark.parametrize(
    ("sample", "without"),
    [
        (CHINESE, True),
        (JAPANESE, True),
        (THAI, True),
        (CHINESE + "GNU tar 1.34\n", True),
        (" ".join(CHINESE), False),  # cut into words
        ("床 前 明月 光 ， 疑 是 地上 霜 。\n", False),
        ("ประเทศ ไทย เป็น ประเทศ ที่ ตั้ง อยู่ ใน เอเชีย\n", False),
        ("대한민국은 민주공화국이다. 모든 권력은 국민으로부터 나온다.\n", False),
        ("The quick brown fox, https://example.org/a/long/address\n", False),
        ("Donaudampfschifffahrtsgesellschaftskapitän fährt heute\n", False),
        ("ACGTACGTTAGC" * 6 + "\n" + "GATTACA" * 9, True),
        ("x" * 1_000_000, True),
    ],
)
def test_text_without_spaces_is_detected(sample, without):
    assert bool(own_text.without_spaces(sample)) == without


def test_the_unit_can_be_overruled(tmp_path):
    path = tmp_path / "zh.txt"
    path.write_text(CHINESE * 200, encoding="utf-8")
    corpus = text.load(path)
    assert corpus.unit == "characters" and len(corpus.vocabulary) == 20 + 3 - 1
    assert "Tokens are characters: 100% of it is in a script without" in corpus.note
    assert "床" in corpus.vocabulary
    by_words = text.load(path, "words")
    assert by_words.unit == "words" and "characters" not in by_words.note
    assert "疑是地上霜" in by_words.vocabulary
    path.write_text(prose(300))
    assert text.load(path).unit == "words"
    assert "w" in text.load(path, "characters").vocabulary
    with pytest.raises(
        ValueError, match="unit must be None or one of words.*'letters'"
    ):
        text.load(path, "letters")  # type: ignore[arg-type]
    # also in three files
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(JAPANESE, encoding="utf-8")
    corpus = text.load(tmp_path)
    assert (corpus.unit, corpus.valid[-1]) == (
        "characters",
        corpus.vocabulary.index(EOS),
    )
    assert text.load(tmp_path, "spaced").unit == "spaced"


# ---------------------------------------------------------------------------
# one text to three parts
# ---------------------------------------------------------------------------


def in_words(corpus):
    return [[corpus.vocabulary[i] for i in part] for part in corpus[:3]]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_the_parts_are_the_text_in_order(tmp_path, ends):
    path = tmp_path / "notes.txt"
    content = prose(400)
    path.write_bytes(codecs.BOM_UTF8 + content.replace("\n", ends).encode())
    corpus = text.load(path)
    parts = in_words(corpus)
    whole = content.replace("\n", f" {EOS} ").split()
    assert sum(parts, []) == whole  # nothing twice, nothing lost
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert len(part) / len(whole) == pytest.approx(share, abs=0.03)
    # cut after empty lines
    assert parts[0][-2:] == parts[1][-2:] == [EOS, EOS]
    sizes = ", ".join(f"{len(part):,}" for part in parts)
    assert corpus.note == (
        f"{path}, split in order, at empty lines: {sizes} words to train, validate and "
        "test."
    )


def test_one_line(tmp_path):
    """A line of a million characters: cut between two words."""
    path = tmp_path / "line.txt"
    words = [f"v{i % 997}" for i in range(200_000)]
    path.write_text(" ".join(words))
    corpus = text.load(path)
    assert "at any word" in corpus.note
    assert sum(in_words(corpus), []) == [*words, EOS]
    assert [len(part) for part in corpus[:3]] == [160_001, 20_000, 20_000]
    path.write_text("ab" * 500_000)
    corpus = text.load(path)
    assert corpus.unit == "characters" and "at any character" in corpus.note
    assert [len(part) for part in corpus[:3]] == [800_001, 100_000, 100_000]


@pytest.mark.parametrize("content", ["a", "a\n", "a b c\n" * 100])
def test_too_short(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    n = 400 if len(content) > 2 else 2
    with pytest.raises(
        ValueError, match=f"notes.txt has {n} words, .* at least 500 are"
    ):
        text.load(path)


def test_a_folder(tmp_path):
    """In the order of names, 2 before 10; hidden and other files are left out."""
    contents = {}
    for i in (1, 2, 3, 10):
        name = f"chapter{i}.{'md' if i == 2 else 'TXT'}"
        contents[name] = f"chapter {i} begins\n" * (300 if i == 1 else 50)
        (tmp_path / name).write_text(contents[name])
    for name in (".hidden.txt", "__MACOSX/a.txt", ".git/b.md", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "empty.txt").touch()
    found = own_text.load(tmp_path)
    assert sum(found.parts, []) == (
        "".join(contents.values()).replace("\n", f" {EOS} ").split()
    )
    assert f"{tmp_path}, 4 files, split in order, at the ends of lines" in found.note
    # between files, where the shares allow it
    for i in (3, 10):
        (tmp_path / f"chapter{i}.TXT").write_text(f"chapter {i} begins\n" * 44)
    found = own_text.load(tmp_path)
    assert "at the ends of files" in found.note
    assert {*found.parts[1]} == {"chapter", "3", "begins", EOS}
    assert {*found.parts[2]} == {"chapter", "10", "begins", EOS}


def test_folders_that_are_not_to_be_split(tmp_path):
    (tmp_path / "a.txt").write_text(prose(200))
    (tmp_path / "train.txt").write_text(prose(200))
    with pytest.raises(
        ValueError, match="has no valid.txt.* in one file.* split by its"
    ):
        text.load(tmp_path)
    # the file itself may have that name, as long as it is alone
    assert "split in order" in text.load(tmp_path / "train.txt").note
    (tmp_path / "valid.txt").write_text(prose(20))
    with pytest.raises(
        ValueError, match=r"train.txt' is one of the texts of .*pass that"
    ):
        text.load(tmp_path / "train.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.pdf").touch()
    with pytest.raises(ValueError, match="contains none of .*and no other .txt or .md"):
        text.load(tmp_path / "empty")
    for name in "ab":
        (tmp_path / "empty" / f"{name}.txt").touch()
    with pytest.raises(ValueError, match="empty is empty: its 2 files have no word"):
        text.load(tmp_path / "empty")


def test_words_that_occur_once_are_unknown(tmp_path):
    """So the network sees the token that stands for all words to come."""
    path = tmp_path / "notes.txt"
    path.write_text(prose(400).replace("w7", "seldom", 1).replace("w8", "twice", 2))
    corpus = text.load(path)
    assert "twice" in corpus.vocabulary and "seldom" not in corpus.vocabulary
    assert np.sum(corpus.train == corpus.vocabulary.index("<unk>")) == 1
    assert "seldom" in text.load(path, min_count=1).vocabulary
    assert "w9" not in text.load(path, min_count=10**6).vocabulary
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        text.load(path, min_count=0)


@pytest.mark.parametrize("option", [{"unit": "words"}, {"min_count": 2}])
def test_pythons_documentation_has_no_options(option):
    with pytest.raises(
        ValueError, match=f"{next(iter(option))} must be None for Python"
    ):
        text.load(None, **option)


# ---------------------------------------------------------------------------
# warnings
# ---------------------------------------------------------------------------


def test_many_unknown_words(tmp_path):
    path = tmp_path / "notes.txt"
    strange = " ".join(f"x{i}" for i in range(400)) + "\n"
    path.write_text(prose(400) + strange)
    corpus = text.load(path)
    (warning,) = text.warnings(corpus)
    share = text.unknown_share(corpus.test, corpus.vocabulary)
    assert share == np.mean([w == "<unk>" for w in in_words(corpus)[2]]) > 0.5
    assert warning.startswith(f"{share:.0%} of the test text is <unk>, words outside")
    assert "--min-count, or use --unit characters." in warning
    path.write_text(prose(400))
    assert text.warnings(text.load(path)) == []


def test_copied_passages(tmp_path):
    rng = np.random.default_rng(0)
    train, fresh = rng.integers(0, 1000, (2, 5000)).astype(np.int32)
    other = np.concatenate([fresh[:300], train[700:1000]])
    windows = {tuple(train[i : i + 20]) for i in range(len(train) - 19)}
    expected = np.mean([tuple(other[i : i + 20]) in windows for i in range(581)])
    assert text.copied_share(train, other, 20) == expected == 281 / 581
    assert text.copied_share(train, other[:19], 20) == 0
    path = tmp_path / "notes.txt"
    path.write_text(prose(300, words=10**6) * 2)
    warnings = text.warnings(text.load(path, min_count=1))
    for name, warning in zip(("validation", "test"), warnings, strict=True):
        assert f"of the {name} text is in the training text too" in warning


def test_the_parts_share_no_passage(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(prose(400, words=10**6))
    corpus = text.load(path, min_count=1)
    for part in (corpus.valid, corpus.test):
        assert text.copied_share(corpus.train, part, 20) == 0
