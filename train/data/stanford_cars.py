"""Stanford Cars, in both layouts of its publishers."""

from pathlib import Path
from typing import Any

import numpy as np

from train.data.image_files import (
    Files,
    Pictures,
    abridge,
    hold_out,
    printable,
    select,
)

PUBLISHED = "the publisher's test images"
TEST_LABELS = "cars_test_annos_withlabels.mat"


def read(root: Path) -> Pictures | None:
    """The pictures in `root`, as yet undecoded; None: it is not Stanford Cars.

    Args:
        root: the folder of `cars_train` and `devkit` (also of `cars_test` and
            `cars_test_annos_withlabels.mat`), or of `car_ims` and `cars_annos.mat`.
    """
    if (root / "cars_train").is_dir():
        return _read_by_folder(root)
    if (root / "car_ims").is_dir():
        return _read_by_flag(root)
    return None


def _read_by_folder(root: Path) -> Pictures:
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
    return hold_out(classes, train)


def _read_by_flag(root: Path) -> Pictures:
    """The first layout, which the article used."""
    path = root / "cars_annos.mat"
    classes = _class_names(path)
    files, records = _annotated(path, root, "relative_im_path", classes)
    test = _field(path, records, "test").astype(bool)
    return Pictures(classes, select(files, ~test), select(files, test), PUBLISHED)


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
        found = [f"{labels[i]} for {printable(paths[i].name)}" for i in wrong]
        raise ValueError(
            f"{path}: labels must be in [1, {len(classes)}], got {abridge(found)}"
        )
    missing = [printable(image.name) for image in paths if not image.is_file()]
    if missing:
        raise ValueError(
            f"{root}: images listed in {path} are missing: {abridge(missing)}"
        )
    return Files(paths, labels - 1), records
