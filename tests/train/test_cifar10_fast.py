"""train.cifar10_fast: results, and seeds that are left."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_cifar10_fast import TINY, pictures

from train import cifar10_fast
from train.data import cifar10 as data
from train.run.folder import Run

pytestmark = pytest.mark.usefixtures("lenient", "cache")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    """Such pictures in the official format, sixty a batch."""
    root = tmp_path_factory.mktemp("cifar10")
    folder, checksums = root / "cifar-10-batches-py", {}
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        x, y = pictures(60, seed)
        pixels = x.transpose(0, 3, 1, 2).reshape(60, 3072)
        raw = pickle.dumps({b"data": pixels, b"labels": y.tolist()}, protocol=2)
        (folder / name).write_bytes(raw)
        checksums[name] = hashlib.md5(raw).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(data.CIFAR10_MD5):
            patch.delitem(data.CIFAR10_MD5, name)
        for name, md5 in checksums.items():
            patch.setitem(data.CIFAR10_MD5, name, md5)
        yield root


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """One compilation for all runs of the module, which share their settings."""
    compile_and_warm_up, programs = cifar10_fast.compile_and_warm_up, []

    def once(run, *args):
        if not programs:
            programs.append(compile_and_warm_up(run, *args))
        else:
            run.start(1.0)
            run.log("warm", cold_seconds=2.0)
        return programs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10_fast, "compile_and_warm_up", once)
        yield


CONFIG = dataclasses.replace(TINY, name="a", seeds=3, first_seed=5)


def run(out, cifar_dir, **changes):
    return cifar10_fast.main(
        dataclasses.replace(CONFIG, data_dir=cifar_dir, out=out, **changes)
    )


@dataclasses.dataclass
class Finished:
    folder: Path
    results: dict
    ends: list
    printed: str


def read_ends(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == "end"]


@pytest.fixture(scope="module")
def finished(quick_compilation, compile_once, cifar_dir, tmp_path_factory):
    """A run of three seeds, which no test changes."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        folder = run(tmp_path_factory.mktemp("runs"), cifar_dir)
    results = json.loads((folder / "results.json").read_text())
    return Finished(folder, results, read_ends(folder), printed.getvalue())


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.folder, tmp_path / "a")


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_results(finished):
    folder, ends, results = finished.folder, finished.ends, finished.results
    files = {"config.json", "curves.png", "metrics.jsonl", "results.json"}
    assert {path.name for path in folder.iterdir()} == files
    settings = json.loads((folder / "config.json").read_text())
    assert settings["batch_size"] == 20
    assert settings["versions"]["jax"] == jax.__version__

    assert [end["seed"] for end in ends] == [5, 6, 7]
    for end in ends:
        both = end["train_seconds"] + end["evaluate_seconds"]
        assert end["seconds"] == pytest.approx(both)
        assert f"seed {end['seed']}: {end['accuracy']:.2f} %" in finished.printed
    accuracies = [end["accuracy"] for end in ends]
    assert results["accuracy"] == {
        "n": 3,
        "mean": pytest.approx(np.mean(accuracies)),
        "std": pytest.approx(np.std(accuracies, ddof=1)),
        "standard_error": pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(3)),
    }
    reached = np.mean([accuracy >= 20 for accuracy in accuracies])
    assert results["share_at_target"] == pytest.approx(reached)
    assert results["cold_seconds"] > results["compile_seconds"] > 0
    assert f"accuracy: {np.mean(accuracies):.3f} % (n = 3, std" in finished.printed
    assert "\ntrain_seconds: " in finished.printed


def test_a_finished_run_is_reported_again(finished, copy, cifar_dir, capsys):
    before = contents(copy)
    run(copy.parent, cifar_dir)
    assert contents(copy) == before
    printed = capsys.readouterr().out
    assert "is finished; --overwrite starts again" in printed
    mean = finished.results["accuracy"]["mean"]
    assert f"accuracy: {mean:.3f} % (n = 3" in printed


def test_other_settings_and_devices_are_refused(copy, cifar_dir, monkeypatch):
    before = contents(copy)
    with pytest.raises(ValueError, match="name: .* b2 = 0.99, now 0.9"):
        run(copy.parent, cifar_dir, b2=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(cifar10_fast, "environment", lambda: {"devices": "2 x tpu"})
        with pytest.raises(ValueError, match="devices = '2 x cpu', now '2 x tpu'"):
            run(copy.parent, cifar_dir, seeds=4)
    assert contents(copy) == before


class Killed(BaseException):
    """Instead of a signal."""


def kill_in_second_seed(patch, kill):
    """While its line is written."""
    run_log = Run.log

    def log(self, event, **values):
        if (event, values.get("seed")) == ("end", 6):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"event": event} | values)[:40])
            kill()
        return run_log(self, event, **values)

    patch(Run, "log", log)


def check_resumed(folder, first, whole, results):
    ends = read_ends(folder)
    assert ends[0] == first  # with its times: it was not repeated
    again = json.loads((folder / "results.json").read_text())
    for key in ("accuracy", "loss"):
        assert [end[key] for end in ends] == [end[key] for end in whole]
        assert again[key] == results[key]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_next_seed(
    finished, cifar_dir, tmp_path, monkeypatch
):
    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        kill_in_second_seed(patch.setattr, kill)
        with pytest.raises(Killed):
            run(tmp_path, cifar_dir)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[2])
    assert not (tmp_path / "a" / "results.json").exists()
    run(tmp_path, cifar_dir)
    check_resumed(tmp_path / "a", first, finished.ends, finished.results)


def child(out, cifar_dir, checksums, kills):
    """The command in a process of its own, which kills itself."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    data.CIFAR10_MD5.clear()
    data.CIFAR10_MD5.update(checksums)
    if kills:
        kill_in_second_seed(setattr, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(Path(out), Path(cifar_dir))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_next_seed(finished, cifar_dir, tmp_path, cache):
    def start(kills):
        args = str(tmp_path), str(cifar_dir), dict(data.CIFAR10_MD5), kills
        code = f"import test_cifar10_fast as t; t.child(*{args!r})"
        here = Path(__file__)
        paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert done.returncode == (-signal.SIGKILL if kills else 0), done.stderr

    start(True)
    (first,) = (
        json.loads(line)
        for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[2:3]
    )
    start(False)
    check_resumed(tmp_path / "a", first, finished.ends, finished.results)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("train_size", 0, "at least 1"),
        ("train_size", 301, r"in \[1, 300\]"),
        ("eval_size", 0, "at least 1"),
        ("eval_size", 61, r"in \[1, 60\]"),
        ("width", 0.01, "at least 0.1"),
        ("width", float("nan"), "at least 0.1"),
        ("epochs", 0.0, "above 0"),
        ("epochs", float("inf"), "above 0"),
        ("batch_size", 0, r"in \[1, 100\]"),
        ("batch_size", 101, r"in \[1, 100\]"),
        ("learning_rate", -1.0, "above 0"),
        ("weight_decay", -1.0, ">= 0"),
        ("b2", 1.0, r"in \[0, 1"),
        ("warm_up", 0.0, r"in \(0, 1\)"),
        ("warm_up", 1.0, r"in \(0, 1\)"),
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("translate", -1, r"in \[0, 31\]"),
        ("translate", 32, r"in \[0, 31\]"),
        ("unsure", 0, r"in \[1, 60\]"),
        ("unsure", 61, r"in \[1, 60\]"),
        ("target", 100.0, r"in \(0, 100\)"),
        ("seeds", 1, "at least 2"),
        ("first_seed", -1, "in "),
    ],
)
def test_bad_settings(tmp_path, cifar_dir, option, value, allowed):
    config = dataclasses.replace(
        TINY, data_dir=cifar_dir, out=tmp_path, **{option: value}
    )
    with pytest.raises(ValueError, match=f"{option}.*{allowed}.* got .?{value}"):
        cifar10_fast.main(config)
    assert not list(tmp_path.iterdir())


def test_the_command_line():
    config = cifar10_fast.parse_args(["--b1", "0.9", "0.8", "--epochs", "3"])
    assert config == cifar10_fast.Config(b1=(0.9, 0.8), epochs=3.0)


@pytest.mark.slow
def test_the_command_and_what_it_does_not_need():
    code = (
        "import sys\n"
        "for name in ('tyro', 'torch', 'sklearn', 'tensorflow_datasets'):"
        "    sys.modules[name] = None\n"
        "import train.cifar10_fast"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "train.cifar10_fast", "--b1", "0.9", "0.8"]
    done = subprocess.run(
        [*command, "--epochs", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "error: epochs must be above 0, got 0" in done.stderr
