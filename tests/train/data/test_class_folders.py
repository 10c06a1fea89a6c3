"""Folders of classes and of splits, as people name them, and what is refused."""

import os
import shutil
import sys

import pytest
from picture_folders import class_folders, names, write
from PIL import Image

from train.data import class_folders as layout
from train.data import pictures


@pytest.mark.parametrize(
    "folders",
    [
        ["valid", "val", "test"],
        ["val", "validation", "test"],
        ["Validation", "Test"],
        ["validation_set", "testing_set"],
        ["Val Images"],
    ],
)
@pytest.mark.parametrize("train", ["train", "Training_Set", "TRAINING"])
def test_a_separate_validation_set(tmp_path, train, folders):
    class_folders(tmp_path / train, a=5, b=2, c=1)
    for k, name in enumerate(folders):
        class_folders(tmp_path / name, c=k + 1, b=1)
    found = pictures.read(str(tmp_path))
    assert found.split == f"the images of {folders[0]}/"
    assert len(found.train.paths) == 8
    assert names(found.valid) == ["b/00.png", "c/00.png"]
    assert found.valid.labels.tolist() == [1, 2]
    assert found.valid.paths[0] == tmp_path / folders[0] / "b" / "00.png"


@pytest.mark.parametrize("test", ["test", "Test", "testing_set", "test-images"])
def test_test_images_are_no_validation_images(tmp_path, capsys, test):
    """Unless asked for."""
    class_folders(tmp_path / "train", a=5, b=5)
    class_folders(tmp_path / test, a=1, b=1)
    found = pictures.read(tmp_path)
    assert found.split == pictures.EVERY_FIFTH
    assert names(found.valid) == ["a/04.png", "b/04.png"]
    assert {path.parts[-3] for path in (*found.train.paths, *found.valid.paths)} == {
        "train"
    }
    assert capsys.readouterr().out == (
        f"{tmp_path}: not used: {test}/ (to validate on {test}/: --valid-folder "
        f"{test})\n"
    )
    found = pictures.read(tmp_path, test)
    assert found.split == f"the images of {test}/"
    assert {path.parts[-3] for path in found.valid.paths} == {test}
    assert len(found.train.paths) == 10
    assert capsys.readouterr().out == ""


def test_a_validation_folder_of_any_name(tmp_path):
    class_folders(tmp_path / "train", a=5, b=5)
    class_folders(tmp_path / "held out", a=1, b=2)
    found = pictures.read(tmp_path, "held out")
    assert names(found.valid) == ["a/00.png", "b/00.png", "b/01.png"]
    assert found.split == "the images of held out/"
    for name in ("test", "train"):
        with pytest.raises(
            ValueError,
            match=rf"valid_folder must be one of the folders beside train/ in .*: held "
            rf"out/; got '{name}'$",
        ):
            pictures.read(tmp_path, name)
    with pytest.raises(ValueError, match="valid_folder='b' needs a folder train/"):
        pictures.read(tmp_path / "train", "b")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("train", "train"), ("Train", "train"), ("TRAINING", "train")),
        *(("training_set", "train"), ("trainset", "train"), ("seg_train", "train")),
        *(("train images", "train"), ("Dataset-Train", "train"), ("val", "valid")),
        *(("valid", "valid"), ("Validation", "valid"), ("validation_data", "valid")),
        *(("test", "test"), ("Testing", "test"), ("seg_test", "test")),
        *(("images_test", "test"), ("TestSet", "test"), ("freight train", None)),
        *(("test_tube", None), ("trains", None), ("valley", None), ("contest", None)),
        *(("training shoes", None), ("data", None), ("", None), ("traintest", None)),
    ],
)
def test_names_of_splits(name, role):
    assert layout.split_role(name) == role


def test_a_second_folder_of_the_same_name(tmp_path, capsys):
    """As Kaggle's Intel data are packed, with pictures that have no labels."""
    for role in ("train", "test"):
        class_folders(tmp_path / f"seg_{role}" / f"seg_{role}", sea=5, street=5)
    write(tmp_path / "seg_pred" / "seg_pred" / "1.jpg")
    found = pictures.read(tmp_path)
    assert found.classes == ("sea", "street")
    assert found.split == pictures.EVERY_FIFTH
    assert len(found.train.paths) == 8
    printed = capsys.readouterr().out
    assert "not used: seg_pred/, seg_test/ (to validate on seg_test/" in printed
    found = pictures.read(tmp_path, "seg_test")
    assert len(found.train.paths) == len(found.valid.paths) == 10


def test_a_long_name_is_understood_at_once():
    """Without trying all ways of taking it apart."""
    assert layout.split_role("dataset" * 36) is None
    assert layout.split_role("dataset_" * 20 + "train" + "_images" * 12) == "train"


@pytest.mark.parametrize("train", ["", "train"])
def test_pictures_beside_the_folders_are_mentioned(tmp_path, capsys, train):
    class_folders(tmp_path / train, a=5, b=5)
    write(tmp_path / train / "cover.jpg")
    assert pictures.read(tmp_path).classes == ("a", "b")
    root = tmp_path / train
    assert capsys.readouterr().out == f"{root}: not used: 1 image beside the folders\n"


@pytest.mark.parametrize("above", ["archive", "archive/flowers", "Test/archive"])
@pytest.mark.parametrize("train", ["", "train"])
def test_a_folder_above_that_holds_everything(tmp_path, capsys, above, train):
    class_folders(tmp_path / above / train, a=5, b=5)
    (tmp_path / "README.txt").write_text("flowers")
    class_folders(tmp_path / "__MACOSX", c=5)
    if above.startswith("Test"):  # might be a split
        with pytest.raises(ValueError, match="only one folder, 'Test' in"):
            pictures.read(tmp_path)
        return
    assert pictures.read(tmp_path).classes == ("a", "b")
    assert capsys.readouterr().out == (
        f"{tmp_path}: the pictures are in {tmp_path / above}\n"
    )


def test_only_two_folders_above(tmp_path):
    class_folders(tmp_path / "1" / "2" / "3", a=5, b=5)
    assert pictures.read(tmp_path / "1").classes == ("a", "b")
    with pytest.raises(ValueError, match="only one folder, '3' in .*1/2. Expected"):
        pictures.read(tmp_path)


def test_an_only_training_folder(tmp_path):
    class_folders(tmp_path / "train", a=5, b=5)
    assert pictures.read(tmp_path).classes == ("a", "b")
    assert pictures.read(tmp_path / "train").classes == ("a", "b")


@pytest.mark.parametrize("pair", [("part1", "part2"), ("good", "held out")])
def test_an_unfamiliar_pair_of_splits_is_refused(tmp_path, pair):
    """They are not two classes."""
    class_folders(tmp_path / pair[0], Cat=5, dog=5, bird=5)
    class_folders(tmp_path / pair[1], cat=5, dog=5)
    with pytest.raises(
        ValueError,
        match=rf"{pair[0]}/, {pair[1]}/ both have the folders Cat/, dog/, so they are "
        r"understood as splits, not as classes\. Call the training images train/ and",
    ):
        pictures.read(tmp_path)
    (tmp_path / pair[0]).rename(tmp_path / "train")
    with pytest.raises(
        ValueError,
        match=rf"{pair[1]}/ has the folders Cat/, dog/, as train/ has, but its name is "
        "not known .* pass --valid-folder",
    ):
        pictures.read(tmp_path)
    (tmp_path / "train" / "Cat").rename(tmp_path / "train" / "cat")
    assert len(pictures.read(tmp_path, pair[1]).valid.paths) == 10


def test_folders_below_the_classes(tmp_path):
    """Are part of the class, unless they look like splits."""
    class_folders(tmp_path / "cats" / "images", a=1)
    class_folders(tmp_path / "dogs" / "images", a=1)
    class_folders(tmp_path / "cats", old=5)
    class_folders(tmp_path / "dogs", new=5)
    found = pictures.read(tmp_path)
    assert found.classes == ("cats", "dogs") and len(found.train.paths) == 10


def test_other_splits_that_are_refused(tmp_path):
    def assert_refused(message):
        with pytest.raises(ValueError, match=message):
            pictures.read(tmp_path)

    class_folders(tmp_path / "test", a=5, b=5)
    assert_refused("only one folder, 'test'")
    class_folders(tmp_path / "sorted", c=5)
    assert_refused("test/ is understood as a split, but no folder beside it as the")
    class_folders(tmp_path / "train", a=5)
    assert_refused("only one folder, 'a' in .*train. Expected")
    class_folders(tmp_path / "Training", a=5, b=5)
    assert_refused("several folders of training images, Training/, train/; keep one")


def test_splits_below_classes_or_without_classes_are_refused(tmp_path):
    for name in ("cats", "dogs"):
        class_folders(tmp_path / "below" / name, train=5, test=5)
    with pytest.raises(
        ValueError,
        match="cats/, dogs/ are understood as classes with splits inside, test/, "
        "train/; put the splits above the classes, as test/cats/$",
    ):
        pictures.read(tmp_path / "below")
    class_folders(tmp_path / "flat", train=5, test=5)
    with pytest.raises(ValueError, match="test/, train/ are understood as splits, and"):
        pictures.read(tmp_path / "flat")
    write(tmp_path / "nothing" / "x.jpg")
    with pytest.raises(ValueError, match="1 image, but no folder in .* Expected"):
        pictures.read(tmp_path / "nothing")


def test_system_files_and_folders(tmp_path, capsys):
    class_folders(tmp_path, a=5, b=5)
    system = ("@eaDir", ".thumbnails", "__MACOSX", ".ipynb_checkpoints", ".git")
    for name in (*system, "lost+found", "a/@eaDir", "a/.thumbnails", "b/__MACOSX"):
        write(tmp_path / name / "x.jpg")
    for name in ("Thumbs.db", "._00.jpg", ".DS_Store", "desktop.ini"):
        (tmp_path / "a" / name).write_bytes(b"Mac OS X")
    found = pictures.read(tmp_path)
    assert found.classes == ("a", "b")
    assert len(found.train.paths) == 8 and len(found.valid.paths) == 2
    assert capsys.readouterr().out == ""


def test_links(tmp_path):
    """To pictures and to folders are followed, but in no circle."""
    class_folders(tmp_path / "elsewhere", old=2, new=5)
    class_folders(tmp_path / "data", b=5)
    root = tmp_path / "data"
    (root / "a").symlink_to(tmp_path / "elsewhere" / "new")
    (root / "b" / "old").symlink_to(tmp_path / "elsewhere" / "old")
    (root / "b" / "again").symlink_to(tmp_path / "elsewhere" / "old")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to("self")
    (root / "b" / "05.png").symlink_to(tmp_path / "elsewhere" / "old" / "00.png")
    found = pictures.read(root)
    assert len(found.train.paths) + len(found.valid.paths) == 5 + 5 + 2 + 1
    (root / "b" / "06.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read: .*06.png: .*No such file"):
        pictures.read(root)


def test_a_pipe_is_no_picture(tmp_path, capsys):
    """Opening it would wait for ever."""
    class_folders(tmp_path, a=5, b=5)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert len(pictures.read(tmp_path).train.paths) == 8
    assert "skipped files that are not images: 1 special" in capsys.readouterr().out


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    """Are not taken for empty ones."""
    class_folders(tmp_path, a=5, b=5)
    scandir = os.scandir

    def deny(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(ValueError, match="b cannot be listed: Permission denied"):
        pictures.read(tmp_path)


def test_accents_in_one_or_two_characters(tmp_path):
    """macOS writes two."""
    class_folders(tmp_path / "train", **{"caf\u00e9": 5, "bar": 5})
    class_folders(tmp_path / "valid", **{"cafe\u0301": 1, "bar": 2})
    assert pictures.read(tmp_path).valid.labels.tolist() == [0, 0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text")
def test_names_that_are_no_utf8(tmp_path, capsys):
    root = os.fsencode(tmp_path)
    class_folders(tmp_path, bar=5)
    os.mkdir(root + b"/caf\xe9")
    for i in range(5):
        path = os.fsdecode(root + b"/caf\xe9/" + bytes([65 + i]) + b"\xff\n.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    found = pictures.read(tmp_path)
    assert found.classes == ("bar", "caf\\xe9")
    assert len(pictures.fingerprint(found, tmp_path)) == 32
    with open(os.fsencode(found.train.paths[-1]), "wb"):
        pass
    with pytest.raises(ValueError) as error:
        pictures.read(tmp_path)
    assert "caf\\xe9/D\\xff\\n.png: cannot identify image file" in str(error.value)
    str(error.value).encode()


def test_long_names(tmp_path):
    name = "n" * 250
    class_folders(tmp_path, **{name: 5, "b": 5})
    write(tmp_path / "b" / f"{name}.jpg")
    assert pictures.read(tmp_path).classes == ("b", name)


def test_which_files_are_images(tmp_path):
    kept = [
        "0.JPG",
        "1.jpeg",
        "2.Png",
        "3.webp",
        "4.bmp",
        "5.gif",
        "6.tif",
        "more/7.TIFF",
    ]
    for name in [*kept, ".hidden.png", ".folder/x.png"]:
        write(tmp_path / "a" / name)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    class_folders(tmp_path, b=1)
    class_folders(tmp_path / ".git", c=1)
    found = pictures.read(tmp_path)
    assert found.classes == ("a", "b")
    paths = [p.relative_to(tmp_path / "a").as_posix() for p in found.train.paths[:-1]]
    assert paths == [name for name in kept if name != "4.bmp"]
    assert names(found.valid) == ["a/4.bmp"]


def test_skipped_files_are_counted(tmp_path, capsys):
    class_folders(tmp_path, a=5, b=5)
    for name in ("a/1.heic", "a/2.heic", "b/notes.txt", "b/README", "b/.DS_Store"):
        (tmp_path / name).write_text("no image")
    assert len(pictures.read(tmp_path).train.paths) == 8
    printed = capsys.readouterr().out
    assert printed == (
        f"{tmp_path}: skipped files that are not images: 1 without suffix, 2 .heic, "
        "1 .txt\n"
    )


def test_a_class_of_the_name_train(tmp_path):
    class_folders(tmp_path, bus=5, train=5)
    assert pictures.read(tmp_path).classes == ("bus", "train")


def test_unusable_folders(tmp_path):
    def assert_refused(message, *parts):
        with pytest.raises(ValueError, match=message):
            pictures.read(tmp_path.joinpath(*parts))

    assert_refused("data_dir='.*nowhere' is not a folder", "nowhere")
    assert_refused(
        "data_dir='.*': no folder in .* Expected .*train/.*cars_train/.*car_ims/"
    )
    class_folders(tmp_path, a=4)
    assert_refused("data_dir='.*': only one folder, 'a' in .* Expected")
    class_folders(tmp_path, b=4)
    class_folders(tmp_path, a=5)
    for name in "cdefg":
        (tmp_path / name).mkdir()
    assert_refused(
        r"no image \(.*\.jpg .*\) in the class folders: c, d, e, \.\.\. \(5 in all\)$"
    )
    (tmp_path / "c" / "photo.heic").write_text("from a telephone")
    assert_refused(r"class folders: c, d, e, \.\.\. \(5 in all\) \(but 1 \.heic\)$")


def test_unusable_validation_folders(tmp_path):
    class_folders(tmp_path / "train", a=5, b=5)
    (tmp_path / "valid").mkdir()
    with pytest.raises(ValueError, match="no validation images: the images of valid/"):
        pictures.read(tmp_path)
    class_folders(tmp_path / "valid", a=1, x=1, y=1)
    with pytest.raises(
        ValueError, match="valid has classes that .*train does not have: x, y$"
    ):
        pictures.read(tmp_path)
    for name in ("a", "x", "y"):
        shutil.rmtree(tmp_path / "valid" / name)
    write(tmp_path / "valid" / "1.jpg")
    with pytest.raises(ValueError, match="valid has 1 image, but no folder for each"):
        pictures.read(tmp_path)
