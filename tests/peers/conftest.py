"""Each test here runs with Optax's functions and with ours, and knows the right value.

A test compares through one of two fixtures. `same(value, right)`: both libraries give
the right value. `differs(value, optax=..., here=...)`: they do not, and
`peers.differences` says why, in a row with the name of the test. A difference without a
row fails, and so does a row whose test finds no difference.
"""

import jax
import numpy as np
import optax
import pytest
from peers.differences import DIFFERENCES

import adamw_jax as aj

LIBRARIES = {"optax": optax, "here": aj}


@pytest.fixture(params=LIBRARIES)
def lib(request, lenient, fast_compile):
    """The library under test; `aj` has all functions that these tests call."""
    return LIBRARIES[request.param]


def is_close(value, right, rtol=2e-5, atol=1e-9):
    """Whether the leaves of a tree, strings or arrays, are those of another."""

    def agree(x, y):
        if isinstance(x, str) or isinstance(y, str):
            return isinstance(y, str) and x == y
        x, y = np.asarray(x), np.asarray(y)
        if x.shape != y.shape or y.dtype == object:
            return False
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        x, y = x.astype(wide), y.astype(wide)
        return np.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True)

    leaves, treedef = jax.tree.flatten(value)
    try:
        return all(map(agree, leaves, treedef.flatten_up_to(right)))
    except (ValueError, TypeError):
        return False


@pytest.fixture
def same(request, lib):
    """Asserts a value that both libraries give."""
    name = request.function.__name__
    assert name not in DIFFERENCES, f"{name} is in the table of differences"

    def compare(value, right, **tolerance):
        assert is_close(value, right, **tolerance), f"{value} instead of {right}"

    return compare


@pytest.fixture
def differs(request, lib):
    """Asserts the value of each library, and that the table has the difference."""
    name = request.function.__name__
    assert name in DIFFERENCES, f"{name} is not in the table of differences"

    def compare(value, **values):
        assert not is_close(values["optax"], values["here"]), "there is no difference"
        right = values["optax" if lib is optax else "here"]
        assert is_close(value, right), f"{value} instead of {right}"

    return compare
