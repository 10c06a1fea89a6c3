"""The command of a process, as it is written to config.json."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from train.run.environment import command


@pytest.mark.parametrize(
    ("spec", "argv", "expected"),
    [
        ("train.cifar10", ["x/cifar10.py"], "python -m train.cifar10"),
        (
            "train.cars",
            ["cars.py", "--name", "a b"],
            "python -m train.cars --name 'a b'",
        ),
        (
            "train.bench.__main__",
            ["bench/__main__.py", "update", "--rounds", "3"],
            "python -m train.bench update --rounds 3",
        ),
        (None, ["script.py", "1"], "python script.py 1"),
    ],
)
def test_the_command(monkeypatch, spec, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    spec = spec and ModuleSpec(spec, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert command() == expected
