"""One sentence for every bad option."""

import importlib.util
import types

import pytest

from train.recipes.check import check_options, run_rules


def options(**changes):
    return types.SimpleNamespace(
        **{"epochs": 2, "seed": 0, "seeds": 1, "tensorboard": False} | changes
    )


def test_the_sentence():
    check_options(options(), {"epochs": (True, "at least 1")})
    with pytest.raises(ValueError, match="^epochs must be at least 1, got -2$"):
        check_options(options(epochs=-2), {"epochs": (False, "at least 1")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 99\], got -1"),
        ({"seed": 99, "seeds": 2}, r"seed must be in \[0, 98\], got 99"),
        ({"tensorboard": True}, "tensorboard must be False, since tensorboardX"),
    ],
)
def test_rules_of_a_run(monkeypatch, changes, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_options(options(), run_rules(options(), 100))
    with pytest.raises(ValueError, match=message):
        config = options(**changes)
        check_options(config, run_rules(config, 100))
