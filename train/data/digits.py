"""scikit-learn's digits: 1,797 images of 8 x 8 pixels, from its file."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from train.data.splits import SPLIT_SEED, Images, Splits, check_sizes


def load_digits(train_size: int, eval_size: int | None = None) -> Splits:
    """Training, validation and test images.

    Args:
        train_size: number of training images.
        eval_size: number of validation images, and of test images; None: half of those
            that remain.
    """
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
    n, remaining = train_size, (len(table) - train_size) // 2
    m = check_sizes(n, eval_size, len(table) - 2, remaining)
    x, y = table[:, :-1].astype(np.uint8), table[:, -1]
    return Splits(
        Images(x[:n], y[:n]),
        Images(x[n : n + m], y[n : n + m]),
        Images(x[n + m : n + 2 * m], y[n + m : n + 2 * m]),
    )
