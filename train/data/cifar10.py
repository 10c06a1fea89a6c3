"""Data sets as NumPy arrays, from files that are there or that are easy to get."""

import gzip
import hashlib
import importlib.util
import pickle
import tarfile
import zlib
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
        data_dir: where the official batches are, Python or binary: a folder, the folder
            above it, or the publisher's archive or its folder. None: read them with
            tensorflow-datasets, which has an order of its own.
        checksums: MD5 of each file, training files first; those named .bin are binary.
        sizes: images of each split, the check where there are no checksums.
    """
    if data_dir is None:
        return _cifar10_from_tfds(sizes)
    parts = []
    for path, raw in _find_batches(Path(data_dir), checksums).items():
        expected = checksums[path.name]
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != expected:  # before it is unpickled, which may run code
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {path} is damaged: {len(raw):,} bytes "
                f"with MD5 {found}, expected MD5 {expected}. {_GET_IT}"
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
        eval_size: number of validation images, and of test images; None: as many as
            there are of both.
        checksums: as in `read_cifar10`.
        sizes: as in `read_cifar10`.
    """
    train, test = read_cifar10(data_dir, checksums, sizes)
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
    """The files of one version, from the first place that has all of them."""
    binary = [name for name in checksums if name.endswith(".bin")]
    python = [name for name in checksums if name not in binary]
    below = (*CIFAR10_FOLDERS, *CIFAR10_ARCHIVES)
    incomplete = []
    for place in (data_dir, *(data_dir / name for name in below)):
        files = _read_place(place, checksums)
        for names in filter(None, (python, binary)):
            missing = [name for name in names if name not in files]
            if not missing:
                return {place / name: files[name] for name in names}
            if len(missing) < len(names):
                incomplete.append((place, missing[0]))
    if incomplete:
        place, name = incomplete[0]
        raise ValueError(
            f"data_dir={str(data_dir)!r}: {place} is incomplete: it has no {name}. "
            f"{_GET_IT}"
        )
    raise ValueError(
        f"data_dir={str(data_dir)!r} holds neither "
        f"{', nor '.join(('data_batch_1', 'data_batch_1.bin', *below))}. {_GET_IT}"
    )


def _read_place(place: Path, names) -> dict[str, bytes]:
    """Those of the files that a folder or an archive has."""
    if not place.is_file():
        paths = [place / name for name in names]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    files = {}
    try:
        with tarfile.open(place) as tar:
            for member in tar:  # in one pass, to go back is to decompress again
                name = Path(member.name).name
                if name in names and (file := tar.extractfile(member)):
                    files[name] = file.read()
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{place} is damaged, or no .tar.gz: {error}. {_GET_IT}"
        ) from error
    return files


def _cifar10_from_tfds(sizes: dict[str, int]) -> tuple[Images, Images]:
    try:
        import tensorflow_datasets as tfds

        train: Any = tfds.data_source("cifar10", split="train")
        test: Any = tfds.data_source("cifar10", split="test")
    except ImportError as error:
        raise ValueError(
            "data_dir=None reads CIFAR-10 through tensorflow-datasets, which misses a "
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
