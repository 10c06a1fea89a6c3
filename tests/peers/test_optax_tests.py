"""The command that runs Optax's own tests: what it finds, counts and explains."""

import subprocess
import sys
from pathlib import Path

import pytest
from peers.differences import DIFFERENCES
from peers.optax_tests import EXPECTED, FOLDER, NAMES, expected, files, report


def test_failures_have_a_row():
    assert set(EXPECTED.values()) <= DIFFERENCES.keys()
    texts = [path.read_text("utf-8") for path in FOLDER.rglob("*_test.py")]
    for name in EXPECTED:
        definition = f"def {name.rstrip('0123456789')}("
        assert any(definition in text for text in texts), name


def test_files_are_found():
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


@pytest.mark.slow
def test_the_command():
    """Tests that pass, one that fails as expected, and others that are not ours."""
    command = Path(__file__).with_name("optax_tests.py")
    select = "test_masked_state_structure or test_empty or test_should_be_masked"
    done = subprocess.run(
        [sys.executable, command, "_masking_test", "-k", select],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_masking_test.py: " in done.stdout and " 1 fail" in done.stdout
    assert DIFFERENCES["test_structure_of_the_state"].function in done.stdout
