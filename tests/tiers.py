"""The two tiers of the suite: what is quick, and how much of it."""

import pytest
from hypothesis import settings


def matrix(cells, quick):
    """Parameters for `parametrize`: the cells that are not in `quick` are slow."""
    quick = list(quick)
    missing = [cell for cell in quick if cell not in cells]
    assert quick and not missing, f"no such cells: {missing}"
    return [
        cell
        if cell in quick
        else pytest.param(
            *(cell if isinstance(cell, tuple) else (cell,)), marks=pytest.mark.slow
        )
        for cell in cells
    ]


def examples(count, **options):
    """Settings of a property with `count` examples, at most the profile's when quick.

    The quick tier loads the profile "quick", `make test-slow` and `make test-all` the
    profile "full" (see conftest.py).
    """
    if settings.get_current_profile_name() == "quick":
        count = min(count, settings.get_profile("quick").max_examples)
    return settings(max_examples=count, **options)
