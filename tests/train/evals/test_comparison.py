"""The page of `train.compare` says what the numbers say."""

import pytest

from train.evals import comparison


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        ((0.5, 0.2, 0.8), "AdamW is better than Adam"),
        ((-0.5, -0.8, -0.2), "AdamW is worse than Adam"),
        ((0.1, -0.2, 0.4), "do not differ measurably"),
    ],
)
def test_the_finding_says_what_the_numbers_say(interval, says):
    results = {
        "adamw_minus_adam_l2": dict(
            zip(("mean", "low", "high"), interval, strict=True)
        ),
        "tuning": {"adamw": {"basin": 5}, "adam-l2": {"basin": 7}},
        "test": {"adamw": {"n": 40}},
    }
    sentence = comparison.finding(results)
    assert says in sentence
    assert f"{interval[0]:+.2f} points" in sentence
    assert f"{interval[1]:+.2f} to {interval[2]:+.2f} over 40" in sentence
    assert ": 5 against 7." in sentence
    assert sentence.count(". ") == 0
