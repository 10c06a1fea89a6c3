"""Shuffles, label noise and crops drawn on the host, and what a step makes of them."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import lax

from train.data import batches
from train.data.splits import Images

# ---------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------


def test_every_epoch_has_every_image_once():
    order = batches.order(np.random.default_rng(0), 23, batch_size=5, epochs=7)
    assert order.shape == (7 * 4, 5)
    for epoch in order.reshape(7, 20):
        assert len(set(epoch)) == 20
    assert set(order.ravel()) == set(range(23))  # another three are left out each time


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_label_noise_is_exact(fraction):
    y = np.random.default_rng(0).integers(0, 10, 400).astype(np.int32)
    noisy = batches.with_label_noise(np.random.default_rng(1), y, fraction)
    assert (noisy != y).sum() == fraction * 400
    assert noisy.dtype == y.dtype
    assert 0 <= noisy.min() <= noisy.max() <= 9


def test_crops_and_flips_are_drawn_from_all():
    crops = batches.crops_and_flips(np.random.default_rng(0), (200, 3))
    assert crops.shape == (200, 3, 3)
    assert crops.dtype == np.uint8
    for column, most in enumerate((8, 8, 1)):
        assert set(crops[..., column].ravel()) == set(range(most + 1))


def test_evaluation_in_batches():
    images = Images(np.zeros((4000, 64), np.uint8), np.zeros(4000, np.int32))
    assert batches.in_batches(images).x.shape == (4, 1000, 64)
    assert batches.in_batches(Images(images.x[:7], images.y[:7])).y.shape == (1, 7)
    with pytest.raises(ValueError, match="eval_size above 1000 .* got 1001"):
        batches.in_batches(Images(images.x[:1001], images.y[:1001]))


# ---------------------------------------------------------------------------
# crops, flips and what the network sees, against loops over pixels
# ---------------------------------------------------------------------------


def edge_repeated(k, size):
    """-1 is the first pixel again, -2 the second; likewise at the other end."""
    if k < 0:
        return -k - 1
    return k if k < size else 2 * size - k - 1


def cropped_and_flipped(image, row, column, flip):
    size = len(image)
    out = np.empty_like(image)
    for i in range(size):
        for j in range(size):
            k = size - 1 - j if flip else j  # the crop is flipped, not the image
            y = edge_repeated(row + i - 4, size)
            x = edge_repeated(column + k - 4, size)
            out[i, j] = image[y, x]
    return out


@pytest.mark.slow
def test_crop_and_flip_at_all_offsets():
    crops = np.array([*itertools.product(range(9), range(9), range(2))], np.uint8)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (len(crops), 12, 12, 3), dtype=np.uint8)
    ours = jax.vmap(batches.crop_and_flip)(batches.padded(x), crops)
    assert ours.dtype == np.uint8
    for image, crop, result in zip(x, crops.tolist(), ours, strict=True):
        np.testing.assert_array_equal(result, cropped_and_flipped(image, *crop))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    arrays(np.uint8, (12, 12, 3)),
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 1)),
)
def test_what_the_network_sees_of_a_training_image(image, crop):
    padded = batches.padded(image[None])[0]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours = jax.jit(lambda x, c: batches.normalise(batches.crop_and_flip(x, c)))(
            padded, np.array(crop, np.uint8)
        )
    assert ours.dtype == np.float32
    # The published moments of the pixels, in double precision.
    mean, std = [0.4914, 0.48216, 0.44653], [0.24703, 0.24349, 0.26159]
    expected = (cropped_and_flipped(image, *crop) / np.float64(255) - mean) / std
    # A few roundings at 1, divided by 0.25: absolute, as pixels near the mean cancel.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_normalise_on_the_host():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 1, 3)
    ours = batches.normalise(levels)
    assert ours.dtype == np.float32
    for level, (red, green, blue) in enumerate(ours[:, 0, 0].tolist()):
        assert abs(red - (level / 255 - 0.4914) / 0.24703) < 1e-6
        assert abs(green - (level / 255 - 0.48216) / 0.24349) < 1e-6
        assert abs(blue - (level / 255 - 0.44653) / 0.26159) < 1e-6
    digits = batches.normalise(np.arange(17, dtype=np.uint8)[None])
    assert digits.dtype == np.float32
    assert digits.tolist() == [[level / 16 for level in range(17)]]


def test_pixels_keep_their_label():
    """Every image is of one colour, its number; so is every crop of it."""
    rng = np.random.default_rng(0)
    x = np.tile(np.arange(120, dtype=np.uint8)[:, None, None, None], (1, 32, 32, 3))
    y = rng.permutation(np.arange(120, dtype=np.int32))
    order = batches.order(rng, 120, batch_size=16, epochs=3)
    crops = batches.crops_and_flips(rng, order.shape)

    def step(tables, batch):
        x, y = tables
        images = jax.vmap(batches.crop_and_flip)(x[batch["order"]], batch["crops"])
        return tables, (images, y[batch["order"]])

    tables = jax.device_put((batches.padded(x), y))
    _, (seen_x, seen_y) = lax.scan(step, tables, {"order": order, "crops": crops})
    assert seen_x.shape == (21, 16, 32, 32, 3)
    seen_x, seen_y = np.asarray(seen_x).reshape(21 * 16, -1), np.asarray(seen_y)
    assert (seen_x == seen_x[:, :1]).all()
    np.testing.assert_array_equal(seen_x[:, 0], order.ravel())
    np.testing.assert_array_equal(seen_y.ravel(), y[seen_x[:, 0]])
