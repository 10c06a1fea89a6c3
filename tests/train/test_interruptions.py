"""Commands in processes of their own, with mistakes and signals."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import untimed
from tiny_language_model import write_text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = {
    **{"embedding": 8, "width": 12, "epochs": 60, "batch-size": 4, "bptt": 8},
    **{"lengths": 2, "window": 50, "learning-rate": 2e-2, "save-every": 1000},
}


def options(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


# A shell's background jobs ignore SIGINT. Not in preexec_fn, which forks a process that
# has threads of JAX.
AS_IN_A_TERMINAL = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def start(command, *args):
    """A command whose standard output and standard error are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL, f"train.{command}", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, until=None, number=None):
    """Status and outputs; sends a signal after the line that contains `until`."""
    out = ""
    while until:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        out += line
        if until in line:
            process.send_signal(number)
            break
    rest, err = process.communicate(timeout=300)
    return process.returncode, out + rest, err


def test_a_language_model(tmp_path):
    """Ctrl-C, then SIGTERM, then to the end: the numbers of a run left alone."""
    data = write_text(tmp_path / "text")

    def train(name):
        args = options(data_dir=data, out=tmp_path, name=name)
        args += [f"--{key}={value}" for key, value in LANGUAGE_MODEL.items()]
        return start("language_model", *args)

    steps = []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        code, out, err = finish(train("stopped"), "seed 0 epoch", number)
        waits, stopped = err.splitlines()[-2:]
        assert code == status and waits.startswith("Stopping when this step is saved")
        pattern = r"Stopped at step (\d+); the same command goes on\."
        steps.append(re.fullmatch(pattern, stopped)[1])
        assert "Traceback" not in err
    assert f"Going on from step {steps[0]}.\n" in out
    code, out, err = finish(train("stopped"))
    assert code == 0 and f"Going on from step {steps[1]}.\n" in out, err
    assert finish(train("whole"))[0] == 0
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")


def test_a_command_that_cannot_resume(tmp_path):
    args = options(out=tmp_path, name="x", epochs=400, evaluate_every=400)
    code, out, err = finish(start("compare", *args), "compiling", signal.SIGINT)
    assert (code, err.splitlines()[-1]) == (130, "Stopped.")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("cifar10", ["--data-dir=nowhere"], "nowhere"),
        ("cifar10_fast", ["--seeds=1"], "seeds must be"),
        ("cars", ["--data-dir=nowhere"], "nowhere"),
        ("cars", ["predict", "nowhere.jpg", "--model=nowhere"], "nowhere"),
        ("language_model", ["--epochs=0"], "epochs must be"),
        ("generate", ["nowhere"], "folder: nowhere does not exist"),
        ("tune_cache", ["nowhere"], "folder: nowhere does not exist"),
        ("lr_find", ["language_model", "--steps=3"], "steps must be at least 20"),
        ("compare", ["--data-dir=nowhere"], "data_dir must be None for digits"),
        ("low_memory", ["--seeds=1"], "seeds must be at least 2, got 1"),
        ("continue_from_torch", ["--begin=0"], "begin must be at least 1, got 0"),
        ("tabulate", ["nowhere"], "folder must have results of one of"),
        ("bench", ["update", "--turns=0"], "turns must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(command, args, message):
    code, _, err = finish(start(command, *args))
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line


def test_traceback():
    code, _, err = finish(start("generate", "nowhere", "--traceback"))
    assert code == 1 and "Traceback" in err and "ValueError: folder: nowhere" in err
