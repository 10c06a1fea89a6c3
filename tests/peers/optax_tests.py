"""Optax's own tests against this library: `python tests/peers/optax_tests.py`.

The wheel of Optax contains its tests. They run twice, a process for each file: as they
are, and with our functions in place of Optax's wherever Optax's modules import them, so
that its other optimizers and wrappers are built from ours, too. Counted are the tests
that pass with Optax's functions here and call one of ours; the failures are listed
with their errors. Nothing of the tests is copied.

    python tests/peers/optax_tests.py                     # all files, 10 minutes
    python tests/peers/optax_tests.py alias_test -k adamw # some of them
"""

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import jax
import optax
import pytest

import adamw_jax as aj

NAMES = (
    *("adam", "adamw", "amsgrad", "sgd"),
    *("scale_by_adam", "scale_by_amsgrad", "trace", "add_decayed_weights"),
    *("scale_by_learning_rate", "clip_by_global_norm", "chain", "apply_updates"),
)
FOLDER = Path(optax.__file__).parent
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    # As many as the tests of sharding ask for.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}


def files() -> list[Path]:
    """Optax's files of tests that could call one of the functions."""
    words = re.compile(rf"\b({'|'.join(NAMES)}|alias|combine|contrib|transform)\b")
    tests = sorted(FOLDER.rglob("*_test.py"), key=lambda path: path.stat().st_size)
    return [path for path in tests if words.search(path.read_text("utf-8"))]


class Calls:
    """Replaces Optax's functions by ours and notes which are called."""

    def __init__(self):
        self.names: set[str] = set()

    def note(self, name, function):
        """The function, which notes that it was called."""

        @functools.wraps(function)
        def noted(*args, **kwargs):
            self.names.add(name)
            return function(*args, **kwargs)

        return noted

    def ours(self, name):
        """Our function of this name; what it builds notes its calls, too."""
        function = getattr(aj, name)
        if name == "apply_updates":
            return self.note(name, function)

        @functools.wraps(function)
        def build(*args, **kwargs):
            self.names.add(name)
            tx = function(*args, **kwargs)
            init, update = self.note(name, tx.init), self.note(name, tx.update)
            return type(tx)(init, update, **getattr(tx, "__dict__", {}))

        return build

    def replace(self):
        """Replaces the functions in all of Optax's modules, and not in ours."""
        original = types.ModuleType("optax")
        original.__dict__.update(vars(optax))
        replacements = {id(getattr(optax, name)): self.ours(name) for name in NAMES}
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "adamw_jax" and hasattr(module, "optax"):
                module.optax = original
            if module_name.split(".")[0] == "optax":
                for key, value in list(vars(module).items()):
                    if id(value) in replacements:
                        setattr(module, key, replacements[id(value)])


class Results:
    """A plugin of pytest that collects each test's calls, outcome and error."""

    def __init__(self, calls):
        self.calls = calls
        self.tests: dict[str, dict] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.calls.names.clear()
        yield
        result = self.tests[item.nodeid]
        result["calls"] = sorted(self.calls.names)
        return True

    def pytest_collectreport(self, report):
        if report.failed:
            self.tests["collection"] = {
                "outcome": "failed",
                "error": str(report.longrepr)[-400:],
                "trace": "",
                "calls": [],
            }

    def pytest_runtest_logreport(self, report):
        result = self.tests.setdefault(
            report.nodeid, {"outcome": "passed", "error": "", "trace": ""}
        )
        if report.outcome == "passed" or result["outcome"] == "failed":
            return
        result["outcome"] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is not None:
            result["error"] = crash.message
            result["trace"] = f"{crash.path}:{crash.lineno}"
        else:
            result["error"] = str(report.longrepr)[-300:]


class Version(str):
    """A version that is compared by numbers; Optax's tests compare "0.10" < "0.7"."""

    def __lt__(self, other):
        return [*map(int, self.split("."))] < [*map(int, other.split("."))]


def run_here(path: str, output: str, ours: bool, options: list[str]) -> None:
    """Runs one file in this process and writes its results."""
    jax.__version__ = Version(jax.__version__)
    calls = Calls()
    if ours:
        calls.replace()
    results = Results(calls)
    config = ["--rootdir", str(FOLDER), "-c", os.devnull, "-p", "no:cacheprovider"]
    pytest.main([path, "-q", "--tb=short", *config, *options], plugins=[results])
    Path(output).write_text(json.dumps(results.tests), "utf-8")


def run(path: Path, ours: bool, options: list[str]) -> dict[str, dict]:
    """Results of the tests of one file, by their ids, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        done = subprocess.run(
            [sys.executable, __file__, "--run", str(path), str(output), str(int(ours))],
            input=json.dumps(options),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if not output.exists():
            raise RuntimeError(f"{path}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(output.read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs=3)
    parser.add_argument("--json")
    parser.add_argument("-k", default="")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.run:
        path, output, ours = args.run
        run_here(path, output, ours == "1", json.load(sys.stdin))
        return
    everything = {}
    for path in files():
        name = path.relative_to(FOLDER).as_posix()
        if args.names and not any(n in name for n in args.names):
            continue
        found = run(path, True, ["-k", args.k] if args.k else [])
        failed = [k for k, v in found.items() if v["outcome"] == "failed"]
        if "collection" in found:
            theirs = run(path, False, ["-k", args.k] if args.k else [])
        elif failed:
            theirs = run(
                path, False, ["-k", " or ".join({k.split("::")[-1] for k in failed})]
            )
        else:
            theirs = {}
        if "collection" in found:
            for k, v in theirs.items():
                if v["outcome"] == "passed":
                    found[k] = {**found["collection"], "calls": ["?"]}
            del found["collection"]
        for k in list(found):
            if (
                found[k]["outcome"] == "failed"
                and theirs.get(k, {}).get("outcome") == "failed"
            ):
                found[k]["outcome"] = "failed with Optax, too"
        everything |= found
        c = collections.Counter(
            (v["outcome"], bool(v["calls"])) for v in found.values()
        )
        print(name, dict(c), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
