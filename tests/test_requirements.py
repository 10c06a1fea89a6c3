"""Requirements: lower bounds for users, upper bounds for a clone."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    """Without extras and versions; each has a lower bound and nothing else."""
    return {re.fullmatch(r"([\w-]+)>=[\d.]+", x)[1] for x in requirements}


def test_upper_bounds_are_in_the_constraints_only():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    bounds = [line for line in lines if not line.startswith("#")]
    bounded = {re.fullmatch(r"([\w-]+)<[\d.]+", line)[1] for line in bounds}
    required = names(PROJECT["dependencies"])
    for extra in ("flax", "train", "tensorboard", "pretrained"):
        required |= names(EXTRAS[extra])
    # A backport that does not break.
    assert required - bounded == {"importlib_resources"} and bounded <= required


def test_the_library_needs_three_packages():
    assert names(PROJECT["dependencies"]) == {"jax", "numpy", "optax"}


def test_versions_that_pages_name_are_those_of_pyproject():
    readme = (ROOT / "README.md").read_text("utf-8")
    for requirement in PROJECT["dependencies"]:
        if not requirement.startswith("numpy"):
            assert requirement.replace(">=", " >= ") in readme
    (train,) = (x for x in EXTRAS["train"] if x.startswith("jax"))
    assert train.replace(">=", " >= ") in readme
