"""Batches of pictures: order, seeds, threads and errors."""

import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image
from sample_pictures import make_picture

from train.data import augment, loader, pictures


@pytest.fixture
def files(tmp_path):
    """13 pictures of different sizes, labelled with their numbers."""
    for i in range(13):
        make_picture(12 + i, 20 - i, seed=i).save(tmp_path / f"{i:02}.png")
    paths = tuple(sorted(tmp_path.iterdir()))
    return pictures.Files(paths, np.arange(13, dtype=np.int32))


def stacked(batches):
    return [(b["image"].copy(), b["label"].copy()) for b in batches]


def assert_same(ours, others):
    for (x, y), (other_x, other_y) in zip(ours, others, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def test_epochs(files):
    batches = stacked(loader.train_batches(files, 8, 5, seed=3, epochs=3, workers=2))
    assert [len(y) for _, y in batches] == [5, 5, 3] * 3
    assert {x.shape[1:] for x, _ in batches} == {(8, 8, 3)}
    assert {x.dtype for x, _ in batches} == {np.dtype(np.uint8)}
    assert {y.dtype for _, y in batches} == {np.dtype(np.int32)}
    orders = np.concatenate([y for _, y in batches]).reshape(3, 13)
    for order in orders:
        assert sorted(order) == list(range(13))
    assert len({tuple(order) for order in orders}) == 3
    # and each picture looks different in each epoch
    x = np.concatenate([x for x, _ in batches]).reshape(3, 13, 8, 8, 3)
    x = np.stack([x[k, np.argsort(orders[k])] for k in range(3)])
    assert all((x[0, i] != x[1, i]).any() for i in range(13))


@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_the_batches_do_not_depend_on_the_workers(files, workers):
    def batches(workers):
        yield from loader.train_batches(files, 8, 2, seed=1, epochs=4, workers=workers)
        yield from loader.eval_batches(files, 8, 3, workers=workers)
        yield from loader.eval_batches(files, 8, 3, augment_seed=1, workers=workers)

    assert_same(stacked(batches(workers)), stacked(batches(0)))


def test_seeds(files):
    def order(seed):
        batches = loader.train_batches(files, 8, 13, seed=seed, epochs=1, workers=0)
        (batch,) = batches
        return tuple(batch["label"].tolist()), batch["image"].tobytes()

    assert order(0) == order(0)
    assert len({order(seed)[0] for seed in (0, 1, 2, 2**32 - 1)}) == 4
    (a,), (b,), (same,) = (
        stacked(loader.eval_batches(files, 8, 13, augment_seed=seed, workers=0))
        for seed in (0, 1, 0)
    )
    assert_same([a], [same])
    assert (a[0] != b[0]).any((1, 2, 3)).all()


def test_a_batch_is_read_by_many_threads(files, monkeypatch):
    """Even if it is the only batch, as with few validation images."""
    seen, open_image = set(), loader.open_image

    def slow(*args, **options):
        seen.add(threading.get_ident())
        time.sleep(0.01)
        return open_image(*args, **options)

    monkeypatch.setattr(loader, "open_image", slow)
    files = pictures.Files(files.paths * 8, np.tile(files.labels, 8))
    (batch,) = loader.eval_batches(files, 8, 64 * len(files.paths), workers=4)
    assert len(batch["label"]) == len(files.paths) > 2 * loader.MAX_CHUNK
    assert len(seen) >= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_any_step(files, workers):
    def batches(first_step):
        return stacked(
            loader.train_batches(
                files, 8, 5, seed=0, epochs=2, first_step=first_step, workers=workers
            )
        )

    complete = batches(0)
    for first_step in range(7):
        assert_same(batches(first_step), complete[first_step:])


def test_evaluation_in_order(files):
    batches = stacked(loader.eval_batches(files, 8, 4))
    assert [len(y) for _, y in batches] == [4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), range(13))
    x = np.concatenate([x for x, _ in batches])
    for path, view in zip(files.paths, x, strict=True):
        plain = augment.plain_view(pictures.open_image(path), 8)
        np.testing.assert_array_equal(view, plain)
    augmented = stacked(loader.eval_batches(files, 8, 4, augment_seed=5))
    np.testing.assert_array_equal(np.concatenate([y for _, y in augmented]), range(13))
    assert (np.concatenate([x for x, _ in augmented]) != x).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    ("shortest", "to_evaluate", "to_train"),
    [(199, 199, 199), (200, 100, 200), (209, 105, 209), (210, 105, 105)],
)
def test_photos_are_never_decoded_too_small(
    tmp_path, monkeypatch, shortest, to_evaluate, to_train
):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (300, shortest)).save(path)
    files = pictures.Files((path,) * 200, np.zeros(200, np.int32))
    resize, sides, targets = augment._resize, set(), set()

    def recorded(image, target):
        sides.add(min(image.size))
        targets.add(target)
        return resize(image, target)

    monkeypatch.setattr(augment, "_resize", recorded)
    list(loader.eval_batches(files, 100, 50))
    assert (sides, targets) == ({to_evaluate}, {100})
    sides.clear()
    list(loader.train_batches(files, 100, 50, seed=0, epochs=1))
    assert (sides, targets) == ({to_train}, {100, 101, 102, 103, 104})


def test_shares_in_batches(tmp_path):
    """Half white, half black pictures: the white side shows which were flipped."""
    x = np.zeros((40, 40, 3), np.uint8)
    x[:, 20:] = 255
    Image.fromarray(x).save(tmp_path / "x.png")
    n = 1500
    files = pictures.Files((tmp_path / "x.png",) * n, np.zeros(n, np.int32))
    (batch,) = loader.train_batches(files, 20, n, seed=0, epochs=1)
    left, right = (
        batch["image"][:, :, half].mean((1, 2, 3))
        for half in (slice(10), slice(10, 20))
    )
    assert np.mean(left > right) == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    # the edge is upright in those that are not rotated
    upright = (batch["image"] == batch["image"][:, :1]).all((1, 2, 3))
    assert np.mean(upright) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


def alive():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def assert_threads_end():
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


def test_threads_end(files):
    assert_threads_end()
    unused = loader.train_batches(files, 8, 2, seed=0, epochs=1, workers=2)
    assert not alive()
    list(unused)
    assert_threads_end()
    batches = loader.train_batches(files, 8, 2, seed=0, epochs=10**6, workers=2)
    next(batches)
    assert alive()
    batches.close()
    assert_threads_end()
    batches = loader.eval_batches(files, 8, 1, workers=2)
    next(batches)
    del batches
    assert_threads_end()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_file_that_fails_later_is_named(files, workers):
    files.paths[6].write_bytes(files.paths[6].read_bytes()[:400])
    with pytest.raises(ValueError, match="06.png: .*truncated"):
        list(loader.eval_batches(files, 8, 2, workers=workers))
    with pytest.raises(ValueError, match="06.png: .*truncated"):
        list(loader.train_batches(files, 8, 2, seed=0, epochs=3, workers=workers))
    batches = loader.eval_batches(files, 8, 2, workers=workers)
    good = list(itertools.islice(batches, 3))
    assert len(good) == 3
    with pytest.raises(ValueError, match="06.png"):
        next(batches)
    assert list(batches) == []
    assert_threads_end()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("size", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("seed", -1, r"in \[0, 2\*\*32\)"),
        ("seed", 2**32, r"in \[0, 2\*\*32\)"),
        ("epochs", 0, "at least 1"),
        ("first_step", -1, r"in \[0, 6\]"),
        ("first_step", 7, r"in \[0, 6\]"),
        ("workers", -1, "None or at least 0"),
    ],
)
def test_bad_settings(files, option, value, allowed):
    good = {"size": 8, "batch_size": 5, "seed": 0, "epochs": 2}
    with pytest.raises(ValueError, match=f"{option} must be {allowed}, got {value}"):
        loader.train_batches(files, **good | {option: value})


def test_no_pictures():
    nothing = pictures.Files((), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="at least one picture"):
        loader.eval_batches(nothing, 8, 2)
