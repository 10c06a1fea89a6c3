"""The layouts of picture folders, what is refused, and opening a file."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from train.data import loader, pictures


def write(path, width=9, height=7, color=(10, 20, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path, **options)
    return path


def class_folders(root, **counts):
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i:02}.png")


def names(files):
    return [f"{path.parent.name}/{path.name}" for path in files.paths]


# ---------------------------------------------------------------------------
# folders of classes
# ---------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "folders", [["valid", "val", "test"], ["val", "test"], ["test"]]
)
def test_a_separate_validation_set(tmp_path, folders):
    class_folders(tmp_path / "train", a=5, b=2, c=1)
    for k, name in enumerate(folders):
        class_folders(tmp_path / name, c=k + 1, b=1)
    found = pictures.read(str(tmp_path))
    assert found.split == f"the images of {folders[0]}/"
    assert len(found.train.paths) == 8
    assert names(found.valid) == ["b/00.png", "c/00.png"]
    assert found.valid.labels.tolist() == [1, 2]
    assert found.valid.paths[0] == tmp_path / folders[0] / "b" / "00.png"


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


def test_a_truncated_picture_is_named_before_training(tmp_path):
    class_folders(tmp_path, a=5, b=5)
    path = write(tmp_path / "a" / "cut.jpg", 200, 200)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cannot be read: .*cut\.jpg: .*truncated"):
        pictures.read(tmp_path)


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
    assert_refused("no validation images: no class has five images")
    class_folders(tmp_path, a=5)
    for name in "cdefg":
        (tmp_path / name).mkdir()
    assert_refused(
        r"no image \(.*\.jpg .*\) in the class folders: c, d, e, \.\.\. \(5 in all\)$"
    )


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


# ---------------------------------------------------------------------------
# Stanford Cars
# ---------------------------------------------------------------------------


def save_mat(path, classes=None, **fields):
    content = {}
    if classes:
        content["class_names"] = np.array([classes], object)
    if fields:
        rows = list(zip(*fields.values(), strict=True))
        content["annotations"] = np.array([rows], [(name, "O") for name in fields])
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def make_cars(root, labels, test_labels=()):
    """The later layout; the order of file names differs from that of the labels."""
    save_mat(root / "devkit" / "cars_meta.mat", ["Volvo V40", "Audi A4", "Fiat 500"])
    for part, all_labels in (("train", labels), ("test", test_labels)):
        files = [f"{i + 1:05}.jpg" for i in range(len(all_labels))]
        for name in files:
            write(root / f"cars_{part}" / name)
        mat = {"train": "devkit/cars_train_annos", "test": "cars_test_annos_withlabels"}
        if files:
            save_mat(
                root / f"{mat[part]}.mat",
                bbox_x1=[5] * len(files),
                **{"class": all_labels, "fname": files},
            )


LABELS = [1, 3, 2, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("below", ["", "stanford_cars"])
def test_cars_without_test_labels(tmp_path, below):
    make_cars(tmp_path / below, LABELS)
    found = pictures.read(tmp_path)
    assert found.classes == ("Volvo V40", "Audi A4", "Fiat 500")
    assert found.split == pictures.EVERY_FIFTH
    assert names(found.valid) == ["cars_train/00008.jpg"]
    assert found.train.labels.tolist() == [0, 2, 1, 0, 0, 0, 2, 0]
    assert found.train.paths[-1] == tmp_path / below / "cars_train" / "00009.jpg"


@pytest.mark.parametrize("labels_in", ["", "devkit"])
def test_cars_with_test_labels(tmp_path, labels_in):
    make_cars(tmp_path, LABELS, [2, 2])
    name = "cars_test_annos_withlabels.mat"
    (tmp_path / name).rename(tmp_path / labels_in / name)
    found = pictures.read(tmp_path)
    assert found.split == "the publisher's test images"
    assert len(found.train.paths) == 9
    assert names(found.valid) == ["cars_test/00001.jpg", "cars_test/00002.jpg"]
    assert found.valid.labels.tolist() == [1, 1]
    assert found.valid.labels.dtype == np.int32


def make_cars_by_flag(root, labels, test):
    files = [f"car_ims/{i + 1:06}.jpg" for i in range(len(labels))]
    for name in files:
        write(root / name)
    fields = {"relative_im_path": files, "class": labels, "test": test}
    save_mat(root / "cars_annos.mat", ["Volvo V40", "Audi A4"], **fields)


def test_cars_in_the_layout_of_the_article(tmp_path):
    make_cars_by_flag(tmp_path / "stanford_cars", [2, 1, 2, 1], [0, 1, 1, 0])
    found = pictures.read(tmp_path)
    assert found.classes == ("Volvo V40", "Audi A4")
    assert names(found.train) == ["car_ims/000001.jpg", "car_ims/000004.jpg"]
    assert found.train.labels.tolist() == [1, 0]
    assert names(found.valid) == ["car_ims/000002.jpg", "car_ims/000003.jpg"]
    assert found.valid.labels.tolist() == [0, 1]
    assert found.split == "the publisher's test images"


def test_unusable_cars(tmp_path):
    def assert_refused(message):
        with pytest.raises(ValueError, match=message):
            pictures.read(tmp_path)

    (tmp_path / "cars_train").mkdir()
    assert_refused("cars_meta.mat, a part of Stanford Cars, is missing")
    make_cars(tmp_path, [1, 4, 0])
    assert_refused(r"labels must be in \[1, 3\], got 4 for 00002.jpg, 0 for 00003.jpg$")
    make_cars(tmp_path, [1, 1, 2, 1, 1, 1])
    assert_refused("classes without training images: Fiat 500$")
    make_cars(tmp_path, LABELS)
    (tmp_path / "cars_train" / "00002.jpg").unlink()
    assert_refused("images listed in .*annos.mat are missing: 00002.jpg$")
    path = tmp_path / "devkit" / "cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused("cars_train_annos.mat is damaged or has no variable 'annotations'")
    save_mat(path, **{"class": [1, 1]})
    assert_refused("cars_train_annos.mat: the annotations have no field 'fname'")
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    make_cars_by_flag(tmp_path / "other", [1, 2], [0, 0])
    with pytest.raises(ValueError, match="no validation images: the publisher's test"):
        pictures.read(tmp_path / "other")


def test_cars_of_one_class(tmp_path):
    make_cars(tmp_path, [1] * 5)
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    with pytest.raises(ValueError, match="only one class: Volvo V40"):
        pictures.read(tmp_path)


@pytest.mark.skipif("ADAMW_JAX_DATA" not in os.environ, reason="no ADAMW_JAX_DATA")
def test_cars_themselves():
    data_dir = Path(os.environ["ADAMW_JAX_DATA"])
    if not (data_dir / "stanford_cars").is_dir():
        pytest.skip("no stanford_cars in ADAMW_JAX_DATA")
    found = pictures.read(data_dir)
    assert len(found.classes) == 196
    assert found.classes[13] == "Audi TTS Coupe 2012"  # of 00001.jpg, as published
    both = sorted(found.train.paths + found.valid.paths)
    assert len(set(both)) == 8144
    counts = np.bincount(np.r_[found.train.labels, found.valid.labels])
    assert len(found.valid.paths) == (counts // 5).sum()
    assert np.bincount(found.valid.labels).tolist() == (counts // 5).tolist()
    label = dict(zip(found.train.paths, found.train.labels, strict=True))
    assert label[data_dir / "stanford_cars" / "cars_train" / "00001.jpg"] == 13
    batch = next(loader.eval_batches(found.valid, 64, 32))
    assert batch["image"].shape == (32, 64, 64, 3)
    np.testing.assert_array_equal(batch["label"], found.valid.labels[:32])


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation(tmp_path, orientation, suffix):
    """The pixels are turned or mirrored, as their EXIF tag records."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    image = pictures.open_image(path)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image, int), upright, atol=8)


def test_modes_become_rgb(tmp_path):
    def opened(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        result = pictures.open_image(tmp_path / name)
        assert result.mode == "RGB"
        return np.asarray(result).tolist()

    ramp = np.array([[0, 100, 255]], np.uint8)
    grey = [[[v] * 3 for v in (0, 100, 255)]]
    assert opened(Image.fromarray(ramp)) == grey
    assert opened(Image.fromarray(ramp == 255)) == [[[0] * 3, [0] * 3, [255] * 3]]
    # 16 bits: 0xffff is white, 257 levels are one.
    deep = Image.fromarray(np.array([[0, 100 * 257 + 100, 65535]], np.uint16))
    assert deep.mode == "I;16"
    assert opened(deep) == opened(deep, "x.tif") == grey
    # transparent: on white
    rgba = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 100, 255, 51]]], np.uint8)
    white = [[[9, 8, 7], [255] * 3, [204, 224, 255]]]
    assert opened(Image.fromarray(rgba)) == white
    la = np.array([[[9, 255], [9, 0], [0, 51]]], np.uint8)
    assert opened(Image.fromarray(la)) == [[[9] * 3, [255] * 3, [204] * 3]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    plain = [[[1, 2, 3], [40, 50, 60], [70, 80, 90]]]
    assert opened(palette) == opened(palette, "x.gif") == plain
    hole = [plain[0][0], [255] * 3, plain[0][2]]
    assert opened(palette, transparency=1) == [hole]
    assert opened(palette, transparency=bytes([255, 0, 255])) == [hole]
    assert opened(palette, "x.gif", transparency=1) == [hole]
    cmyk = opened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.jpg", quality=100)
    np.testing.assert_allclose(cmyk, np.tile([255, 0, 0], (8, 8, 1)), atol=3)


def test_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **options
        )
        first = np.asarray(pictures.open_image(tmp_path / name))
        np.testing.assert_array_equal(first, np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("min_side", "size"),
    [
        (0, (400, 300)),
        (151, (400, 300)),
        (150, (200, 150)),
        (75, (100, 75)),
        (1, (50, 38)),
    ],
)
def test_large_photos_are_decoded_smaller(tmp_path, min_side, size):
    path = write(tmp_path / "x.jpg", 400, 300, (200, 100, 50))
    image = pictures.open_image(path, min_side)
    assert image.size == size
    np.testing.assert_allclose(np.asarray(image)[0, 0], (200, 100, 50), atol=3)
    assert (
        pictures.open_image(write(tmp_path / "x.png", 400, 300), min_side).width == 400
    )


def test_files_that_cannot_be_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tif"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"cut.{suffix}: .+"):
            pictures.open_image(path)
    with pytest.raises(
        ValueError, match=r"cut.jpg: image file is truncated \(\d+ byte"
    ):
        pictures.open_image(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match="nothing.jpg: .*No such file or directory$"):
        pictures.open_image(tmp_path / "nothing.jpg")
    Image.fromarray(np.ones((4, 4), np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif: 32-bit pixels"):
        pictures.open_image(tmp_path / "deep.tif")
