"""The views of a photograph against loops over pixels in double precision."""

import itertools
import types

import jax
import numpy as np
import pytest
from PIL import Image
from sample_pictures import make_picture

from train.data import augment


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


NOTHING = (0.9, 0, 0.9, 0, 0.5, 0.5, 0.9, 0, 0)  # would change a picture


def changed(**draws):
    order = "zooms zoom turns angle light contrast flips row column".split()
    values = dict(zip(order, NOTHING, strict=True)) | draws
    assert len(values) == 9
    return fixed(*values.values())


@pytest.mark.parametrize("degrees", [-10.0, -3.0, 0.0, 1.5, 10.0])
@pytest.mark.parametrize("size", [(40, 31), (31, 40), (6, 90), (5, 4), (1, 30)])
def test_rotation_with_mirror_images_beyond_the_edges(size, degrees):
    image = make_picture(*size)
    ours = np.asarray(augment._rotate(image, degrees), float)
    exact = rotated(np.asarray(image, float), degrees)
    # Pillow drops the fractions, and rounds its coordinates a little.
    assert -1.01 < (ours - exact).min() <= (ours - exact).max() < 0.01
    if degrees == 0:
        np.testing.assert_array_equal(ours, exact)


def test_rotation_is_counter_clockwise():
    x = np.zeros((41, 41, 3), np.uint8)
    x[20, 25:40] = 255  # from the middle to the right
    turned = np.asarray(augment._rotate(Image.fromarray(x), 10.0))[..., 0]
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
        assert augment._resize(make_picture(width, height), target).size == scaled
    # areas are averaged
    image = make_picture(40, 24)
    blocks = np.asarray(image, float).reshape(6, 4, 10, 4, 3).mean((1, 3))
    small = np.asarray(augment._resize(image, 6), float)
    np.testing.assert_allclose(small, blocks, rtol=0, atol=1.01)
    assert abs(small - blocks).mean() < 0.35  # 0.25: rounded
    # enlarging keeps pixel centres in place and interpolates linearly
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8)[:, None], (25, 1, 3))
    ramp = ramp.reshape(25, 25, 3)
    large = np.asarray(augment._resize(Image.fromarray(ramp), 50), float)
    at = np.clip((np.arange(50) + 0.5) / 2 - 0.5, 0, 24)
    np.testing.assert_allclose(large[7, :, 0], 10 * at, rtol=0, atol=0.51)


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    ("length", "target", "kept", "filter_"),
    [
        (10_000, 20, 4096, Image.Resampling.BILINEAR),  # would be 20,000 x 20
        (10_000, 5, 4096, Image.Resampling.BOX),  # 5,000 x 5
        (8190, 5, 4095, Image.Resampling.BOX),
        (500, 600, 4800, Image.Resampling.BILINEAR),  # 6,000 x 600
    ],
)
def test_of_very_long_images_the_middle_is_kept(length, target, kept, filter_, upright):
    image = make_picture(length, 50 if target == 600 else 10)
    width = length * target // image.height
    complete = image.resize((width, target), filter_)
    left = (complete.width - kept) // 2
    middle = np.asarray(complete, int)[:, left : left + kept]
    if upright:
        image, middle = (
            image.transpose(Image.Transpose.TRANSPOSE),
            middle.swapaxes(0, 1),
        )
    ours = np.asarray(augment._resize(image, target), int)
    np.testing.assert_allclose(ours, middle, rtol=0, atol=1)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (100_000, 3), (300, 200)])
def test_what_a_picture_may_ask_for(monkeypatch, size):
    """Pixels of the largest intermediate image, for any shape and draw."""
    new, pixels = Image.new, []

    def record(mode, size, *args):
        pixels.append(size[0] * size[1])
        return new(mode, size, *args)

    monkeypatch.setattr(Image, "new", record)
    image = make_picture(*size)
    for view in (changed(zooms=0, zoom=1, turns=0, angle=0), changed(turns=0, angle=1)):
        assert augment.train_view(image, view, 224).shape == (224, 224, 3)
    assert len(pixels) >= 2 and max(pixels) < 5e6  # 15 MB; without bound 14 GB
    assert augment.plain_view(image, 224).shape == (224, 224, 3)


@pytest.mark.parametrize("brightness", [-0.05, 0.0, 0.03])
@pytest.mark.parametrize("contrast", [-0.05, 0.0, 0.05])
def test_lighting(brightness, contrast):
    image = make_picture(50, 37)
    ours = np.asarray(augment._relight(image, 255 * brightness, contrast), float)
    exact = lit(np.asarray(image, float), brightness, contrast)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=0.5 + 1e-9)


def test_plain_view():
    for width, height, size in [(40, 30, 30), (30, 43, 30), (64, 50, 17), (9, 8, 12)]:
        image = make_picture(width, height)
        x = np.asarray(augment._resize(image, size))
        top, left = -(-(x.shape[0] - size) // 2), -(-(x.shape[1] - size) // 2)
        view = augment.plain_view(image, size)
        assert view.dtype == np.uint8
        assert view.shape == (size, size, 3)
        np.testing.assert_array_equal(view, x[top : top + size, left : left + size])


def test_only_a_corner_crop():
    image = make_picture(45, 30)
    view = augment.train_view(image, fixed(*NOTHING), 30)
    np.testing.assert_array_equal(view, np.asarray(image)[:, :30])


def test_each_share_and_range():
    """The threshold of each probability, and the range of each change."""
    image = make_picture(45, 30)
    x = np.asarray(image, float)

    def view(**draws):
        return np.asarray(augment.train_view(image, changed(**draws), 30), float)

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
    zoomed = np.asarray(augment._resize(image, 31))
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
    """All steps after the resize in double precision, with random draws."""
    worst, means = 0, []
    for seed in range(12):
        image, size = make_picture(50 + seed, 61 - seed, seed), 33
        u = np.random.default_rng(seed).random(9)
        zoom = 1 + 0.05 * u[1] if u[0] < 0.75 else 1
        x = np.asarray(augment._resize(image, int(size * zoom)), float)
        if u[2] < 0.75:
            x = rotated(x, 20 * u[3] - 10)
        x = lit(x, 0.1 * u[4] - 0.05, 0.1 * u[5] - 0.05)
        if u[6] < 0.5:
            x = x[:, ::-1]
        row, column = (int(n) for n in np.floor(u[7:] * (np.array(x.shape[:2]) - size)))
        x = x[row : row + size, column : column + size]
        view = augment.train_view(image, np.random.default_rng(seed), size)
        assert view.dtype == np.uint8
        assert view.shape == (size, size, 3)
        worst = max(worst, abs(view - x).max())
        means.append(abs(view - x).mean())
    assert worst < 2  # levels of 255
    assert np.mean(means) < 0.4


def test_what_is_drawn_does_not_depend_on_the_picture():
    rngs = [np.random.default_rng(0) for _ in range(3)]
    for rng, image in zip(
        rngs, (make_picture(20, 20), make_picture(90, 40)), strict=False
    ):
        augment.train_view(image, rng, 20)
    rngs[2].random(9)
    assert len({rng.random() for rng in rngs}) == 1


def test_normalise(lenient):
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    for ours in (augment.normalise(x), jax.jit(augment.normalise)(x)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, (x / 255 - mean) / std, rtol=0, atol=1e-6)
