"""CIFAR-10 as NumPy arrays: 60,000 images of 32 x 32 pixels, from official files."""

import hashlib
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from train.data.splits import SPLIT_SEED, Images, Splits, check_sizes

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_ARCHIVES = {  # MD5 on the publisher's page
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}
CIFAR10_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")  # in the archives
CIFAR10_SIZES = {"train": 50_000, "test": 10_000}
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    # A record of the binary version is the label and the pixels of the Python version,
    # so these follow from the files above. A test derives them again.
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_GET_IT = "Get it from " + " or ".join(
    f"{CIFAR10_URL}{name} (MD5 {md5})" for name, md5 in CIFAR10_ARCHIVES.items()
)


def read_cifar10(
    data_dir: Path | str | None,
    checksums: dict[str, str] = CIFAR10_MD5,
    sizes: dict[str, int] = CIFAR10_SIZES,
) -> tuple[Images, Images]:
    """The training and the test images, in the order of the files.

    Args:
        data_dir: the folder of the official batches, Python or binary, its parent, the
            publisher's archive, or the archive's folder. None: tensorflow-datasets,
            which has another order.
        checksums: MD5 of each file, training files first; those named .bin are binary.
        sizes: images in each split of tensorflow-datasets.
    """
    if data_dir is None:
        return _cifar10_from_tfds(sizes)
    parts = []
    for path, raw in _find_batches(Path(data_dir), checksums).items():
        expected = checksums[path.name]
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if md5 != expected:  # before it is unpickled, which may run code
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {path} is damaged: {len(raw):,} bytes "
                f"with MD5 {md5}, expected MD5 {expected}. {_GET_IT}"
            )
        parts.append(_decode(path, raw))
    *train, test = parts
    return Images(*map(np.concatenate, zip(*train, strict=True))), test


def load_cifar10(
    data_dir: Path | str | None,
    train_size: int,
    eval_size: int | None = None,
    checksums: dict[str, str] = CIFAR10_MD5,
    sizes: dict[str, int] = CIFAR10_SIZES,
) -> Splits:
    """Training and validation images from the 50,000, test images from the 10,000.

    Args:
        data_dir: as in `read_cifar10`.
        train_size: number of training images.
        eval_size: number of validation images, and of test images; None: the largest
            that both allow.
        checksums: as in `read_cifar10`.
        sizes: as in `read_cifar10`.
    """
    train, test = read_cifar10(data_dir, checksums, sizes)
    remaining = min(len(test.y), len(train.y) - train_size)
    m = check_sizes(train_size, eval_size, len(train.y) - 1, remaining)
    rng = np.random.default_rng(SPLIT_SEED)
    order, test_order = rng.permutation(len(train.y)), rng.permutation(len(test.y))
    parts = (
        (train, order[:train_size]),
        (train, order[-m:]),  # the same images whatever the training size
        (test, test_order[:m]),
    )
    return Splits(*(Images(images.x[i], images.y[i]) for images, i in parts))


def _decode(path: Path, raw: bytes) -> Images:
    if path.suffix == ".bin":
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
        labels, pixels = records[:, 0], records[:, 1:]
    else:
        batch = pickle.loads(raw, encoding="bytes")
        labels, pixels = batch[b"labels"], batch[b"data"]
    x = np.stack(np.split(pixels, 3, 1), -1)  # from planes of red, green and blue
    return Images(x.reshape(-1, 32, 32, 3), np.asarray(labels, np.int32))


def _find_batches(data_dir: Path, checksums: dict[str, str]) -> dict[Path, bytes]:
    """The files of one version, from the first location that has all of them."""
    binary = [name for name in checksums if name.endswith(".bin")]
    python = [name for name in checksums if name not in binary]
    below = (*CIFAR10_FOLDERS, *CIFAR10_ARCHIVES)
    incomplete = []
    for location in (data_dir, *(data_dir / name for name in below)):
        files = _read_files(location, checksums)
        for names in filter(None, (python, binary)):
            missing = [name for name in names if name not in files]
            if not missing:
                return {location / name: files[name] for name in names}
            if len(missing) < len(names):
                incomplete.append((location, missing[0]))
    if incomplete:
        location, name = incomplete[0]
        raise ValueError(
            f"data_dir={str(data_dir)!r}: {location} is incomplete: it has no {name}. "
            f"{_GET_IT}"
        )
    raise ValueError(
        f"data_dir={str(data_dir)!r} holds neither "
        f"{', nor '.join(('data_batch_1', 'data_batch_1.bin', *below))}. {_GET_IT}"
    )


def _read_files(location: Path, names) -> dict[str, bytes]:
    """Reads those of the files that a folder or an archive has."""
    if not location.is_file():
        paths = [location / name for name in names]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    files = {}
    try:
        with tarfile.open(location) as tar:
            for member in tar:  # in one pass: going back decompresses again
                name = Path(member.name).name
                if name in names and (file := tar.extractfile(member)):
                    files[name] = file.read()
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{location} is damaged, or not a .tar.gz: {error}. {_GET_IT}"
        ) from error
    return files


def _cifar10_from_tfds(sizes: dict[str, int]) -> tuple[Images, Images]:
    try:
        import tensorflow_datasets as tfds

        train: Any = tfds.data_source("cifar10", split="train")
        test: Any = tfds.data_source("cifar10", split="test")
    except ImportError as error:
        raise ValueError(
            "data_dir=None reads CIFAR-10 through tensorflow-datasets, which lacks a "
            f"package: {error}. pip install tensorflow-datasets tensorflow (the latter "
            f"to prepare the files), or pass --data-dir with the files. {_GET_IT}"
        ) from error
    print(
        f"Reading CIFAR-10 through tensorflow-datasets: {len(train) + len(test):,} PNG "
        "images to decode. --data-dir with the publisher's files is much faster."
    )
    return _from_source("train", train, sizes), _from_source("test", test, sizes)


def _from_source(split: str, source, sizes: dict[str, int]) -> Images:
    if len(source) != sizes[split]:
        raise ValueError(
            f"tensorflow-datasets has {len(source):,} images in the split {split!r} of "
            f"cifar10, expected {sizes[split]:,}. Delete its folder cifar10 to prepare "
            f"them again, or pass --data-dir with the files. {_GET_IT}"
        )
    records = [source[i] for i in range(len(source))]
    x = np.stack([record["image"] for record in records])
    if x.shape[1:] != (32, 32, 3) or x.dtype != np.uint8:
        raise ValueError(
            f"tensorflow-datasets has {x.dtype} images of shape {x.shape[1:]} in the "
            f"split {split!r} of cifar10, expected uint8 of shape (32, 32, 3)"
        )
    return Images(x, np.array([record["label"] for record in records], np.int32))
