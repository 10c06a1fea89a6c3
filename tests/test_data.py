"""Loaders against files in the official formats; the tables of a seed."""

import hashlib
import pickle
import sys
import tarfile

import jax
import numpy as np
import pytest

from train import batches, data

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


@pytest.fixture
def cifar(tmp_path):
    """A folder with batches like the official ones, and their checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    checksums, rng = {}, np.random.default_rng(0)
    for k, name in enumerate(data.CIFAR10_MD5):
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        pixels[:, 0] = range(10 * k, 10 * k + 10)  # to be recognised by
        batch = {b"data": pixels, b"labels": list(rng.permutation(10).tolist())}
        raw = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(raw)
        checksums[name] = hashlib.md5(raw).hexdigest()
    return tmp_path, checksums


def test_cifar10_from_all_places(cifar, tmp_path):
    root, checksums = cifar
    archive = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    places = (root, root / "cifar-10-batches-py", archive, archive.parent, str(root))
    first, *others = (data.load_cifar10(p, 30, 10, checksums) for p in places)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    assert [images.x.shape[0] for images in first] == [30, 10, 10]
    marks = [set(images.x[:, 0, 0, 0]) for images in first]
    assert not marks[0] & marks[1]
    assert marks[0] | marks[1] < set(range(50))
    assert marks[2] == set(range(50, 60))


def test_cifar10_pixels_and_labels_stay_together(cifar):
    root, checksums = cifar
    splits = data.load_cifar10(root, 30, 10, checksums)
    raw = (root / "cifar-10-batches-py" / "test_batch").read_bytes()
    batch = pickle.loads(raw)
    for image, label in zip(*splits.test, strict=True):
        row = int(image[0, 0, 0]) - 50
        assert label == batch[b"labels"][row]
        red, green, blue = batch[b"data"][row].reshape(3, 32, 32)
        np.testing.assert_array_equal(image, np.stack([red, green, blue], -1))


def test_the_validation_images_do_not_depend_on_the_training_size(cifar):
    root, checksums = cifar
    small, large = (data.load_cifar10(root, n, 10, checksums) for n in (5, 40))
    np.testing.assert_array_equal(small.validation.x, large.validation.x)


def test_a_damaged_file(cifar):
    root, checksums = cifar
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    message = f"data_batch_3 is damaged.*expected {checksums['data_batch_3']}.*https://"
    with pytest.raises(ValueError, match=message):
        data.load_cifar10(root, 30, 10, checksums)


def test_a_missing_file(cifar):
    root, checksums = cifar
    (root / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(ValueError, match="has no data_batch_2.*https://"):
        data.load_cifar10(root, 30, 10, checksums)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="data_dir=.* holds neither .*https://"):
        data.load_cifar10(tmp_path / "nowhere", 30, 10)


@pytest.mark.filterwarnings("ignore")
def test_cifar10_from_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=20):
        splits = data.load_cifar10(None, 12, 8)
    assert splits.train.x.shape == (12, 32, 32, 3)
    assert splits.train.x.dtype == np.uint8
    assert splits.test.y.dtype == np.int32


def test_without_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="tensorflow-datasets, which is not installed"):
        data.load_cifar10(None, 12, 8)


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


def test_crops_and_flips():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    crops = batches.crops_and_flips(rng, (200,))
    assert crops.min(0).tolist() == [0, 0, 0]
    assert crops.max(0).tolist() == [8, 8, 1]
    padded = batches.padded(x)
    ours = jax.vmap(batches.crop_and_flip)(padded, crops)
    for image, (row, column, flip), result in zip(padded, crops, ours, strict=True):
        expected = image[row : row + 32, column : column + 32][:, :: -1 if flip else 1]
        np.testing.assert_array_equal(result, expected)
    middle = jax.vmap(batches.crop_and_flip)(padded, np.full((200, 3), [4, 4, 0]))
    np.testing.assert_array_equal(middle, x)


def test_evaluation_in_batches():
    images = data.Images(np.zeros((4000, 64), np.uint8), np.zeros(4000, np.int32))
    assert batches.in_batches(images).x.shape == (4, 1000, 64)
    assert batches.in_batches(data.Images(images.x[:7], images.y[:7])).y.shape == (1, 7)
    with pytest.raises(ValueError, match="eval_size above 1000 .* got 1001"):
        batches.in_batches(data.Images(images.x[:1001], images.y[:1001]))
