"""The recipe of CIFAR-10: its settings, its programs against plain loops."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_cifar10 import TINY, TRAIN, read_cifar10

from train.data import batches
from train.models.wide_resnet import WideResNet
from train.recipes import cifar10
from train.recipes.optimizer import make_optimizer
from train.run import devices

pytestmark = pytest.mark.usefixtures("lenient", "cache")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------


def test_the_articles_steps():
    """391 steps an epoch, the last of 80 images; the rates of the article's code."""
    parts = cifar10.split_batches(np.arange(50_000), 128)
    assert [part.shape for part in parts] == [(390, 128), (1, 80)]
    np.testing.assert_array_equal(
        np.concatenate([p.ravel() for p in parts]), range(50_000)
    )
    schedule = cifar10.make_schedule(cifar10.RECIPES["adamw-30"], 391)
    assert schedule.total_steps == 11_730
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
        values = schedule.at(step)
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
    schedule = cifar10.make_schedule(config, 391)
    total = n_epochs * 391
    assert schedule.total_steps == total
    top = math.ceil((1 - pct) / 2 * total - 1e-6)
    last = math.ceil((1 - pct) * total - 1e-6)
    for step, factor, b1 in ((0, 1 / div, 0.95), (top, 1, 0.85), (last, 1 / div, 0.95)):
        values = schedule.at(step)
        assert values["learning_rate"] == pytest.approx(rate * factor, rel=1e-6)
        assert values["b1"] == pytest.approx(b1, rel=1e-6)

    tx = make_optimizer(config, schedule)
    p = np.array([2.0, -3.0])
    gradients = np.array([[1e-6, -1e-6], [1e-4, 1e-7]])  # small enough to feel the L2
    state = tx.init(jnp.array(p))
    m = v = largest = np.zeros(2)
    kept = 1.0  # the product of the betas: what an exact bias correction divides by
    for k, g in enumerate(gradients):
        updates, state = tx.update(jnp.array(g), state, jnp.array(p))
        values, g = schedule.at(k), g + l2 * p
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


def _fields(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in leaves]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam.*got 'lion'"),
        ({"optimizer": "optax.lyon"}, "cannot import 'optax.lyon'"),
        ({"optimizer": "optax.adam"}, "weight_decay must be 0 with optax.adam.*0.1"),
        ({"optimizer": "adamw", "l2": 1e-4}, "l2 must be 0 with adamw.*0.0001"),
        ({"optimizer_args": {"bee": 1.0}}, "optimizer_args.*bee"),
        ({"optimizer": "optax.lbfgs", "weight_decay": 0.0}, "not a gradient"),
        ({"optimizer": "math.pow", "weight_decay": 0.0}, "not a gradient|take"),
        ({"optimizer": "optax.lion", "b2": 0.5}, "b2 must be left at its.*got 0.5"),
        ({"optimizer": "optax.lion", "b1": (0.9, 0.8)}, "b1 must be left at its"),
        ({"optimizer": "sgd", "b2": 0.5}, "b2 must be left at its"),
        ({"seed": 2**31 - 1, "seeds": 2}, "seed must be in"),
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
def test_bad_settings_are_refused(changes, message):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        cifar10.check(config, TRAIN)
        cifar10.build(config, devices.data_mesh(), TRAIN)


def test_sgd_has_decoupled_decay_too():
    config = dataclasses.replace(TINY, optimizer="sgd", weight_decay=0.1)
    cifar10.check(config, TRAIN)
    cifar10.build(config, devices.data_mesh(), TRAIN)


def test_every_image_once_with_the_articles_crops():
    draw_epoch = jax.jit(cifar10.draw_epoch, static_argnums=2)
    order, crops = draw_epoch(0, 3, 5000)
    np.testing.assert_array_equal(np.sort(order), range(5000))
    assert crops.dtype == np.uint8
    counts = [np.bincount(np.asarray(crops)[:, i]) for i in range(3)]
    assert [len(count) for count in counts] == [8, 8, 2]  # offset 8 is never drawn
    for count in counts:
        expected = 5000 / len(count)
        assert (abs(count - expected) < 5 * np.sqrt(expected)).all()
    again, other_epoch, other_seed = (
        np.asarray(draw_epoch(*which, 5000)[0]) for which in ((0, 3), (0, 4), (1, 3))
    )
    np.testing.assert_array_equal(order, again)
    assert (order != other_epoch).mean() > 0.9 and (order != other_seed).mean() > 0.9


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def plain_step(config):
    """A step on one device, compiled once for each size of a batch."""
    net = WideResNet(config.blocks, config.width, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(nnx.view(net, use_running_average=False))
    tx = make_optimizer(config, cifar10.make_schedule(config, 4))

    @jax.jit
    def step(params, stats, opt, x, y):
        def loss_fn(params):
            net = nnx.merge(graph, params, stats, copy=True)
            labels = jax.nn.one_hot(y, 10)
            loss = -(jax.nn.log_softmax(net(x)) * labels).sum(-1).mean()
            return loss, nnx.state(net, nnx.BatchStat)

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), new, opt, loss

    return step


def plain_epoch(config, step, state, train, seed, epoch):
    """An epoch as a loop in Python: images cropped by NumPy slices."""
    order, crops = map(np.asarray, cifar10.draw_epoch(seed, epoch, TRAIN))
    padded = np.pad(train.x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
    losses = []
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


@functools.cache
def compiled(n_devices):
    """The programs as the command has them."""
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    train, test = read_cifar10()
    x, y, test_x = jax.device_put(
        (batches.padded(train.x), train.y, test.x[None]), everywhere
    )
    programs = cifar10.build(TINY, mesh, TRAIN)
    return cifar10.compile_programs(programs, x, y, test_x, cifar10.TTA_PASSES)


@pytest.mark.slow
@pytest.mark.parametrize("n_devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_epochs_equal_a_plain_loop(n_devices):
    """Split over devices or not: batch norm over all of a batch, no image left out.

    Every epoch and every seed has an order of its own.
    """
    train, _ = read_cifar10()
    step = plain_step(TINY)
    program = compiled(n_devices)
    for seed, epoch in ((5, 2), (5, 3), (6, 0)):
        state = program.initial_state(np.int32(seed))
        start = jax.tree.map(np.array, state)  # the state is donated
        ours, our_losses = program.train_epoch(state, np.int32(seed), np.int32(epoch))
        (params, stats, _), losses = plain_epoch(TINY, step, start, train, seed, epoch)
        assert ours.step == 4
        np.testing.assert_allclose(our_losses, losses, rtol=1e-4)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4),
            (ours.params, ours.stats),
            (params, stats),
        )


@functools.cache
def plain_softmax():
    net = cifar10.make_network(TINY, 0)
    graph, *_ = nnx.split(
        nnx.view(net, use_running_average=True), nnx.Param, nnx.BatchStat
    )

    @jax.jit
    def softmax(params, stats, x):
        logits = nnx.merge(graph, params, stats)(batches.normalise(x))
        return jax.nn.softmax(logits)

    return softmax


def plain_evaluation(state, x, seed, augmented):
    """A loop over images that are cropped by NumPy slices."""
    softmax = plain_softmax()
    key = jax.random.fold_in(jax.random.key(seed), TINY.epochs)
    crops = np.asarray(cifar10.random_crops(key, (len(x), augmented, x.shape[1])))
    found = []
    for images, tables in zip(x, crops, strict=True):
        views = [images]
        pad = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
        for crop in tables:
            view = np.stack(
                [
                    p[r : r + 32, c : c + 32]
                    for p, (r, c, _) in zip(pad, crop, strict=True)
                ]
            )
            flips = crop[:, 2, None, None, None]
            views.append(np.where(flips, view[:, :, ::-1], view))
        each = [softmax(state.params, state.stats, view) for view in views]
        found.append(np.mean(each, 0))
    return np.stack(found)


@pytest.mark.slow
def test_compiled_programs():
    """The state is donated; the last evaluation has five passes; nothing is traced."""
    program = compiled(2)
    zero = np.int32(0)
    state = program.initial_state(zero)
    _, test = read_cifar10()
    for evaluate, passes in ((program.evaluate, 0), (program.evaluate_last, 4)):
        expected = plain_evaluation(state, test.x[None], 0, passes)
        np.testing.assert_allclose(
            evaluate(state, zero), expected, rtol=2e-4, atol=1e-6
        )
    leaf = jax.tree.leaves(state.params)[0]
    state, _ = program.train_epoch(state, zero, zero)
    assert leaf.is_deleted()
    state, _ = program.train_epoch(state, np.int32(1), np.int32(1))  # as it is
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == expected


@pytest.mark.slow
def test_activations_in_bfloat16_and_parameters_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    programs = cifar10.build(config, devices.data_mesh(), TRAIN)
    train, _ = read_cifar10()
    state = jax.eval_shape(programs.initial_state, 0)
    jaxpr, (out, losses) = jax.make_jaxpr(programs.train_epoch, return_shape=True)(
        state, train.x, train.y, 0, 0
    )
    convolutions = [
        line for line in str(jaxpr).split("\n") if "conv_general_dilated[" in line
    ]
    assert convolutions and all("bf16" in line for line in convolutions)
    dtypes = {str(x.dtype) for x in jax.tree.leaves((out.params, losses))}
    assert dtypes == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("augmented", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_evaluation_equals_a_plain_loop(augmented):
    programs = cifar10.build(TINY, devices.data_mesh(), TRAIN)
    state = jax.jit(programs.initial_state)(0)
    _, test = read_cifar10()
    x = test.x.reshape(2, 10, 32, 32, 3)
    found = jax.jit(programs.evaluate, static_argnums=3)(state, x, 7, augmented)
    expected = plain_evaluation(state, x, 7, augmented)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_a_scanned_step_is_as_fast_as_a_looped_one():
    """XLA's naive convolutions in loops made it 10 to 76 times slower on CPUs."""
    jax.config.update("jax_disable_most_optimizations", False)
    train, _ = read_cifar10()
    config = dataclasses.replace(TINY, width=8, batch_size=12)
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
