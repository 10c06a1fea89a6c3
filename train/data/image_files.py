"""Image files with labels: which are held out, their names in messages, opening one."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

EVERY_FIFTH = "every fifth image of each class, in order of file names"
LAST_OF_EACH = "the last image of each class, in order of file names"


class Files(NamedTuple):
    paths: tuple[Path, ...]
    labels: np.ndarray  # (n,) int32


class Pictures(NamedTuple):
    classes: tuple[str, ...]
    train: Files
    valid: Files
    split: str  # the rule that chose the validation images


# ---------------------------------------------------------------------------
# lists of files
# ---------------------------------------------------------------------------


def select(files: Files, mask: np.ndarray) -> Files:
    paths = tuple(files.paths[i] for i in np.flatnonzero(mask))
    return Files(paths, files.labels[mask])


def hold_out(classes: tuple[str, ...], files: Files) -> Pictures:
    """Holds out every fifth image of each class, in order of file names.

    Where no class has five images, it is the last image of each class that has two.
    """
    every_fifth, last = np.zeros((2, len(files.paths)), bool)
    for label in np.unique(files.labels):
        images = np.flatnonzero(files.labels == label)
        images = sorted(images, key=lambda i: files.paths[i].as_posix())
        every_fifth[images[4::5]] = True
        last[images[1:][-1:]] = True
    rule, mask = (
        (EVERY_FIFTH, every_fifth) if every_fifth.any() else (LAST_OF_EACH, last)
    )
    return Pictures(classes, select(files, ~mask), select(files, mask), rule)


# ---------------------------------------------------------------------------
# names and numbers in messages
# ---------------------------------------------------------------------------


def printable(name: Path | str) -> str:
    r"""The name with escapes for bytes that are no UTF-8, and for control characters.

    >>> printable("caf\udce9\n.jpg")
    'caf\\xe9\\n.jpg'
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    control = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
    return re.sub(control, lambda match: repr(match[0])[1:-1], text)


def count_images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def abridge(names: Sequence[str]) -> str:
    """The first three of a list."""
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ---------------------------------------------------------------------------
# one file
# ---------------------------------------------------------------------------


def open_image(path: Path, min_side: int = 0) -> Image.Image:
    """Opens an image (its first frame) upright, in RGB, on white where transparent.

    16-bit images use the full range, so 12-bit data stored in 16 bits come out dark.

    Args:
        path: the file.
        min_side: a JPEG may be decoded at a half, a quarter or an eighth of its size,
            as long as its shorter side keeps this number of pixels; 0: full size.

    Raises:
        ValueError: the file cannot be read; the message starts with its path.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32-bit pixels have no defined white level")
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            return _to_rgb(_upright(image))
    except Exception as error:  # damaged files raise many kinds
        text = str(error) or type(error).__name__
        text = text.replace(repr(str(path)), "").rstrip(": ")  # names the path once
        raise ValueError(f"{printable(path)}: {text}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turns or mirrors the image as its EXIF tag says; damaged tags say nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # many kinds
        return image
    turns: dict[Any, Image.Transpose] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # `convert` would clip
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
