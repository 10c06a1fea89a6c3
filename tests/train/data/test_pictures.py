"""Pictures from folders against NumPy loops, the layouts, and batches of them."""

import itertools
import os
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from train.data import pictures as images


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
    pictures = images.read(tmp_path)
    assert pictures.classes == ("a", "b")
    assert names(pictures.valid) == ["b/04.png", "b/09.png"]
    assert names(pictures.train) == [
        *(f"a/{i:02}.png" for i in range(4)),
        *(f"b/{i:02}.png" for i in range(11) if i not in (4, 9)),
    ]
    assert pictures.train.labels.tolist() == [0] * 4 + [1] * 9
    assert pictures.train.labels.dtype == pictures.valid.labels.dtype == np.int32
    assert pictures.split == images.EVERY_FIFTH


@pytest.mark.parametrize("there", [["valid", "val", "test"], ["val", "test"], ["test"]])
def test_validation_images_apart(tmp_path, there):
    class_folders(tmp_path / "train", a=5, b=2, c=1)
    for k, name in enumerate(there):
        class_folders(tmp_path / name, c=k + 1, b=1)
    pictures = images.read(str(tmp_path))
    assert pictures.split == f"the images of {there[0]}/"
    assert len(pictures.train.paths) == 8
    assert names(pictures.valid) == ["b/00.png", "c/00.png"]
    assert pictures.valid.labels.tolist() == [1, 2]
    assert pictures.valid.paths[0] == tmp_path / there[0] / "b" / "00.png"


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
    pictures = images.read(tmp_path)
    assert pictures.classes == ("a", "b")
    paths = [
        p.relative_to(tmp_path / "a").as_posix() for p in pictures.train.paths[:-1]
    ]
    assert paths == [name for name in kept if name != "4.bmp"]
    assert names(pictures.valid) == ["a/4.bmp"]


def test_files_left_out_are_counted(tmp_path, capsys):
    class_folders(tmp_path, a=5, b=5)
    for name in ("a/1.heic", "a/2.heic", "b/notes.txt", "b/README", "b/.DS_Store"):
        (tmp_path / name).write_text("no image")
    assert len(images.read(tmp_path).train.paths) == 8
    printed = capsys.readouterr().out
    assert printed == (
        f"{tmp_path}: left out, files with other suffixes: 1 of none, 2 of .heic, "
        "1 of .txt\n"
    )


def test_a_truncated_picture_is_named_before_training(tmp_path):
    class_folders(tmp_path, a=5, b=5)
    path = write(tmp_path / "a" / "cut.jpg", 200, 200)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cannot be read: .*cut\.jpg: .*truncated"):
        images.read(tmp_path)


def test_a_class_of_the_name_train(tmp_path):
    class_folders(tmp_path, bus=5, train=5)
    assert images.read(tmp_path).classes == ("bus", "train")


def test_folders_that_will_not_do(tmp_path):
    def says(message, *there):
        with pytest.raises(ValueError, match=message):
            images.read(tmp_path.joinpath(*there))

    says("data_dir='.*nowhere' is not a folder", "nowhere")
    says("data_dir='.*': no folder in .* Looked for .*train/.*cars_train/.*car_ims/")
    class_folders(tmp_path, a=4)
    says("data_dir='.*': only one folder, 'a' in .* Looked for")
    class_folders(tmp_path, b=4)
    says("no validation images: no class has five")
    class_folders(tmp_path, a=5)
    for name in "cdefg":
        (tmp_path / name).mkdir()
    says(r"no image \(.*\.jpg .*\) in the class folders: c, d, e, \.\.\. \(5 in all\)$")


def test_validation_folders_that_will_not_do(tmp_path):
    class_folders(tmp_path / "train", a=5, b=5)
    (tmp_path / "valid").mkdir()
    with pytest.raises(ValueError, match="no validation images: the images of valid/"):
        images.read(tmp_path)
    class_folders(tmp_path / "valid", a=1, x=1, y=1)
    with pytest.raises(
        ValueError, match="valid has classes that .*train has not: x, y$"
    ):
        images.read(tmp_path)


def test_all_unreadable_files_are_named_at_once(tmp_path):
    class_folders(tmp_path, a=20, b=2)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "b" / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: pixels of 32 bits.*white$"):
        images.read(tmp_path)
    for name in ("03", "04", "07"):
        (tmp_path / "a" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as error:
        images.read(tmp_path)
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


def cars(place, labels, test_labels=()):
    """The publisher's later layout, its file names in another order than the labels."""
    save_mat(place / "devkit" / "cars_meta.mat", ["Volvo V40", "Audi A4", "Fiat 500"])
    for part, all_labels in (("train", labels), ("test", test_labels)):
        files = [f"{i + 1:05}.jpg" for i in range(len(all_labels))]
        for name in files:
            write(place / f"cars_{part}" / name)
        mat = {"train": "devkit/cars_train_annos", "test": "cars_test_annos_withlabels"}
        if files:
            save_mat(
                place / f"{mat[part]}.mat",
                bbox_x1=[5] * len(files),
                **{"class": all_labels, "fname": files},
            )


LABELS = [1, 3, 2, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("below", ["", "stanford_cars"])
def test_cars_without_test_labels(tmp_path, below):
    cars(tmp_path / below, LABELS)
    pictures = images.read(tmp_path)
    assert pictures.classes == ("Volvo V40", "Audi A4", "Fiat 500")
    assert pictures.split == images.EVERY_FIFTH
    assert names(pictures.valid) == ["cars_train/00008.jpg"]
    assert pictures.train.labels.tolist() == [0, 2, 1, 0, 0, 0, 2, 0]
    assert pictures.train.paths[-1] == tmp_path / below / "cars_train" / "00009.jpg"


@pytest.mark.parametrize("labels_in", ["", "devkit"])
def test_cars_with_test_labels(tmp_path, labels_in):
    cars(tmp_path, LABELS, [2, 2])
    name = "cars_test_annos_withlabels.mat"
    (tmp_path / name).rename(tmp_path / labels_in / name)
    pictures = images.read(tmp_path)
    assert pictures.split == "the publisher's test images"
    assert len(pictures.train.paths) == 9
    assert names(pictures.valid) == ["cars_test/00001.jpg", "cars_test/00002.jpg"]
    assert pictures.valid.labels.tolist() == [1, 1]
    assert pictures.valid.labels.dtype == np.int32


def cars_by_flag(place, labels, test):
    files = [f"car_ims/{i + 1:06}.jpg" for i in range(len(labels))]
    for name in files:
        write(place / name)
    fields = {"relative_im_path": files, "class": labels, "test": test}
    save_mat(place / "cars_annos.mat", ["Volvo V40", "Audi A4"], **fields)


def test_cars_in_the_layout_of_the_article(tmp_path):
    cars_by_flag(tmp_path / "stanford_cars", [2, 1, 2, 1], [0, 1, 1, 0])
    pictures = images.read(tmp_path)
    assert pictures.classes == ("Volvo V40", "Audi A4")
    assert names(pictures.train) == ["car_ims/000001.jpg", "car_ims/000004.jpg"]
    assert pictures.train.labels.tolist() == [1, 0]
    assert names(pictures.valid) == ["car_ims/000002.jpg", "car_ims/000003.jpg"]
    assert pictures.valid.labels.tolist() == [0, 1]
    assert pictures.split == "the publisher's test images"


def test_cars_that_will_not_do(tmp_path):
    def says(message):
        with pytest.raises(ValueError, match=message):
            images.read(tmp_path)

    (tmp_path / "cars_train").mkdir()
    says("cars_meta.mat is missing")
    cars(tmp_path, [1, 4, 0])
    says(r"labels must be in \[1, 3\], got 4 of 00002.jpg, 0 of 00003.jpg$")
    cars(tmp_path, [1, 1, 2, 1, 1, 1])
    says("classes without a training image: Fiat 500$")
    cars(tmp_path, LABELS)
    (tmp_path / "cars_train" / "00002.jpg").unlink()
    says("images named by .*annos.mat are missing: 00002.jpg$")
    path = tmp_path / "devkit" / "cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:200])
    says("cars_train_annos.mat is damaged, or holds no 'annotations'")
    save_mat(path, **{"class": [1, 1]})
    says("cars_train_annos.mat: its annotations have no 'fname'")
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    cars_by_flag(tmp_path / "other", [1, 2], [0, 0])
    with pytest.raises(ValueError, match="no validation images: the publisher's test"):
        images.read(tmp_path / "other")


def test_cars_of_one_class(tmp_path):
    cars(tmp_path, [1] * 5)
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    with pytest.raises(ValueError, match="only one class: Volvo V40"):
        images.read(tmp_path)


@pytest.mark.skipif("ADAMW_JAX_DATA" not in os.environ, reason="no ADAMW_JAX_DATA")
def test_cars_themselves():
    data_dir = Path(os.environ["ADAMW_JAX_DATA"])
    if not (data_dir / "stanford_cars").is_dir():
        pytest.skip("no stanford_cars in ADAMW_JAX_DATA")
    pictures = images.read(data_dir)
    assert len(pictures.classes) == 196
    assert pictures.classes[13] == "Audi TTS Coupe 2012"  # of 00001.jpg, as published
    both = sorted(pictures.train.paths + pictures.valid.paths)
    assert len(set(both)) == 8144
    counts = np.bincount(np.r_[pictures.train.labels, pictures.valid.labels])
    assert len(pictures.valid.paths) == (counts // 5).sum()
    assert np.bincount(pictures.valid.labels).tolist() == (counts // 5).tolist()
    label = dict(zip(pictures.train.paths, pictures.train.labels, strict=True))
    assert label[data_dir / "stanford_cars" / "cars_train" / "00001.jpg"] == 13
    batch = next(images.eval_batches(pictures.valid, 64, 32))
    assert batch["image"].shape == (32, 64, 64, 3)
    np.testing.assert_array_equal(batch["label"], pictures.valid.labels[:32])


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation(tmp_path, orientation, suffix):
    """The file has the picture turned or mirrored, and says so."""
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
    image = images.open_image(path)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image, int), upright, atol=8)


def test_modes_become_rgb(tmp_path):
    def opened(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        result = images.open_image(tmp_path / name)
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
        first = np.asarray(images.open_image(tmp_path / name))
        np.testing.assert_array_equal(first, np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("least", "size"),
    [
        (0, (400, 300)),
        (151, (400, 300)),
        (150, (200, 150)),
        (75, (100, 75)),
        (1, (50, 38)),
    ],
)
def test_large_photos_are_decoded_smaller(tmp_path, least, size):
    path = write(tmp_path / "x.jpg", 400, 300, (200, 100, 50))
    image = images.open_image(path, least)
    assert image.size == size
    np.testing.assert_allclose(np.asarray(image)[0, 0], (200, 100, 50), atol=3)
    assert images.open_image(write(tmp_path / "x.png", 400, 300), least).width == 400


def test_files_that_cannot_be_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tif"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"cut.{suffix}: .+"):
            images.open_image(path)
    with pytest.raises(
        ValueError, match=r"cut.jpg: image file is truncated \(\d+ byte"
    ):
        images.open_image(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match="nothing.jpg: .*No such file or directory$"):
        images.open_image(tmp_path / "nothing.jpg")
    Image.fromarray(np.ones((4, 4), np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif: pixels of 32 bits"):
        images.open_image(tmp_path / "deep.tif")


# ---------------------------------------------------------------------------
# views, against loops over pixels in double precision
# ---------------------------------------------------------------------------


def picture(width, height, seed=0):
    """Smooth colours, a few sharp edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0.5, 3, (3, 3))]
    levels = 128 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
    levels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 100)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def mirrored(k, size):
    """-1 is the first pixel again, -2 the second; so on for ever."""
    while not 0 <= k < size:
        k = -k - 1 if k < 0 else 2 * size - k - 1
    return k


def rotated(x, degrees):
    """OpenCV's: about pixel (w // 2, h // 2), counter-clockwise, bilinear."""
    height, width, _ = x.shape
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    out = np.zeros(x.shape)
    for row, column in itertools.product(range(height), range(width)):
        dx, dy = column - width // 2, row - height // 2
        u = width // 2 + cos * dx - sin * dy
        v = height // 2 + sin * dx + cos * dy
        left, top = int(np.floor(u)), int(np.floor(v))
        for i, j in itertools.product((0, 1), (0, 1)):
            weight = abs(1 - i - (v - top)) * abs(1 - j - (u - left))
            source = x[mirrored(top + i, height), mirrored(left + j, width)]
            out[row, column] += weight * source
    return out


def lit(x, brightness, contrast):
    """On [0, 1], the mean over all pixels and channels."""
    factor = 1 + contrast if contrast >= 0 else 1 / (1 - contrast)
    mean = x.mean()
    return 255 * np.clip(
        (x / 255 - mean / 255) * factor + mean / 255 + brightness, 0, 1
    )


def fixed(*draws):
    return types.SimpleNamespace(random=lambda n: np.array(draws, float)[:n])


NOTHING = (0.9, 0, 0.9, 0, 0.5, 0.5, 0.9, 0, 0)  # that changes a picture


def changed(**draws):
    order = "zooms zoom turns angle light contrast flips row column".split()
    values = dict(zip(order, NOTHING, strict=True)) | draws
    assert len(values) == 9
    return fixed(*values.values())


@pytest.mark.parametrize("degrees", [-10.0, -3.0, 0.0, 1.5, 10.0])
@pytest.mark.parametrize("size", [(40, 31), (31, 40), (6, 90), (5, 4), (1, 30)])
def test_rotation_with_mirror_images_beyond_the_edges(size, degrees):
    image = picture(*size)
    ours = np.asarray(images._rotated(image, degrees), float)
    exact = rotated(np.asarray(image, float), degrees)
    # Pillow drops the fractions, and rounds its coordinates a little.
    assert -1.01 < (ours - exact).min() <= (ours - exact).max() < 0.01
    if degrees == 0:
        np.testing.assert_array_equal(ours, exact)


def test_rotation_is_counter_clockwise():
    x = np.zeros((41, 41, 3), np.uint8)
    x[20, 25:40] = 255  # from the middle to the right
    turned = np.asarray(images._rotated(Image.fromarray(x), 10.0))[..., 0]
    assert turned[18, 33] > 100 > turned[22, 33]


def test_the_shortest_side_is_scaled():
    for width, height, target, scaled in [
        (100, 60, 30, (50, 30)),
        (103, 60, 30, (51, 30)),  # half a pixel of the other side is not
        (60, 100, 33, (33, 55)),
        (7, 7, 20, (20, 20)),
        (300, 2, 3, (450, 3)),
        (49, 49, 23, (23, 23)),  # 49 * (23 / 49) is just below 23 in floating point
        (31, 31, 31, (31, 31)),
    ]:
        assert images._scaled(picture(width, height), target).size == scaled
    # areas are averaged
    image = picture(40, 24)
    blocks = np.asarray(image, float).reshape(6, 4, 10, 4, 3).mean((1, 3))
    small = np.asarray(images._scaled(image, 6), float)
    np.testing.assert_allclose(small, blocks, rtol=0, atol=1.01)
    assert abs(small - blocks).mean() < 0.35  # 0.25: rounded
    # between pixels, whose middles keep their places, weights are linear
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8)[:, None], (25, 1, 3))
    ramp = ramp.reshape(25, 25, 3)
    large = np.asarray(images._scaled(Image.fromarray(ramp), 50), float)
    at = np.clip((np.arange(50) + 0.5) / 2 - 0.5, 0, 24)
    np.testing.assert_allclose(large[7, :, 0], 10 * at, rtol=0, atol=0.51)


@pytest.mark.parametrize("brightness", [-0.05, 0.0, 0.03])
@pytest.mark.parametrize("contrast", [-0.05, 0.0, 0.05])
def test_lighting(brightness, contrast):
    image = picture(50, 37)
    ours = np.asarray(images._lit(image, 255 * brightness, contrast), float)
    exact = lit(np.asarray(image, float), brightness, contrast)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=0.5 + 1e-9)


def test_plain_view():
    for width, height, size in [(40, 30, 30), (30, 43, 30), (64, 50, 17), (9, 8, 12)]:
        image = picture(width, height)
        x = np.asarray(images._scaled(image, size))
        top, left = -(-(x.shape[0] - size) // 2), -(-(x.shape[1] - size) // 2)
        view = images.plain_view(image, size)
        assert view.dtype == np.uint8
        assert view.shape == (size, size, 3)
        np.testing.assert_array_equal(view, x[top : top + size, left : left + size])


def test_nothing_but_a_corner():
    image = picture(45, 30)
    view = images.train_view(image, fixed(*NOTHING), 30)
    np.testing.assert_array_equal(view, np.asarray(image)[:, :30])


def test_each_share_and_range():
    """The draw at which something begins, and how far it goes."""
    image = picture(45, 30)
    x = np.asarray(image, float)

    def view(**draws):
        return np.asarray(images.train_view(image, changed(**draws), 30), float)

    plain = view()
    for name, share, change in [
        ("zooms", 0.75, {"zoom": 0.99}),
        ("turns", 0.75, {"angle": 0.99}),
        ("flips", 0.5, {}),
    ]:
        assert (view(**{name: share}, **change) == plain).all()
        assert (view(**{name: share - 1e-9}, **change) != plain).any()
    flipped = x[:, ::-1]
    np.testing.assert_array_equal(view(flips=0), flipped[:, :30])
    np.testing.assert_array_equal(view(flips=0, column=0.2), flipped[:, 3:33])
    np.testing.assert_array_equal(view(column=0.9999), x[:, 14:44])
    np.testing.assert_array_equal(view(row=0.9999), plain)
    zoomed = np.asarray(images._scaled(image, 31))
    np.testing.assert_array_equal(view(zooms=0, zoom=0.999, row=0.9), zoomed[:30, :30])
    for draw in (0, 0.25, 1 - 1e-9):
        part = 0.05 * (2 * draw - 1)
        np.testing.assert_allclose(
            view(light=draw), lit(x, part, 0)[:, :30], atol=0.51, rtol=0
        )
        np.testing.assert_allclose(
            view(contrast=draw), lit(x, 0, part)[:, :30], atol=0.51, rtol=0
        )
        turned = rotated(x, 10 * (2 * draw - 1))[:, :30]
        difference = view(turns=0, angle=draw) - turned
        assert abs(difference.mean()) < 0.06
        assert abs(difference).max() < 1.01


def test_views_like_those_of_the_article():
    """The whole in double precision after the scaling, with numbers really drawn."""
    worst, means = 0, []
    for seed in range(12):
        image, size = picture(50 + seed, 61 - seed, seed), 33
        u = np.random.default_rng(seed).random(9)
        zoom = 1 + 0.05 * u[1] if u[0] < 0.75 else 1
        x = np.asarray(images._scaled(image, int(size * zoom)), float)
        if u[2] < 0.75:
            x = rotated(x, 20 * u[3] - 10)
        x = lit(x, 0.1 * u[4] - 0.05, 0.1 * u[5] - 0.05)
        if u[6] < 0.5:
            x = x[:, ::-1]
        row, column = (int(n) for n in np.floor(u[7:] * (np.array(x.shape[:2]) - size)))
        x = x[row : row + size, column : column + size]
        view = images.train_view(image, np.random.default_rng(seed), size)
        assert view.dtype == np.uint8
        assert view.shape == (size, size, 3)
        worst = max(worst, abs(view - x).max())
        means.append(abs(view - x).mean())
    assert worst < 2  # levels of 255
    assert np.mean(means) < 0.4


def test_what_is_drawn_does_not_depend_on_the_picture():
    rngs = [np.random.default_rng(0) for _ in range(3)]
    for rng, image in zip(rngs, (picture(20, 20), picture(90, 40)), strict=False):
        images.train_view(image, rng, 20)
    rngs[2].random(9)
    assert len({rng.random() for rng in rngs}) == 1


def test_normalise(lenient):
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    for ours in (images.normalise(x), jax.jit(images.normalise)(x)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, (x / 255 - mean) / std, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------
# batches
# ---------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """13 pictures of different sizes; the label is the number."""
    for i in range(13):
        picture(12 + i, 20 - i, seed=i).save(tmp_path / f"{i:02}.png")
    paths = tuple(sorted(tmp_path.iterdir()))
    return images.Files(paths, np.arange(13, dtype=np.int32))


def stacked(batches):
    return [(b["image"].copy(), b["label"].copy()) for b in batches]


def assert_same(ours, others):
    for (x, y), (other_x, other_y) in zip(ours, others, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def test_epochs(files):
    batches = stacked(images.train_batches(files, 8, 5, seed=3, epochs=3, workers=2))
    assert [len(y) for _, y in batches] == [5, 5, 3] * 3
    assert {x.shape[1:] for x, _ in batches} == {(8, 8, 3)}
    assert {x.dtype for x, _ in batches} == {np.dtype(np.uint8)}
    assert {y.dtype for _, y in batches} == {np.dtype(np.int32)}
    orders = np.concatenate([y for _, y in batches]).reshape(3, 13)
    for order in orders:
        assert sorted(order) == list(range(13))
    assert len({tuple(order) for order in orders}) == 3
    # nor does a picture look the same in each
    x = np.concatenate([x for x, _ in batches]).reshape(3, 13, 8, 8, 3)
    x = np.stack([x[k, np.argsort(orders[k])] for k in range(3)])
    assert all((x[0, i] != x[1, i]).any() for i in range(13))


@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_the_batches_do_not_depend_on_the_workers(files, workers):
    def batches(workers):
        yield from images.train_batches(files, 8, 2, seed=1, epochs=4, workers=workers)
        yield from images.eval_batches(files, 8, 3, workers=workers)
        yield from images.eval_batches(files, 8, 3, augment_seed=1, workers=workers)

    assert_same(stacked(batches(workers)), stacked(batches(0)))


def test_seeds(files):
    def order(seed):
        batches = images.train_batches(files, 8, 13, seed=seed, epochs=1, workers=0)
        (batch,) = batches
        return tuple(batch["label"].tolist()), batch["image"].tobytes()

    assert order(0) == order(0)
    assert len({order(seed)[0] for seed in (0, 1, 2, 2**32 - 1)}) == 4
    (a,), (b,), (same,) = (
        stacked(images.eval_batches(files, 8, 13, augment_seed=seed, workers=0))
        for seed in (0, 1, 0)
    )
    assert_same([a], [same])
    assert (a[0] != b[0]).any((1, 2, 3)).all()


def test_a_batch_is_read_by_many_threads(files, monkeypatch):
    """Also one that is all there is, as where few images are held out."""
    seen, open_image = set(), images.open_image

    def slow(*args, **options):
        seen.add(threading.get_ident())
        time.sleep(0.01)
        return open_image(*args, **options)

    monkeypatch.setattr(images, "open_image", slow)
    files = images.Files(files.paths * 8, np.tile(files.labels, 8))
    (batch,) = images.eval_batches(files, 8, 64 * len(files.paths), workers=4)
    assert len(batch["label"]) == len(files.paths) > 2 * images.PIECE
    assert len(seen) >= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_any_step(files, workers):
    def batches(first_step):
        return stacked(
            images.train_batches(
                files, 8, 5, seed=0, epochs=2, first_step=first_step, workers=workers
            )
        )

    whole = batches(0)
    for first_step in range(7):
        assert_same(batches(first_step), whole[first_step:])


def test_evaluation_in_order(files):
    batches = stacked(images.eval_batches(files, 8, 4))
    assert [len(y) for _, y in batches] == [4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), range(13))
    x = np.concatenate([x for x, _ in batches])
    for path, view in zip(files.paths, x, strict=True):
        plain = images.plain_view(images.open_image(path), 8)
        np.testing.assert_array_equal(view, plain)
    augmented = stacked(images.eval_batches(files, 8, 4, augment_seed=5))
    np.testing.assert_array_equal(np.concatenate([y for _, y in augmented]), range(13))
    assert (np.concatenate([x for x, _ in augmented]) != x).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    ("shortest", "to_evaluate", "to_train"),
    [(199, 199, 199), (200, 100, 200), (209, 105, 209), (210, 105, 105)],
)
def test_photos_are_never_decoded_too_small(
    tmp_path, monkeypatch, shortest, to_evaluate, to_train
):
    path = write(tmp_path / "x.jpg", 300, shortest)
    files = images.Files((path,) * 200, np.zeros(200, np.int32))
    scaled, sides, targets = images._scaled, set(), set()

    def recorded(image, target):
        sides.add(min(image.size))
        targets.add(target)
        return scaled(image, target)

    monkeypatch.setattr(images, "_scaled", recorded)
    list(images.eval_batches(files, 100, 50))
    assert (sides, targets) == ({to_evaluate}, {100})
    sides.clear()
    list(images.train_batches(files, 100, 50, seed=0, epochs=1))
    assert (sides, targets) == ({to_train}, {100, 101, 102, 103, 104})


def test_shares_in_batches(tmp_path):
    """Half white, half black pictures: which half is where says what was flipped."""
    x = np.zeros((40, 40, 3), np.uint8)
    x[:, 20:] = 255
    Image.fromarray(x).save(tmp_path / "x.png")
    n = 1500
    files = images.Files((tmp_path / "x.png",) * n, np.zeros(n, np.int32))
    (batch,) = images.train_batches(files, 20, n, seed=0, epochs=1)
    left, right = (
        batch["image"][:, :, half].mean((1, 2, 3))
        for half in (slice(10), slice(10, 20))
    )
    assert np.mean(left > right) == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    # the edge is upright in those that are not rotated
    upright = (batch["image"] == batch["image"][:, :1]).all((1, 2, 3))
    assert np.mean(upright) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


def alive():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def assert_threads_end():
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


def test_threads_end(files):
    assert_threads_end()
    unused = images.train_batches(files, 8, 2, seed=0, epochs=1, workers=2)
    assert not alive()
    list(unused)
    assert_threads_end()
    batches = images.train_batches(files, 8, 2, seed=0, epochs=10**6, workers=2)
    next(batches)
    assert alive()
    batches.close()
    assert_threads_end()
    batches = images.eval_batches(files, 8, 1, workers=2)
    next(batches)
    del batches
    assert_threads_end()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_file_that_fails_later_is_named(files, workers):
    files.paths[6].write_bytes(files.paths[6].read_bytes()[:400])
    with pytest.raises(ValueError, match="06.png: .*truncated"):
        list(images.eval_batches(files, 8, 2, workers=workers))
    with pytest.raises(ValueError, match="06.png: .*truncated"):
        list(images.train_batches(files, 8, 2, seed=0, epochs=3, workers=workers))
    batches = images.eval_batches(files, 8, 2, workers=workers)
    good = list(itertools.islice(batches, 3))
    assert len(good) == 3
    with pytest.raises(ValueError, match="06.png"):
        next(batches)
    assert list(batches) == []
    assert_threads_end()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("size", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("seed", -1, r"in \[0, 2\*\*32\)"),
        ("seed", 2**32, r"in \[0, 2\*\*32\)"),
        ("epochs", 0, "at least 1"),
        ("first_step", -1, r"in \[0, 6\]"),
        ("first_step", 7, r"in \[0, 6\]"),
        ("workers", -1, "None or at least 0"),
    ],
)
def test_bad_settings(files, option, value, allowed):
    good = {"size": 8, "batch_size": 5, "seed": 0, "epochs": 2}
    with pytest.raises(ValueError, match=f"{option} must be {allowed}, got {value}"):
        images.train_batches(files, **good | {option: value})


def test_no_pictures():
    nothing = images.Files((), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="at least one picture"):
        images.eval_batches(nothing, 8, 2)
