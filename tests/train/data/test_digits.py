"""scikit-learn's digits, split."""

import numpy as np
import pytest

from train.data.digits import load_digits


def test_digits_are_split_the_same_way_every_time():
    splits, again = load_digits(400), load_digits(400)
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
    parts = [np.c_[i.x, i.y] for i in load_digits(597)]  # 597 + 2 * 600: all
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
        load_digits(*sizes)
