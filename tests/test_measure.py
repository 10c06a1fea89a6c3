"""The scripts that measure everything, with an interpreter that only notes."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
import tyro

TRAIN = Path(__file__).parents[1] / "train"
SCRIPT = TRAIN / "measure_cifar10.sh"


@pytest.fixture
def measure(tmp_path):
    """Runs it; returns the exit status and the commands, as lists of words."""
    notes, python = tmp_path / "notes", tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\necho says something\n'
        'case "$*" in *$FAIL*) exit 1;; esac\n'
    )
    python.chmod(0o755)

    def run(*command, fail="nothing"):
        notes.write_text("")
        env = os.environ | {"PYTHON": str(python), "FAIL": fail}
        command = command or (SCRIPT, "DIR", tmp_path / "out")
        done = subprocess.run(command, env=env, check=False)
        return done.returncode, [line.split() for line in notes.read_text().split("\n")]

    return run


def test_what_is_done_is_not_repeated_and_what_failed_is(measure, tmp_path):
    status, commands = measure(fail="sgd-30")
    assert status == 1
    names = [words[words.index("--name") + 1] for words in commands[:-1]]
    assert len(names) == len(set(names)) == 10
    assert "says something" in (tmp_path / "out" / "sgd-30.log").read_text()
    status, commands = measure()
    assert status == 0
    assert [words[1] for words in commands[:-1]] == ["train.cifar10"]
    assert "sgd-30" in commands[0]
    assert measure() == (0, [[]])


def test_it_can_be_stopped(tmp_path):
    """With what is running, at once, without going on to the next part."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/notes\nexec sleep 60\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python)}
    command = ["timeout", "1", SCRIPT, "DIR", tmp_path / "out"]
    done = subprocess.run(command, env=env, check=False, timeout=30)
    assert done.returncode == 124
    assert len((tmp_path / "notes").read_text().splitlines()) == 1


def test_the_commands_are_understood(measure):
    """By each script's own parser; with the seeds that were asked for."""
    _, commands = measure()
    runs = {}
    for _, module, *args in commands[:-1]:
        script = importlib.import_module(module)
        if module == "train.cifar10":
            recipe = args[args.index("--recipe") + 1]
            config = tyro.cli(script.Config, args=args, default=script.RECIPES[recipe])
        elif module == "train.bench":
            config = tyro.cli(script.Cifar10 | script.LanguageModel, args=args)
        else:
            config = tyro.cli(script.Config, args=args)
        runs[config.name] = config
        assert config.out.name == "out"
        if module == "train.cifar10":
            assert (config.blocks, config.width, config.train_size) == (3, 96, None)
            assert config.name == config.recipe
    seeds = {name: getattr(config, "seeds", None) for name, config in runs.items()}
    assert seeds == {
        **{"fast": 10, "fast-200": 200, "bench-wrn22": None},
        **{"adamw-30": 5, "adamw-18-tta": 5, "adamw-30-wd0.3": 3},
        **{"adam-l2-30": 3, "amsgrad-30": 3, "amsgrad-l2-30": 3, "sgd-30": 3},
    }
    assert runs["fast-200"].first_seed >= 10  # none that the choices were made with


@pytest.mark.parametrize("data", [None, "DIR"])
def test_the_commands_for_language_models(measure, tmp_path, data):
    script, out = TRAIN / "measure_language_model.sh", tmp_path / "out"
    command = [script, out] if data is None else [script, out, tmp_path / data]
    (tmp_path / "DIR").mkdir()
    status, commands = measure(*command, fail="salesforce")
    assert status == (data is None)
    runs, tuned, timed = {}, [], []
    for _, module, *args in commands[:-1]:
        script = importlib.import_module(module)
        if module == "train.language_model":
            config = script.config_of(args)
            runs[config.name] = config
            name = f"{config.model}-{config.recipe}"
            name += "-bfloat16" * (config.dtype == "bfloat16")
            assert (config.out, config.name) == (out, name)
            assert config.data_dir == (data and tmp_path / data)
            assert config.embedding == (400 if data else 128)
        elif module == "train.tune_cache":
            options = (tyro.conf.PositionalRequiredArgs,)
            config = tyro.cli(script.Config, args=args, config=options)
            assert config.folder.name in runs  # trained before
            assert config.data_dir == (data and tmp_path / data)
            tuned.append(config.folder.name)
        else:
            config = tyro.cli(script.Cifar10 | script.LanguageModel, args=args)
            timed.append((config.model, config.cudnn, config.dtype))
    recipes = {"adam-l2", "adamw", "amsgrad-l2", "amsgradw"}
    recipes |= set() if data else {"salesforce"}
    names = {f"{m}-{r}" for m in ("lstm", "qrnn") for r in recipes}
    assert set(runs) == names | (set() if data else {"lstm-adamw-bfloat16"})
    assert {config.seeds for config in runs.values()} == {1 if data else 3}
    assert tuned == ["lstm-adam-l2", "qrnn-adam-l2"]
    expected = [(model, False, "float32") for model in ("lstm", "qrnn")]
    expected += [("lstm", True, "float32"), ("lstm", False, "bfloat16")]
    assert timed == (expected if data else [])
    if data is None:  # what failed is done again, and nothing else
        _, commands = measure(*command)
        assert [words[4] for words in commands[:-1]] == ["salesforce"] * 2
