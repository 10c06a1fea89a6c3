"""Normalized weight decay."""

import pytest

import adamw_jax as aj


def digits(value, like):
    """The value with as many significant digits as the text."""
    mantissa = like.lower().split("e")[0].replace(".", "").lstrip("0")
    return f"{value:.{max(len(mantissa), 1) - 1}e}"


def assert_digits(value, like):
    assert digits(value, like) == digits(float(like), like)


def test_normalized_weight_decay():
    decay = aj.normalized_weight_decay(0.025, 128, 50_000, 100)
    assert_digits(decay, "1.265e-4")
    for name in ("batch_size", "num_examples", "epochs"):
        arguments = {"batch_size": 1, "num_examples": 1, "epochs": 1} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            aj.normalized_weight_decay(0.1, **arguments)
