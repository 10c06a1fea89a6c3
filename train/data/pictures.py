"""Labelled pictures on disk: Stanford Cars as published, or a folder for each class."""

import collections
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
}
EVERY_FIFTH = "every fifth image of each class, in order of file names"
PUBLISHED = "the publisher's test images"
TEST_LABELS = "cars_test_annos_withlabels.mat"


class Files(NamedTuple):
    paths: tuple[Path, ...]
    labels: np.ndarray  # (n,) int32


class Pictures(NamedTuple):
    classes: tuple[str, ...]
    train: Files
    valid: Files
    split: str  # the rule that chose the validation images


def read(data_dir: Path | str) -> Pictures:
    """Lists the pictures of a folder, after decoding each once to find damaged files.

    Where there is no separate validation set, a fifth of the training images is held
    out.

    Args:
        data_dir: one of
            - Stanford Cars, or the folder above `stanford_cars`: `cars_train` and
              `devkit` (also `cars_test` and `cars_test_annos_withlabels.mat`), or
              `car_ims` and `cars_annos.mat`;
            - `train/CLASS/*`, optionally with `valid/CLASS/*`, `val` or `test`;
            - `CLASS/*`.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder")
    for root in (data_dir, data_dir / "stanford_cars"):
        if (root / "cars_train").is_dir():
            pictures = _cars_by_folder(root)
            break
        if (root / "car_ims").is_dir():
            pictures = _cars_by_flag(root)
            break
    else:
        pictures = _class_folders(data_dir)
    _check(data_dir, pictures)
    return pictures


def fingerprint(pictures: Pictures, data_dir: Path) -> str:
    """A hash of the classes, the file names and their labels."""
    lines = list(pictures.classes)
    for files in (pictures.train, pictures.valid):
        for path, label in zip(files.paths, files.labels, strict=True):
            lines.append(f"{label} {path.relative_to(data_dir).as_posix()}")
    text = "\n".join(lines).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------
# Stanford Cars
# ---------------------------------------------------------------------------


def _cars_by_folder(root: Path) -> Pictures:
    """The later layout. The labels of its test images were published separately."""
    devkit = root / "devkit"
    classes = _class_names(devkit / "cars_meta.mat")
    train, _ = _annotated(
        devkit / "cars_train_annos.mat", root / "cars_train", "fname", classes
    )
    for path in (root / TEST_LABELS, devkit / TEST_LABELS):
        if path.is_file() and (root / "cars_test").is_dir():
            valid, _ = _annotated(path, root / "cars_test", "fname", classes)
            return Pictures(classes, train, valid, PUBLISHED)
    return Pictures(classes, *_hold_out_every_fifth(train), EVERY_FIFTH)


def _cars_by_flag(root: Path) -> Pictures:
    """The first layout, which the article used."""
    path = root / "cars_annos.mat"
    classes = _class_names(path)
    files, records = _annotated(path, root, "relative_im_path", classes)
    test = _field(path, records, "test").astype(bool)
    return Pictures(classes, _select(files, ~test), _select(files, test), PUBLISHED)


def _load_mat(path: Path, variable: str) -> Any:
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(f"{path}, a part of Stanford Cars, is missing")
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True)[variable])
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(
            f"{path} is damaged or has no variable {variable!r}: {error}"
        ) from error


def _field(path: Path, records, name: str) -> np.ndarray:
    if name not in (records.dtype.names or ()):
        raise ValueError(f"{path}: the annotations have no field {name!r}")
    return records[name]


def _class_names(path: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in _load_mat(path, "class_names"))


def _annotated(path: Path, root: Path, field: str, classes: tuple[str, ...]):
    """The files listed by a .mat file, and its records."""
    records = _load_mat(path, "annotations")
    paths = tuple(root / str(name) for name in _field(path, records, field))
    labels = _field(path, records, "class").astype(np.int32)  # counted from 1
    wrong = np.flatnonzero((labels < 1) | (labels > len(classes)))
    if len(wrong):
        found = [f"{labels[i]} for {paths[i].name}" for i in wrong]
        raise ValueError(
            f"{path}: labels must be in [1, {len(classes)}], got {_abridge(found)}"
        )
    missing = [image.name for image in paths if not image.is_file()]
    if missing:
        raise ValueError(
            f"{root}: images listed in {path} are missing: {_abridge(missing)}"
        )
    return Files(paths, labels - 1), records


# ---------------------------------------------------------------------------
# a folder for each class
# ---------------------------------------------------------------------------


def _class_folders(data_dir: Path) -> Pictures:
    validation = []
    root = data_dir / "train"
    if root.is_dir() and _sub_folders(root):
        folders = (data_dir / name for name in ("valid", "val", "test"))
        validation = [folder for folder in folders if folder.is_dir()]
    else:
        root = data_dir
    classes = _sub_folders(root)
    if len(classes) < 2:
        found = f"only one folder, {classes[0]!r}" if classes else "no folder"
        raise ValueError(
            f"data_dir={str(data_dir)!r}: {found} in {root}. Expected one folder per "
            "class, for two or more classes, in data_dir or its train/; or Stanford "
            "Cars, as cars_train/ and devkit/ or car_ims/ and cars_annos.mat, in "
            "data_dir or its stanford_cars/"
        )
    train = _list_images(root, classes)
    if not validation:
        return Pictures(classes, *_hold_out_every_fifth(train), EVERY_FIFTH)
    folder = validation[0]
    unknown = [name for name in _sub_folders(folder) if name not in classes]
    if unknown:
        raise ValueError(
            f"{folder} has classes that {root} does not have: {_abridge(unknown)}"
        )
    valid = _list_images(folder, classes)
    return Pictures(classes, train, valid, f"the images of {folder.name}/")


def _sub_folders(root: Path) -> tuple[str, ...]:
    names = (path.name for path in root.iterdir() if path.is_dir())
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _list_images(root: Path, classes: tuple[str, ...]) -> Files:
    """The images of each class in order of file names, without hidden files."""
    paths, labels, empty, skipped = [], [], [], collections.Counter()
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue  # a class may lack validation images
        images = []
        for folder, folders, files in os.walk(root / name):
            folders[:] = [f for f in folders if not f.startswith(".")]
            visible = [Path(folder, f) for f in files if not f.startswith(".")]
            images += [path for path in visible if path.suffix.lower() in SUFFIXES]
            suffixes = [path.suffix for path in visible]
            skipped.update(x for x in suffixes if x.lower() not in SUFFIXES)
        paths += sorted(images, key=Path.as_posix)
        labels += [label] * len(images)
        if not images:
            empty.append(name)
    if empty:
        raise ValueError(
            f"{root}: no image ({' '.join(sorted(SUFFIXES))}) in the class folders: "
            f"{_abridge(empty)}"
        )
    if skipped:
        counts = (
            f"{count} {suffix or 'without suffix'}"
            for suffix, count in sorted(skipped.items())
        )
        print(f"{root}: skipped files that are not images: {', '.join(counts)}")
    return Files(tuple(paths), np.array(labels, np.int32))


# ---------------------------------------------------------------------------
# splits and checks
# ---------------------------------------------------------------------------


def _select(files: Files, mask: np.ndarray) -> Files:
    paths = tuple(files.paths[i] for i in np.flatnonzero(mask))
    return Files(paths, files.labels[mask])


def _hold_out_every_fifth(files: Files) -> tuple[Files, Files]:
    held_out = np.zeros(len(files.paths), bool)
    for label in np.unique(files.labels):
        images = np.flatnonzero(files.labels == label)
        images = sorted(images, key=lambda i: files.paths[i].as_posix())
        held_out[images[4::5]] = True
    return _select(files, ~held_out), _select(files, held_out)


def _check(data_dir: Path, pictures: Pictures) -> None:
    source = f"data_dir={str(data_dir)!r}"
    classes, train, valid, split = pictures
    if len(classes) < 2:
        raise ValueError(f"{source} has only one class: {_abridge(classes)}")
    counts = np.bincount(train.labels, minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        raise ValueError(
            f"{source}: classes without training images: {_abridge(empty)}"
        )
    if not valid.paths:
        why = "no class has five images" if split == EVERY_FIFTH else split
        raise ValueError(f"{source} has no validation images: {why}")
    with ThreadPoolExecutor(8) as pool:
        errors = pool.map(_decoding_error, train.paths + valid.paths)
        errors = [error for error in errors if error]
    if errors:
        raise ValueError(f"{source} has images that cannot be read: {_abridge(errors)}")


def _decoding_error(path: Path) -> str | None:
    try:
        open_image(path, min_side=1)
    except ValueError as error:
        return str(error)


def _abridge(names: Sequence[str]) -> str:
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
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32-bit pixels have no defined white level")
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # damaged files raise many kinds
        text = str(error) or type(error).__name__
        text = text.replace(repr(str(path)), "").rstrip(": ")  # names the path once
        raise ValueError(f"{path}: {text}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # `convert` would clip
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
