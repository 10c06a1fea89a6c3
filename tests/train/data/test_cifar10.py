"""CIFAR-10's loaders against files in the official formats."""

import hashlib
import os
import pickle
import sys
import tarfile
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

from train.data import batches
from train.data import cifar10 as data
from train.data.splits import Images

# ---------------------------------------------------------------------------
# CIFAR-10, ten images a batch
# ---------------------------------------------------------------------------

PYTHON, BINARY = data.CIFAR10_FOLDERS
ARCHIVES = dict(zip(data.CIFAR10_FOLDERS, data.CIFAR10_ARCHIVES, strict=True))


def write_batches(root, version, x, y):
    """Files in the official layout, and their checksums."""
    folder, checksums = root / version, {}
    folder.mkdir(parents=True)
    names = [n for n in data.CIFAR10_MD5 if n.endswith(".bin") == (version == BINARY)]
    for name, images, labels in zip(
        names, x.reshape(6, 10, 32, 32, 3), y.reshape(6, 10), strict=True
    ):
        if version == BINARY:
            raw = b""
            for image, label in zip(images, labels, strict=True):
                planes = [image[..., c].tobytes() for c in range(3)]
                raw += bytes([label]) + b"".join(planes)
        else:
            pixels = np.stack([np.concatenate([*i.transpose(2, 0, 1)]) for i in images])
            batch = {b"data": pixels.reshape(10, 3072), b"labels": labels.tolist()}
            raw = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(raw)
        checksums[name] = hashlib.md5(raw).hexdigest()
    return checksums


def pack(folder, archive):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    x[:, 0, 0, 0] = range(60)  # to be recognised by
    return Images(x, rng.integers(0, 10, 60).astype(np.int32))


@pytest.fixture(params=[PYTHON, BINARY])
def version(request):
    return request.param


@pytest.fixture
def cifar(tmp_path, version, images):
    """The folder above the batches of one version, and their checksums."""
    return tmp_path, write_batches(tmp_path, version, *images)


def check(parts, images):
    """All images as they were written, in that order."""
    for part, rows in zip(parts, (slice(0, 50), slice(50, 60)), strict=True):
        assert part.x.dtype == np.uint8
        assert part.y.dtype == np.int32
        assert part.x.flags.c_contiguous
        np.testing.assert_array_equal(part.x, images.x[rows])
        np.testing.assert_array_equal(part.y, images.y[rows])


def test_cifar10_from_all_places(cifar, tmp_path, version, images):
    root, checksums = cifar
    archive = tmp_path / "elsewhere" / ARCHIVES[version]
    pack(root / version, archive)
    renamed = archive.with_name("data.tgz")
    renamed.write_bytes(archive.read_bytes())
    for place in (root, root / version, archive, archive.parent, renamed, str(root)):
        check(data.read_cifar10(place, checksums), images)


def test_the_first_complete_version_is_taken(tmp_path, images):
    checksums = write_batches(tmp_path, PYTHON, *images)
    (tmp_path / PYTHON / "data_batch_4").unlink()
    checksums |= write_batches(tmp_path, BINARY, *images)
    check(data.read_cifar10(tmp_path, checksums), images)


def test_the_splits_are_parts_of_all_images(cifar, images):
    root, checksums = cifar
    splits = data.load_cifar10(root, 30, 10, checksums)
    assert [part.x.shape[0] for part in splits] == [30, 10, 10]
    marks = [part.x[:, 0, 0, 0] for part in splits]
    assert not set(marks[0]) & set(marks[1])
    assert set(marks[0]) | set(marks[1]) < set(range(50))
    assert set(marks[2]) == set(range(50, 60))
    for part, rows in zip(splits, marks, strict=True):
        np.testing.assert_array_equal(part.x, images.x[rows])
        np.testing.assert_array_equal(part.y, images.y[rows])


def test_the_validation_images_do_not_depend_on_the_training_size(cifar):
    root, checksums = cifar
    small, large = (data.load_cifar10(root, n, 10, checksums) for n in (5, 40))
    np.testing.assert_array_equal(small.validation.x, large.validation.x)


def how_to_get_it(version):
    return f"https://www.cs.toronto.edu/~kriz/{ARCHIVES[version]} "


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1] + b"!", lambda raw: raw[:99]])
@pytest.mark.parametrize("archived", [False, True])
def test_a_damaged_file(cifar, version, damage, archived):
    root, checksums = cifar
    name = list(checksums)[2]
    path = root / version / name
    raw = damage(path.read_bytes())
    path.write_bytes(raw)
    place = root
    if archived:
        place = root / "elsewhere"
        pack(root / version, place / ARCHIVES[version])
    path = place / ARCHIVES[version] / name if archived else path
    message = (
        f"{path} is damaged: {len(raw):,} bytes with MD5 "
        f"{hashlib.md5(raw).hexdigest()}, expected MD5 {checksums[name]}. "
    )
    with pytest.raises(ValueError) as error:
        data.read_cifar10(place, checksums)
    assert message in str(error.value)
    assert how_to_get_it(version) in str(error.value)


class Dangerous:
    def __reduce__(self):
        return pytest.fail, ("unpickled before it was checked",)


def test_a_damaged_file_is_not_unpickled(tmp_path, images):
    checksums = write_batches(tmp_path, PYTHON, *images)
    path = tmp_path / PYTHON / "data_batch_1"
    path.write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(ValueError, match="data_batch_1 is damaged"):
        data.read_cifar10(tmp_path, checksums)
    checksums["data_batch_1"] = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(pytest.fail.Exception):  # so the check is what prevents it
        data.read_cifar10(tmp_path, checksums)


@pytest.mark.parametrize("archived", [False, True])
def test_a_missing_file(cifar, version, archived):
    root, checksums = cifar
    name = list(checksums)[1]
    (root / version / name).unlink()
    place = root / version
    if archived:
        place = root / "elsewhere" / ARCHIVES[version]
        pack(root / version, place)
    with pytest.raises(ValueError) as error:
        data.read_cifar10(place, checksums)
    assert f"{place} is incomplete: it has no {name}. " in str(error.value)
    assert how_to_get_it(version) in str(error.value)


def cut(raw):
    return raw[: len(raw) // 2]


def another_page(raw):
    return b"<html>404</html>"


@pytest.mark.parametrize("damage", [cut, another_page])
def test_a_damaged_archive(cifar, version, damage):
    root, checksums = cifar
    archive = root / "elsewhere" / ARCHIVES[version]
    pack(root / version, archive)
    archive.write_bytes(damage(archive.read_bytes()))
    for place in (archive, archive.parent):
        with pytest.raises(ValueError, match="is damaged, or not a .tar.gz: ") as error:
            data.read_cifar10(place, checksums)
        assert archive.name in str(error.value)
        md5 = data.CIFAR10_ARCHIVES[archive.name]
        assert how_to_get_it(version) + f"(MD5 {md5})" in str(error.value)


def test_a_wrong_byte_anywhere_in_an_archive(tmp_path, version, images):
    """It may stop zlib, hide the files that follow, or change what a file holds."""
    easy = Images(images.x // 64, images.y)  # so that gzip compresses, not stores
    checksums = write_batches(tmp_path, version, *easy)
    archive = tmp_path / "elsewhere" / ARCHIVES[version]
    pack(tmp_path / version, archive)
    raw, met = archive.read_bytes(), set()
    for k in range(100, len(raw) - 1000, len(raw) // 40):
        archive.write_bytes(raw[:k] + bytes([raw[k] ^ 255]) + raw[k + 1 :])
        try:
            check(data.read_cifar10(archive, checksums), easy)  # it was in the padding
        except ValueError as error:
            assert "is damaged" in str(error) or "is incomplete" in str(error)
            assert how_to_get_it(version) in str(error)
            met.add(type(error.__cause__))
    assert {zlib.error, type(None)} <= met


def test_nothing_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="data_dir=.* holds neither .*https://"):
            data.load_cifar10(place, 30, 10)


# ---------------------------------------------------------------------------
# CIFAR-10 through tensorflow-datasets
# ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_cifar10_from_tensorflow_datasets(capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=20):
        train, test = data.read_cifar10(None, sizes={"train": 20, "test": 20})
        assert "tensorflow-datasets: 40 PNG images" in capsys.readouterr().out
        for part, split in ((train, "train"), (test, "test")):
            records = list(tfds.data_source("cifar10", split=split))
            np.testing.assert_array_equal(part.x, [r["image"] for r in records])
            np.testing.assert_array_equal(part.y, [r["label"] for r in records])
        splits = data.load_cifar10(None, 12, 8, sizes={"train": 20, "test": 20})
        with pytest.raises(ValueError, match="20 images .* 'train' .* expected 50,000"):
            data.read_cifar10(None)
        with pytest.raises(ValueError, match="20 images .* 'test' .* expected 21"):
            data.read_cifar10(None, sizes={"train": 20, "test": 21})
    assert splits.train.x.shape == (12, 32, 32, 3)
    assert splits.train.x.dtype == np.uint8
    assert splits.test.y.dtype == np.int32


def test_images_of_another_shape(monkeypatch):
    records = [{"image": np.zeros((28, 28, 1), np.uint8), "label": 3}] * 4
    fake = types.SimpleNamespace(data_source=lambda name, split: records)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    with pytest.raises(ValueError, match=r"shape \(28, 28, 1\) .* expected uint8 of"):
        data.read_cifar10(None, sizes={"train": 4, "test": 4})


def test_without_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets .*https://"):
        data.load_cifar10(None, 12, 8)


def test_without_tensorflow_to_prepare_the_files(monkeypatch):
    def data_source(name, split):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    fake = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    with pytest.raises(ValueError, match="No module named 'tensorflow'. pip install"):
        data.read_cifar10(None)


# ---------------------------------------------------------------------------
# CIFAR-10 itself, where ADAMW_JAX_DATA names the folder above its Python batches
# ---------------------------------------------------------------------------


@pytest.fixture
def real_dir():
    if "ADAMW_JAX_DATA" not in os.environ:
        pytest.skip("ADAMW_JAX_DATA does not say where cifar-10-batches-py is")
    return Path(os.environ["ADAMW_JAX_DATA"])


def test_checksums_of_the_binary_version(real_dir):
    """A record is the label as a byte and the row of `data`."""
    for name in [name for name in data.CIFAR10_MD5 if not name.endswith(".bin")]:
        raw = (real_dir / PYTHON / name).read_bytes()
        assert hashlib.md5(raw).hexdigest() == data.CIFAR10_MD5[name]
        batch = pickle.loads(raw, encoding="bytes")
        md5 = hashlib.md5()
        for label, row in zip(batch[b"labels"], batch[b"data"], strict=True):
            md5.update(bytes([label]) + row.tobytes())
        assert md5.hexdigest() == data.CIFAR10_MD5[name + ".bin"]


def test_cifar10_itself(real_dir):
    train, test = data.read_cifar10(real_dir)
    assert train.x.shape == (data.CIFAR10_SIZES["train"], 32, 32, 3)
    assert test.x.shape == (data.CIFAR10_SIZES["test"], 32, 32, 3)
    assert np.bincount(train.y).tolist() == [5000] * 10
    assert np.bincount(test.y).tolist() == [1000] * 10
    # The constants of `normalise` are those of the training images, to their digits.
    counts = [np.bincount(train.x[..., c].ravel(), minlength=256) for c in range(3)]
    shares, levels = np.array(counts) / train.x[..., 0].size, np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    np.testing.assert_allclose(mean, batches.CIFAR10_MEAN, atol=2e-5)
    np.testing.assert_allclose(std, batches.CIFAR10_STD, atol=2e-5)
