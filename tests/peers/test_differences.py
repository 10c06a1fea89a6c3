"""The table of differences: each row has its test, and the page is current."""

import ast
from pathlib import Path

import pytest
from peers.differences import DIFFERENCES, PAGE, ROWS, table
from peers.optax_tests import EXPECTED, FOLDER, NAMES, expected, files, report

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


def test_failures_of_optaxs_tests_have_a_row():
    assert set(EXPECTED.values()) <= DIFFERENCES.keys()
    texts = [path.read_text("utf-8") for path in FOLDER.rglob("*_test.py")]
    for name in EXPECTED:
        definition = f"def {name.rstrip('0123456789')}("
        assert any(definition in text for text in texts), name


def test_files_of_optax_are_found():
    names = [path.name for path in files([])]
    assert {"alias_test.py", "combine_test.py", "_inject_test.py"} <= set(names)
    assert files(["combine_test"]) == [FOLDER / "_src" / "combine_test.py"]
    assert len(NAMES) == 12


def test_report():
    """An unexpected failure is marked, so that the command fails."""
    tests = {
        "_src/a_test.py::T::test_one": {"outcome": "passed", "error": ""},
        "_src/a_test.py::T::test_tree_get12": {"outcome": "failed", "error": "x"},
    }
    page = report(tests)
    assert page.startswith("2 tests of Optax") and ": 1 pass, 1 fail, 0 skip." in page
    assert "`test_tree_get`" in page and "unexpected" not in page
    assert expected("a::test_tree_get12") in DIFFERENCES
    new = {"_src/a_test.py::T::test_new": {"outcome": "failed", "error": "E: 1\n2"}}
    assert "| **unexpected**: E: 1" in report(tests | new)
