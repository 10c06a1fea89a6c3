"""train.cifar10 on tiny images: results, restarts, divergence, refusals."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from runs import final_state, untimed
from tiny_cifar10 import TINY, TRAIN, read_cifar10

import adamw_jax as aj
from train import cifar10
from train.data import cifar10 as data
from train.evals import classify
from train.recipes import cifar10 as recipe
from train.run import checkpoint, command, devices
from train.run.folder import Run, exclusive
from train.run.log import read_lines, rewrite_lines

pytestmark = pytest.mark.usefixtures("lenient", "cache")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def setup(quick_compilation):
    """The tiny images, and programs that are compiled once for each configuration."""
    build, compile_programs = cifar10.build, cifar10.compile_programs
    built, compiled = {}, {}

    def build_once(config, mesh, train_size):
        same = {"out": None, "name": None, "overwrite": False, "seed": 0, "seeds": 1}
        key = repr(dataclasses.replace(config, **same))
        if key not in built:
            built[key] = build(config, mesh, train_size)
        return built[key]

    def compile_once(programs, x, y, test_x, passes):
        key = id(programs.train_epoch), passes
        if key not in compiled:
            compiled[key] = compile_programs(programs, x, y, test_x, passes)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_cifar10", read_cifar10)
        patch.setattr(cifar10, "build", build_once)
        patch.setattr(cifar10, "compile_programs", compile_once)
        yield compiled


def run(out, config=TINY, **changes):
    return cifar10.main(dataclasses.replace(config, out=out, **changes))


@dataclasses.dataclass
class Finished:
    folder: Path
    results: dict
    printed: str


SEEDS = 2
CONFIG = dataclasses.replace(TINY, tta=True, tensorboard=True, seeds=SEEDS)


@pytest.fixture(scope="module")
def finished(setup, tmp_path_factory):
    """A run of two seeds, which no test changes."""
    pytest.importorskip("tensorboardX")
    out = tmp_path_factory.mktemp("cifar10")
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        results = run(out, CONFIG)
    return Finished(out / "run", results, printed.getvalue())


@pytest.fixture
def programs(setup, finished):
    """Those of the finished run."""
    return next(iter(setup.values()))


@pytest.fixture
def copy(finished, tmp_path):
    """Of the folder of the finished run, to be changed."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def log(folder):
    return read_lines(folder / "metrics.jsonl")


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---------------------------------------------------------------------------
# results
# ---------------------------------------------------------------------------


def test_results(finished):
    results, folder = finished.results, finished.folder
    assert json.loads((folder / "results.json").read_text()) == results
    accuracies = results["accuracy"]["runs"]
    assert results["n"] == len(accuracies) == 2
    assert results["accuracy"]["mean"] > 30  # colours are easy; a guess has 10 %
    assert results["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
    assert results["accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    seconds = [x["seconds"] for x in log(folder) if x["event"] == "epoch"]
    assert results["train_seconds"] == pytest.approx(sum(seconds) / 2)
    config = json.loads((folder / "config.json").read_text())
    assert config["train_size"] == TRAIN and "jax" in config["versions"]
    assert imread(folder / "curves.png").std() > 0.05
    (events,) = (folder / "tensorboard" / "0").iterdir()
    assert b"test_loss" in events.read_bytes()


def test_the_log(finished):
    lines = log(finished.folder)
    assert [line["event"] for line in lines] == (
        ["start"] + (["epoch"] * 5 + ["end"]) * 2
    )
    first, last = lines[1], lines[5]
    assert lines[6]["passes"] == 5
    assert lines[6]["test_loss"] != last["test_loss"]  # that of the plain pass
    assert (first["step"], last["step"], last["epoch"]) == (4, 20, 5)
    assert last["loss"] < first["loss"]
    schedule = recipe.make_schedule(CONFIG, 4)
    assert last["learning_rate"] == pytest.approx(schedule.at(19)["learning_rate"])
    losses = {x["seed"]: x["loss"] for x in lines if x["event"] == "epoch"}
    assert losses[0] != losses[1]


def test_what_is_printed(finished):
    assert finished.printed.count("images/s") == 10
    assert "epochs 5" in finished.printed  # which differs from the recipe
    assert "94.25" in finished.printed  # the article's
    assert f"{finished.results['accuracy']['mean']:.2f}" in finished.printed


def test_the_log_is_that_of_the_programs(finished, programs):
    """tests/train/recipes compares the programs with a plain loop."""
    for seed in range(SEEDS):
        number = np.int32(seed)
        state = programs.initial_state(number)
        lines = [x for x in log(finished.folder) if x.get("seed") == seed]
        for epoch in range(CONFIG.epochs):
            state, losses = programs.train_epoch(state, number, np.int32(epoch))
            assert lines[epoch]["loss"] == np.asarray(losses).mean()


def test_a_finished_run_is_reported_again_and_goes_on_with_more_seeds(
    finished, copy, capsys
):
    before = (copy / "metrics.jsonl").read_bytes()
    assert run(copy.parent, CONFIG) == finished.results
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert "is finished; --overwrite starts again" in capsys.readouterr().out
    more = run(copy.parent, CONFIG, seeds=3)
    assert more["n"] == 3
    assert more["accuracy"]["runs"][:2] == finished.results["accuracy"]["runs"]
    assert run(copy.parent, CONFIG, seeds=1)["n"] == 1  # only those asked for


def test_evaluation_of_batches():
    p = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.25, 0.75]]])
    loss, accuracy = cifar10.evaluate(p, np.array([0, 0, 1, 1]))
    assert accuracy == 50.0
    assert loss == pytest.approx(-np.log([0.9, 0.2, 0.5, 0.75]).mean())


@pytest.mark.slow
def test_another_optimizer_and_fewer_images(tmp_path):
    results = run(
        tmp_path,
        optimizer="optax.lion",
        learning_rate=1e-3,
        optimizer_args={"b2": 0.98},
        epochs=1,
        train_size=32,  # two full batches: half as much to compile
    )
    assert results["changed"]["optimizer"] == "optax.lion"
    assert "mu" in str(jax.tree.structure(final_state(tmp_path / "run")["opt"]))
    assert [x["step"] for x in log(tmp_path / "run") if x["event"] == "epoch"] == [2]


# ---------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------


def test_other_settings_are_refused(finished, copy):
    with pytest.raises(
        ValueError, match=r"learning_rate = 0.01, now 0.1; .*epochs = 5, now 2"
    ):
        run(copy.parent, CONFIG, epochs=2, learning_rate=0.1)
    assert log(copy) == log(finished.folder)


def test_overwriting_starts_again(copy):
    run(copy.parent, CONFIG, seeds=1, overwrite=True)
    assert len(log(copy)) == 7


def test_bad_settings_are_refused_before_a_folder_is_made(tmp_path):
    for changes, message in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"optimizer": "optax.lyon"}, "cannot import 'optax.lyon'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_two_processes_in_one_folder_are_refused(copy):
    before = log(copy)
    for changes in ({"seeds": 3}, {"overwrite": True}):
        with exclusive(copy), pytest.raises(ValueError, match="another process"):
            run(copy.parent, CONFIG, **changes)
    assert log(copy) == before


def test_a_log_that_lost_lines_is_refused(copy):
    rewrite_lines(copy / "metrics.jsonl", log(copy)[:2])
    with pytest.raises(ValueError, match="1 epochs of seed 0, its checkpoint 5"):
        run(copy.parent, CONFIG)


def test_other_devices_are_mentioned(copy, capsys):
    lines = log(copy)
    lines[0]["devices"] = "1 x abacus"
    rewrite_lines(copy / "metrics.jsonl", lines)
    results = run(copy.parent, CONFIG, seeds=3)
    assert "started with other devices" in capsys.readouterr().out
    assert results["devices"] == "1 x abacus and 2 x cpu"


def test_a_run_of_an_earlier_version(finished, copy):
    """Finished it is reported as before; unfinished it is refused."""
    path = copy / "config.json"
    settings = json.loads(path.read_text())
    del settings["format"]
    path.write_text(json.dumps(settings))
    assert run(copy.parent, CONFIG) == finished.results
    with pytest.raises(ValueError, match="unfinished run of an earlier version"):
        run(copy.parent, CONFIG, seeds=3)
    assert log(copy) == log(finished.folder)


def test_a_checkpoint_of_another_network_is_refused(finished):
    config = dataclasses.replace(CONFIG, width=6)
    programs = recipe.build(config, devices.data_mesh(), TRAIN)
    like = jax.eval_shape(programs.initial_state, 0)
    folder = finished.folder / "checkpoints" / "0"
    with checkpoint.open_folder(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"step 20 does not fit.*float32\[24\]"):
            checkpoint.restore(checkpoints, like)


def test_hyperparameters_are_in_the_restored_state(finished, programs):
    folder = finished.folder / "checkpoints" / "0"
    with checkpoint.open_folder(folder) as checkpoints:
        state = checkpoint.restore(checkpoints, programs.state)
    assert jax.tree.structure(state) == jax.tree.structure(programs.state)
    assert set(aj.current_hyperparams(state.opt)) >= {"learning_rate", "b1", "b2"}


# ---------------------------------------------------------------------------
# divergence
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_divergence_stops_the_run(tmp_path):
    """The loss is not finite within the first epoch."""
    changes = {"optimizer": "sgd", "weight_decay": 0.0, "div": 1.0}
    changes |= {"learning_rate": 1e25, "name": "bad", "train_size": 32}
    for _ in range(2):  # the second time, it is resumed
        with pytest.raises(
            FloatingPointError,
            match=r"step \d: .*learning rate 1e\+25, .*Finished epochs: 0",
        ):
            run(tmp_path, **changes)
    lines = log(tmp_path / "bad")
    assert lines[-1]["event"] == "diverged" and lines[-1]["step"] < 2
    assert [line["event"] for line in lines].count("diverged") == 1
    assert imread(tmp_path / "bad" / "curves.png").std() > 0.01


def test_divergence_keeps_the_last_good_checkpoint(finished, copy, monkeypatch):
    lines = [x for x in log(copy) if x.get("seed") != 0 or x.get("epoch", 9) < 5]
    rewrite_lines(copy / "metrics.jsonl", lines)
    folder = copy / "checkpoints" / "0"
    with checkpoint.open_folder(folder) as checkpoints:
        checkpoints.delete(20)
    with monkeypatch.context() as patch:
        patch.setattr(classify, "divergent_step", lambda losses, test_loss: 2)
        with pytest.raises(
            FloatingPointError, match="step 18: .*Finished epochs: 4.*checkpoints/0"
        ):
            run(copy.parent, CONFIG)
    assert json.loads((copy / "results.json").read_text())["n"] == 1  # of seed 1
    with checkpoint.open_folder(folder) as checkpoints:
        assert checkpoints.latest.step == 16
    assert log(copy)[-1]["event"] == "diverged"
    run(copy.parent, CONFIG)
    same_bits(final_state(copy), final_state(finished.folder))
    assert "diverged" not in [line["event"] for line in log(copy)]


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "name", "epochs"),
    [
        (["--recipe", "adamw-18-tta"], "adamw-18-tta", 18),
        (["--recipe", "sgd-30", "--epochs", "7"], "sgd-30", 7),
        ([], "adamw-30", 30),
    ],
)
def test_the_command_line(args, name, epochs):
    """A recipe changes the defaults of the other options, which take precedence."""
    config = cifar10.parse_args(args)
    assert (config.recipe, config.epochs) == (name, epochs)
    assert config == dataclasses.replace(recipe.RECIPES[name], epochs=epochs)


@pytest.mark.slow
def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "train.cifar10", "--recipe", "sgd-30", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "default: 20" in done.stdout  # div of sgd-30


# ---------------------------------------------------------------------------
# kills
# ---------------------------------------------------------------------------


class Killed(BaseException):
    """Instead of a signal."""


MOMENTS = (  # in this order, each on what the one before has left
    "before the line",
    "in the line",
    "before the checkpoint",
    "in the checkpoint",
    "before the end",
)


def kill_at(moment, patch, kill):
    """Calls `kill` at a moment of the run."""
    run_log, save = Run.log, checkpoint.save

    def log(self, event, **values):
        at = event, values.get("epoch")
        if (moment, *at) == ("before the line", "epoch", 2):
            kill()
        if (moment, *at) == ("in the line", "epoch", 2):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"event": event} | values)[:40])
            kill()
        if (moment, *at) == ("before the end", "end", None):
            kill()
        return run_log(self, event, **values)

    def save_and_kill(checkpoints, step, state):
        if moment == "before the checkpoint" and step == 8:
            kill()
        save(checkpoints, step, state)
        if moment == "in the checkpoint" and step == 12:
            folder = Path(checkpoints.directory)
            while not any("tmp" in path.name for path in folder.iterdir()):
                assert not (folder / "12").exists(), "too late"
            kill()

    patch(Run, "log", log)
    patch(checkpoint, "save", save_and_kill)


def check_resumed(killed, whole, kills):
    assert untimed(killed) == untimed(whole)
    same_bits(final_state(killed), final_state(whole))
    starts = [line for line in log(killed) if line["event"] == "start"]
    assert len(starts) == kills + 1
    one, other = (
        json.loads((folder / "results.json").read_text()) for folder in (killed, whole)
    )
    assert one["accuracy"] == other["accuracy"]


def test_an_interrupted_run_ends_with_the_same_bits(
    finished, tmp_path, monkeypatch, capsys
):
    """Also a run of the same seeds that is not interrupted, which it is compared to."""

    def kill():
        raise Killed

    moments = [moment for moment in MOMENTS if moment != "in the checkpoint"]
    for moment in moments:
        with monkeypatch.context() as patch:
            kill_at(moment, patch.setattr, kill)
            with pytest.raises(Killed):
                run(tmp_path, CONFIG)
        assert not (tmp_path / "run" / "results.json").exists()
    capsys.readouterr()
    run(tmp_path, CONFIG)
    assert "seed 0" not in capsys.readouterr().out  # its last epoch was saved
    check_resumed(tmp_path / "run", finished.folder, len(moments))


def test_an_interruption_saves_within_an_epoch(finished, tmp_path, monkeypatch, capsys):
    """After some steps of an epoch or at its end; also a kill before the next save."""
    monkeypatch.setattr(cifar10, "SEGMENT_SECONDS", 1e9)  # one step, then the others
    asked = command.Stop.asked

    def interrupt(patch, at):
        asks = iter(range(1, 100))

        def ask(self):
            if next(asks) == at:
                command._asked.signal = signal.SIGINT
            return asked(self)

        patch.setattr(command, "_asked", command._Asked())
        patch.setattr(command.Stop, "asked", ask)

    # the question in each process, and the step that it follows
    for at, step in ((1, 1), (2, 4), (1, 5), (3, 9)):
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            message = f"Stopped at step {step}; the same command goes on."
            with pytest.raises(command.Interrupted, match=message):
                run(tmp_path, CONFIG)
    assert "Seed 0: going on from step 5." in capsys.readouterr().out
    with monkeypatch.context() as patch:  # before anything else is saved
        patch.setattr(cifar10, "end_epoch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, CONFIG)
    run(tmp_path, CONFIG)
    assert "Seed 0: going on from step 9." in capsys.readouterr().out
    check_resumed(tmp_path / "run", finished.folder, 5)


def child(out, moment):
    """The command in a process of its own, which kills itself at a moment."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    data.read_cifar10 = read_cifar10
    if moment:
        kill_at(moment, setattr, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(Path(out))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, cache):
    def start(out, moment):
        code = f"import test_cifar10 as t; t.child({str(out)!r}, {moment!r})"
        here = Path(__file__)
        paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        killed = -signal.SIGKILL if moment else 0
        assert done.returncode == killed, done.stdout + done.stderr
        return done.stdout

    start(tmp_path / "whole", None)
    for moment in MOMENTS:
        start(tmp_path / "killed", moment)
        assert not (tmp_path / "killed" / "run" / "results.json").exists()
    out = start(tmp_path / "killed", None)
    assert "images/s" not in out  # the last epoch was saved already
    check_resumed(tmp_path / "killed" / "run", tmp_path / "whole" / "run", len(MOMENTS))
