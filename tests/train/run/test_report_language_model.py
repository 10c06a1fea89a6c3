"""The sentence about the best epoch of a run of train.language_model."""

from types import SimpleNamespace

import numpy as np
import pytest

from train.run.report_language_model import describe_best


@pytest.mark.parametrize(
    ("best", "at_end", "expected"),
    [
        ({"epoch": 9, "valid_loss": np.log(50)}, 50.0, ""),
        (
            {"epoch": 7, "valid_loss": np.log(50)},
            50.9,
            "Seed 3: best at epoch 7 of 9 (validation perplexity 50.00, 50.90 at the "
            "end).",
        ),
        (
            {"epoch": 7, "valid_loss": np.log(50)}
            | {"test": {"perplexity": 61.0, "with_cache": 41.0}},
            80.0,
            "Seed 3: best at epoch 7 of 9, then it overfits (validation perplexity "
            "50.00, 80.00 at the end). The best network is in best-3.npz: test "
            "perplexity 61.00, with the cache 41.00.",
        ),
        ({}, 80.0, ""),
    ],
)
def test_the_best_epoch(tmp_path, best, at_end, expected):
    run = SimpleNamespace(folder=tmp_path, lines=lambda *_: [{}] * 9)
    end = {"seed": 3, "valid": {"perplexity": at_end}, "best": best}
    assert describe_best(end, run) == expected  # type: ignore[arg-type]
