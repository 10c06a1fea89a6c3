"""Data sets as NumPy arrays, from files that are there or that are easy to get."""

import gzip
import hashlib
import importlib.util
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLIT_SEED = 0  # which images are for training, validation and test: always the same


class Images(NamedTuple):
    x: np.ndarray  # uint8: digits (n, 64), 0 to 16; CIFAR-10 (n, 32, 32, 3), 0 to 255
    y: np.ndarray  # (n,) int32


class Splits(NamedTuple):
    train: Images
    validation: Images  # of one size with test, so that one program takes either
    test: Images


def _eval_size(train_size: int, eval_size: int | None, most: int, rest: int) -> int:
    if not 1 <= train_size <= most:
        raise ValueError(f"train_size must be in [1, {most}], got {train_size}")
    if eval_size is None:
        return rest
    if not 1 <= eval_size <= rest:
        raise ValueError(
            f"eval_size must be in [1, {rest}] beside {train_size} training images, "
            f"got {eval_size}"
        )
    return eval_size


# ---------------------------------------------------------------------------
# scikit-learn's digits: 1,797 images of 8 x 8 pixels
# ---------------------------------------------------------------------------


def load_digits(train_size: int, eval_size: int | None = None) -> Splits:
    """Training images, and for either judgement `eval_size`; None: half of the rest."""
    spec = importlib.util.find_spec("sklearn")  # finds the file without the slow import
    if spec is None or spec.origin is None:
        raise ValueError(
            "dataset='digits' is read from scikit-learn, which is not installed: "
            "pip install scikit-learn"
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        raise ValueError(f"{path} is missing: is scikit-learn installed completely?")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    table = np.random.default_rng(SPLIT_SEED).permutation(table)
    n, rest = train_size, (len(table) - train_size) // 2
    m = _eval_size(n, eval_size, len(table) - 2, rest)
    x, y = table[:, :-1].astype(np.uint8), table[:, -1]
    return Splits(
        Images(x[:n], y[:n]),
        Images(x[n : n + m], y[n : n + m]),
        Images(x[n + m : n + 2 * m], y[n + m : n + 2 * m]),
    )


# ---------------------------------------------------------------------------
# CIFAR-10: 60,000 images of 32 x 32 pixels
# ---------------------------------------------------------------------------

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def load_cifar10(
    data_dir: Path | str | None,
    train_size: int,
    eval_size: int | None = None,
    checksums: dict[str, str] = CIFAR10_MD5,
) -> Splits:
    """Training and validation images from the 50,000, test images from the 10,000.

    Args:
        data_dir: where the official Python batches are: a folder, the folder above it,
            or cifar-10-python.tar.gz or its folder. None: tensorflow-datasets.
        train_size: number of training images.
        eval_size: number of validation images, and of test images; None: as many as
            there are of both.
        checksums: MD5 of each file.
    """
    train, test = (
        _cifar10_from_tfds()
        if data_dir is None
        else _cifar10_from_batches(Path(data_dir), checksums)
    )
    rest = min(len(test.y), len(train.y) - train_size)
    m = _eval_size(train_size, eval_size, len(train.y) - 1, rest)
    rng = np.random.default_rng(SPLIT_SEED)
    order, test_order = rng.permutation(len(train.y)), rng.permutation(len(test.y))
    parts = (
        (train, order[:train_size]),
        (train, order[-m:]),  # the same images whatever the training size
        (test, test_order[:m]),
    )
    return Splits(*(Images(images.x[i], images.y[i]) for images, i in parts))


def _cifar10_from_batches(data_dir: Path, checksums: dict[str, str]):
    images = []
    for name, raw in _read_batches(data_dir, tuple(checksums)).items():
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != checksums[name]:  # before it is unpickled, which may run code
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {name} is damaged, its MD5 is {found}, "
                f"expected {checksums[name]}. Get it again from {CIFAR10_URL}"
            )
        batch = pickle.loads(raw, encoding="bytes")
        planes = batch[b"data"].reshape(-1, 3, 32, 32)  # of red, green and blue
        labels = np.array(batch[b"labels"], np.int32)
        images.append(Images(planes.transpose(0, 2, 3, 1), labels))
    train = Images(*map(np.concatenate, zip(*images[:-1], strict=True)))
    return train, images[-1]


def _read_batches(data_dir: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    folder = "cifar-10-batches-py"
    for place in (data_dir, data_dir / folder):
        missing = [name for name in names if not (place / name).is_file()]
        if not missing:
            return {name: (place / name).read_bytes() for name in names}
        if len(missing) < len(names):
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {place} has no {missing[0]}. "
                f"Get it from {CIFAR10_URL}"
            )
    for archive in (data_dir, data_dir / "cifar-10-python.tar.gz"):
        if archive.is_file():
            with tarfile.open(archive) as tar:
                members = {name: tar.extractfile(f"{folder}/{name}") for name in names}
                return {name: file.read() for name, file in members.items() if file}
    raise ValueError(
        f"data_dir={str(data_dir)!r} holds neither {names[0]}, nor "
        f"{folder}/{names[0]}, nor cifar-10-python.tar.gz. Get it from {CIFAR10_URL}"
    )


def _cifar10_from_tfds():
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            "data_dir=None reads CIFAR-10 through tensorflow-datasets, which is not "
            "installed: pip install tensorflow-datasets, or pass --data-dir with the "
            f"files of {CIFAR10_URL}"
        ) from error
    images = []
    for split in ("train", "test"):
        source: Any = tfds.data_source("cifar10", split=split)
        records = [source[i] for i in range(len(source))]
        labels = np.array([record["label"] for record in records], np.int32)
        images.append(Images(np.stack([r["image"] for r in records]), labels))
    return images
