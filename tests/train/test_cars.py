"""train.cars on tiny images: stages, restarts, the files it leaves, what it refuses.

The network itself is in test_resnet.py, its files in test_weights.py, the pictures in
test_images.py.
"""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import tyro
from flax import nnx
from matplotlib.image import imread
from PIL import Image

from adamw_jax import apply_updates
from train import cars
from train.data import pictures as images
from train.models import pretrained as weights
from train.models import resnet
from train.plots import confusion
from train.references import resnet as torch_resnet
from train.references.resnet import ResNet as TorchResNet
from train.run import checkpoint, devices, record

pytestmark = pytest.mark.usefixtures("lenient", "cache")

CLASSES = ("blue", "green", "red")
COLOURS = ((40, 60, 200), (40, 180, 70), (200, 50, 40))
EACH = 15  # images of a class: 12 to train, 3 held out; two batches of 16, one of 4
STAGES = {"frozen_epochs": 1, "epochs": 3}
SMALL = {"architecture": "resnet18", "width": 4, "size": 32, "batch_size": 16}


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """A block at each size of the maps: half the time of compilation."""
    with pytest.MonkeyPatch.context() as patch:
        counts = (1, 1, 1, 1)
        patch.setitem(resnet.LAYERS, "resnet18", (resnet.BasicBlock, counts))
        patch.setitem(torch_resnet.LAYERS, "resnet18", (False, counts))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three colours, of different sizes."""
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
    """A file as a user has it: PyTorch's own, with a head for other classes."""
    path = tmp_path_factory.mktemp("weights") / "body.pth"
    torch.manual_seed(0)
    tensors = TorchResNet("resnet18", 4, classes=7).state_dict()
    tensors = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    tensors |= {"fc.weight": torch.zeros(1000, 32), "fc.bias": torch.zeros(1000)}
    torch.save(tensors, path)
    return path


def tiny(folder, tmp_path, **changes):
    options = SMALL | {"epochs": 2, "name": "run", "out": tmp_path} | changes
    return cars.Config(folder, **options)


def run(*args, **changes):
    config = tiny(*args, **changes)
    return cars.main(config), config.out / config.name


def epochs(folder):
    """What must be the same in two runs: all but times."""
    timed = ("seconds", "images_per_second", "share_waiting_for_images")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in record.read_lines(folder / "metrics.jsonl")
        if line["event"] in ("epoch", "end")
    ]


def programs_of(config, train_size=36):
    config = cars.settled(config)
    return config, cars.build(config, train_size, len(CLASSES))


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    return x, rng.integers(0, 3, size).astype(np.int32)


# ---------------------------------------------------------------------------
# the recipe
# ---------------------------------------------------------------------------


def test_the_articles_stages(folder, body):
    """Steps, rates and betas of the article's code, for 8,144 images."""
    config = cars.settled(cars.Config(folder, weights=body))
    assert cars.steps_per_epoch(config, 8144) == 64
    head, everything = cars.stages_of(config, 64)
    assert (head.frozen, head.first, head.last) == (True, 0, 1280)
    assert (everything.frozen, everything.first, everything.last) == (False, 1280, 3840)
    for stage, peak, half in ((head, 1e-2, 576), (everything, 3e-3, 1152)):
        values = [stage.cycle.at(step) for step in (0, half, 2 * half)]
        rates = [value["learning_rate"] for value in values]
        np.testing.assert_allclose(rates, [peak / 10, peak, peak / 10], rtol=1e-6)
        assert [value["b1"] for value in values] == pytest.approx([0.95, 0.85, 0.95])
        assert {value["b2"] for value in values} == {0.99}
        last = stage.cycle.at(stage.last - stage.first - 1)["learning_rate"]
        assert peak / 1000 < last < peak / 400
    assert (config.l2, config.weight_decay, config.batch_size) == (1e-3, 0, 128)


def test_what_a_recipe_and_an_optimizer_bring(folder):
    """From Python as from the command line; decays are an optimizer's own."""
    for changes, expected in (
        ({}, ("adam", 0, 1e-3)),
        ({"recipe": "adamw"}, ("adamw", 0.1, 0)),
        ({"recipe": "adamw", "weight_decay": 0.3}, ("adamw", 0.3, 0)),
        ({"l2": 0.0}, ("adam", 0, 0)),
        ({"optimizer": "optax.lion"}, ("optax.lion", 0, 0)),
        ({"optimizer": "sgd", "l2": 1e-4}, ("sgd", 0, 1e-4)),
    ):
        c = cars.settled(cars.Config(folder, **changes))
        assert (c.optimizer, c.weight_decay, c.l2) == expected


def test_from_scratch_nothing_is_frozen_and_all_learn_at_one_rate(folder):
    config = cars.settled(cars.Config(folder))
    assert (config.frozen_epochs, config.divisors) == (0, (1, 1, 1))
    (stage,) = cars.stages_of(config, 64)
    assert not stage.frozen


def test_the_head_alone_in_the_first_stage(folder, body, tmp_path):
    """Not one bit of the body's parameters and running statistics moves."""
    config, programs = programs_of(tiny(folder, tmp_path, weights=body, l2=0.1))
    stage = programs.stages[0]
    before = programs.initial(0)
    state = programs.begin(stage, jnp.int32(0), *before)
    step = jax.jit(programs.train_step, static_argnums=0)
    for i in range(3):
        state, _ = step(stage, state, *batch(i), 0)
    for name, tree in (("params", state.params), ("stats", state.stats)):
        old = before[0] if name == "params" else before[1]
        for one, other in zip(
            jax.tree.leaves(old["body"]), jax.tree.leaves(tree["body"]), strict=True
        ):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        for one, other in zip(
            jax.tree.leaves(old["head"]), jax.tree.leaves(tree["head"]), strict=True
        ):
            assert (np.asarray(one) != np.asarray(other)).any()
    # no moments of convolutions: those of the head alone
    assert max(x.ndim for x in jax.tree.leaves(state.opt)) == 2


@pytest.mark.usefixtures("x64")
def test_two_stages_equal_pytorch(folder, body, tmp_path, monkeypatch):
    """In float64 to 1e-9: groups with a rate each, L2, the cycle, frozen batch norm."""
    # Without dropout, whose numbers are others in PyTorch.
    monkeypatch.setattr(nnx.Dropout, "__call__", lambda self, x, **_: x)
    mean, std = images.MEAN.astype(float), images.STD.astype(float)
    monkeypatch.setattr(images, "normalise", lambda x: (x / 255.0 - mean) / std)
    config = tiny(folder, tmp_path, weights=body, dtype="float32", epochs=3)
    torchs = {"bias_correction": "torch"}  # under a cycle ours is another one
    config = dataclasses.replace(config, frozen_epochs=2, optimizer_args=torchs)
    config, programs = programs_of(config)
    net = cars.network("resnet18", 4, "float64", len(CLASSES))
    params, stats = jax.tree.map(
        lambda x: x.astype(jnp.float64), net.initial(jax.random.key(1))
    )
    theirs = TorchResNet("resnet18", 4, classes=len(CLASSES)).double()
    theirs.load_state_dict(
        {
            key: torch.tensor(value)
            for key, value in weights.to_tensors(params, stats, 0).items()
        }
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def step(stage, params, stats, opt, x, y):
        def loss_of(params):
            logits, new = net.logits(
                *(params, stats, x),
                **{"frozen": stage.frozen, "train": True, "key": jax.random.key(0)},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, new

        grads, stats = jax.grad(loss_of, has_aux=True)(params)
        updates, opt = stage.tx.update(grads, opt, params)
        return apply_updates(params, updates), stats, opt

    step = jax.jit(step, static_argnums=0)
    groups = {name: [] for name in cars.GROUPS}
    for name, parameter in theirs.named_parameters():
        path = name.replace(".", "/")
        path = path if name.startswith("fc.") else f"body/{path}"
        group = next((g for g, p in cars.GROUPS.items() if re.search(p, path)), "head")
        groups[group].append(parameter)
    body_only = [*groups["early"], *groups["late"]]
    total = 0
    for stage in programs.stages:
        opt = stage.tx.init(params)
        for parameter in body_only:
            parameter.requires_grad_(not stage.frozen)
        divisors = dict(zip(cars.GROUPS, config.divisors, strict=True))
        chosen = {"head": groups["head"]} if stage.frozen else groups
        adam = torch.optim.Adam(
            [{"params": group, "name": name} for name, group in chosen.items()],
            weight_decay=config.l2,
        )
        for i in range(stage.last - stage.first):
            values = stage.cycle.at(i)
            for group in adam.param_groups:
                divisor = 1 if stage.frozen else divisors[group["name"]]
                group["lr"] = values["learning_rate"] / divisor
                group["betas"] = values["b1"], values["b2"]
            x, y = batch(total)
            total += 1
            theirs.train()
            if stage.frozen:
                for name, module in theirs.named_children():
                    if name != "fc":
                        module.eval()
            pixels = torch.tensor(images.normalise(x).transpose(0, 3, 1, 2))
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                theirs(pixels), torch.tensor(y).long()
            )
            loss.backward()
            adam.step()
            params, stats, opt = step(stage, params, stats, opt, x, y)
    ours = weights.to_tensors(params, stats, total)
    for name, parameter in theirs.named_parameters():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(ours[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", ["adam-l2", "adamw"])
def test_group_rates_at_every_step(folder, body, tmp_path, recipe):
    """With gradients that are always 1, Adam's update is the rate itself."""
    options = {"recipe": recipe, "weights": body, "l2": 0.0, "weight_decay": 0.0}
    config, programs = programs_of(tiny(folder, tmp_path, **options))
    stage = programs.stages[-1]
    params, _ = programs.initial(0)
    opt = stage.tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(stage.tx.update)
    for step in range(stage.last - stage.first):
        updates, opt = update(ones, opt, params)
        rates = cars.rates_of(config, stage, stage.first + step)["learning_rates"]
        peak = stage.cycle.at(step)["learning_rate"]
        assert list(rates.values()) == pytest.approx([peak / 9, peak / 3, peak])
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            name = jax.tree_util.keystr(path)
            group = "head" if "head" in name else "early"
            group = "late" if "layer3" in name or "layer4" in name else group
            np.testing.assert_allclose(leaf, -rates[group], rtol=1e-5)


# ---------------------------------------------------------------------------
# runs
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder, body, tmp_path_factory):
    """Two stages from a file, one seed."""
    options = {"weights": body, "tensorboard": True, **STAGES}
    out = tmp_path_factory.mktemp("runs")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return run(folder, out, **options)


def test_a_run(finished, folder):
    results, out = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "results.json", "curves.png"),
        *("checkpoints", "confusion-0.png", "mistakes-0.png", "predictions-0.csv"),
        *("model-0.safetensors", "tensorboard"),
    }
    lines = record.lines_of(out, "epoch", 0)
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
    for picture in ("curves.png", "confusion-0.png", "mistakes-0.png"):
        assert imread(out / picture).std() > 0.01
    assert results["images"] == (36, 9) and results["classes"] == 3
    assert results["split"] == images.EVERY_FIFTH
    assert "article" not in results
    (end,) = record.lines_of(out, "end", 0)
    assert results["tta_accuracy"]["runs"] == [end["accuracy"]]
    assert results["accuracy"]["runs"] == [lines[-1]["accuracy"]]
    assert end["plain_accuracy"] == lines[-1]["accuracy"]
    assert end["plain_loss"] == lines[-1]["valid_loss"]
    assert json.loads((out / "results.json").read_text())["n"] == 1


def test_predictions_are_those_of_the_model(finished, folder):
    """The table agrees with the log, and with the exported model on the same views."""
    _, out = finished
    with (out / "predictions-0.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = images.read(folder)
    assert [row["image"] for row in rows] == [
        path.relative_to(folder).as_posix() for path in pictures.valid.paths
    ]
    right = [row["class"] == row["prediction"] for row in rows]
    (end,) = record.lines_of(out, "end", 0)
    assert 100 * np.mean(right) == pytest.approx(end["accuracy"])
    p = np.array([float(row["of the class"]) for row in rows])
    assert -np.log(p).mean() == pytest.approx(end["loss"], abs=1e-4)

    model = cars.load(out / "model-0.safetensors")
    assert model.classes == CLASSES and model.size == 32
    labels, plain, views = pictures.valid.labels, [], []
    for path in pictures.valid.paths:
        image = images.open_image(path, 32)
        plain.append(images.plain_view(image, 32))
    views = [np.asarray(model.predict(np.stack(plain)), np.float64)]
    loss, accuracy = cars.judge(views[0], labels)
    assert loss == pytest.approx(end["plain_loss"], rel=1e-5)
    assert accuracy == end["plain_accuracy"]


def test_test_time_augmentation(finished, folder):
    """The mean of the probabilities of one plain and four augmented views."""
    _, out = finished
    model, valid = cars.load(out / "model-0.safetensors"), images.read(folder).valid
    views = []
    for seed in (None, 0, 1, 2, 3):
        batches = images.eval_batches(valid, 32, 16, augment_seed=seed)
        logs = [model.predict(b["image"]) for b in batches]
        views.append(np.exp(np.concatenate(logs).astype(np.float64)))
    assert not np.allclose(views[1], views[2], rtol=1e-4)
    mean = sum(views) / 5
    (end,) = record.lines_of(out, "end", 0)
    assert end["passes"] == 5
    loss, accuracy = cars.judge(np.log(mean), valid.labels)
    assert end["loss"] == pytest.approx(loss, rel=1e-5)
    assert end["accuracy"] == accuracy


def test_torchvision_names_in_pytorch(finished, folder):
    """As the README says it: the exported file gives PyTorch the same logits."""
    _, out = finished
    tensors, told = weights.read(out / "model-0.safetensors")
    theirs = TorchResNet("resnet18", 4, classes=3)
    theirs.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()})
    theirs.eval()
    x, _ = batch(0)
    mean, std = (np.array(json.loads(told[k]), np.float32) for k in ("mean", "std"))
    pixels = torch.tensor(((x / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    expected = torch.log_softmax(theirs(pixels), 1).detach().numpy()
    ours = cars.load(out / "model-0.safetensors").predict(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert tensors["bn1.num_batches_tracked"] == 12


def test_it_learns(folder, tmp_path):
    """Three colours, from random weights."""
    results, _ = run(folder, tmp_path, epochs=8, learning_rate=1e-2, batch_size=8)
    assert results["tta_accuracy"]["mean"] > 85
    assert results["changed"]["learning_rate"] == 1e-2
    assert results["weights"] is None


def test_the_articles_number_is_beside_its_own_recipe_only(
    finished, folder, body, tmp_path, monkeypatch
):
    shutil.copytree(finished[1], tmp_path / "run")
    monkeypatch.setattr(cars, "ARTICLE_IMAGES", (36, 9))
    results, _ = run(folder, tmp_path, weights=body, **STAGES)
    assert "article" not in results  # a ResNet-18
    config = cars.settled(cars.Config(folder, weights=body))
    cycle = cars.stages_of(config, 3)[1].cycle
    results = cars.report(config, cycle, images.read(folder), tmp_path / "run")
    assert results["article"] == cars.ARTICLE


def test_own_model_as_weights(finished, folder, tmp_path):
    """What a run has written is the body of the next one."""
    _, out = finished
    model = out / "model-0.safetensors"
    results, _ = run(folder, tmp_path, weights=model, **STAGES)
    assert results["weights"] == "run/model-0.safetensors"


def test_the_numbers_do_not_depend_on_devices_and_workers(
    finished, folder, body, tmp_path, monkeypatch
):
    """Two devices and as many workers as cores, or none; one device."""
    expected = epochs(finished[1])
    options = {"weights": body, **STAGES}
    _, out = run(folder, tmp_path, workers=0, **options)
    assert epochs(out) == expected
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(devices, "data_mesh", lambda: mesh)
    _, out = run(folder, tmp_path, name="one", **options)
    for line, other in zip(epochs(out), expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_seeds_differ_and_are_summed_up(finished, folder, body, tmp_path):
    """One more seed goes on with a finished run, which stays as it is."""
    shutil.copytree(finished[1], tmp_path / "run")
    options = {"weights": body, **STAGES}
    again, out = run(folder, tmp_path, **options)  # nothing left to do
    assert again["accuracy"] == finished[0]["accuracy"]
    results, _ = run(folder, tmp_path, seeds=2, **options)
    assert results["n"] == 2 and len(results["accuracy"]["runs"]) == 2
    losses = [record.lines_of(out, "epoch", seed)[0]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert epochs(out)[: len(epochs(finished[1]))] == epochs(finished[1])
    assert (out / "model-1.safetensors").exists()


# ---------------------------------------------------------------------------
# restarts
# ---------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_killed_after_a_save_it_ends_with_the_same_bits(
    finished, folder, body, tmp_path, monkeypatch, after
):
    """In the first stage, at its end, in the second, in the middle of epochs."""
    options = {"weights": body, "save_every": 1e-9, **STAGES}
    saves, save = 0, checkpoint.save

    def save_and_die(*args):
        nonlocal saves
        save(*args)
        saves += 1
        if saves == after:
            args[0].wait()
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        run(folder, tmp_path, **options)
    monkeypatch.undo()
    run(folder, tmp_path, **options)
    assert epochs(tmp_path / "run") == epochs(finished[1])


# What `python -m train.cars` does, with the network of the other tests.
SHALLOW = """
import runpy
from train.models import (resnet)
resnet.LAYERS["resnet18"] = (resnet.BasicBlock, (1, 1, 1, 1))
runpy.run_module("train.cars", run_name="__main__", alter_sys=True)
"""


def test_killed_for_real(finished, folder, body, tmp_path):
    """By the system, from the command line; then the same command."""
    command = [sys.executable, "-c", SHALLOW, "--data-dir", str(folder)]
    command += ["--weights", str(body), "--out", str(tmp_path), "--name", "run"]
    command += ["--architecture", "resnet18", "--width", "4", "--size", "32"]
    command += ["--batch-size", "16", "--frozen-epochs", "1", "--epochs", "3"]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    env["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
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
    assert not record.ended(tmp_path / "run", 0)
    done = subprocess.run(
        command, env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = epochs(tmp_path / "run")
    assert [line["event"] for line in lines] == ["epoch"] * 4 + ["end"]
    for line, other in zip(lines, epochs(finished[1]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert "Wrote" in done.stdout and "% of the images held out" in done.stdout


def test_other_images_or_weights_are_refused(finished, folder, body, tmp_path):
    options = {"weights": body, **STAGES}
    _, out = finished
    config = tiny(folder, out.parent, **options)
    before = (out / "metrics.jsonl").read_bytes()
    other = tmp_path / "other.pth"
    tensors = torch.load(body)
    torch.save(tensors | {"bn1.bias": tensors["bn1.bias"] + 1}, other)
    with pytest.raises(ValueError, match="weights_md5"):
        cars.main(dataclasses.replace(config, weights=other))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in CLASSES:
        (fewer / name).symlink_to(folder / name)
    (fewer / "yellow").symlink_to(folder / "red")
    with pytest.raises(ValueError, match="data = "):
        cars.main(dataclasses.replace(config, data_dir=fewer))
    with pytest.raises(ValueError, match="learning_rate = "):
        cars.main(dataclasses.replace(config, learning_rate=1.0))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_it_stops_where_the_loss_is_no_number(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="diverged in the epoch before step"):
        run(folder, tmp_path, learning_rate=1e38, optimizer="sgd", b1=(0.9, 0.9))
    lines = record.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["event"] == "diverged"
    assert (tmp_path / "run" / "curves.png").exists()


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("recipe", "adam"), ("architecture", "vgg16"), ("width", 0), ("size", 16)),
        *(("epochs", 0), ("frozen_epochs", 3), ("divisors", (0, 1, 1)), ("seed", -1)),
        *(("batch_size", 1), ("batch_size", 64), ("batch_size", 34), ("seeds", 0)),
        *(("workers", -1), ("save_every", 0), ("optimizer", "adamm"), ("size", 31)),
        *(("optimizer", "optax.nothing"), ("weight_decay", 0.1)),
    ],
)
def test_options_are_checked(folder, tmp_path, option, value):
    config = tiny(folder, tmp_path)
    with pytest.raises(ValueError, match=option):
        cars.main(dataclasses.replace(config, **{option: value}))
    assert not list(tmp_path.iterdir())


def test_a_batch_is_split_over_all_devices(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        cars.main(tiny(folder, tmp_path, batch_size=15))


def test_weights_of_another_network(folder, body, tmp_path):
    """Before anything is trained or written."""
    with pytest.raises(ValueError, match=r"layer1\.0\.conv3|conv1\.weight"):
        run(folder, tmp_path, weights=body, architecture="resnet50")
    with pytest.raises(ValueError, match="missing.pth"):
        run(folder, tmp_path, weights=tmp_path / "missing.pth")
    assert not list(tmp_path.iterdir())


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="data_dir"):
        run(tmp_path / "nothing", tmp_path)


# ---------------------------------------------------------------------------
# predictions
# ---------------------------------------------------------------------------


def test_predict(finished, folder, capsys):
    _, out = finished
    paths = (folder / "red" / "00.png", folder / "blue" / "01.png")
    model = out / "model-0.safetensors"
    found = cars.predict(cars.Predict(paths, model, top=2))
    printed = capsys.readouterr().out
    assert list(found) == list(paths)
    for path, p in found.items():
        assert p.sum() == pytest.approx(1)
        assert str(path) in printed
        best, second = p.argsort()[::-1][:2]
        first = f"{100 * p[best]:6.2f} %  {CLASSES[best]}"
        assert f"  {first}\n  {100 * p[second]:6.2f} %  {CLASSES[second]}\n" in printed
    assert printed.count("%") == 4
    augmented = cars.predict(cars.Predict(paths[:1], model, views=2))[paths[0]]
    assert augmented.sum() == pytest.approx(1) and (augmented != found[paths[0]]).any()


def test_predict_takes_the_newest_model(finished, folder, monkeypatch, capsys):
    _, out = finished
    newest = out.parent / "newest"
    newest.mkdir()
    (newest / "model-3.safetensors").write_bytes(
        (out / "model-0.safetensors").read_bytes()
    )
    os.utime(newest / "model-3.safetensors", (2e9, 2e9))
    assert cars.newest_model(out.parent) == newest / "model-3.safetensors"
    (newest / "model-3.safetensors").unlink()
    newest.rmdir()


def test_predict_from_the_command_line(finished, folder, tmp_path, capsys):
    _, out = finished
    image = str(folder / "red" / "00.png")
    config = cars.predict_of([image, image, "--top", "1"])
    assert config == cars.Predict((Path(image), Path(image)), top=1)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    model = out / "model-0.safetensors"
    good = folder / "red" / "00.png"
    with pytest.raises(ValueError, match=r"cannot be read: .*broken.jpg"):
        cars.predict(cars.Predict((broken, good), model))
    assert f"{good}\n" in capsys.readouterr().out  # predicted all the same
    with pytest.raises(ValueError, match="images must be at least one"):
        cars.predict(cars.Predict((), model))
    with pytest.raises(ValueError, match="top must be at least 1"):
        cars.predict(cars.Predict((broken,), model, top=0))
    with pytest.raises(ValueError, match="model: there is none in"):
        cars.newest_model(tmp_path)


def test_a_file_that_is_no_model(body, folder):
    with pytest.raises(ValueError, match="was not written by train.cars"):
        cars.load(body)


def test_the_command_line(folder, body):
    args = ["--data-dir", str(folder), "--weights", str(body), "--recipe", "adamw"]
    args += ["--divisors", "4", "2", "1", "--epochs", "3", "--l2", "0"]
    config = tyro.cli(cars.Config, args=args)
    assert (config.recipe, config.weights, config.l2) == ("adamw", body, 0)
    assert config.divisors == (4, 2, 1) and config.epochs == 3
    with pytest.raises(SystemExit):
        tyro.cli(cars.Config, args=[])  # without data


def test_confused(finished):
    """What is printed is what the table of predictions says."""
    _, out = finished
    with (out / "predictions-0.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels, predictions = (
        np.array([CLASSES.index(row[key]) for row in rows])
        for key in ("class", "prediction")
    )
    (end,) = record.lines_of(out, "end", 0)
    expected = confusion.most_confused(labels, predictions, CLASSES)
    assert end["most_confused"] == expected
