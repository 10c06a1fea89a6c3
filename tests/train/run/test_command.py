"""How commands end: errors in process, signals in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import adamw_jax
from train.run import command
from train.run.folder import Run
from train.run.output import Output

ROOT = Path(__file__).parents[3]


def end(main, args=(), parse_args=lambda args: args):
    """The exit status of a command."""
    with pytest.raises(SystemExit) as exit:
        command.run_command(main, parse_args, list(args))
    return exit.value.code


# ---------------------------------------------------------------------------
# mistakes
# ---------------------------------------------------------------------------


def bad_name(args):
    """A ValueError of ours, with a name of two lines."""
    Run(
        Output(name="two\n/lines"), script="x", name="y", may_change=(), seeds=[0]
    )._open()


def bad_type(args):
    adamw_jax.Phases((1,), steps_per_epoch=2)


def missing_file(args):
    Path("no/such/file").read_text()


def diverges(args):
    class NoRun(Run):
        def log(self, event, **values):
            return {}

        def lines(self, event=None, seed=None):
            return []

    run = NoRun(Output(), script="x", name="y", may_change=(), seeds=[0])
    run.diverged(0, 7, loss=float("nan"))


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (bad_name, "error: name must be that of a folder, got 'two\\n/lines'\n"),
        (bad_type, "error: phases[0] must be a Phase, got 1\n"),
        (missing_file, "error: no/such/file: No such file or directory\n"),
        (
            diverges,
            "error: seed 0 diverged at step 7: loss nan. Finished epochs: 0. "
            "Checkpoints: runs/y/checkpoints/0\n",
        ),
    ],
)
def test_a_mistake_is_one_line(main, message, capsys):
    assert end(main) == 2
    assert capsys.readouterr() == ("", message)
    # also where the options are read
    assert end(print, parse_args=main) == 2
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("main", [bad_name, bad_type, missing_file, diverges])
def test_traceback(main):
    with pytest.raises((ValueError, TypeError, OSError, FloatingPointError)):
        command.run_command(main, lambda args: args, ["--traceback"])


BUGS = {
    "of this test": lambda args: exec("raise ValueError('a bug')"),
    "of NumPy": lambda args: np.zeros(3).reshape(2),
    "in a line of ours": lambda args: adamw_jax.Phases(3),
    "of another kind": lambda args: {}["key"],
}


@pytest.mark.parametrize("kind", BUGS)
def test_a_bug_keeps_its_traceback(kind):
    with pytest.raises((ValueError, TypeError, KeyError)):
        command.run_command(BUGS[kind], lambda args: args, [])


def test_a_command_that_succeeds(capsys):
    before = [signal.getsignal(number) for number in command.SIGNALS]
    command.run_command(lambda args: print(args), list, ["--epochs", "3"])
    command.run_command(lambda args: print(args), list, ["--traceback", "3"])
    assert capsys.readouterr().out == "['--epochs', '3']\n['3']\n"
    assert [signal.getsignal(number) for number in command.SIGNALS] == before


def test_help_names_the_option(capsys):
    def parse_args(args):
        sys.exit(0)

    assert end(print, ["--help"], parse_args) == 0
    assert "--traceback" in capsys.readouterr().out


# ---------------------------------------------------------------------------
# interruptions
# ---------------------------------------------------------------------------


def test_a_signal_waits_for_the_step(capsys, monkeypatch):
    """The step in which it comes is saved, and no other one is taken."""
    steps = []

    def main(args):
        with command.resumable(), command.finish_steps() as interrupt:
            for step in range(1, 9):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                steps.append((step, interrupt.asked()))
                interrupt.here(step)

    before = [signal.getsignal(number) for number in command.SIGNALS]
    monkeypatch.setattr(command, "_exit_soon", lambda status: None)
    try:
        assert end(main) == 143
    finally:
        command._asked.wakeup[1].close()
        command._asked = command._Asked()
        for number, handler in zip(command.SIGNALS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
    assert steps == [(1, False), (2, False), (3, True)]
    assert capsys.readouterr().err == "Stopped at step 3; the same command goes on.\n"


def test_a_signal_after_the_question_waits_for_the_next_step():
    """Otherwise this step would be reported, but was not saved."""
    interrupt = command.Stop()
    with pytest.MonkeyPatch.context() as patch:
        assert not interrupt.asked()
        patch.setattr(command._asked, "signal", signal.SIGINT)
        interrupt.here(1)
        assert interrupt.asked()
        with pytest.raises(command.Interrupted, match="Stopped at step 2; the same"):
            interrupt.here(2)


# Starts, and then takes steps in Python, or is held in one call that runs no handlers,
# like a compiled program.
# A shell's background jobs ignore SIGINT.
AS_IN_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
COMMAND = """
import contextlib, hashlib, time
from train.run.command import finish_steps, resumable, run_command
def main(kind):
    with contextlib.ExitStack() as stack:
        if "resumable" in kind:
            stack.enter_context(resumable())
        if "finishes" in kind:
            interrupt = stack.enter_context(finish_steps())
        print("started", flush=True)
        if "held" in kind:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        while True:
            time.sleep(0.01)
            if "finishes" in kind and interrupt.asked():
                interrupt.here(57)
run_command(main, lambda args: args[0])
"""
WAITS = "Stopping when this step is saved. A second signal stops at once.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "signals", "printed"),
    [
        ("steps", ["SIGINT"], "Stopped.\n"),
        ("steps", ["SIGTERM"], "Stopped.\n"),
        ("resumable", ["SIGINT"], "Stopped; the same command goes on.\n"),
        (
            "resumable finishes",
            ["SIGTERM"],
            WAITS + "Stopped at step 57; the same command goes on.\n",
        ),
        ("held", ["SIGINT"], "Stopped.\n"),
        ("held resumable", ["SIGTERM"], "Stopped; the same command goes on.\n"),
        (
            "held resumable finishes",
            ["SIGINT", "SIGTERM"],
            WAITS + "Stopped; the same command goes on.\n",
        ),
    ],
)
def test_signals(kind, signals, printed):
    process = subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL + COMMAND, kind],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    start = time.monotonic()
    for number, name in enumerate(signals):
        time.sleep(0.5 * number)
        process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("", printed)
    assert process.returncode == 128 + getattr(signal, signals[-1])
    assert time.monotonic() - start < 15
