"""Times programs in turns in one process, and writes what they take.

Every program is built and run once before the first turn. In a turn each program runs
once, so that all of them meet the same conditions. Results are per call of a program,
in milliseconds: the best turn, the median, and the spread, which is the interquartile
range over the median.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.recipes.check import check_options
from train.run.devices import print_compiling
from train.run.environment import environment
from train.run.folder import new_folder
from train.run.log import write_json
from train.run.output import Output
from train.run.report import markdown

Cell = Callable[[dict[str, Any]], str]  # of a table, from its row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns(Output):
    """The options that all benchmarks share."""

    turns: int = 7  # of each program; best, median and spread of them are reported


def check_at_least(config: Any, **least: int) -> None:
    """Raises a ValueError that names the first option below its least value."""
    rules = {
        option: (getattr(config, option) >= minimum, f"at least {minimum}")
        for option, minimum in least.items()
    }
    check_options(config, rules)


class Program(NamedTuple):
    """A compiled program, ready to be timed.

    Attributes:
        run: makes `calls` calls and waits for the last of them.
        calls: in a turn.
        work: FLOPs or bytes that no implementation of a call can do without.
        figures: what else belongs in the row, such as seconds of compilation.
    """

    run: Callable[[], Any]
    calls: int = 1
    work: float | None = None
    figures: Mapping[str, Any] = {}


class Probe(NamedTuple):
    """A program that runs at the speed of the hardware, timed in the same turns.

    Its best rate sets the floor of the others: their work at that rate.

    Attributes:
        name: what it does.
        make: builds it; its `work` is known.
        work_key: of a program's work in bench.json.
        rate_key: of the rate.
        unit: of the rate.
        scale: that unit, in FLOPs or bytes per second.
    """

    name: str
    make: Callable[[], Program]
    work_key: str
    rate_key: str
    unit: str
    scale: float


class Bench(NamedTuple):
    """What is timed.

    Attributes:
        title: the networks or parameters, for the line above the table.
        call: what a program does once, such as a step.
        turn: the calls of a turn, such as 20 steps.
        programs: what builds each program, by row.
        probe: sets the floor; None: there is none.
        may_fail: programs whose failure is reported and does not end the benchmark.
        totals: further rows, each the sum of others that belong together.
        units: plural and number of what a call processes, for a column of throughput.
        ratios: pairs of rows. The first is reported as a multiple of the second.
        ratio_column: heading under which the table shows the ratios; None: each is a
            sentence below it.
        columns: further columns, by heading.
        results: what else belongs in bench.json.
    """

    title: str
    call: str
    turn: str
    programs: Mapping[str, Callable[[], Program]]
    probe: Probe | None = None
    may_fail: Collection[str] = ()
    totals: Mapping[str, Sequence[str]] = {}
    units: tuple[str, int] | None = None
    ratios: Sequence[tuple[str, str]] = ()
    ratio_column: str | None = None
    columns: Mapping[str, Cell] = {}
    results: Mapping[str, Any] = {}


class Timings(NamedTuple):
    """What was built and timed, by name."""

    programs: dict[str, Program]
    seconds: dict[str, np.ndarray]  # of each turn
    ready_seconds: dict[str, float]  # until the program was built and had run once
    failed: dict[str, str]  # why


def run(config: Any, name: str, bench: Bench) -> dict[str, Any]:
    """Times a benchmark; writes config.json, bench.json and bench.md.

    Args:
        config: an `Output` with `turns`.
        name: of the benchmark.
        bench: what is timed.

    Returns:
        The content of bench.json.
    """
    folder = new_folder(config, f"bench-{name}")
    env = environment()
    settings = {"bench": name} | dataclasses.asdict(config) | env
    write_json(folder / "config.json", settings)
    makers = dict(bench.programs)
    if bench.probe:
        makers = {bench.probe.name: bench.probe.make} | makers
    timings = time_in_turns(makers, config.turns, bench.may_fail)
    results = summarize(bench, timings)
    page = report(bench, results, config.turns, env["devices"])
    write_json(folder / "bench.json", results)
    (folder / "bench.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nWrote {folder}.")
    return results


# ---------------------------------------------------------------------------
# timing
# ---------------------------------------------------------------------------


def time_in_turns(
    makers: Mapping[str, Callable[[], Program]], turns: int, may_fail: Collection[str]
) -> Timings:
    """Builds the programs, runs each once, and then times them in turns."""
    timings = Timings({}, {}, {}, {})
    for name, make in makers.items():
        print_compiling(name)
        start = time.perf_counter()
        try:
            program = make()
            program.run()
        except Exception as error:
            if name not in may_fail:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            timings.failed[name] = reason
            print(f"{name}: {reason}", flush=True)
            continue
        timings.programs[name] = program
        timings.seconds[name] = np.zeros(turns)
        timings.ready_seconds[name] = time.perf_counter() - start
        print(f"{name}: ready in {timings.ready_seconds[name]:.1f} s", flush=True)
    for turn in range(turns):
        for name, program in timings.programs.items():
            start = time.perf_counter()
            program.run()
            timings.seconds[name][turn] = time.perf_counter() - start
    return timings


# ---------------------------------------------------------------------------
# results
# ---------------------------------------------------------------------------


def summarize(bench: Bench, timings: Timings) -> dict[str, Any]:
    """Rows, ratios and failures, as in bench.json."""
    results: dict[str, Any] = {}
    if bench.probe:
        program = timings.programs[bench.probe.name]
        seconds = timings.seconds[bench.probe.name].min() / program.calls
        rate = (program.work or 0) / float(seconds)
        results[bench.probe.rate_key] = rate / bench.probe.scale
    rows: dict[str, dict[str, Any]] = {}
    for name in bench.programs:
        if name in timings.programs:
            program, seconds = timings.programs[name], timings.seconds[name]
            rows[name] = make_row(bench, results, program, seconds)
            rows[name]["ready_seconds"] = timings.ready_seconds[name]
        for total, parts in bench.totals.items():
            if name == parts[-1]:
                rows[total] = make_row(bench, results, *add_up(timings, parts))
    for name, peer in bench.ratios:
        if name in rows and peer in rows:
            ratio = rows[name]["median_ms"] / rows[peer]["median_ms"]
            rows[name].setdefault("over", {})[peer] = ratio
    return {**results, **bench.results, "rows": rows, "failed": timings.failed}


def add_up(timings: Timings, parts: Sequence[str]) -> tuple[Program, np.ndarray]:
    """Programs as one, and the seconds of its turns."""
    programs = [timings.programs[part] for part in parts]
    calls = sum(program.calls for program in programs)
    work = sum(program.calls * (program.work or 0) for program in programs)
    program = programs[-1]._replace(calls=calls, work=work / calls)
    return program, np.sum([timings.seconds[part] for part in parts], 0)


def make_row(
    bench: Bench, results: dict[str, Any], program: Program, seconds: np.ndarray
) -> dict[str, Any]:
    """Times of a call, what it must do, and the time of that at the probe's rate."""
    ms = 1e3 * seconds / program.calls
    low, median, high = (float(x) for x in np.quantile(ms, (0.25, 0.5, 0.75)))
    row: dict[str, Any] = {
        "best_ms": float(ms.min()),
        "median_ms": median,
        "spread": (high - low) / median,
    }
    if bench.probe and program.work:
        floor = 1e3 * program.work / (results[bench.probe.rate_key] * bench.probe.scale)
        row[bench.probe.work_key] = program.work
        row |= {"floor_ms": floor, "utilization": floor / median}
    if bench.units:
        unit, number = bench.units
        row[f"{unit}_per_second"] = 1e3 * number / median
    return row | dict(program.figures) | {"turns_ms": ms.tolist()}


def report(bench: Bench, results: dict[str, Any], turns: int, devices: str) -> str:
    """The page: what was timed and where, the table, and the ratios."""
    head = f"{bench.title}, on {devices}"
    if bench.probe:
        rate = f"{results[bench.probe.rate_key]:.3g} {bench.probe.unit}"
        head += f"; floors at the {rate} of {bench.probe.name}"
    rows, columns = results["rows"], make_columns(bench)
    table: list[tuple[str, ...]] = [("", *columns)]
    table += [(name, *(f(row) for f in columns.values())) for name, row in rows.items()]
    for name, reason in results["failed"].items():
        table.append((name, reason, *[""] * (len(columns) - 1)))
    lines = [f"{head}. {turns} turns of {bench.turn}.", "", markdown(table), ""]
    if not bench.ratio_column:
        lines += [
            f"{name} takes {ratio:.2f} x the time of {peer}."
            for name, row in rows.items()
            for peer, ratio in row.get("over", {}).items()
        ]
    return "\n".join(lines).rstrip() + "\n"


def make_columns(bench: Bench) -> dict[str, Cell]:
    columns: dict[str, Cell] = {
        f"ms per {bench.call}, best": lambda row: digits(row["best_ms"]),
        "median": lambda row: digits(row["median_ms"]),
        "spread": lambda row: f"{row['spread']:.0%}",
    }
    if bench.ratio_column:
        columns[bench.ratio_column] = lambda row: next(
            (f"{ratio:.2f}" for ratio in row.get("over", {}).values()), "–"
        )
    if bench.probe:
        columns["floor, ms"] = lambda row: digits(row.get("floor_ms"))
        columns["floor / median"] = lambda row: percent(row.get("utilization"))
    if bench.units:
        key = f"{bench.units[0]}_per_second"
        columns[f"{bench.units[0]}/s"] = lambda row: f"{row[key]:,.0f}"
    return columns | dict(bench.columns)


def digits(value: float | None) -> str:
    """Three significant ones, and thousands in full; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A dash for None."""
    return "–" if share is None else f"{share:.1%}"


def seconds(key: str) -> Cell:
    """The cell of a duration; a dash where the row has none."""
    return lambda row: f"{row[key]:.2g}" if key in row else "–"
