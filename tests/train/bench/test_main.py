"""python -m train.bench: its options, and what it prepares."""

import json
import os
import subprocess
import sys

import pytest

from train.bench import __main__ as command
from train.bench import update
from train.run import devices


def test_each_name_has_its_options(tmp_path):
    for name, bench in command.BENCHES.items():
        options = ["--turns=3", f"--out={tmp_path}", "--name=x", "--overwrite"]
        config = command.parse_args([name, *options])
        assert type(config) is bench.Config
        assert (config.turns, config.out, config.name) == (3, tmp_path, "x")
        assert config.overwrite
    assert type(command.parse_args(["language-model"])).__module__.endswith("_model")


@pytest.mark.parametrize(
    ("name", "cores", "cached"),
    [
        ("cifar10", [128], True),
        ("language_model", [], True),  # one device: its products use all the cores
        ("images", [128], True),
        ("update", [], False),  # compilation is timed
        ("packing", [], False),
        ("accumulation", [], True),
        ("overhead", [], True),
    ],
)
def test_what_is_prepared(name, cores, cached, monkeypatch):
    used, caches, ran = [], [], []
    monkeypatch.setattr(devices, "use_all_cores", used.append)
    monkeypatch.setattr(devices, "use_compilation_cache", lambda: caches.append(1))
    monkeypatch.setattr(command.BENCHES[name], "main", ran.append)
    command.main(command.parse_args([name, "--name=x"]))
    assert (used, bool(caches)) == (cores, cached)
    assert [config.name for config in ran] == ["x"]


def test_help(capsys):
    with pytest.raises(SystemExit):
        command.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(
        name.replace("_", "-") in text.replace("_", "-") for name in command.BENCHES
    )
    with pytest.raises(SystemExit):
        command.parse_args(["update", "--help"])
    text = capsys.readouterr().out
    assert "python -m train.bench update" in text and "--leaves" in text


@pytest.mark.slow
def test_the_command(tmp_path):
    """In a process of its own: the line in config.json starts it again."""
    args = ["update", "--leaves=tiny", "--scale=0.001", "--turns=1", "--no-torch"]
    args += [f"--out={tmp_path}", "--name=x"]
    subprocess.run([sys.executable, "-m", "train.bench", *args], check=True)
    settings = json.loads((tmp_path / "x" / "config.json").read_text())
    assert settings["command"] == f"python -m train.bench {' '.join(args)}"
    assert (settings["bench"], settings["leaves"]) == ("update", "tiny")
    assert settings["cores"] == os.cpu_count()
    assert update.Config.turns == 7
