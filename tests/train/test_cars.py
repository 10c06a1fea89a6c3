"""train.cars on tiny pictures: results, restarts, refused options, predictions."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from runs import untimed
from shallow_resnet import shallow_resnets

from train import cars
from train.data import augment, loader, pictures
from train.evals.classify import cross_entropy_and_accuracy
from train.models import classifier, pretrained
from train.plots import confusion
from train.recipes import cars as recipe
from train.references.resnet import ResNet as TorchResNet
from train.run import checkpoint, devices
from train.run.log import read_events, read_lines
from train.run.output import Output

pytestmark = pytest.mark.usefixtures("lenient")

CLASSES = ("blue", "green", "red")
COLOURS = ((40, 60, 200), (40, 180, 70), (200, 50, 40))
EACH = 15  # images of a class: 12 to train, 3 held out; batches of 16, 16 and 4
STAGES = {"frozen_epochs": 1, "epochs": 3}
SMALL = {"architecture": "resnet18", "width": 4, "size": 32, "batch_size": 16}
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Shallow networks, and each program compiled only once."""
    memory = {}

    def once(function):
        def call(*args):
            config = next(arg for arg in args if isinstance(arg, recipe.Config))
            irrelevant = (*recipe.MAY_CHANGE_ON_RESUME, *vars(Output()), "seed")
            options = {k: v for k, v in vars(config).items() if k not in irrelevant}
            numbers = [arg for arg in args if isinstance(arg, int)]
            key = function.__name__, repr(options), devices.data_mesh(), *numbers
            if key not in memory:
                memory[key] = function(*args)
            return memory[key]

        return call

    with shallow_resnets(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "build", once(recipe.build))
        patch.setattr(recipe, "compile_programs", once(recipe.compile_programs))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three colours and of different sizes."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        (root / name).mkdir()
        for i in range(EACH):
            shape = (*rng.integers(32, 60, 2), 3)
            x = np.clip(np.array(colour) + rng.normal(0, 40, shape), 0, 255)
            Image.fromarray(x.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """PyTorch's own format, with a classifier for other classes."""
    path = tmp_path_factory.mktemp("weights") / "body.pth"
    torch.manual_seed(0)
    tensors = TorchResNet("resnet18", 4, classes=7).state_dict()
    tensors = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    tensors |= {"fc.weight": torch.zeros(1000, 32), "fc.bias": torch.zeros(1000)}
    torch.save(tensors, path)
    return path


def make_config(folder, out, **changes):
    options = SMALL | {"epochs": 2, "name": "run", "out": out} | changes
    return cars.Config(folder, **options)


def run(*args, **changes):
    config = make_config(*args, **changes)
    return cars.main(config), config.out / config.name


def read_table(folder):
    with (folder / "predictions-0.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------
# a run
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder, body, tmp_path_factory):
    """Results and folder of a run of two stages, which no test may change."""
    options = {"weights": body, "tensorboard": True, **STAGES}
    out = tmp_path_factory.mktemp("runs")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return run(folder, out, **options)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def test_files(finished):
    _, out = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "results.json", "curves.png"),
        *("checkpoints", "confusion-0.png", "mistakes-0.png", "predictions-0.csv"),
        *("model-0.safetensors", "tensorboard"),
    }
    for picture in ("curves.png", "confusion-0.png", "mistakes-0.png"):
        assert imread(out / picture).std() > 0.01


def test_log_and_results(finished):
    results, out = finished
    lines = read_events(out, "epoch", 0)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["stage"] for line in lines] == ["frozen", "all", "all", "all"]
    assert lines[0]["learning_rates"].keys() == {"head"}
    assert lines[1]["learning_rates"]["early"] == pytest.approx(
        lines[1]["learning_rate"] / 9
    )
    for line in lines:
        assert 0 <= line["share_waiting_for_images"] <= 1
        assert line["images_per_second"] == pytest.approx(36 / line["seconds"])
    assert results["images"] == (36, 9) and results["classes"] == 3
    assert results["split"] == pictures.EVERY_FIFTH
    assert "article" not in results
    (end,) = read_events(out, "end", 0)
    assert results["tta_accuracy"]["runs"] == [end["accuracy"]]
    assert results["accuracy"]["runs"] == [lines[-1]["accuracy"]]
    assert end["plain_accuracy"] == lines[-1]["accuracy"]
    assert end["plain_loss"] == lines[-1]["valid_loss"]
    assert json.loads((out / "results.json").read_text())["n"] == 1


def test_predictions_are_those_of_the_model(finished, folder):
    """The table agrees with the log, and the exported model with the plain results."""
    _, out = finished
    rows, data = read_table(out), pictures.read(folder)
    assert [row["image"] for row in rows] == [
        path.relative_to(folder).as_posix() for path in data.valid.paths
    ]
    right = [row["class"] == row["prediction"] for row in rows]
    (end,) = read_events(out, "end", 0)
    assert 100 * np.mean(right) == pytest.approx(end["accuracy"])
    p = np.array([float(row["of the class"]) for row in rows])
    assert -np.log(p).mean() == pytest.approx(end["loss"], abs=1e-4)

    model = classifier.load_model(out / "model-0.safetensors")
    assert model.classes == CLASSES and model.size == 32
    images = [pictures.open_image(path, 32) for path in data.valid.paths]
    pixels = np.stack([augment.plain_view(image, 32) for image in images])
    log_probs = np.asarray(model.log_probs(pixels), np.float64)
    loss, accuracy = cross_entropy_and_accuracy(log_probs, data.valid.labels)
    assert loss == pytest.approx(end["plain_loss"], rel=1e-5)
    assert accuracy == end["plain_accuracy"]


@pytest.mark.slow
def test_test_time_augmentation(finished, folder):
    """The mean of the probabilities of one plain and four augmented views."""
    _, out = finished
    model = classifier.load_model(out / "model-0.safetensors")
    valid, views = pictures.read(folder).valid, []
    for seed in (None, 0, 1, 2, 3):
        batches = loader.eval_batches(valid, 32, 9, augment_seed=seed)
        logs = [model.log_probs(batch["image"]) for batch in batches]
        views.append(np.exp(np.concatenate(logs).astype(np.float64)))
    assert not np.allclose(views[1], views[2], rtol=1e-4)
    mean = sum(views) / 5
    (end,) = read_events(out, "end", 0)
    assert end["passes"] == 5
    loss, accuracy = cross_entropy_and_accuracy(np.log(mean), valid.labels)
    assert end["loss"] == pytest.approx(loss, rel=1e-5)
    assert end["accuracy"] == accuracy


def test_most_confused(finished):
    """The log agrees with the table of predictions."""
    _, out = finished
    rows = read_table(out)
    labels, predictions = (
        np.array([CLASSES.index(row[key]) for row in rows])
        for key in ("class", "prediction")
    )
    (end,) = read_events(out, "end", 0)
    expected = confusion.most_confused(labels, predictions, CLASSES)
    assert end["most_confused"] == expected


def test_steps_in_an_exported_model(finished):
    tensors, _ = pretrained.read(finished[1] / "model-0.safetensors")
    assert tensors["bn1.num_batches_tracked"] == 12


@pytest.mark.slow
def test_it_learns(folder, tmp_path):
    """Three colours, from random weights."""
    options = {"epochs": 12, "learning_rate": 1e-2, "batch_size": 12}
    results, _ = run(folder, tmp_path, **options)
    assert results["tta_accuracy"]["mean"] > 85
    assert results["changed"]["learning_rate"] == 1e-2
    assert results["weights"] is None


def test_published_accuracy_is_reported_for_the_published_task_only(
    copied, folder, body, monkeypatch
):
    monkeypatch.setattr(recipe, "ARTICLE_IMAGES", (36, 9))
    results, _ = run(folder, copied.parent, weights=body, **STAGES)
    assert "article" not in results  # a ResNet-18
    monkeypatch.setattr(cars, "changed_settings", lambda *_: {})
    results, _ = run(folder, copied.parent, weights=body, **STAGES)
    assert results["article"] == recipe.ARTICLE


@pytest.mark.slow
def test_own_model_as_weights(finished, folder, tmp_path):
    """A run can start from the body that another run has written."""
    model = finished[1] / "model-0.safetensors"
    results, _ = run(folder, tmp_path, weights=model, **STAGES)
    assert results["weights"] == "run/model-0.safetensors"


@pytest.mark.slow
def test_workers_do_not_change_results(finished, folder, body, tmp_path):
    _, out = run(folder, tmp_path, workers=0, weights=body, **STAGES)
    assert untimed(out) == untimed(finished[1])


@slow
def test_one_device_instead_of_two(finished, folder, body, tmp_path, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(devices, "data_mesh", lambda: mesh)
    _, out = run(folder, tmp_path, weights=body, **STAGES)
    for line, other in zip(untimed(out), untimed(finished[1]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.slow
def test_another_seed_joins_a_finished_run(finished, copied, folder, body):
    options = {"weights": body, **STAGES}
    again, out = run(folder, copied.parent, **options)  # nothing to do
    assert again["accuracy"] == finished[0]["accuracy"]
    results, _ = run(folder, copied.parent, seeds=2, **options)
    assert results["n"] == 2 and len(results["accuracy"]["runs"]) == 2
    losses = [read_events(out, "epoch", seed)[0]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    first_seed = untimed(finished[1])
    assert untimed(out)[: len(first_seed)] == first_seed
    assert (out / "model-1.safetensors").exists()


# ---------------------------------------------------------------------------
# restarts
# ---------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [pytest.param(n, marks=slow) for n in (1, 2, 3, 4)])
def test_a_killed_run_ends_with_the_same_bits(
    finished, folder, body, tmp_path, monkeypatch, after
):
    """In the first stage (1, 2), at its end (3), and within an epoch of the second."""
    options = {"weights": body, "save_every": 1e-9, **STAGES}
    saves, save = 0, checkpoint.save

    def save_and_die(*args):
        nonlocal saves
        save(*args)
        saves += 1
        if saves == after:
            args[0].wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(folder, tmp_path, **options)
    run(folder, tmp_path, **options)
    assert untimed(tmp_path / "run") == untimed(finished[1])


# `python -m train.cars` with the network of the other tests.
SHALLOW = """
import runpy
from train.models import resnet
resnet.LAYERS["resnet18"] = (resnet.BasicBlock, (1, 1, 1, 1))
runpy.run_module("train.cars", run_name="__main__", alter_sys=True)
"""


@slow
def test_kill_9(finished, folder, body, tmp_path):
    """From the command line, which then resumes the run."""
    command = [sys.executable, "-c", SHALLOW, "--data-dir", str(folder)]
    command += ["--weights", str(body), "--out", str(tmp_path), "--name", "run"]
    command += ["--architecture", "resnet18", "--width", "4", "--size", "32"]
    command += ["--batch-size", "16", "--frozen-epochs", "1", "--epochs", "3"]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.exists() and '"epoch": 2' in log.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not read_events(tmp_path / "run", "end", 0)
    done = subprocess.run(
        command, env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = untimed(tmp_path / "run")
    assert [line["event"] for line in lines] == ["epoch"] * 4 + ["end"]
    for line, other in zip(lines, untimed(finished[1]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert "Wrote" in done.stdout and "% of the images held out" in done.stdout


def test_other_data_weights_or_settings_are_refused(finished, folder, body, tmp_path):
    _, out = finished
    config = make_config(folder, out.parent, weights=body, **STAGES)
    before = (out / "metrics.jsonl").read_bytes()
    other = tmp_path / "other.pth"
    tensors = torch.load(body)
    torch.save(tensors | {"bn1.bias": tensors["bn1.bias"] + 1}, other)
    with pytest.raises(ValueError, match="weights_md5"):
        cars.main(dataclasses.replace(config, weights=other))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for name, new_name in zip(CLASSES, ("blue", "green", "yellow"), strict=True):
        (renamed / new_name).symlink_to(folder / name)
    with pytest.raises(ValueError, match="data = "):
        cars.main(dataclasses.replace(config, data_dir=renamed))
    with pytest.raises(ValueError, match="div = "):
        cars.main(dataclasses.replace(config, div=5.0))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run(folder, body, tmp_path, monkeypatch):
    restore = cars.restore

    def spoil(*args):
        state = restore(*args)
        return state._replace(params=jax.tree.map(lambda x: np.nan * x, state.params))

    monkeypatch.setattr(cars, "restore", spoil)
    with pytest.raises(FloatingPointError, match="seed 0 diverged at step 3: loss nan"):
        run(folder, tmp_path, weights=body, **STAGES)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["event"] for line in lines] == ["start", "diverged"]
    assert (tmp_path / "run" / "curves.png").exists()


@slow
def test_divergence_ends_the_run(folder, tmp_path):
    options = {"learning_rate": 1e38, "optimizer": "sgd", "b1": (0.9, 0.9)}
    with pytest.raises(FloatingPointError, match="seed 0 diverged at step 3: loss"):
        run(folder, tmp_path, batch_size=12, **options)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["event"] == "diverged"
    assert (tmp_path / "run" / "curves.png").exists()


# ---------------------------------------------------------------------------
# refused options
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("recipe", "adam"), ("architecture", "vgg16"), ("width", 0), ("size", 16)),
        *(("epochs", 0), ("frozen_epochs", 3), ("divisors", (0, 1, 1)), ("seed", -1)),
        *(("batch_size", 1), ("batch_size", 0), ("batch_size", -2), ("seeds", 0)),
        *(("workers", -1), ("save_every", 0), ("optimizer", "adamm"), ("size", 31)),
        *(("optimizer", "optax.nothing"), ("weight_decay", 0.1), ("seed", 2**30)),
    ],
)
def test_invalid_options(folder, tmp_path, option, value):
    config = make_config(folder, tmp_path)
    with pytest.raises(ValueError, match=option):
        cars.main(dataclasses.replace(config, **{option: value}))
    assert not list(tmp_path.iterdir())


@slow
@pytest.mark.parametrize(("asked", "used"), [(64, 8), (34, 28)])
def test_few_pictures_lower_the_batch_size(folder, tmp_path, capsys, asked, used):
    results, _ = run(folder, tmp_path, batch_size=asked, epochs=1)
    assert results["changed"]["batch_size"] == used
    assert f"batch_size: {used}, since {asked} does not suit 36 training images.\n" in (
        capsys.readouterr().out
    )


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="names are text")
def test_a_run_on_names_that_are_no_utf8(folder, tmp_path, capsys):
    """From one command to the table of predictions and to the model's classes."""
    data = tmp_path / "data"
    shutil.copytree(folder / "red", data / "train" / "red")
    odd = os.fsencode(data / "train") + b"/$caf\xe9\n_{$"
    shutil.copytree(os.fsencode(folder / "blue"), odd)
    for name in os.listdir(odd):
        os.rename(odd + b"/" + name, odd + b"/\xff\n" + name)
    results, out = run(data, tmp_path, epochs=1)
    assert results["images"] == (24, 6)
    rows = read_table(out)
    assert {row["class"] for row in rows} == {"red", "$caf\\xe9\\n_{$"}
    assert any("/\\xff\\n" in row["image"] for row in rows)
    path = pictures.read(data).valid.paths[0]
    cars.predict(cars.Predict((path,), out / "model-0.safetensors"))
    assert "/$caf\\xe9\\n_{$/\\xff\\n04.png\n" in capsys.readouterr().out


def test_devices_must_divide_the_batch(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        cars.main(make_config(folder, tmp_path, batch_size=15))


def test_weights_of_another_network(folder, body, tmp_path):
    """Refused before anything is trained or written."""
    with pytest.raises(ValueError, match=r"layer1\.0\.conv3|conv1\.weight"):
        run(folder, tmp_path, weights=body, architecture="resnet50")
    with pytest.raises(ValueError, match="missing.pth"):
        run(folder, tmp_path, weights=tmp_path / "missing.pth")
    assert not list(tmp_path.iterdir())


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="data_dir"):
        run(tmp_path / "nothing", tmp_path)


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------


def test_command_line(folder, body):
    args = ["--data-dir", str(folder), "--weights", str(body), "--recipe", "adamw"]
    args += ["--divisors", "4", "2", "1", "--epochs", "3", "--l2", "0"]
    config = cars.parse_args(args)
    assert (config.recipe, config.weights, config.l2) == ("adamw", body, 0)
    assert config.divisors == (4, 2, 1) and config.epochs == 3
    with pytest.raises(SystemExit):
        cars.parse_args([])  # without data


def test_command_line_of_predict():
    config = cars.parse_args(["predict", "a.png", "b.png", "--top", "1"])
    assert config == cars.Predict((Path("a.png"), Path("b.png")), top=1)


def test_predict(finished, folder, capsys):
    paths = (folder / "red" / "00.png", folder / "blue" / "01.png")
    model = finished[1] / "model-0.safetensors"
    probabilities = cars.predict(cars.Predict(paths, model, top=2))
    printed = capsys.readouterr().out
    assert list(probabilities) == list(paths)
    for path, p in probabilities.items():
        assert p.sum() == pytest.approx(1)
        assert str(path) in printed
        best, second = p.argsort()[::-1][:2]
        first = f"{100 * p[best]:6.2f} %  {CLASSES[best]}"
        assert f"  {first}\n  {100 * p[second]:6.2f} %  {CLASSES[second]}\n" in printed
    assert printed.count("%") == 4
