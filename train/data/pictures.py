"""Labelled pictures on disk: Stanford Cars as published, or a folder for each class."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.data import class_folders, stanford_cars
from train.data.image_files import (
    EVERY_FIFTH,
    LAST_OF_EACH,
    Files,
    Pictures,
    abridge,
    count_images,
    open_image,
    printable,
)

__all__ = [
    "EVERY_FIFTH",
    "LAST_OF_EACH",
    "Files",
    "Pictures",
    "fingerprint",
    "open_image",
    "read",
]

SLOW = 500  # images from which on reading them is announced


def read(data_dir: Path | str, valid_folder: str | None = None) -> Pictures:
    """Lists the pictures of a folder, after decoding each once to find damaged files.

    Where there is no separate validation set, a fifth of the training images is held
    out. A test set is no validation set, except that of Stanford Cars, whose test
    images are the ones that its publishers and the article report.

    Args:
        data_dir: one of these, or a folder that holds nothing but it:
            - Stanford Cars, or the folder above `stanford_cars`: `cars_train` and
              `devkit` (also `cars_test` and `cars_test_annos_withlabels.mat`), or
              `car_ims` and `cars_annos.mat`;
            - `train/CLASS/*`, optionally with `valid/CLASS/*`. The names of splits may
              also be those of `class_folders.split_role`: Train, training_set, val;
            - `CLASS/*`.
        valid_folder: name of the folder of validation images beside `train`, such as
            "test"; None: `valid` or `val`, or else a fifth of the training images.

    Raises:
        ValueError: the folders are not understood, or hold damaged images.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder")
    pictures, inside = None, class_folders.unwrap(data_dir)
    for root in (data_dir, data_dir / "stanford_cars", inside):
        pictures = pictures or stanford_cars.read(root)
    if pictures is None:
        pictures = class_folders.read(data_dir, inside, valid_folder)
    elif valid_folder is not None:
        raise ValueError(
            f"valid_folder must be None for Stanford Cars, got {valid_folder!r}"
        )
    _check(data_dir, pictures)
    return pictures


def fingerprint(pictures: Pictures, data_dir: Path) -> str:
    """A hash of the classes, the file names and their labels."""
    lines = list(pictures.classes)
    for files in (pictures.train, pictures.valid):
        for path, label in zip(files.paths, files.labels, strict=True):
            lines.append(f"{label} {path.relative_to(data_dir).as_posix()}")
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------
# checks
# ---------------------------------------------------------------------------


def _check(data_dir: Path, pictures: Pictures) -> None:
    source = f"data_dir={str(data_dir)!r}"
    classes, train, valid, split = pictures
    if len(classes) < 2:
        raise ValueError(f"{source} has only one class: {abridge(classes)}")
    empty, not_validated = (
        [classes[i] for i in sorted(set(range(len(classes))) - set(labels.tolist()))]
        for labels in (train.labels, valid.labels)
    )
    if empty:
        raise ValueError(f"{source}: classes without training images: {abridge(empty)}")
    if not valid.paths:
        why = "no class has two images" if split == LAST_OF_EACH else split
        raise ValueError(f"{source} has no validation images: {why}")
    count = len(train.paths) + len(valid.paths)
    if count >= SLOW:
        print(f"Reads {count_images(count)} once, to find damaged ones.", flush=True)
    with ThreadPoolExecutor(8) as pool:
        errors = pool.map(_decoding_error, train.paths + valid.paths)
        errors = [error for error in errors if error]
    if errors:
        raise ValueError(f"{source} has images that cannot be read: {abridge(errors)}")
    if not_validated:
        print(f"Classes without validation images: {abridge(not_validated)}")
    same = _in_both(train, valid)
    if same:
        first = " = ".join(printable(path.relative_to(data_dir)) for path in same[0])
        print(
            "Warning: both in training and in validation, byte for byte: "
            f"{count_images(len(same))}, such as {first}"
        )


def _decoding_error(path: Path) -> str | None:
    try:
        open_image(path, min_side=1)
    except ValueError as error:
        return str(error)


def _in_both(train: Files, valid: Files) -> list[tuple[Path, Path]]:
    """Validation files that equal a training file. Only those of one size are read."""

    def by_size(files):
        return [(path.stat().st_size, path) for path in files.paths]

    def digest(path):
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()

    ours, theirs = by_size(valid), by_size(train)
    shared = {size for size, _ in ours} & {size for size, _ in theirs}
    twins = {digest(path): path for size, path in reversed(theirs) if size in shared}
    ours = [(path, digest(path)) for size, path in ours if size in shared]
    return [(path, twins[key]) for path, key in ours if key in twins]
