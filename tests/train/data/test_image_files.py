"""Opening a file: modes, orientation, frames, damage; and names in messages."""

import numpy as np
import pytest
from picture_folders import write
from PIL import Image

from train.data import pictures


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


def test_damaged_orientation(tmp_path):
    """The pixels are those of a file without it."""
    image = Image.new("RGB", (8, 4), (10, 200, 30))
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    for name in ("x.jpg", "x.webp"):
        path = tmp_path / name
        image.save(path, exif=exif)
        data = path.read_bytes()
        assert pictures.open_image(path).size == (4, 8)
        start = data.index(b"MM\0*")
        path.write_bytes(data[:start] + b"MMMM" + data[start + 4 :])
        assert pictures.open_image(path).size == (8, 4)
        # the type of the resolution, which only writing the tags again would notice
        start = data.index(b"\x01\x1a", start)
        path.write_bytes(data[: start + 2] + b"\0\x02" + data[start + 4 :])
        assert pictures.open_image(path).size == (4, 8)


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
