"""Loaders against files in the official formats; the tables of a seed."""

import hashlib
import itertools
import os
import pickle
import sys
import tarfile
import types
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import lax

from train.data import batches
from train.data import cifar10 as data

# ---------------------------------------------------------------------------
# digits
# ---------------------------------------------------------------------------


def test_digits_are_split_the_same_way_every_time():
    splits, again = data.load_digits(400), data.load_digits(400)
    assert [images.x.shape for images in splits] == [(400, 64), (698, 64), (698, 64)]
    for images, same in zip(splits, again, strict=True):
        np.testing.assert_array_equal(images.x, same.x)
        np.testing.assert_array_equal(images.y, same.y)
        assert images.x.dtype == np.uint8
        assert images.x.max() == 16
        assert set(images.y) == set(range(10))


def test_digits_are_those_of_sklearn():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    parts = [np.c_[i.x, i.y] for i in data.load_digits(597)]  # 597 + 2 * 600: all
    ours = sorted(map(tuple, np.concatenate(parts)))
    assert ours == sorted(map(tuple, np.c_[x, y].astype(int)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0,), "train_size must be in .* got 0"),
        ((1796,), "train_size must be in .* got 1796"),
        ((400, 0), "eval_size must be in .1, 698. .* got 0"),
        ((400, 699), "eval_size must be in .1, 698. .* got 699"),
    ],
)
def test_sizes_out_of_range(sizes, message):
    with pytest.raises(ValueError, match=message):
        data.load_digits(*sizes)


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
    return data.Images(x, rng.integers(0, 10, 60).astype(np.int32))


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
        with pytest.raises(ValueError, match="is damaged, or no .tar.gz: ") as error:
            data.read_cifar10(place, checksums)
        assert archive.name in str(error.value)
        md5 = data.CIFAR10_ARCHIVES[archive.name]
        assert how_to_get_it(version) + f"(MD5 {md5})" in str(error.value)


def test_a_wrong_byte_anywhere_in_an_archive(tmp_path, version, images):
    """It may stop zlib, hide the files that follow, or change what a file holds."""
    easy = data.Images(images.x // 64, images.y)  # so that gzip compresses, not stores
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


# ---------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------


def test_every_epoch_has_every_image_once():
    order = batches.order(np.random.default_rng(0), 23, batch_size=5, epochs=7)
    assert order.shape == (7 * 4, 5)
    for epoch in order.reshape(7, 20):
        assert len(set(epoch)) == 20
    assert set(order.ravel()) == set(range(23))  # another three are left out each time


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_label_noise_is_exact(fraction):
    y = np.random.default_rng(0).integers(0, 10, 400).astype(np.int32)
    noisy = batches.with_label_noise(np.random.default_rng(1), y, fraction)
    assert (noisy != y).sum() == fraction * 400
    assert noisy.dtype == y.dtype
    assert 0 <= noisy.min() <= noisy.max() <= 9


def test_crops_and_flips_are_drawn_from_all():
    crops = batches.crops_and_flips(np.random.default_rng(0), (200, 3))
    assert crops.shape == (200, 3, 3)
    assert crops.dtype == np.uint8
    for column, most in enumerate((8, 8, 1)):
        assert set(crops[..., column].ravel()) == set(range(most + 1))


def test_evaluation_in_batches():
    images = data.Images(np.zeros((4000, 64), np.uint8), np.zeros(4000, np.int32))
    assert batches.in_batches(images).x.shape == (4, 1000, 64)
    assert batches.in_batches(data.Images(images.x[:7], images.y[:7])).y.shape == (1, 7)
    with pytest.raises(ValueError, match="eval_size above 1000 .* got 1001"):
        batches.in_batches(data.Images(images.x[:1001], images.y[:1001]))


# ---------------------------------------------------------------------------
# crops, flips and what the network sees, against loops over pixels
# ---------------------------------------------------------------------------


def edge_repeated(k, size):
    """-1 is the first pixel again, -2 the second; likewise at the other end."""
    if k < 0:
        return -k - 1
    return k if k < size else 2 * size - k - 1


def cropped_and_flipped(image, row, column, flip):
    size = len(image)
    out = np.empty_like(image)
    for i in range(size):
        for j in range(size):
            k = size - 1 - j if flip else j  # the crop is flipped, not the image
            y = edge_repeated(row + i - 4, size)
            x = edge_repeated(column + k - 4, size)
            out[i, j] = image[y, x]
    return out


def test_crop_and_flip_at_all_offsets():
    crops = np.array([*itertools.product(range(9), range(9), range(2))], np.uint8)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (len(crops), 12, 12, 3), dtype=np.uint8)
    ours = jax.vmap(batches.crop_and_flip)(batches.padded(x), crops)
    assert ours.dtype == np.uint8
    for image, crop, result in zip(x, crops.tolist(), ours, strict=True):
        np.testing.assert_array_equal(result, cropped_and_flipped(image, *crop))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    arrays(np.uint8, (12, 12, 3)),
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 1)),
)
def test_what_the_network_sees_of_a_training_image(image, crop):
    padded = batches.padded(image[None])[0]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours = jax.jit(lambda x, c: batches.normalise(batches.crop_and_flip(x, c)))(
            padded, np.array(crop, np.uint8)
        )
    assert ours.dtype == np.float32
    # The published moments of the pixels, in double precision.
    mean, std = [0.4914, 0.48216, 0.44653], [0.24703, 0.24349, 0.26159]
    expected = (cropped_and_flipped(image, *crop) / np.float64(255) - mean) / std
    # A few roundings at 1, divided by 0.25: absolute, as pixels near the mean cancel.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_normalise_on_the_host():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 1, 3)
    ours = batches.normalise(levels)
    assert ours.dtype == np.float32
    for level, (red, green, blue) in enumerate(ours[:, 0, 0].tolist()):
        assert abs(red - (level / 255 - 0.4914) / 0.24703) < 1e-6
        assert abs(green - (level / 255 - 0.48216) / 0.24349) < 1e-6
        assert abs(blue - (level / 255 - 0.44653) / 0.26159) < 1e-6
    digits = batches.normalise(np.arange(17, dtype=np.uint8)[None])
    assert digits.dtype == np.float32
    assert digits.tolist() == [[level / 16 for level in range(17)]]


def test_pixels_keep_their_label():
    """Every image is of one colour, its number; so is every crop of it."""
    rng = np.random.default_rng(0)
    x = np.tile(np.arange(120, dtype=np.uint8)[:, None, None, None], (1, 32, 32, 3))
    y = rng.permutation(np.arange(120, dtype=np.int32))
    order = batches.order(rng, 120, batch_size=16, epochs=3)
    crops = batches.crops_and_flips(rng, order.shape)

    def step(tables, batch):
        x, y = tables
        images = jax.vmap(batches.crop_and_flip)(x[batch["order"]], batch["crops"])
        return tables, (images, y[batch["order"]])

    tables = jax.device_put((batches.padded(x), y))
    _, (seen_x, seen_y) = lax.scan(step, tables, {"order": order, "crops": crops})
    assert seen_x.shape == (21, 16, 32, 32, 3)
    seen_x, seen_y = np.asarray(seen_x).reshape(21 * 16, -1), np.asarray(seen_y)
    assert (seen_x == seen_x[:, :1]).all()
    np.testing.assert_array_equal(seen_x[:, 0], order.ravel())
    np.testing.assert_array_equal(seen_y.ravel(), y[seen_x[:, 0]])
