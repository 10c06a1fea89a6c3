"""The harness, with programs that take a known time."""

import dataclasses
import json
import re

import numpy as np
import pytest

from train.bench import harness
from train.bench.harness import Bench, Probe, Program, Timings


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only by `clock.append`."""
    passed: list[float] = []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: sum(passed))
    return passed


def bench(**changes) -> Bench:
    """Two programs of two calls, and a probe of 1,000 bytes per call."""
    probe = Probe("a copy", lambda: copy, "floor_bytes", "copy_kb_per_s", "kB/s", 1e3)
    ours = Program(lambda: None, 2, 500.0, {"compile_seconds": 0.25})
    theirs = Program(lambda: None, 2)
    options = {
        "title": "AdamW",
        "call": "update",
        "turn": "2 updates",
        "programs": {"ours": lambda: ours, "theirs": lambda: theirs},
        "probe": probe,
        "units": ("images", 64),
        "ratios": [("ours", "theirs"), ("ours", "missing")],
        "columns": {"compile": harness.seconds("compile_seconds")},
        "results": {"parameters": 3},
    }
    return Bench(**options | changes)


copy = Program(lambda: None, 4, 1000.0)


def timings(bench: Bench, **seconds) -> Timings:
    """As if the programs had taken these seconds."""
    programs = {name: make() for name, make in bench.programs.items()}
    programs = {"a copy": copy} | programs
    arrays = {name.replace("_", " "): np.array(s) for name, s in seconds.items()}
    programs = {name: p for name, p in programs.items() if name in arrays}
    return Timings(programs, arrays, dict.fromkeys(arrays, 1.5), {})


# ---------------------------------------------------------------------------
# timing
# ---------------------------------------------------------------------------


def test_programs_take_turns_and_the_first_run_is_not_timed(clock, capsys):
    calls = []

    def maker(name, seconds, error=None):
        times = iter(seconds)

        def run():
            if error:
                raise error
            calls.append(name)
            clock.append(next(times))

        def make():
            clock.append(100.0)
            return Program(run)

        return make

    makers = {
        "a": maker("a", [7.0, 1.0, 2.0]),
        "b": maker("b", [8.0, 3.0, 4.0]),
        "c": maker("c", [], ValueError("no compiler\nat all")),
    }
    timed = harness.time_in_turns(makers, 2, ["b", "c"])
    assert calls == ["a", "b"] * 3
    assert {name: list(s) for name, s in timed.seconds.items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
    }
    assert timed.ready_seconds == {"a": 107.0, "b": 108.0}
    assert timed.failed == {"c": "ValueError: no compiler"}
    assert "c: ValueError: no compiler\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no compiler"):
        harness.time_in_turns({"c": makers["c"]}, 2, ["b"])


# ---------------------------------------------------------------------------
# results
# ---------------------------------------------------------------------------


def test_rows():
    given = bench()
    seconds = {"a_copy": [4.0, 8.0], "ours": [2.0, 4.0, 8.0], "theirs": [16.0] * 3}
    results = harness.summarize(given, timings(given, **seconds))
    assert results["copy_kb_per_s"] == 1.0  # 1,000 bytes in the best 4 s / 4 calls
    assert results["parameters"] == 3 and results["failed"] == {}
    ours, theirs = results["rows"].values()
    assert ours["turns_ms"] == [1000.0, 2000.0, 4000.0]
    assert (ours["best_ms"], ours["median_ms"]) == (1000.0, 2000.0)
    assert ours["spread"] == pytest.approx((3000 - 1500) / 2000)
    assert (ours["floor_bytes"], ours["floor_ms"]) == (500.0, 500.0)
    assert ours["utilization"] == 0.25
    assert ours["images_per_second"] == 32.0
    assert (ours["compile_seconds"], ours["ready_seconds"]) == (0.25, 1.5)
    assert ours["over"] == {"theirs": 0.25}
    assert theirs["spread"] == 0 and not {"floor_ms", "over"} & theirs.keys()
    json.dumps(results)


def test_totals_follow_their_parts():
    given = bench(totals={"both": ("ours", "theirs")}, ratios=[("both", "ours")])
    seconds = {"a_copy": [4.0], "ours": [2.0, 4.0], "theirs": [6.0, 4.0]}
    rows = harness.summarize(given, timings(given, **seconds))["rows"]
    assert list(rows) == ["ours", "theirs", "both"]
    assert rows["both"]["turns_ms"] == [2000.0, 2000.0]  # 8 s of 4 calls
    assert rows["both"]["floor_bytes"] == 250.0
    assert rows["both"]["over"]["ours"] == pytest.approx(2000 / 1500)


def test_the_page():
    given = bench()
    seconds = {"a_copy": [4.0], "ours": [12.3456], "theirs": [0.02468]}
    results = harness.summarize(given, timings(given, **seconds))
    results["failed"] = {"PyTorch": "No: not today"}
    page = harness.report(given, results, 7, "1 x cpu")
    head, table, ratios = page.split("\n\n")
    assert head == (
        "AdamW, on 1 x cpu; floors at the 1 kB/s of a copy. 7 turns of 2 updates."
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]
    names = "ms per update, best|median|spread|floor, ms|floor / median|images/s"
    assert rows[0] == ["", *names.split("|"), "compile"]
    ours = ["6,173", "6,173", "0%", "500", "8.1%", "10", "0.25"]
    assert rows[2] == ["ours", *ours]
    assert rows[3] == ["theirs", "12.3", "12.3", "0%", "–", "–", "5,186", "–"]
    assert rows[4] == ["PyTorch", "No: not today", *[""] * 6]
    assert ratios == "ours takes 500.23 x the time of theirs.\n"


def test_ratios_as_a_column():
    given = bench(ratio_column="x theirs", probe=None, units=None)
    results = harness.summarize(given, timings(given, ours=[3.0], theirs=[2.0]))
    page = harness.report(given, results, 1, "1 x cpu")
    assert re.search(r"^\| ours +\| 1,500 +\| 1,500 +\| 0% +\| 1.50 +\|", page, re.M)
    assert re.search(r"^\| theirs .*\| – +\| – +\|$", page, re.M)
    assert "the time of" not in page and "floor" not in page


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    size: int = 3


def test_what_is_written(tmp_path, capsys):
    calls = []
    programs = {"ours": lambda: Program(lambda: calls.append(1), 2)}
    options = {"programs": programs, "probe": None, "ratios": ()}
    config = Config(turns=4, out=tmp_path, name="b")
    results = harness.run(config, "update", bench(**options))
    assert len(calls) == 5 and len(results["rows"]["ours"]["turns_ms"]) == 4
    folder = tmp_path / "b"
    assert json.loads((folder / "bench.json").read_text()) == results
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["bench"], settings["size"], settings["turns"]) == ("update", 3, 4)
    assert "jax" in settings["versions"]
    assert (folder / "bench.md").read_text() in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists"):
        harness.run(config, "update", bench(**options))
    assert len(calls) == 5  # nothing is timed in vain
    harness.run(dataclasses.replace(config, overwrite=True), "update", bench(**options))


def test_options_below_their_least_value():
    harness.check_at_least(Config(), size=3)
    with pytest.raises(ValueError, match="size must be at least 4, got 3"):
        harness.check_at_least(Config(), turns=1, size=4)
