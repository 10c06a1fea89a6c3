"""The table of differences: each row has its test, and the page is current."""

import ast
from pathlib import Path

import pytest
from peers.differences import DIFFERENCES, PAGE, ROWS, table

HERE = Path(__file__).parent


def functions(path):
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def checks():
    """Tests that assert a difference: by the fixture, or of both libraries at once."""
    found = []
    for path in HERE.glob("test_*.py"):
        for function in functions(path):
            arguments = [argument.arg for argument in function.args.args]
            if "differs" in arguments or path.name == "test_facts.py":
                found.append(function.name)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.check)
def test_each_row_has_a_check(row):
    assert row.check in checks()
    assert all(row) and row.optax != row.here


def test_each_check_has_one_row():
    assert len(DIFFERENCES) == len(ROWS)
    by_fixture = [
        function.name
        for path in HERE.glob("test_*.py")
        for function in functions(path)
        if "differs" in [argument.arg for argument in function.args.args]
    ]
    assert set(by_fixture) <= DIFFERENCES.keys() and len(by_fixture) > 10


def test_the_page_is_current():
    text = PAGE.read_text("utf-8")
    assert text == table() + "\n", "run `python tests/peers/differences.py`"
