"""Progress in a log and on a terminal."""

import io
import sys

from train.run import progress


def test_a_log_has_a_line_now_and_then(monkeypatch, capsys):
    now = iter(range(0, 100, 3))  # a call takes 3 seconds
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    with progress.progress(4, "runs") as advance:
        for _ in range(4):
            advance(1, "AdamW")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  2 of 4 runs, 0.333 runs/s, 6 s left (AdamW)",
        "  4 of 4 runs, 0.333 runs/s, 0 s left (AdamW)",
    ]


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress.progress(2, "runs") as advance:
        advance(2, "AdamW")
    assert "2/2" in terminal.getvalue() and "AdamW" in terminal.getvalue()
