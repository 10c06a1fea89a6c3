"""The article's augmentation of photographs, with Pillow instead of OpenCV.

Every intermediate image is uint8, and images smaller than the target are enlarged with
plain bilinear weights.
"""

import math

import numpy as np
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, of pixels in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)

MAX_ZOOM = 1.05  # of the shorter side
MAX_DEGREES = 10.0
MAX_LIGHTING = 0.05  # of brightness, for pixels in [0, 1], and of contrast
ZOOM_PROBABILITY = ROTATION_PROBABILITY = 0.75
FLIP_PROBABILITY = 0.5
# The longer side of what is augmented, in pixels and in shorter sides: whichever is
# more. Views of 5,000 x 1 pixels would ask for 14 GB otherwise.
MAX_LONGER, MAX_ASPECT = 4096, 8


def train_view(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random view for training -> (size, size, 3) uint8.

    Always draws nine numbers in [0, 1), in this order: whether to zoom, zoom, whether
    to rotate, angle, brightness, contrast, whether to flip, row and column of the crop.
    The image is zoomed, rotated or flipped if the number is below the probability.
    """
    do_zoom, zoom, do_rotate, angle, light, contrast, do_flip, row, column = rng.random(
        9
    )
    zoom = 1 + (MAX_ZOOM - 1) * zoom if do_zoom < ZOOM_PROBABILITY else 1
    image = _resize(image, int(size * zoom))
    truncation = 0.0
    if do_rotate < ROTATION_PROBABILITY:
        image = _rotate(image, MAX_DEGREES * (2 * angle - 1))
        truncation = 0.5  # what Pillow's truncation to uint8 removes on average
    brightness = 255 * MAX_LIGHTING * (2 * light - 1) + truncation
    image = _relight(image, brightness, MAX_LIGHTING * (2 * contrast - 1))
    if do_flip < FLIP_PROBABILITY:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = image.size
    row, column = int(row * (height - size)), int(column * (width - size))
    return _crop(image, row, column, size)


def plain_view(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop, the shorter side scaled to `size` -> (size, size, 3) uint8."""
    image = _resize(image, size)
    width, height = image.size
    return _crop(image, (height - size + 1) // 2, (width - size + 1) // 2, size)


def normalise(pixels, mean=MEAN, std=STD):
    """uint8 pixels to the network's input; runs inside the step."""
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


# ---------------------------------------------------------------------------
# operations
# ---------------------------------------------------------------------------


def _resize(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scales the shorter side; of very long images, only the middle is kept."""
    ratio = shorter_side / min(image.size)
    limit = max(MAX_LONGER, MAX_ASPECT * shorter_side)
    width, height = (max(math.floor(n * ratio), shorter_side) for n in image.size)
    filter_ = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BILINEAR
    if max(width, height) <= limit:
        return image.resize((width, height), filter_)
    left, top = (max(0.0, (n - limit / ratio) / 2) for n in image.size)
    box = (left, top, image.width - left, image.height - top)
    return image.resize((min(width, limit), min(height, limit)), filter_, box)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Counter-clockwise about OpenCV's centre; mirror images continue the edges.

    The output pixel at offset (dx, dy) from the centre is the input's at
    (cos dx - sin dy, sin dx + cos dy), which lies beyond the edge by at most sin times
    half of the other side.
    """
    width, height = image.size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    left = math.ceil(abs(sin) * (height // 2)) + 1  # one for the bilinear weights
    top = math.ceil(abs(sin) * (width // 2)) + 1
    x, y = width // 2 + 0.5, height // 2 + 0.5  # Pillow's pixel centres are at .5
    matrix = (
        *(cos, -sin, x - cos * x + sin * y + left),
        *(sin, cos, y - sin * x - cos * y + top),
    )
    return _mirror_pad(image, left, top).transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _mirror_pad(image: Image.Image, left: int, top: int) -> Image.Image:
    """Pads by `left` and `top` pixels on both sides, as NumPy's mode "symmetric"."""
    width, height = image.size
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    upside_down = Image.Transpose.FLIP_TOP_BOTTOM
    tiles = (
        (image, flipped),
        (image.transpose(upside_down), flipped.transpose(upside_down)),
    )
    canvas = Image.new("RGB", (width + 2 * left, height + 2 * top))
    columns, rows = math.ceil(left / width), math.ceil(top / height)
    for i in range(-rows, rows + 1):
        for j in range(-columns, columns + 1):
            canvas.paste(tiles[i % 2][j % 2], (left + j * width, top + i * height))
    return canvas


def _relight(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    counts = np.reshape(image.histogram(), (3, 256)).sum(0)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum()
    factor = 1 + contrast if contrast >= 0 else 1 / (1 - contrast)
    new_levels = np.clip((levels - mean) * factor + mean + brightness, 0, 255)
    return image.point(np.rint(new_levels).astype(int).tolist() * 3)


def _crop(image: Image.Image, row: int, column: int, size: int) -> np.ndarray:
    return np.asarray(image.crop((column, row, column + size, row + size)))
