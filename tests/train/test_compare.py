"""The main job on tiny settings: its engine against a loop, its files and sentences."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

import adamw_jax
from train import compare
from train.data import batches, digits
from train.data import cifar10 as data
from train.evals import statistics as analysis
from train.models import small as models
from train.references import loop as torch_loop
from train.run import report

pytestmark = pytest.mark.usefixtures("lenient")  # Flax and Optax promote dtypes

TINY = compare.Config(
    train_size=40, eval_size=50, width=16, epochs=2, batch_size=10, evaluate_every=1,
    target=20.0, grid=2, tune_seeds=2, seeds=3, chunk=2,
)  # fmt: skip
NAMES = list(compare.OPTIMIZERS)


# ---------------------------------------------------------------------------
# the convolution
# ---------------------------------------------------------------------------

CASES = [  # height, width, kernel, stride, padding
    (8, 8, 3, 1, "SAME"),
    (8, 8, 3, 2, "SAME"),
    (7, 9, 3, 2, "SAME"),
    (9, 8, 5, 3, "SAME"),
    (8, 8, 1, 1, "SAME"),
    (9, 9, 1, 2, "SAME"),
    (8, 8, 3, 2, "VALID"),
    (11, 11, 2, 3, "VALID"),
    (10, 10, 3, 2, ((1, 1), (0, 2))),
]


@pytest.mark.parametrize(("h", "w", "k", "stride", "padding"), CASES)
def test_conv_is_that_of_jax(h, w, k, stride, padding):
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(4, h, w, 3), (k, k, 3, 5)])
    )
    theirs = functools.partial(
        lax.conv_general_dilated, dimension_numbers=models.DIMENSIONS
    )
    shape = jax.eval_shape(lambda: theirs(x, kernel, (stride, stride), padding)).shape
    g = jax.random.normal(jax.random.key(2), shape)

    @functools.partial(jax.jit, static_argnums=0)
    def all_three(conv, x, kernel, g):
        y, vjp = jax.vjp(
            lambda *args: conv(*args, (stride, stride), padding), x, kernel
        )
        return y, *vjp(g)

    ours, expected = (all_three(c, x, kernel, g) for c in (models.conv, theirs))
    for our, their in zip(ours, expected, strict=True):
        np.testing.assert_allclose(our, their, atol=2e-5)


@pytest.mark.parametrize(
    ("option", "value"), [("feature_group_count", 2), ("rhs_dilation", (2, 2))]
)
def test_conv_refuses_what_it_does_not_know(option, value):
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    with pytest.raises(ValueError, match=option):
        models.conv(x, kernel, (1, 1), "SAME", **{option: value})


def test_convolutions_of_a_step_are_in_the_form_that_is_fast_in_a_scan():
    def convolutions(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                yield eqn.params["dimension_numbers"]
            for inner in jaxprs_in_params(eqn.params):
                yield from convolutions(inner)

    net = nnx.eval_shape(lambda: models.CNN(4, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    x = jnp.zeros((2, 32, 32, 3))
    step = jax.grad(lambda state: nnx.merge(graph, state, copy=True)(x).sum())
    found = list(convolutions(jax.make_jaxpr(step)(state).jaxpr))
    assert len(found) == 3 * 3  # forward, dx, dkernel
    fast = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, models.DIMENSIONS)
    assert set(found) == {fast}


def test_max_pool():
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
    np.testing.assert_array_equal(models.max_pool(x), nnx.max_pool(x, (2, 2), (2, 2)))


# ---------------------------------------------------------------------------
# the engine against a Python loop
# ---------------------------------------------------------------------------


def build(config, side_by_side=False):
    mesh = Mesh(np.array(jax.devices()), ("members",))
    return compare.build_program(config, mesh, side_by_side)


build_once = functools.cache(build)


@pytest.fixture
def adamw_only(monkeypatch):
    """Compiles one branch of the program instead of five."""
    one = {"adamw": compare.OPTIMIZERS["adamw"]}
    monkeypatch.setattr(compare, "OPTIMIZERS", one)


def train_two(program, config, name, splits, lr, decay):
    """The first run is that of the second seed."""
    tables = compare.tables(config, splits.train.y, range(2))
    runs = compare.members(tables, np.array([1, 0]), np.array(lr), np.array(decay))
    images = batches.padded(splits.train.x), *batches.in_batches(splits.test)
    index = list(compare.OPTIMIZERS).index(name)
    results = program(np.int32(index), runs, images)
    return compare.members(tables, 1, lr[0], decay[0]), np.asarray(results)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_a_loop_over_steps(name):
    config = dataclasses.replace(TINY, epochs=6, evaluate_every=3)
    splits, lr, decay = digits.load_digits(40, 50), 0.05, 0.02
    member, results = train_two(
        build_once(config), config, name, splits, [lr, 0.1], [decay, 0.0]
    )

    def forward(params, x):
        hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        return jax.nn.relu(hidden) @ params["head"]["kernel"] + params["head"]["bias"]

    @jax.jit
    def loss_and_grads(params, x, y):
        def loss_of(params):
            logits = forward(params, x)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

        return jax.value_and_grad(loss_of)(params)

    cycle = compare.cycle_of(config)
    tx = compare.OPTIMIZERS[name](
        lambda step: lr * cycle.schedule("learning_rate")(step),
        cycle.schedule("b1"),
        decay,
    )
    params = nnx.to_pure_dict(member["params"])
    state, update, losses, expected = tx.init(params), jax.jit(tx.update), [], []
    for k, index in enumerate(member["order"]):
        x, y = splits.train.x[index] / np.float32(16), member["labels"][index]
        loss, grads = loss_and_grads(params, x, y)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
        if (k + 1) % 12 == 0:  # three epochs of four steps
            guess = forward(params, splits.test.x / np.float32(16)).argmax(-1)
            accuracy = 100 * np.mean(guess == splits.test.y)
            expected.append([accuracy, np.mean(losses[-12:])])
    np.testing.assert_allclose(results[0], expected, rtol=1e-5)
    assert results[1, 1, 1] < 0.9 * results[1, 0, 1]  # the other run learns, too


def test_side_by_side_as_one_by_one(adamw_only):
    splits = digits.load_digits(40, 50)
    one, other = (
        train_two(build(TINY, side), TINY, "adamw", splits, [0.1, 0.02], [0.1, 0.0])[1]
        for side in (False, True)
    )
    np.testing.assert_allclose(one[..., 1], other[..., 1], rtol=1e-5)
    np.testing.assert_allclose(one[..., 0], other[..., 0], atol=2.1)  # of 50 images


TINY_CIFAR = dataclasses.replace(TINY, dataset="cifar10", width=4, tune_seeds=1)


def test_a_run_with_crops_and_batch_norm_is_a_loop_over_steps(cifar_dir, adamw_only):
    splits = data.load_cifar10(cifar_dir, 40, 50)
    member, results = train_two(
        build(TINY_CIFAR), TINY_CIFAR, "adamw", splits, [0.02, 0.01], [0.1, 0.1]
    )
    cycle = compare.cycle_of(TINY_CIFAR)
    tx = compare.OPTIMIZERS["adamw"](
        lambda step: 0.02 * cycle.schedule("learning_rate")(step),
        cycle.schedule("b1"),
        0.1,
    )
    net = compare.network(TINY_CIFAR, 1)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    padded, expected, losses = batches.padded(splits.train.x), [], []

    @nnx.jit
    def train_step(net, optimizer, x, y):
        def loss_of(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_of)(net)
        optimizer.update(net, grads)
        return loss

    for k, (index, crops) in enumerate(
        zip(member["order"], member["crops"], strict=True)
    ):
        x = np.stack(
            [
                image[row : row + 32, column : column + 32][:, :: -1 if flip else 1]
                for image, (row, column, flip) in zip(padded[index], crops, strict=True)
            ]
        )
        x, y = batches.normalise(x), member["labels"][index]
        losses.append(train_step(net, optimizer, x, y))
        if (k + 1) % 4 == 0:
            eval_net = nnx.view(net, use_running_average=True)
            guess = eval_net(batches.normalise(splits.test.x)).argmax(-1)
            accuracy = 100 * np.mean(guess == splits.test.y)
            expected.append([accuracy, np.mean(losses[-4:])])
    np.testing.assert_allclose(results[0, :, 1], np.array(expected)[:, 1], rtol=1e-4)
    np.testing.assert_allclose(results[0, :, 0], np.array(expected)[:, 0], atol=2.1)


def test_the_torch_loop_trains_the_same_runs(monkeypatch):
    pytest.importorskip("torch")
    for kind in ("adam", "adamw", "amsgrad"):
        as_torch = functools.partial(getattr(adamw_jax, kind), bias_correction="torch")
        monkeypatch.setattr(compare, kind, as_torch)
    splits = digits.load_digits(400)
    config = dataclasses.replace(TINY, train_size=400, batch_size=50)
    x, test_x = (batches.normalise(part.x) for part in (splits.train, splits.test))
    program = build(config)
    for name in NAMES:
        member, results = train_two(
            program, config, name, splits, [0.05, 0.05], [0.1, 0.1]
        )
        sample = torch_loop.time_run(
            name, member, compare.cycle_of(config), x, test_x, splits.test.y
        )
        assert sample["seconds"] > 0
        assert sample["accuracy"] == pytest.approx(results[0, -1, 0], abs=0.3)


def test_the_torch_loop_has_the_same_cnn(cifar_dir):
    torch = pytest.importorskip("torch")
    net = models.CNN(4, rngs=nnx.Rngs(0))
    _, params, _ = nnx.split(net, nnx.Param, nnx.BatchStat)
    twin = torch_loop.network(jax.tree.map(np.asarray, params))
    x = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(x)).numpy()
    ours = nnx.view(net, use_running_average=False)(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------------------
# the whole job
# ---------------------------------------------------------------------------


def without_times(results):
    del results["speed"]
    for tuning in results["tuning"].values():
        del tuning["seconds_per_run"]
    return results


def test_the_whole_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # it has to do without
    config = dataclasses.replace(TINY, out=tmp_path, name="one")
    folder = compare.main(config)
    printed = capsys.readouterr().out
    assert folder == tmp_path / "one"
    files = {"config.json", "results.json", "results.md", "heatmap.png", "curves.png"}
    assert {path.name for path in folder.iterdir()} == files
    for picture in folder.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert picture.stat().st_size > 10_000

    settings = json.loads((folder / "config.json").read_text())
    assert settings["train_size"] == 40
    assert settings["versions"]["jax"] == jax.__version__
    assert settings["devices"] == "2 x cpu"

    text = (folder / "results.md").read_text()
    assert printed.rstrip().endswith(text.rstrip())
    assert "55 of 55 runs" in printed
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "|" in line]
    assert len(rows) == 2 + len(NAMES)
    assert {len(row) for row in rows} == {7}
    assert "Not compared with PyTorch" in text

    results = json.loads((folder / "results.json").read_text())
    assert list(results["tuning"]) == list(results["test"]) == NAMES
    assert text.rstrip().endswith(f"**{results['finding']}**")
    for name in NAMES:
        grid, best = results["tuning"][name]["grid"], results["tuning"][name]
        accuracy = np.array(grid["accuracies"])
        assert accuracy.shape == (2, 2, 2)
        assert best["accuracy"] == pytest.approx(accuracy.mean(-1).max(), abs=0.01)
        assert best["lr"] in grid["learning_rates"]
        assert np.array(results["test"][name]["accuracy"]).shape == (3, 2)

    # not over the results of an earlier run, unless told to
    before = (folder / "results.json").read_bytes()
    with pytest.raises(ValueError, match="one exists; .* --overwrite"):
        compare.main(config)
    assert (folder / "results.json").read_bytes() == before

    # the same again, in chunks of another size
    again = dataclasses.replace(config, overwrite=True, chunk=7)
    compare.main(again)
    other = json.loads((folder / "results.json").read_text())
    assert without_times(other) == without_times(results)


def test_the_whole_job_on_cifar10(tmp_path, cifar_dir, capsys, monkeypatch):
    two = {name: compare.OPTIMIZERS[name] for name in ("adam-l2", "adamw")}
    monkeypatch.setattr(compare, "OPTIMIZERS", two)  # less to compile
    config = dataclasses.replace(TINY_CIFAR, data_dir=cifar_dir, out=tmp_path)
    folder = compare.main(config)
    assert folder.name.startswith("compare-cifar10-")
    results = json.loads((folder / "results.json").read_text())
    assert results["test"]["adamw"]["n"] == 3
    if torch_loop.is_available():
        assert "A PyTorch loop on one core needs" in capsys.readouterr().out
        assert list(results["speed"]["torch"]) == list(two)


def test_the_command(tmp_path):
    """As a user starts it, with every core a device."""
    settings = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in vars(TINY).items()
        if key not in ("data_dir", "torch", "out", "name", "overwrite")
    ]
    command = [sys.executable, "-m", "train.compare", *settings, f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs/s" in done.stdout
    assert "Each at its own best learning rate and decay" in done.stdout
    (folder,) = tmp_path.iterdir()
    flags = json.loads((folder / "config.json").read_text())["xla_flags"]
    assert "host_platform_device_count" in flags


def test_importing_needs_neither_tyro_nor_torch_nor_sklearn():
    code = (
        "import sys\n"
        "for name in ('tyro', 'torch', 'sklearn', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
        "import train.compare"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("dataset", "mnist", "one of digits, cifar10"),
        ("data_dir", "here", "None for digits"),
        ("train_size", 0, "at least 1"),
        ("train_size", 5000, r"\[1, 1795\]"),
        ("eval_size", 5000, r"\[1, 878\]"),
        ("eval_size", 0, r"\[1, 878\]"),
        ("label_noise", 1.0, r"\[0, 1\)"),
        ("label_noise", float("nan"), r"\[0, 1\)"),
        ("width", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, r"\[1, 40\]"),
        ("batch_size", 41, r"\[1, 40\]"),
        ("evaluate_every", 3, r"one of \[1, 2\]"),
        ("target", 100.0, r"\(0, 100\)"),
        ("grid", 1, "at least 2"),
        ("tune_seeds", 0, "at least 1"),
        ("seeds", 1, "at least 2"),
        ("chunk", 0, "at least 1"),
    ],
)
def test_bad_settings(tmp_path, option, value, allowed):
    config = dataclasses.replace(TINY, out=tmp_path, **{option: value})
    with pytest.raises(ValueError, match=f"{option} .*{allowed}.* got .?{value}"):
        compare.main(config)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------
# what is made of the numbers
# ---------------------------------------------------------------------------


def test_confidence_covers_in_95_of_100():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    intervals = [analysis.confidence(draw) for draw in draws]
    inside = np.mean([i["low"] <= 3.0 <= i["high"] for i in intervals])
    assert inside == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5])
def test_the_slope_of_the_best_decay_is_found(slope):
    lrs, decays = np.geomspace(1e-3, 1e-1, 5), np.geomspace(1e-4, 1e2, 13)
    best = 0.3 * (lrs / 1e-2) ** slope
    distance = np.log10(decays[None] / best[:, None])
    noise = np.random.default_rng(0).normal(0, 0.1, (5, 13, 6))
    accuracy = 90 - 4 * distance[..., None] ** 2 + noise
    found = analysis.decay_slope(lrs, decays, accuracy)
    assert found is not None
    assert found["mean"] == pytest.approx(slope, abs=0.1)
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["high"] - found["low"] < 0.3
    assert analysis.decay_slope(lrs, decays, accuracy[..., :2]) is None  # seeds


def test_the_best_cell_on_an_edge_is_reported():
    accuracy = np.zeros((3, 4, 2))
    accuracy[2, 0] = 90
    accuracy[2, 1] = 89.6
    best = analysis.tuned(np.arange(1, 4), np.arange(1, 5), accuracy)
    assert (best["lr"], best["decay"]) == (3, 1)
    assert best["edges"] == ["highest learning rate", "lowest decay"]
    assert (best["basin"], best["cells"]) == (2, 12)


def test_the_target_is_reached_or_not():
    accuracy = np.array([[50, 91, 92], [50, 60, 95], [10, 20, 30]])
    curves = np.stack([accuracy, accuracy], -1)
    tested = analysis.tested(curves, np.array([4, 8, 12]), 90)
    assert (tested["reached"], tested["n"]) == (2, 3)
    assert tested["epochs_to_target"] == 10
    never = analysis.tested(curves, np.array([4, 8, 12]), 99)
    assert (never["reached"], never["epochs_to_target"]) == (0, None)


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        ((0.5, 0.2, 0.8), "AdamW does better than Adam"),
        ((-0.5, -0.8, -0.2), "AdamW does worse than Adam"),
        ((0.1, -0.2, 0.4), "cannot be told apart"),
    ],
)
def test_the_finding_says_what_the_numbers_say(interval, says):
    results = {
        "adamw_minus_adam_l2": dict(
            zip(("mean", "low", "high"), interval, strict=True)
        ),
        "tuning": {"adamw": {"basin": 5}, "adam-l2": {"basin": 7}},
        "test": {"adamw": {"n": 40}},
    }
    sentence = report.finding(results)
    assert says in sentence
    assert f"{interval[0]:+.2f} points" in sentence
    assert f"{interval[1]:+.2f} to {interval[2]:+.2f} over 40" in sentence
    assert "5 against 7 cells" in sentence
    assert sentence.count(". ") == 0
