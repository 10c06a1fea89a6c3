"""train.cifar10 on tiny images: the recipe, the program, restarts, what it refuses."""

import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.image import imread

import adamw_jax as aj
from train import cifar10
from train.data import batches
from train.data import cifar10 as data
from train.data.splits import Images
from train.models import tta
from train.run import checkpoint, devices, record

pytestmark = pytest.mark.usefixtures("lenient", "cache")

TINY = cifar10.Config(
    blocks=1, width=4, epochs=3, batch_size=16, learning_rate=1e-2, name="run"
)
TRAIN, TEST = 60, 20  # images: three batches of 16 and one of 12


def images(seed, size):
    """Ten classes told apart by their colour, so that something can be learned."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(size) % 10).astype(np.int32)
    colours = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 3))
    x = colours[y] + rng.normal(0, 30, (size, 32, 32, 3))
    return Images(x.clip(0, 255).astype(np.uint8), y)


def fake_cifar10(data_dir):
    del data_dir
    return images(1, TRAIN), images(2, TEST)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(data, "read_cifar10", fake_cifar10)


def run(tmp_path, config=TINY, **changes):
    return cifar10.main(cifar10.dataclasses.replace(config, out=tmp_path, **changes))


def log(folder):
    return record.read_lines(folder / "metrics.jsonl")


def epochs(folder):
    """What must be the same in two runs: all but times."""
    timed = ("seconds", "images_per_second")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in log(folder)
        if line["event"] in ("epoch", "end")
    ]


def final_state(folder, seed=0):
    with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sharding info not provided")
            return checkpoints.load(None)


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---------------------------------------------------------------------------
# the recipe
# ---------------------------------------------------------------------------


def test_the_articles_steps():
    """391 steps an epoch, the last of 80 images; the rates of the article's code."""
    parts = cifar10.in_steps(np.arange(50_000), 128)
    assert [part.shape for part in parts] == [(390, 128), (1, 80)]
    np.testing.assert_array_equal(
        np.concatenate([p.ravel() for p in parts]), range(50_000)
    )
    cycle = cifar10.cycle_of(cifar10.RECIPES["adamw-30"], 391)
    assert cycle.total_steps == 11_730
    expected = {
        0: (3e-4, 0.95),
        1: (3.00497684e-4, 0.9499816),
        100: (3.49768439e-4, 0.9481567),
        5425: (2.99993779e-3, 0.8500023),
        5426: (3e-3, 0.85),
        10850: (3.00559895e-4, 0.9499793),
        10851: (3e-4, 0.95),
        11729: (3.59079284e-6, 0.95),
    }
    for step, (rate, b1) in expected.items():
        values = cycle.at(step)
        assert values["learning_rate"] == pytest.approx(rate, rel=1e-7)
        assert values["b1"] == pytest.approx(b1, rel=1e-6)
        assert values["b2"] == 0.99


RECIPES = {  # epochs, peak, div, share of the last phase, decoupled decay, L2
    "adamw-30": (30, 3e-3, 10, 0.075, 0.1, 0),
    "adamw-30-wd0.3": (30, 3e-3, 10, 0.075, 0.3, 0),
    "adamw-18-tta": (18, 3e-3, 10, 0.075, 0.1, 0),
    "adam-l2-30": (30, 1e-3, 10, 0.075, 0, 1e-6),
    "amsgrad-30": (30, 3e-3, 10, 0.075, 0.1, 0),
    "amsgrad-l2-30": (30, 1e-3, 10, 0.075, 0, 1e-6),
    "sgd-30": (30, 0.5, 20, 0.2, 0, 1e-4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_do_what_they_say(name):
    """Two updates, by the rule written out in NumPy; the phases; the rest."""
    config = cifar10.RECIPES[name]
    assert config.recipe == name and name in cifar10.ARTICLE
    n_epochs, rate, div, pct, decay, l2 = RECIPES[name]
    assert (config.epochs, config.batch_size) == (n_epochs, 128)
    assert config.tta == ("tta" in name)
    cycle = cifar10.cycle_of(config, 391)
    total = n_epochs * 391
    assert cycle.total_steps == total
    top = math.ceil((1 - pct) / 2 * total - 1e-6)
    last = math.ceil((1 - pct) * total - 1e-6)
    for step, factor, b1 in ((0, 1 / div, 0.95), (top, 1, 0.85), (last, 1 / div, 0.95)):
        assert cycle.at(step)["learning_rate"] == pytest.approx(rate * factor, rel=1e-6)
        assert cycle.at(step)["b1"] == pytest.approx(b1, rel=1e-6)

    tx = cifar10.make_optimizer(config, cycle)
    p = np.array([2.0, -3.0])
    gradients = np.array([[1e-6, -1e-6], [1e-4, 1e-7]])  # where L2 is heard
    state = tx.init(jnp.array(p))
    m = v = largest = np.zeros(2)
    kept = 1.0  # the product of the betas: what an exact bias correction divides by
    for k, g in enumerate(gradients):
        updates, state = tx.update(jnp.array(g), state, jnp.array(p))
        values, g = cycle.at(k), g + l2 * p
        b1, kept = values["b1"], kept * values["b1"]
        if config.optimizer == "sgd":
            m = b1 * m + g
            direction = m
        else:
            m, v = b1 * m + (1 - b1) * g, 0.99 * v + 0.01 * g**2
            largest = np.maximum(largest, v)
            used = largest if name.startswith("amsgrad") else v
            root = np.sqrt(used / (1 - 0.99 ** (k + 1)))
            direction = m / (1 - kept) / (root + 1e-8)
        expected = -values["learning_rate"] * (direction + decay * p)
        np.testing.assert_allclose(updates, expected, rtol=1e-4)
        p = p + expected
    is_amsgrad = any("max" in f for f in _fields(state))
    assert is_amsgrad == name.startswith("amsgrad")


def test_other_optimizers_follow_the_rate():
    config = cifar10.dataclasses.replace(
        TINY, optimizer="optax.lion", weight_decay=0.0, learning_rate=1e-2
    )
    cycle = cifar10.cycle_of(config, 4)
    assert set(cycle.at(0)) == {"learning_rate"}  # nothing else drives them
    tx = cifar10.make_optimizer(config, cycle)
    params = jnp.ones(1)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jnp.ones(1), state, params)
        np.testing.assert_allclose(updates, -cycle.at(step)["learning_rate"], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "optax.adamw"])
def test_no_decay_is_no_decay(optimizer):
    """Not AdamW's default of 1e-4."""
    config = cifar10.dataclasses.replace(TINY, optimizer=optimizer, weight_decay=0.0)
    tx = cifar10.make_optimizer(config, cifar10.cycle_of(config, 4))
    params = jnp.array([5.0])
    updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
    assert updates == 0


def _fields(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in leaves]


def test_every_image_once_with_the_articles_crops():
    order, crops = jax.jit(cifar10.draw_epoch, static_argnums=2)(0, 3, 5000)
    np.testing.assert_array_equal(np.sort(order), range(5000))
    assert crops.dtype == np.uint8
    counts = [np.bincount(np.asarray(crops)[:, i]) for i in range(3)]
    assert [len(count) for count in counts] == [8, 8, 2]  # offset 8 is never drawn
    for count in counts:
        expected = 5000 / len(count)
        assert (abs(count - expected) < 5 * np.sqrt(expected)).all()
    again, other_epoch, other_seed = (
        np.asarray(cifar10.draw_epoch(*which, 5000)[0])
        for which in ((0, 3), (0, 4), (1, 3))
    )
    np.testing.assert_array_equal(order, again)
    assert (order != other_epoch).mean() > 0.9 and (order != other_seed).mean() > 0.9


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------


def plain_epoch(config, state, train, seed, epoch):
    """An epoch as a loop in Python: one device, images cropped by NumPy slices."""
    net = cifar10.WideResNet(config.blocks, config.width, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(nnx.view(net, use_running_average=False))
    tx = cifar10.make_optimizer(config, cifar10.cycle_of(config, 4))
    order, crops = map(np.asarray, cifar10.draw_epoch(seed, epoch, TRAIN))
    padded = np.pad(train.x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
    losses = []

    @jax.jit
    def step(params, stats, opt, x, y):
        def loss_of(params):
            net = nnx.merge(graph, params, stats, copy=True)
            labels = jax.nn.one_hot(y, 10)
            loss = -(jax.nn.log_softmax(net(x)) * labels).sum(-1).mean()
            return loss, nnx.state(net, nnx.BatchStat)

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), new, opt, loss

    *_, params, stats, opt = state
    for first in range(0, TRAIN, config.batch_size):
        x = []
        for image in order[first : first + config.batch_size]:
            row, column, flip = crops[np.flatnonzero(order == image)[0]]
            crop = padded[image, row : row + 32, column : column + 32]
            x.append(crop[:, ::-1] if flip else crop)
        pixels = np.stack(x) / np.float64(255)
        x = ((pixels - batches.CIFAR10_MEAN) / batches.CIFAR10_STD).astype(np.float32)
        y = train.y[order[first : first + config.batch_size]]
        params, stats, opt, loss = step(params, stats, opt, x, y)
        losses.append(float(loss))
    return (params, stats, opt), losses


@pytest.mark.parametrize("n_devices", [1, 2])
def test_an_epoch_equals_a_plain_loop(n_devices):
    """Split over devices or not: batch norm over all of a batch, no image left out."""
    config = cifar10.dataclasses.replace(TINY, train_size=TRAIN)
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("data",))
    programs = cifar10.build(config, mesh, TRAIN)
    train, _ = fake_cifar10(None)
    state = programs.initial_state(5)
    (params, stats, _), losses = plain_epoch(config, state, train, 5, 2)
    padded = batches.padded(train.x)
    ours, our_losses = jax.jit(programs.train_epoch)(state, padded, train.y, 5, 2)
    assert ours.step == 4
    np.testing.assert_allclose(our_losses, losses, rtol=1e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4),
        (ours.params, ours.stats),
        (params, stats),
    )


def test_what_is_compiled(tmp_path):
    """The state is donated; the last evaluation is one of five passes; one trace."""
    mesh = devices.data_mesh()
    programs = cifar10.build(TINY, mesh, TRAIN)
    train, test = fake_cifar10(None)
    everywhere = NamedSharding(mesh, PartitionSpec())
    x, y, test_x = jax.device_put(
        (batches.padded(train.x), train.y, test.x[None]), everywhere
    )
    program = cifar10.compiled(programs, everywhere, x, y, test_x, tta=True)
    zero = np.int32(0)
    state = program.initial_state(zero)
    expected = jax.jit(programs.evaluate, static_argnums=3)(state, test_x, zero, 4)
    found = program.evaluate_last(state, test_x, zero)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, program.evaluate(state, test_x, zero), rtol=1e-4)
    leaf = jax.tree.leaves(state.params)[0]
    state, _ = program.train_epoch(state, x, y, zero, zero)
    assert leaf.is_deleted()
    program.train_epoch(state, x, y, np.int32(1), np.int32(1))  # as it is


@pytest.mark.parametrize("seed", [0, 1])
def test_the_command_trains_what_a_plain_loop_trains(tmp_path, seed):
    """Every epoch its own order, every seed its own."""
    config = cifar10.dataclasses.replace(TINY, epochs=2)
    run(tmp_path, config, seed=seed)
    lines = [x for x in log(tmp_path / "run") if x["event"] == "epoch"]
    train, _ = fake_cifar10(None)
    state = cifar10.build(config, devices.data_mesh(), TRAIN).initial_state(seed)
    for epoch in range(2):
        state, losses = plain_epoch(config, state, train, seed, epoch)
        assert lines[epoch]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_fewer_images(tmp_path):
    run(tmp_path, train_size=32, epochs=1)
    assert [x["step"] for x in log(tmp_path / "run") if x["event"] == "epoch"] == [2]


def test_activations_in_bfloat16_and_parameters_in_float32():
    config = cifar10.dataclasses.replace(TINY, dtype="bfloat16")
    programs = cifar10.build(config, devices.data_mesh(), TRAIN)
    train, _ = fake_cifar10(None)
    state = programs.initial_state(0)
    text = str(jax.make_jaxpr(programs.train_epoch)(state, train.x, train.y, 0, 0))
    convolutions = [
        line for line in text.split("\n") if "conv_general_dilated[" in line
    ]
    assert convolutions and all("bf16" in line for line in convolutions)
    out, losses = jax.eval_shape(programs.train_epoch, state, train.x, train.y, 0, 0)
    dtypes = {str(x.dtype) for x in jax.tree.leaves((out.params, losses))}
    assert dtypes == {"float32"}


def test_test_time_augmentation_is_the_mean_of_softmax():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
    shifts = rng.normal(size=(4, 6, 4))

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    expected = [softmax(x @ weights)]
    expected += [softmax((2 * x + shift) @ weights) for shift in shifts]
    found = jax.jit(
        lambda x, shifts: tta.predict(
            lambda x: x @ weights, x, lambda x, shift: 2 * x + shift, shifts
        )
    )(x, shifts)
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-5)
    plain = tta.predict(lambda x: x @ weights, x, lambda x, _: x, shifts[:0])
    np.testing.assert_allclose(plain, expected[0], rtol=1e-5)


@pytest.mark.parametrize("augmented", [0, 4])
def test_evaluation_equals_a_plain_loop(augmented):
    programs = cifar10.build(TINY, devices.data_mesh(), TRAIN)
    state = programs.initial_state(0)
    _, test = fake_cifar10(None)
    x = test.x.reshape(2, 10, 32, 32, 3)
    found = jax.jit(programs.evaluate, static_argnums=3)(state, x, 7, augmented)
    net = cifar10.network(TINY, 0)
    nnx.update(net, state.params, state.stats)
    net = nnx.view(net, use_running_average=True)
    key = jax.random.fold_in(jax.random.key(7), TINY.epochs)
    crops = np.asarray(cifar10.random_crops(key, (2, augmented, 10)))
    for i in range(2):
        views = [x[i]]
        pad = np.pad(x[i], ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
        for crop in crops[i]:
            view = [
                p[r : r + 32, c : c + 32]
                for p, (r, c, _) in zip(pad, crop, strict=True)
            ]
            flips = crop[:, 2, None, None, None]
            views.append(np.where(flips, np.stack(view)[:, :, ::-1], np.stack(view)))
        each = [jax.nn.softmax(net(batches.normalise(view))) for view in views]
        np.testing.assert_allclose(found[i], np.mean(each, 0), rtol=2e-4, atol=1e-6)


def test_judge():
    p = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.25, 0.75]]])
    loss, accuracy = cifar10.judge(p, np.array([0, 0, 1, 1]))
    assert accuracy == 50.0  # the first of equals is the guess
    assert loss == pytest.approx(-np.log([0.9, 0.2, 0.5, 0.75]).mean())


def test_a_scanned_step_is_as_fast_as_a_looped_one():
    """XLA's naive convolutions in loops made it 10 to 76 times slower on CPUs."""
    train, _ = fake_cifar10(None)
    config = cifar10.dataclasses.replace(TINY, width=8, batch_size=12)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def program(size):
        programs = cifar10.build(config, mesh, size)
        state = programs.initial_state(0)
        args = batches.padded(train.x[:size]), train.y[:size], 0, 0
        return functools.partial(
            jax.jit(programs.train_epoch).lower(state, *args).compile(), state, *args
        )

    looped, scanned = program(12), program(60)  # a scan of one step is no loop
    times = {looped: [], scanned: []}
    for _ in range(8):
        for step, seconds in times.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            seconds.append(time.perf_counter() - began)
    assert min(times[scanned]) / 5 < 3 * min(times[looped])


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


def test_a_run_from_end_to_end(tmp_path, capsys):
    results = run(tmp_path, seeds=2, epochs=8, tta=True)
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["n"] == 2 and len(results["accuracy"]["runs"]) == 2
    accuracies = results["accuracy"]["runs"]
    assert results["accuracy"]["mean"] > 30  # colours are easy; a guess has 10 %
    assert results["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
    assert results["accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    seconds = [x["seconds"] for x in log(folder) if x["event"] == "epoch"]
    assert results["train_seconds"] == pytest.approx(sum(seconds) / 2)
    lines = log(folder)
    assert [line["event"] for line in lines] == (
        ["start"] + (["epoch"] * 8 + ["end"]) * 2
    )
    first, last = lines[1], lines[8]
    assert lines[9]["passes"] == 5
    assert lines[9]["test_loss"] != last["test_loss"]  # that of the plain pass
    assert (first["step"], last["step"], last["epoch"]) == (4, 32, 8)
    assert last["loss"] < first["loss"]
    cycle = cifar10.cycle_of(cifar10.dataclasses.replace(TINY, epochs=8), 4)
    assert last["learning_rate"] == pytest.approx(cycle.at(31)["learning_rate"])
    config = json.loads((folder / "config.json").read_text())
    assert config["train_size"] == TRAIN and "jax" in config["versions"]
    assert imread(folder / "curves.png").std() > 0.05
    out = capsys.readouterr().out
    assert out.count("images/s") == 16
    assert "epochs 8" in out and "94.25" in out  # what differs, and the article's
    assert f"{results['accuracy']['mean']:.2f}" in out

    # the same command again trains nothing and says the same
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(tmp_path, seeds=2, epochs=8, tta=True) == results
    assert (folder / "metrics.jsonl").read_bytes() == before

    # with more seeds it goes on
    more = run(tmp_path, seeds=3, epochs=8, tta=True)
    assert (
        more["n"] == 3 and more["accuracy"]["runs"][:2] == results["accuracy"]["runs"]
    )


def test_two_runs_of_a_seed_are_bit_identical_and_two_seeds_differ(tmp_path):
    run(tmp_path / "a", seeds=2)
    run(tmp_path / "b", seeds=2)
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert epochs(one) == epochs(other)
    same_bits(final_state(one), final_state(other))
    losses = {x["seed"]: x["loss"] for x in epochs(one) if x["event"] == "epoch"}
    assert losses[0] != losses[1]


def test_a_folder_is_never_overwritten_without_being_asked(tmp_path):
    run(tmp_path, epochs=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"learning_rate = 0.01, now 0.1; epochs = 1, now 2"
    ):
        run(tmp_path, epochs=2, learning_rate=0.1)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert len(log(tmp_path / "run")) == 3
    run(tmp_path, epochs=2, overwrite=True)
    assert len(log(tmp_path / "run")) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for other in ("", "{}", '{"script": "compare"}', "no JSON"):
        if other:
            (tmp_path / "mine" / "config.json").write_text(other)
        with pytest.raises(
            ValueError, match="not the folder of a run of train.cifar10"
        ):
            run(tmp_path, name="mine", overwrite=True)
        assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="not the folder of a run"):
        run(tmp_path, name="file", overwrite=True)
    for name in ("..", "a/b", str(tmp_path)):
        with pytest.raises(ValueError, match="name must be that of a folder"):
            run(tmp_path, name=name, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_processes_in_one_folder_are_refused(tmp_path):
    run(tmp_path, epochs=1)
    for changes in ({"seeds": 2}, {"overwrite": True}):
        with record.alone(tmp_path / "run"):
            with pytest.raises(ValueError, match="another process is at work"):
                run(tmp_path, epochs=1, **changes)
    assert len(log(tmp_path / "run")) == 3
    assert run(tmp_path, epochs=1, seeds=2)["n"] == 2
    assert run(tmp_path, epochs=1)["n"] == 1  # of the seeds that were asked for


def test_a_log_that_lost_its_lines_is_refused(tmp_path):
    run(tmp_path)
    path = tmp_path / "run" / "metrics.jsonl"
    record.rewrite_lines(path, log(tmp_path / "run")[:2])
    with pytest.raises(ValueError, match="1 epochs of seed 0, its checkpoint 3"):
        run(tmp_path)


def test_what_was_cut_off_in_a_log_goes(tmp_path):
    path = tmp_path / "log"
    record.append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert record.read_lines(path) == [{"a": 1}]
    record.append_line(path, {"c": 3})
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_other_devices_are_mentioned(tmp_path, capsys):
    run(tmp_path, epochs=1)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = log(tmp_path / "run")
    lines[0]["devices"] = "1 x abacus"
    record.rewrite_lines(path, lines)
    results = run(tmp_path, epochs=1, seeds=2)
    assert "Begun with other devices" in capsys.readouterr().out
    assert results["devices"] == "1 x abacus and 2 x cpu"


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """From the second epoch on the images are no numbers that make sense."""
    changes = {"optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 1e-3}
    run(tmp_path, epochs=2, **changes)
    good = final_state(tmp_path / "run")

    with pytest.raises(FloatingPointError, match=r"step \d+.*learning rate was 1e\+25"):
        run(tmp_path, name="bad", **changes | {"learning_rate": 1e25, "div": 1.0})
    lines = log(tmp_path / "bad")
    assert lines[-1]["event"] == "diverged" and lines[-1]["step"] < 4
    with pytest.raises(FloatingPointError, match="No epoch was finished"):
        run(tmp_path, name="bad", **changes | {"learning_rate": 1e25, "div": 1.0})
    assert imread(tmp_path / "bad" / "curves.png").std() > 0.01

    # a checkpoint before the divergence is still there, and is where it goes on
    folder = tmp_path / "run"
    lines = [x for x in log(folder) if x["event"] != "end" and x.get("epoch") != 2]
    record.rewrite_lines(folder / "metrics.jsonl", lines)
    with checkpoint.open_folder(folder / "checkpoints" / "0") as checkpoints:
        checkpoints.delete(8)
    original = cifar10.first_bad
    cifar10.first_bad = lambda losses, test_loss: 2
    try:
        with pytest.raises(FloatingPointError, match="step 6.*of epoch 1 is kept"):
            run(tmp_path, epochs=2, **changes)
    finally:
        cifar10.first_bad = original
    with checkpoint.open_folder(folder / "checkpoints" / "0") as checkpoints:
        assert checkpoints.latest.step == 4
    run(tmp_path, epochs=2, **changes)
    same_bits(final_state(folder), good)
    assert "diverged" not in [line["event"] for line in log(folder)]


@pytest.mark.parametrize(
    ("losses", "test_loss", "expected"),
    [
        ([2.0, 1.0], 1.0, None),
        ([2.0, 9.0, 1.0], 90.0, None),  # a bad batch, a bad running mean: not yet
        ([2.0, np.nan, 1.0], 1.0, 1),
        ([2.0, 1.0, np.inf], np.nan, 2),
        ([2.0, 1.0], np.nan, 1),
        ([2.0, 8.0, 9.0], 1.0, 1),
    ],
)
def test_what_divergence_is(losses, test_loss, expected):
    assert cifar10.first_bad(np.array(losses), test_loss) == expected


def test_any_optax_optimizer(tmp_path):
    results = run(
        tmp_path,
        optimizer="optax.lion",
        learning_rate=1e-3,
        optimizer_args={"b2": 0.98},
        seeds=1,
    )
    assert results["changed"]["optimizer"] == "optax.lion"
    state = final_state(tmp_path / "run")
    assert "mu" in str(jax.tree.structure(state["opt"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam.*got 'lion'"),
        ({"optimizer": "optax.lyon"}, "cannot import 'optax.lyon'"),
        ({"optimizer": "optax.adam"}, "weight_decay must be 0 with optax.adam.*0.1"),
        ({"optimizer": "adamw", "l2": 1e-4}, "l2 must be 0 with adamw.*0.0001"),
        ({"optimizer_args": {"bee": 1.0}}, "optimizer_args.*bee"),
        (
            {"optimizer": "optax.lbfgs", "weight_decay": 0.0},
            "not a gradient",
        ),
        (
            {"optimizer": "math.pow", "weight_decay": 0.0},
            "not a gradient|take",
        ),
        (
            {"optimizer": "optax.lion", "b2": 0.5},
            "b2 must be left at its.*got 0.5",
        ),
        (
            {"optimizer": "optax.lion", "b1": (0.9, 0.8)},
            "b1 must be left at its",
        ),
        ({"optimizer": "sgd", "b2": 0.5}, "b2 must be left at its"),
        ({"seed": 2**31 - 1, "seeds": 2}, "seed must be in"),
        ({"optimizer": "sgd"}, None),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 15}, "multiple of the 2 devices.*got 15"),
        ({"batch_size": 62}, r"batch_size must be in \[2, 60\], got 62"),
        ({"train_size": 61}, r"train_size must be in \[1, 60\], got 61"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"width": 0}, "width must be"),
        ({"learning_rate": -1.0}, "learning_rate must be.*got -1.0"),
        ({"pct": 1.5}, "pct must be.*got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(tmp_path, changes, message):
    if message is None:  # not bad: SGD has decoupled decay too
        run(tmp_path, epochs=1, **changes)
        return
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run(tmp_path, epochs=1)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    folder = tmp_path / "run" / "checkpoints" / "0"
    programs = cifar10.build(
        cifar10.dataclasses.replace(TINY, width=6), devices.data_mesh(), TRAIN
    )
    like = programs.initial_state(0)
    with checkpoint.open_folder(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"step 4 does not fit.*float32\[24\]"):
            checkpoint.restore(checkpoints, like)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "run" / "tensorboard" / "0").iterdir()
    assert b"test_loss" in events.read_bytes()


def test_the_command_line(tmp_path):
    """A recipe changes the defaults of the other options, which still can be given."""
    for args, expected in (
        (["--recipe", "adamw-18-tta"], "epochs=18"),
        (["--recipe", "sgd-30", "--epochs", "7"], "epochs=7"),
        ([], "epochs=30"),
    ):
        code = (
            "import runpy, sys\n"
            "from train.data import cifar10 as data\n"
            "class Stop(Exception): pass\n"
            f"sys.argv = ['cifar10', *{args!r}]\n"
            "def stop(d): raise Stop\n"
            "data.read_cifar10 = stop\n"
            "import tyro\n"
            "cli = tyro.cli\n"
            "def show(*a, **k):\n"
            "    config = cli(*a, **k); print(config); return config\n"
            "tyro.cli = show\n"
            "try: runpy.run_module('train.cifar10', run_name='__main__')\n"
            "except Stop: pass\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        if args:
            assert f"recipe='{args[1]}'" in done.stdout


# ---------------------------------------------------------------------------
# kill -9
# ---------------------------------------------------------------------------


def child(out, moment):
    """The command in a process of its own, which kills itself at a moment."""
    jax.config.update("jax_num_cpu_devices", 2)
    data.read_cifar10 = fake_cifar10
    append_line, save = record.append_line, checkpoint.save

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def append(path, line):
        here = line["event"], line.get("epoch")
        if (moment, *here) == ("before the line", "epoch", 2):
            kill()
        if (moment, *here) == ("in the line", "epoch", 2):
            with path.open("a") as file:
                file.write(json.dumps(line)[:40])
            kill()
        if (moment, *here) == ("before the end", "end", None):
            kill()
        append_line(path, line)

    def save_and_kill(checkpoints, step, state):
        if moment == "before the checkpoint" and step == 8:
            kill()
        save(checkpoints, step, state)
        if moment == "in the checkpoint" and step == 12:
            folder = Path(checkpoints.directory)
            while not any("tmp" in path.name for path in folder.iterdir()):
                assert not (folder / "12").exists(), "too late"
            kill()

    record.append_line, checkpoint.save = append, save_and_kill
    run(Path(out))


MOMENTS = (  # in this order, each on what the one before has left
    "before the line",
    "in the line",
    "before the checkpoint",
    "in the checkpoint",
    "before the end",
)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, cache):
    def start(out, moment):
        code = f"import test_cifar10 as t; t.child({str(out)!r}, {moment!r})"
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        killed = -signal.SIGKILL if moment else 0
        assert done.returncode == killed, done.stdout + done.stderr
        return done.stdout

    start(tmp_path / "whole", None)
    killed = tmp_path / "killed" / "run"
    for moment in MOMENTS:
        start(tmp_path / "killed", moment)
        assert not (killed / "results.json").exists()
    out = start(tmp_path / "killed", None)
    assert "images/s" not in out  # the last epoch was saved already
    whole = tmp_path / "whole" / "run"
    assert epochs(killed) == epochs(whole)
    same_bits(final_state(killed), final_state(whole))
    starts = [line for line in log(killed) if line["event"] == "start"]
    assert len(starts) == len(MOMENTS) + 1
    one, other = (
        json.loads((folder / "results.json").read_text()) for folder in (killed, whole)
    )
    assert one["accuracy"] == other["accuracy"]


def test_hyperparameters_are_in_the_restored_state(tmp_path):
    run(tmp_path, epochs=1)
    programs = cifar10.build(TINY, devices.data_mesh(), TRAIN)
    like = jax.jit(programs.initial_state)(0)
    folder = tmp_path / "run" / "checkpoints" / "0"
    with checkpoint.open_folder(folder) as checkpoints:
        state = checkpoint.restore(checkpoints, like)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert set(aj.current_hyperparams(state.opt)) >= {"learning_rate", "b1", "b2"}
