"""The folder of a run: creation, refusals, the lock, and the log of its seeds."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.run.folder import FORMAT, Run, exclusive, new_folder
from train.run.output import Output

RESULTS = Path(__file__).parents[3] / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class Config(Output):
    epochs: int = 2
    workers: int = 1
    seed: int = 0
    seeds: int = 1
    tensorboard: bool = False


def make(tmp_path, data="abc", **changes):
    config = Config(**{"out": tmp_path, "name": "run"} | changes)
    may_change = ("workers", "seeds", "tensorboard")
    return Run(
        config, script="digits", name="default", may_change=may_change, data=data
    )


def finish(run, *seeds):
    for seed in seeds:
        run.log("epoch", seed=seed, epoch=1, step=4, loss=0.5)
        run.log("end", seed=seed, accuracy=90.0)


def test_output_is_made_of_keywords_and_comes_last():
    """A script's own options stay positional."""
    assert Config(3).epochs == 3
    assert Config().out == Path("runs") and not Config().overwrite


def test_a_run_goes_through_its_seeds(tmp_path):
    with make(tmp_path, seeds=2, seed=7) as run:
        assert run.folder == tmp_path / "run"
        assert list(run.seeds) == run.seeds_left == [7, 8]
        finish(run, 7)
        assert run.seeds_left == [8]
        assert run.ended(7) and not run.ended(8)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["format"] == FORMAT and config["script"] == "digits"
    assert config["epochs"] == 2 and config["data"] == "abc"
    assert "jax" in config["versions"]
    with make(tmp_path, seeds=3, seed=7, workers=5) as run:
        assert run.seeds_left == [8, 9]
        assert [line["event"] for line in run.lines()] == ["epoch", "end"]
        assert run.lines("end", 7) == [{"event": "end", "seed": 7, "accuracy": 90.0}]
        assert run.lines("end", 8) == run.lines("start") == []
    assert make(tmp_path, name=None).folder == tmp_path / "default"


def test_other_settings_are_refused(tmp_path):
    with make(tmp_path):
        pass
    config = tmp_path / "run" / "config.json"
    before = config.read_bytes()
    with pytest.raises(ValueError, match="data = 'abc', now 'abd'"):
        make(tmp_path, data="abd").__enter__()
    with pytest.raises(ValueError, match="has a run with epochs = 2, now 3. Choose"):
        make(tmp_path, epochs=3, workers=2).__enter__()
    assert config.read_bytes() == before


def test_only_a_run_is_overwritten_and_only_on_request(tmp_path):
    with make(tmp_path) as run:
        finish(run, 0)
    with make(tmp_path, epochs=3, overwrite=True) as run:
        assert run.seeds_left == [0] and run.lines() == []
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    for config in ("", "{}", '{"script": "compare"}', "no JSON"):
        if config:
            (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match="not the folder of a run of train.digits"):
            make(tmp_path, name="thesis", overwrite=True).__enter__()
        assert (folder / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="not the folder of a run"):
        make(tmp_path, name="file", overwrite=True).__enter__()
    for name in ("..", "a/b", str(tmp_path)):
        with pytest.raises(ValueError, match="name must be that of a folder"):
            make(tmp_path, name=name, overwrite=True).__enter__()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_process_killed_before_config_json_leaves_no_foreign_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.tmp").write_text('{"for')
    with make(tmp_path) as run:
        assert run.seeds_left == [0]


def test_a_second_process_is_refused(tmp_path):
    with make(tmp_path) as run:
        for changes in ({"seeds": 2}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another process is using .*run"):
                make(tmp_path, **changes).__enter__()
        finish(run, 0)
    with make(tmp_path) as run:
        assert run.seeds_left == []
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
    ]  # no lock file


def test_a_killed_process_holds_no_lock(tmp_path):
    code = (
        "import fcntl, os, sys, time\n"
        "handle = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="another process"):
            with exclusive(tmp_path):
                pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with exclusive(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(9, "Bad file descriptor")  # what NFS says of a folder

    monkeypatch.setattr("fcntl.flock", unsupported)
    with make(tmp_path) as run:
        finish(run, 0)


def test_errors_within_a_run_release_the_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with make(tmp_path):
            raise KeyboardInterrupt
    with make(tmp_path):
        pass


def test_where_a_run_goes_on_is_printed(tmp_path, capsys):
    with make(tmp_path, seeds=2) as run:
        assert capsys.readouterr().out.startswith(f"{run.folder}: compiling")
        run.rewind(0, 0, 0)
        assert not capsys.readouterr().out
        finish(run, 0)
    with make(tmp_path, seeds=2) as run:
        assert capsys.readouterr().out.startswith("1 of 2 seeds are finished.\n")
        run.log("epoch", seed=1, epoch=1, step=4, loss=0.5)
        run.rewind(1, 38, 1)
        assert capsys.readouterr().out == "Seed 1: going on from step 38.\n"
    with make(tmp_path, name="single") as run:
        capsys.readouterr()
        run.rewind(0, 38, 0)
        assert capsys.readouterr().out == "Going on from step 38.\n"


def test_other_devices_are_mentioned(tmp_path, capsys):
    with make(tmp_path) as run:
        start = run.start(1.5)
        assert start == run.lines("start")[0] and start["compile_seconds"] == 1.5
        assert "compiling" in capsys.readouterr().out  # the line before the silence
        run.start(1.5)
        assert not capsys.readouterr().out
        del start["event"]
        run.log("start", **start | {"devices": "1 x abacus"})
        run.start(1.5)
        out = capsys.readouterr().out
    assert "Warning: this run started with other devices; results will not be" in out


def test_divergence_is_logged_and_raised(tmp_path):
    with make(tmp_path) as run:
        run.log("epoch", seed=0, epoch=1, step=4, loss=0.5)
        with pytest.raises(FloatingPointError) as error:
            run.diverged(0, 6, loss=float("inf"), learning_rate=0.01)
        assert run.lines()[-1]["event"] == "diverged"
        assert run.lines("diverged", 0)[0]["step"] == 6
    assert str(error.value) == (
        "seed 0 diverged at step 6: loss inf, learning rate 0.01. Finished epochs: 1. "
        f"Checkpoints: {tmp_path / 'run' / 'checkpoints' / '0'}"
    )


def test_events_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with make(tmp_path) as run:
        with run.events(0, 0) as write:
            write(1, {"loss": 0.5})
        assert not (run.folder / "tensorboard").exists()
    with make(tmp_path, tensorboard=True) as run:
        with run.events(0, 0) as write:
            write(1, {"loss": 0.5})
        (events,) = (run.folder / "tensorboard" / "0").iterdir()
        assert b"loss" in events.read_bytes()


# ---------------------------------------------------------------------------
# folders of earlier versions
# ---------------------------------------------------------------------------


def published(tmp_path, **changes):
    """A run of train.cars whose config.json has no format, opened again."""
    source = RESULTS / "cars" / "cpu" / "cifar10-body"
    written = json.loads((source / "config.json").read_text())
    assert "format" not in written
    folder = tmp_path / "old"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_bytes((source / name).read_bytes())
    keys = list(written)
    settings = {key: written[key] for key in keys[1 : keys.index("data")]}
    settings |= {"out": tmp_path, "name": "old"} | changes
    config = dataclasses.make_dataclass("Config", settings)(**settings)
    return Run(
        config,
        script="cars",
        name="cars-adamw",
        may_change=("seeds",),
        data=written["data"],
        weights_md5=None,
    )


def test_a_finished_run_of_an_earlier_version_is_opened(tmp_path):
    with published(tmp_path) as run:
        assert run.seeds_left == [] and run.lines("end", 0)


def test_an_unfinished_run_of_an_earlier_version_is_refused(tmp_path):
    run = published(tmp_path, seeds=99)
    with pytest.raises(ValueError, match="earlier version .format 1, now 2., whose"):
        run.__enter__()
    with exclusive(run.folder):  # is free again
        pass
    with published(tmp_path, seeds=99, overwrite=True) as run:
        assert run.lines() == []


def test_a_new_folder(tmp_path):
    assert new_folder(Output(out=tmp_path), "bench").name.startswith("bench-2")
    config = Output(out=tmp_path, name="x")
    assert new_folder(config, "bench") == tmp_path / "x"
    with pytest.raises(ValueError, match="x exists; choose another or pass"):
        new_folder(config, "bench")
    new_folder(dataclasses.replace(config, overwrite=True), "bench")
