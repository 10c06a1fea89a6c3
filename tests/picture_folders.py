"""Folders of small pictures for the tests of layouts."""

import hashlib
from pathlib import Path

from PIL import Image


def write(path: Path, width=9, height=7, color=(10, 20, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path, **options)
    return path


def class_folders(root: Path, **counts: int) -> None:
    """Writes 00.png, 01.png, ... of each class, no two with the same pixels."""
    for name, count in counts.items():
        for i in range(count):
            path = root / name / f"{i:02}.png"
            color = hashlib.md5(str(path).encode(), usedforsecurity=False).digest()[:3]
            write(path, color=tuple(color))


def names(files) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in files.paths]
