"""Optax's own tests against this library: `python tests/peers/optax_tests.py`.

The wheel of Optax contains its tests. They run here with our functions in place of
Optax's wherever a module of Optax imports them, so that its other optimizers and its
wrappers are built of ours, too. Counted are the tests that call one of our functions,
except those that fail with Optax's functions as well. A failure that follows from a row
of `peers.differences` is listed with it; any other fails the command. Nothing of the
tests is copied.

    python tests/peers/optax_tests.py                      # writes the result page
    python tests/peers/optax_tests.py alias -k extra_args  # prints it only

A part of the name of a file, such as `combine`, chooses files, and `-k` tests. Tests
that Optax skips because it compares versions of JAX as text run here.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from tabulate import tabulate

ROOT = Path(__file__).absolute().parents[2]
FOLDER = Path(optax.__file__).parent
PAGE = ROOT / "docs" / "results" / "optax" / "own_tests.md"
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    # Nearly all of the time is for compiling.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
NAMES = (
    *("adam", "adamw", "amsgrad", "sgd"),
    *("scale_by_adam", "scale_by_amsgrad", "trace", "add_decayed_weights"),
    *("scale_by_learning_rate", "clip_by_global_norm", "chain", "apply_updates"),
)
# Tests of Optax that fail because of a difference, which its check names: the last
# part of the test's id, with or without the number of its parameters.
EXPECTED = {
    **{
        f"test_explicit_dtype{i}": "test_real_mu_dtype_of_complex_parameters"
        for i in range(24, 30)
    },
    **{
        f"test_explicit_dtype{i}": "test_dtype_of_moments_by_default"
        for i in (9, 10, 11)
    },
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": (
        "test_state_of_a_traced_beta"
    ),
    "test_rms_match_adam": "test_first_update_in_float32",
    "test_schedule_free_adamw": "test_first_update_in_float32",
    "test_mu_dtype_controls_moment_dtype": "test_dtype_of_moments_by_default",
    "test_adam": "test_structure_of_the_state",
    "test_map_non_params_to_none": "test_structure_of_the_state",
    "test_inject_hparams": "test_structure_of_the_state",
    "test_masked_state_structure": "test_structure_of_the_state",
    "test_tree_get": "test_get_the_learning_rate_that_is_injected_around",
    "test_tree_set": "test_get_the_learning_rate_that_is_injected_around",
    "test_tree_get_all_with_path": "test_get_the_learning_rate_that_is_injected_around",
}


# ---- in the process that runs a file -------------------------------------------------


class Calls:
    """Replaces Optax's functions by ours and notes which are called."""

    def __init__(self):
        self.names: set[str] = set()

    def noting(self, name: str, function: Any) -> Any:
        """The function; calling it notes the name."""

        @functools.wraps(function)
        def noted(*args, **kwargs):
            self.names.add(name)
            return function(*args, **kwargs)

        return noted

    def noting_transformation(self, name: str, factory: Any) -> Any:
        """The factory; calling it, or what it has built, notes the name."""

        @functools.wraps(factory)
        def build(*args, **kwargs):
            self.names.add(name)
            tx = factory(*args, **kwargs)
            attributes = getattr(tx, "__dict__", {})
            init, update = self.noting(name, tx.init), self.noting(name, tx.update)
            return type(tx)(init, update, **attributes)

        return build

    def replace(self) -> None:
        """Replaces the functions in every module of Optax, but not as we see them."""
        import adamw_jax

        before = types.ModuleType("optax")
        before.__dict__.update(vars(optax))
        ours = {}
        for name in NAMES:
            function = getattr(adamw_jax, name)
            note = (
                self.noting if name == "apply_updates" else self.noting_transformation
            )
            ours[id(getattr(optax, name))] = note(name, function)
        for path, module in list(sys.modules.items()):
            package = path.split(".")[0]
            if package == "adamw_jax" and hasattr(module, "optax"):
                module.optax = before
            if package == "optax":
                for key, value in list(vars(module).items()):
                    if id(value) in ours:
                        setattr(module, key, ours[id(value)])


class Results:
    """A plugin of pytest that collects calls, outcome and error of each test."""

    def __init__(self, calls: Calls):
        self.calls = calls
        self.tests: dict[str, dict[str, Any]] = {}

    def add(self, name: str, outcome: str, error: str = "") -> None:
        """The first failure of a test, or of one of its subtests, is its result."""
        result = self.tests.setdefault(name, {"outcome": outcome, "error": error})
        if outcome != "passed" and result["outcome"] != "failed":
            result |= {"outcome": outcome, "error": error}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.calls.names.clear()
        result = yield
        self.tests[item.nodeid]["calls"] = sorted(self.calls.names)
        return result

    def pytest_runtest_logreport(self, report):
        crash = getattr(report.longrepr, "reprcrash", None)
        error = str(report.longrepr) if crash is None else crash.message
        self.add(report.nodeid, report.outcome, error)

    def pytest_collectreport(self, report):
        if report.failed:
            self.add("", "failed", str(report.longrepr).strip().splitlines()[-1])


class Version(str):
    """A version that compares by numbers; Optax's tests find "0.10" < "0.7"."""

    def __lt__(self, other):
        return [*map(int, self.split("."))] < [*map(int, other.split("."))]


def run_here(path: str, output: str, ours: bool, options: list[str]) -> None:
    """Runs a file in this process, and writes the results of its tests."""
    jax.__version__ = Version(jax.__version__)
    calls = Calls()
    if ours:
        calls.replace()
    results = Results(calls)
    config = ["--rootdir", str(FOLDER), "-c", os.devnull, "-p", "no:cacheprovider"]
    pytest.main([path, "-q", "--tb=short", *config, *options], plugins=[results])
    Path(output).write_text(json.dumps(results.tests), "utf-8")


# ---- in the command ------------------------------------------------------------------


def files(parts: list[str]) -> list[Path]:
    """Optax's files of tests that could call our functions, the shortest first."""
    words = re.compile(rf"\b({'|'.join(NAMES)}|alias|combine|contrib|transform)\b")
    tests = sorted(FOLDER.rglob("*_test.py"), key=lambda path: path.stat().st_size)
    return [
        path
        for path in tests
        if words.search(path.read_text("utf-8"))
        and (not parts or any(part in path.name for part in parts))
    ]


def run(path: Path, ours: bool, select: str) -> dict[str, dict[str, Any]]:
    """Results of the tests of one file, by their ids, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        arguments = ["--run", str(path), str(output), str(int(ours)), "-k", select]
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if not output.exists():
            raise RuntimeError(f"{path}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(output.read_text("utf-8"))


def results_of(path: Path, select: str) -> dict[str, dict[str, Any]]:
    """The tests of a file that call our functions and pass with Optax's."""
    found = run(path, True, select)
    failed = [name for name, test in found.items() if test["outcome"] == "failed"]
    if "" in found:  # the file cannot be imported: all of its tests fail
        theirs = run(path, False, select)
        found = {name: found[""] | {"calls": ["import"]} for name in theirs}
    elif failed:
        theirs = run(path, False, " or ".join({n.split("::")[-1] for n in failed}))
    return {
        name: test
        for name, test in found.items()
        if test.get("calls")
        and (test["outcome"] != "failed" or theirs[name]["outcome"] == "passed")
    }


def expected(name: str) -> str:
    """The check of the difference that makes a test of Optax fail, or nothing."""
    test = name.split("::")[-1]
    return EXPECTED.get(test, EXPECTED.get(test.rstrip("0123456789"), ""))


def report(tests: dict[str, dict[str, Any]]) -> str:
    """The page: how many tests pass in each file, and why the others do not."""
    from peers.differences import DIFFERENCES

    counts: dict[str, Counter] = {}
    for name, test in tests.items():
        counts.setdefault(name.split("::")[0], Counter())[test["outcome"]] += 1
    total = sum(counts.values(), Counter())
    rows = [
        (name, count.total(), count["passed"], count["failed"], count["skipped"])
        for name, count in [*sorted(counts.items()), ("all", total)]
    ]
    reasons: dict[str, set[str]] = {}
    failures: Counter = Counter()
    for name, test in tests.items():
        if test["outcome"] == "failed":
            row = DIFFERENCES.get(expected(name))
            error = (test["error"].strip().splitlines() or [""])[0][:100]
            reason = row.function if row else f"**unexpected**: {error}"
            failures[reason] += 1
            short = name.split("::")[-1].rstrip("0123456789")
            reasons.setdefault(reason, set()).add(f"`{short}`")
    lines = [
        (reason, count, ", ".join(sorted(reasons[reason])))
        for reason, count in failures.most_common()
    ]
    version = f"Optax {optax.__version__} (jax {jax.__version__})"
    return "\n\n".join(
        [
            f"{total.total()} tests of {version} call our functions: "
            f"{total['passed']} pass, {total['failed']} fail, {total['skipped']} skip.",
            tabulate(rows, ["file", "call ours", "pass", "fail", "skip"], "pipe"),
            "The differences that make tests fail:",
            tabulate(lines, ["difference", "fail", "tests"], "pipe"),
        ]
    )


def main() -> int:
    """Runs the files that are named, or all, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="parts of the names of files")
    parser.add_argument("-k", default="", help="which tests, as for pytest")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        path, output, ours = args.run
        run_here(path, output, ours == "1", ["-k", args.k])
        return 0
    tests = {}
    for path in files(args.parts):
        found = results_of(path, args.k)
        passed = sum(test["outcome"] == "passed" for test in found.values())
        print(f"{path.relative_to(FOLDER)}: {passed} of {len(found)}", flush=True)
        tests |= found
    page = report(tests)
    print(page)
    if not args.parts and not args.k:
        PAGE.write_text(page + "\n", "utf-8")
    return "**unexpected**" in page


if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests"))
    sys.exit(main())
