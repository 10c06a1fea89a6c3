"""What is in folders of pictures, without hidden and system files."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.image_files import Files, abridge, count_images, printable

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff"),
}
# Besides names that begin with a dot: of Synology, QNAP, macOS, Windows, Python, ext4.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
    *("system volume information", "__pycache__", "lost+found"),
}


class Folder(NamedTuple):
    """What is directly in a folder, besides hidden and system files."""

    path: Path
    folders: tuple[str, ...]
    images: int


def look(folder: Path) -> Folder:
    """Lists a folder.

    Raises:
        ValueError: that is not permitted.
    """
    folders, images = [], 0
    for entry in _entries(folder):
        if _is_folder(entry):
            folders.append(entry.name)
        else:
            images += _is_image(entry.name)
    return Folder(folder, tuple(folders), images)


def list_images(root: Path, classes: Sequence[str | None]) -> Files:
    """The images of each class in order of file names; prints what is skipped.

    Args:
        root: the folder of the classes.
        classes: their folders; None: a class that has none, as it may in validation.
    """
    paths, labels, empty, skipped = [], [], [], collections.Counter()
    for label, name in enumerate(classes):
        if name is None:
            continue
        images = []
        for entry in _walk(root / name):
            if _is_special(entry):
                skipped["special"] += 1
            elif _is_image(entry.name):
                images.append(Path(entry.path))
            else:
                skipped[Path(entry.name).suffix] += 1
        paths += sorted(images, key=Path.as_posix)
        labels += [label] * len(images)
        if not images:
            empty.append(printable(name))
    counts = ", ".join(
        f"{count} {printable(suffix) or 'without suffix'}"
        for suffix, count in sorted(skipped.items())
    )
    if empty:
        raise ValueError(
            f"{printable(root)}: no image ({' '.join(sorted(SUFFIXES))}) in the class "
            f"folders: {abridge(empty)}" + (f" (but {counts})" if counts else "")
        )
    if skipped:
        print(f"{printable(root)}: skipped files that are not images: {counts}")
    if strays := look(root).images:
        print(f"{printable(root)}: not used: {count_images(strays)} beside the folders")
    return Files(tuple(paths), np.array(labels, np.int32))


# ---------------------------------------------------------------------------
# entries
# ---------------------------------------------------------------------------


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, in order of names, without hidden and system files."""
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"{printable(folder)} cannot be listed: {error.strerror}"
        ) from error
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and entry.name.casefold() not in SYSTEM_NAMES
    ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in and below a folder, besides folders. Links are followed, not upwards.

    A folder that links reach twice counts once.
    """
    top, folders, seen = folder.resolve(), [folder], set()
    while folders:
        path = folders.pop()
        target = path.resolve()
        if target in seen or (target != top and top.is_relative_to(target)):
            continue
        seen.add(target)
        for entry in _entries(path):
            if _is_folder(entry):
                folders.append(Path(entry.path))
            else:
                yield entry


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe or a socket, which would block; a dangling link is not."""
    try:
        return not entry.is_file() and Path(entry.path).exists()
    except OSError:  # a link to itself
        return False
