"""Which pictures are held out, and what is checked in all layouts."""

import shutil

import numpy as np
import pytest
from picture_folders import class_folders, names, write
from PIL import Image

from train.data import pictures


@pytest.mark.parametrize("train", ["", "train"])
def test_a_fifth_is_held_out(tmp_path, train):
    class_folders(tmp_path / train, b=11, a=4)
    found = pictures.read(tmp_path)
    assert found.classes == ("a", "b")
    assert names(found.valid) == ["b/04.png", "b/09.png"]
    assert names(found.train) == [
        *(f"a/{i:02}.png" for i in range(4)),
        *(f"b/{i:02}.png" for i in range(11) if i not in (4, 9)),
    ]
    assert found.train.labels.tolist() == [0] * 4 + [1] * 9
    assert found.train.labels.dtype == found.valid.labels.dtype == np.int32
    assert found.split == pictures.EVERY_FIFTH


def test_a_truncated_picture_is_named_before_training(tmp_path):
    class_folders(tmp_path, a=5, b=5)
    path = write(tmp_path / "a" / "cut.jpg", 200, 200)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cannot be read: .*cut\.jpg: .*truncated"):
        pictures.read(tmp_path)


def test_all_unreadable_files_are_named_at_once(tmp_path):
    class_folders(tmp_path, a=20, b=2)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "b" / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: 32-bit pixels.*white level$"):
        pictures.read(tmp_path)
    for name in ("03", "04", "07"):
        (tmp_path / "a" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as error:
        pictures.read(tmp_path)
    message = str(error.value)
    assert "03.png: cannot identify image file, " in message
    assert "07.png" in message
    assert message.endswith(", ... (4 in all)")
    assert str(tmp_path) in message


@pytest.mark.parametrize(("count", "held_out"), [(2, "01"), (4, "03")])
def test_the_last_of_each_is_held_out_where_no_class_has_five(
    tmp_path, count, held_out
):
    class_folders(tmp_path, a=count, b=count, c=1)
    found = pictures.read(tmp_path)
    assert found.split == pictures.LAST_OF_EACH
    assert names(found.valid) == [f"a/{held_out}.png", f"b/{held_out}.png"]
    assert len(found.train.paths) == 2 * count - 1


def test_one_picture_per_class(tmp_path):
    class_folders(tmp_path, a=1, b=1)
    with pytest.raises(
        ValueError, match="no validation images: no class has two images$"
    ):
        pictures.read(tmp_path)
    class_folders(tmp_path / "split" / "train", a=1, b=1)
    class_folders(tmp_path / "split" / "valid", a=1, b=1)
    assert len(pictures.read(tmp_path / "split").train.paths) == 2


def test_classes_without_validation_images(tmp_path, capsys):
    class_folders(tmp_path, a=5, b=4, c=1)
    pictures.read(tmp_path)
    assert capsys.readouterr().out == "Classes without validation images: b, c\n"


def test_the_same_picture_for_training_and_validation(tmp_path, capsys):
    class_folders(tmp_path / "train", a=5, b=5)
    class_folders(tmp_path / "valid", a=2, b=2)
    pictures.read(tmp_path)
    assert "Warning" not in capsys.readouterr().out
    for ours, theirs in (("a/00", "a/03"), ("b/01", "a/02")):
        shutil.copy(
            tmp_path / f"train/{theirs}.png", tmp_path / "valid" / f"{ours}.png"
        )
    pictures.read(tmp_path)
    assert capsys.readouterr().out == (
        "Warning: both in training and in validation, byte for byte: 2 images, such "
        "as valid/a/00.png = train/a/03.png\n"
    )


def test_reading_many_images_is_announced(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path, a=5, b=5)
    monkeypatch.setattr(pictures, "SLOW", 10)
    pictures.read(tmp_path)
    assert capsys.readouterr().out == "Reads 10 images once, to find damaged ones.\n"
