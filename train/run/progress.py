"""Progress of countable work: a bar on a terminal, lines now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LOG_SECONDS = 5.0  # between two lines in a log

Advance = Callable[[int, str], None]


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Advance]:
    """Yields `advance(done, doing)`: how much more was done, and what is being done.

    Args:
        total: to be done.
        unit: of what, in the plural: "runs".
    """
    with _bar(total, unit) if sys.stdout.isatty() else _lines(total, unit) as advance:
        yield advance


@contextlib.contextmanager
def _bar(total: int, unit: str) -> Iterator[Advance]:
    from rich import progress as rich

    columns = (
        rich.BarColumn(20),  # so that a line fits into 80 columns
        rich.MofNCompleteColumn(),
        rich.TextColumn(unit),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, doing: bar.update(task, advance=done, description=doing)


@contextlib.contextmanager
def _lines(total: int, unit: str) -> Iterator[Advance]:
    start = last = time.perf_counter()
    finished = 0

    def advance(done: int, doing: str) -> None:
        nonlocal finished, last
        finished, now = finished + done, time.perf_counter()
        if finished == total or now - last > LOG_SECONDS:
            last, rate = now, finished / (now - start)
            print(
                f"  {finished} of {total} {unit}, {rate:.3g} {unit}/s, "
                f"{(total - finished) / rate:.0f} s left ({doing})",
                flush=True,
            )

    yield advance


class Pace:
    """How long the rest of a run takes, from the pace of this process.

    Args:
        total: steps or epochs to do.
    """

    def __init__(self, total: int):
        self.remaining = total
        self._done = 0
        self._start = time.perf_counter()

    def skip(self, n: int) -> None:
        """Counts out what an earlier process has done."""
        self.remaining -= n

    def advance(self, n: int = 1) -> float:
        """Counts what has just been done; returns the seconds that are left."""
        self._done += n
        self.remaining -= n
        return (time.perf_counter() - self._start) / self._done * self.remaining
