"""The measuring scripts, run with an interpreter that only logs its command lines."""

import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from train.bench import cifar10 as cifar10_bench
from train.bench import language_model as language_model_bench
from train.bench import update as update_bench
from train.data import cifar10, pictures
from train.recipes import cars

SCRIPTS = Path(__file__).parents[3] / "train" / "measure"
SCRIPT = SCRIPTS / "cifar10.sh"


def parse(module: str, args: list[str]) -> Any:
    """The configuration that the command makes of its arguments."""
    script = importlib.import_module(module)
    if module == "train.bench":
        script = importlib.import_module("train.bench.__main__")
    if hasattr(script, "parse_args"):
        return script.parse_args(args)
    return tyro.cli(script.Config, args=args)


@pytest.fixture
def measure(tmp_path):
    """Runs a script; returns its exit status and its commands as lists of words."""
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


def test_only_failed_parts_are_repeated(measure, tmp_path):
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
    """At once, with the running part and without starting the next."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/notes\nexec sleep 60\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python)}
    command = ["timeout", "1", SCRIPT, "DIR", tmp_path / "out"]
    done = subprocess.run(command, env=env, check=False, timeout=30)
    assert done.returncode == 124
    assert len((tmp_path / "notes").read_text().splitlines()) == 1


def test_the_commands_for_cifar10(measure):
    """Parsed by each script's own parser, with the expected seeds."""
    _, commands = measure()
    runs = {}
    for _, module, *args in commands[:-1]:
        config = parse(module, args)
        runs[config.name] = config
        assert config.out.name == "out"
        if module == "train.cifar10":
            assert (config.blocks, config.width, config.train_size) == (3, 96, None)
            assert config.name == config.recipe
        elif module == "train.bench":
            assert type(config) is cifar10_bench.Config and config.overwrite
    seeds = {name: getattr(config, "seeds", None) for name, config in runs.items()}
    assert seeds == {
        **{"fast": 10, "fast-200": 200, "bench-wrn22": None},
        **{"adamw-30": 5, "adamw-18-tta": 5, "adamw-30-wd0.3": 3},
        **{"adam-l2-30": 3, "amsgrad-30": 3, "amsgrad-l2-30": 3, "sgd-30": 3},
    }
    assert runs["fast-200"].first_seed >= 10  # unlike those of tuning


@pytest.mark.parametrize("data", [None, "DIR"])
def test_the_commands_for_language_models(measure, tmp_path, data):
    script, out = SCRIPTS / "language_model.sh", tmp_path / "out"
    command = [script, out] if data is None else [script, out, tmp_path / data]
    (tmp_path / "DIR").mkdir()
    for split in ("train", "valid", "test"):  # of which the command reads the length
        text = tmp_path / "DIR" / f"wiki.{split}.tokens"
        text.write_text("a " * (2_000_000 if split == "train" else 1000) + "\n")
    status, commands = measure(*command, fail="salesforce")
    assert status == (data is None)
    runs, tuned, timed = {}, [], []
    for _, module, *args in commands[:-1]:
        config = parse(module, args)
        if module == "train.language_model":
            runs[config.name] = config
            name = f"{config.model}-{config.recipe}"
            name += "-bfloat16" * (config.dtype == "bfloat16")
            assert (config.out, config.name) == (out, name)
            assert config.data_dir == (data and tmp_path / data)
            assert config.embedding == (400 if data else 128)
        elif module == "train.tune_cache":
            assert config.folder.name in runs  # trained before
            assert config.data_dir == (data and tmp_path / data)
            tuned.append(config.folder.name)
        else:
            assert type(config) is language_model_bench.Config
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
    if data is None:  # only what failed is repeated
        _, commands = measure(*command)
        assert [words[4] for words in commands[:-1]] == ["salesforce"] * 2


@pytest.mark.parametrize("weights", [None, "WEIGHTS.pth"])
def test_the_commands_for_cars(measure, tmp_path, weights, monkeypatch):
    """From scratch, the body from CIFAR-10, and runs that start from it or the file."""
    out, inputs = tmp_path / "out", tmp_path / "inputs"
    inputs.mkdir()
    monkeypatch.setenv("NETWORK", "--architecture resnet18 --width 16")
    monkeypatch.setenv("EPOCHS", "12")
    command = [SCRIPTS / "cars.sh", out, inputs / "CARS", inputs / "CIFAR"]
    command += [inputs / weights] if weights else []
    status, commands = measure(*command, fail="scratch-adamw")
    assert status == 1
    runs, timed = {}, {}
    for words in commands[:-1]:
        if words[0] == "-":  # writes CIFAR-10 as images
            assert words[1:] == [str(inputs / "CIFAR"), str(out / "cifar10-images")]
            continue
        config = parse(words[1], words[2:])
        if words[1] == "train.bench":
            timed[config.name] = config.architecture, config.width, config.size
        else:
            runs[config.name] = config
        assert config.out == out
    own = {"bench-224": ("resnet50", 64, 224)} if weights else {}
    assert timed == {"bench": ("resnet18", 16, 128)} | own
    names = ["scratch-adam-l2", "scratch-adamw", "cifar10-body"]
    names += ["cifar10-body-adam-l2", "cifar10-body-adamw"]
    names += ["adam-l2", "adamw"] if weights else []
    assert list(runs) == names
    for name, config in runs.items():
        assert config.recipe == ("adamw" if "adam-l2" not in name else "adam-l2")
        own = name in ("adam-l2", "adamw")
        expected = ("resnet50", 64) if own else ("resnet18", 16)
        resolved = cars.resolve(config)
        assert (resolved.architecture, resolved.width) == expected
        if own:  # the article's
            assert config.weights == inputs / "WEIGHTS.pth"
            assert (config.frozen_epochs, config.epochs, config.size) == (None, 40, 224)
        elif name.startswith("cifar10-body-"):
            assert config.weights == out / "cifar10-body" / "model-0.safetensors"
            assert config.frozen_epochs + config.epochs == 12
        else:
            assert config.weights is None
        where = out / "cifar10-images" if name == "cifar10-body" else inputs / "CARS"
        assert config.data_dir == where
        assert config.valid_folder == ("test" if name == "cifar10-body" else None)
    _, commands = measure(*command)  # what failed is repeated
    again = [
        words[words.index("--name") + 1] for words in commands if "--name" in words
    ]
    assert again == ["scratch-adamw"]


def test_the_commands_for_transfer(measure, tmp_path, monkeypatch):
    """ImageNet's weights and none, in as many epochs, by both recipes."""
    monkeypatch.setenv("EPOCHS", "7")
    monkeypatch.setenv("FROZEN", "2")
    command = SCRIPTS / "transfer.sh", tmp_path / "out", tmp_path / "CARS"
    status, commands = measure(*command, fail="scratch-adamw")
    assert status == 1
    runs = {}
    for _, module, *args in commands[:-1]:
        assert module == "train.cars"
        config = parse(module, args)
        runs[config.name] = cars.resolve(config, Path("extra.pth"))
    names = [f"{kind}-{r}" for r in cars.RECIPES for kind in ("imagenet", "scratch")]
    assert list(runs) == names
    for name, config in runs.items():
        assert (config.architecture, config.width) == ("efficientnet_lite0", 32)
        assert (config.data_dir, config.size) == (tmp_path / "CARS", 128)
        assert name.endswith(config.recipe) and config.seeds == 3
        assert config.frozen_epochs + config.epochs == 9
        pretrained = name.startswith("imagenet")
        assert config.weights == (Path("extra.pth") if pretrained else None)
        assert config.frozen_epochs == (2 if pretrained else 0)
    _, commands = measure(*command)  # what failed is repeated
    assert [words[-1] for words in commands[:-1]] == ["scratch-adamw"]


def test_the_commands_for_updates(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER", "0.2")
    command = SCRIPTS / "update.sh", tmp_path / "out"
    status, commands = measure(*command, fail="large-full")
    assert status == 1
    runs = {}
    for _, module, *args in commands[:-1]:
        config = parse(module, args)
        assert module == "train.bench" and config.out == tmp_path / "out"
        assert config.overwrite
        runs[config.name] = config
    updates = {
        name: config
        for name, config in runs.items()
        if isinstance(config, update_bench.Config)
    }
    assert set(runs) - set(updates) == {"packing", "accumulation"}
    measured = {(c.leaves, c.step, c.dtype) for c in updates.values()}
    assert measured == {
        (leaves, "adamw", dtype)
        for leaves in ("resnet50", "large", "transformer", "tiny")
        for dtype in ("float32", "bfloat16")
    } | {(leaves, "full", "float32") for leaves in ("resnet50", "large")}
    for config in updates.values():
        update_bench.check(config)
        assert config.scale == (0.2 if config.leaves == "transformer" else 1)
    _, commands = measure(*command)  # what failed is repeated
    assert [words[words.index("--name") + 1] for words in commands[:-1]] == [
        "large-full"
    ]


def test_cifar10_as_a_folder_per_class(cifar_dir, tmp_path, monkeypatch):
    """The script writes what train.data.pictures reads, to the last pixel."""
    script = (SCRIPTS / "cars.sh").read_text()
    code = script.split("<<'EOF'")[1].split("EOF")[0].partition("\n")[2]
    monkeypatch.setattr("sys.argv", ["-", str(cifar_dir), str(tmp_path / "images")])
    exec(compile(code, "cars.sh", "exec"), {})
    written = pictures.read(tmp_path / "images", "test")
    train, test = cifar10.read_cifar10(cifar_dir)
    assert written.split == "the images of test/"
    for files, expected in ((written.train, train), (written.valid, test)):
        order = np.argsort([path.name for path in files.paths])
        np.testing.assert_array_equal(files.labels[order], expected.y)
        for i, at in enumerate(order):
            x = np.asarray(pictures.open_image(files.paths[at]))
            np.testing.assert_array_equal(x, expected.x[i])
