"""The fast entry: its parts against NumPy and PyTorch, its program against a loop."""

import dataclasses
import functools
import hashlib
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train import cifar10_fast
from train.data import batches
from train.data import cifar10 as data

pytestmark = pytest.mark.usefixtures("lenient")  # Flax and Optax promote dtypes

# Adam with a small eps makes large updates of rounding errors.
TINY = cifar10_fast.Config(
    train_size=100, eval_size=60, width=0.1, epochs=2.4, batch_size=20, unsure=7,
    eps=1e-2, target=20.0, seeds=2,
)  # fmt: skip


def pictures(n, seed=0):
    """Random images of which the brightness gives the class away."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, n, dtype=np.int32)
    x = rng.integers(0, 56, (n, 32, 32, 3)) + 20 * y[:, None, None, None]
    return x.astype(np.uint8), y


@functools.cache
def program(dtype=jnp.float32):
    return jax.jit(functools.partial(cifar10_fast.train, TINY, dtype))


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


def tables(config, seed=0):
    drawn = cifar10_fast.draw(config, jax.random.key(seed))
    return {key: np.asarray(table) for key, table in drawn.items()}


def test_an_epoch_sees_each_image_once_at_most():
    config = dataclasses.replace(TINY, batch_size=30, epochs=3.5)  # 10 are left out
    assert cifar10_fast.steps_of(config) == (3, 11)
    order = tables(config)["order"]
    assert order.shape == (11, 30)
    epochs = [order[i : i + 3].ravel() for i in range(0, 11, 3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(100))
    assert (epochs[0] != epochs[1]).any()
    assert set(epochs[0]) != set(epochs[1])  # others are left out each time
    assert cifar10_fast.steps_of(dataclasses.replace(TINY, epochs=9.9)) == (5, 50)
    assert cifar10_fast.steps_of(dataclasses.replace(TINY, epochs=0.6)) == (5, 3)


def test_an_image_is_mirrored_in_every_second_epoch():
    drawn = tables(dataclasses.replace(TINY, epochs=5))
    flips = np.empty((5, 100), bool)  # by epoch and image
    for epoch in range(5):
        steps = slice(5 * epoch, 5 * epoch + 5)
        flips[epoch, drawn["order"][steps].ravel()] = drawn["flip"][steps].ravel()
    for epoch in range(5):
        np.testing.assert_array_equal(flips[epoch], flips[0] ^ (epoch % 2 == 1))
    assert 30 < flips[0].sum() < 70


def test_shifts_are_uniform():
    drawn = tables(dataclasses.replace(TINY, epochs=50, translate=2))
    counts = np.bincount(drawn["shift"].ravel(), minlength=5) / drawn["shift"].size
    np.testing.assert_allclose(counts, 0.2, atol=0.02)  # of 10,000
    assert not tables(dataclasses.replace(TINY, translate=0))["shift"].any()


def test_views_are_crops_of_mirrored_edges():
    x, _ = pictures(9)
    rng = np.random.default_rng(1)
    order, shift = rng.integers(0, 9, 20), rng.integers(0, 5, (20, 2))
    flip = rng.integers(0, 2, 20).astype(bool)
    padded = cifar10_fast.padded(jnp.asarray(x), 2)
    ours = jax.jit(cifar10_fast.view)(padded, order, shift, flip)
    edges = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    for our, i, (row, column), mirrored in zip(ours, order, shift, flip, strict=True):
        crop = edges[i, row : row + 32, column : column + 32]
        np.testing.assert_array_equal(our, crop[:, ::-1] if mirrored else crop)
    centre = cifar10_fast.view(padded, order, np.full((20, 2), 2), np.zeros(20, bool))
    np.testing.assert_array_equal(centre, x[order])


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


def smooth_images(n):
    """Neighbours and colours are alike, as in photographs."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(n, 33, 33, 3))
    smooth = sum(noise[:, i : i + 32, j : j + 32] for i in (0, 1) for j in (0, 1))
    return (smooth + 2 * smooth.mean(-1, keepdims=True)).astype(np.float32)


def test_patches_are_the_pixels_of_a_square():
    x = smooth_images(3)
    ours = np.asarray(cifar10_fast.patches(x))
    assert ours.shape == (3, 31, 31, 12)
    for row, column in np.ndindex(31, 31):
        square = x[:, row : row + 2, column : column + 2].reshape(3, 12)
        np.testing.assert_array_equal(ours[:, row, column], square)


def test_whitened_patches_are_uncorrelated():
    x = smooth_images(50)
    kernel = np.asarray(jax.jit(cifar10_fast.whitening)(x), np.float64)
    patches = np.asarray(cifar10_fast.patches(x), np.float64).reshape(-1, 12)
    eigenvalues = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert eigenvalues.max() > 20 * eigenvalues.min()  # there was something to do
    white = patches @ kernel[:, :12]
    np.testing.assert_allclose(
        white.T @ white / len(white),
        np.diag(eigenvalues / (eigenvalues + cifar10_fast.WHITENING_EPS)),
        atol=1e-4,
    )
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 8), (8, 8), (8, 5)])
def test_part_of_the_outputs_are_the_inputs(inputs, outputs):
    kernel = cifar10_fast.part_identity(jax.random.key(0), (3, 3, inputs, outputs))
    x = np.random.default_rng(0).normal(size=(2, 6, 6, inputs)).astype(np.float32)
    y = cifar10_fast.conv(x, kernel, (1, 1), "SAME")
    same = min(inputs, outputs)
    np.testing.assert_allclose(y[..., :same], x[..., :same], atol=1e-6)
    drawn = np.asarray(kernel)[..., same:]
    bound = 1 / np.sqrt(9 * inputs)
    assert (np.abs(drawn) <= bound).all()
    if drawn.size:
        assert np.abs(drawn).max() > 0.9 * bound
        assert np.unique(drawn).size > 0.9 * drawn.size


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_that_of_pytorch(training):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    net = cifar10_fast.Net(0.25, jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for norm in net.norms:
        norm.bias[...] = rng.normal(size=norm.bias.shape)
        norm.mean[...] = rng.normal(size=norm.bias.shape)
        norm.var[...] = rng.uniform(0.5, 2, norm.bias.shape)
    net.whitening_bias[...] = rng.normal(size=24)
    x = smooth_images(6)
    kernel = np.asarray(cifar10_fast.whitening(x))

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def gelu(x):
        return functional.gelu(x, approximate="tanh")

    # (in, out) of a 2 x 2 convolution, whose rows and columns come before the colours
    whiten = tensor(kernel.reshape(2, 2, 3, 24).transpose(3, 2, 0, 1))
    bias = tensor(net.whitening_bias[...])
    y = gelu(functional.conv2d(tensor(x.transpose(0, 3, 1, 2)), whiten, bias))
    means = []
    for i, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
        weight = tensor(np.transpose(conv.kernel[...], (3, 2, 0, 1)))
        y = functional.conv2d(y, weight, padding=1)
        y = functional.max_pool2d(y, 2) if i % 2 == 0 else y
        mean, var = tensor(norm.mean[...]), tensor(norm.var[...])
        y = functional.batch_norm(
            y, mean, var, None, tensor(norm.bias[...]), training, 0.4, 1e-5
        )
        means.append(mean)
        y = gelu(y)
    assert y.shape[2:] == (3, 3)
    head = tensor(net.head.kernel[...])
    expected = functional.max_pool2d(y, 3)[:, :, 0, 0] @ head / 3

    view = nnx.view(net, use_running_average=not training)
    ours, net = nnx.jit(lambda net, x: (net(x, kernel), net))(view, x)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    for norm, mean in zip(net.norms, means, strict=True):
        np.testing.assert_allclose(norm.mean[...], mean, atol=1e-5)


def test_the_full_size():
    net = nnx.eval_shape(lambda: cifar10_fast.Net(1.0, jnp.bfloat16, rngs=nnx.Rngs(0)))
    kernels = [conv.kernel.shape[2:] for conv in net.convs]
    assert kernels == [
        (24, 64),
        (64, 64),
        (64, 256),
        (256, 256),
        (256, 256),
        (256, 256),
    ]
    params = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.float32)}
    assert (
        sum(leaf.size for leaf in params) == 9 * 218_624 + 2560 + 24 + 2 * 64 + 4 * 256
    )


# ---------------------------------------------------------------------------
# optimizer and program
# ---------------------------------------------------------------------------


def test_the_cycle():
    config = dataclasses.replace(
        TINY, epochs=20, learning_rate=0.02, warm_up=0.3, b1=(0.9, 0.8)
    )
    cycle, k = cifar10_fast.cycle_of(config), np.arange(100)
    assert cycle.total_steps == 100
    for name, values in (
        ("learning_rate", [0.002, 0.02, 0.0002]),
        ("b1", [0.9, 0.8, 0.9]),
    ):
        expected = np.interp(k, [0, 30, 100], values)
        np.testing.assert_allclose(cycle.schedule(name)(k), expected, rtol=1e-12)


def test_only_kernels_decay():
    """Without a gradient a step is the decay alone."""
    net = nnx.eval_shape(lambda: cifar10_fast.Net(0.1, jnp.float32, rngs=nnx.Rngs(0)))
    params = jax.tree.map(
        lambda p: np.full(p.shape, 2, np.float32), nnx.state(net, nnx.Param)
    )
    tx = cifar10_fast.optimizer(TINY)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: tx.update(zeros, tx.init(params), params))()
    first = TINY.learning_rate / 10
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_kernel = "kernel" in jax.tree_util.keystr(path)
        expected = -first * TINY.weight_decay * 2 * is_kernel
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_a_run_is_a_loop_over_steps():
    """The same steps with NumPy's views, and a plain loss."""
    x, y = pictures(100)
    trained, losses = program()(np.uint32(3), x, y)

    net_key, draw_key = jax.random.split(jax.random.key(3))
    net = cifar10_fast.Net(TINY.width, jnp.float32, rngs=nnx.Rngs(net_key))
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    kernel = trained.kernel
    drawn = jax.tree.map(np.asarray, cifar10_fast.draw(TINY, draw_key))
    edges = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    tx = cifar10_fast.optimizer(TINY)
    opt, update = tx.init(params), jax.jit(tx.update)

    @jax.jit
    def gradient(params, stats, x, labels):
        def loss_of(params):
            net = nnx.merge(graphdef, params, stats, copy=True)
            logs = jax.nn.log_softmax(net(x, kernel))
            right = logs[jnp.arange(len(labels)), labels]
            s = TINY.label_smoothing
            loss = -jnp.mean((1 - s) * right + s * logs.mean(-1))
            return loss, nnx.state(net, nnx.BatchStat)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    expected = []
    for order, shift, flip in zip(
        drawn["order"], drawn["shift"], drawn["flip"], strict=True
    ):
        views = np.stack(
            [
                edges[i, row : row + 32, column : column + 32][:, :: -1 if f else 1]
                for i, (row, column), f in zip(order, shift, flip, strict=True)
            ]
        )
        (loss, stats), grads = gradient(
            params, stats, batches.normalise(views), y[order]
        )
        updates, opt = update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        expected.append(loss)
    assert len(expected) == 12
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1  # it learns
    for ours, theirs in zip(
        jax.tree.leaves(trained[:2]), jax.tree.leaves((params, stats)), strict=True
    ):
        # a hundredth of what the largest step moved them by
        np.testing.assert_allclose(ours, theirs, atol=TINY.learning_rate / 100)


def test_a_seed_decides_everything():
    x, y = pictures(100)
    one, again, other = (program()(np.uint32(seed), x, y) for seed in (0, 0, 1))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one[1] != other[1]).all()
    np.testing.assert_array_equal(one[0].kernel, other[0].kernel)


def test_half_precision_trains_the_same_network():
    x, y = pictures(100)
    half, losses = program(jnp.bfloat16)(np.uint32(0), x, y)
    full, expected = program()(np.uint32(0), x, y)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(losses, expected, atol=0.05)
    assert (losses != expected).any()


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


def linear_logits(images):
    """Of any images, without a network."""
    weights = np.random.default_rng(5).normal(size=(3072, 10)).astype(np.float32)
    return jnp.reshape(images, (len(images), -1)).astype(np.float32) @ weights / 1e4


def test_the_unsure_images_get_all_views():
    x, _ = pictures(40)
    plain, both, final = map(
        np.asarray, cifar10_fast.votes(linear_logits, jnp.asarray(x), 6)
    )

    edges = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    whole = 0
    for share, view in (
        (1 / 4, x),
        (1 / 8, edges[:, :32, :32]),
        (1 / 8, edges[:, 2:, 2:]),
    ):
        for images in (view, view[:, :, ::-1]):
            whole = whole + share * np.asarray(linear_logits(images))
    np.testing.assert_allclose(plain, linear_logits(x), atol=1e-5)
    mirrored = np.asarray(linear_logits(x[:, :, ::-1]))
    np.testing.assert_allclose(both, (plain + mirrored) / 2, atol=1e-5)

    odds = np.exp(both) / np.exp(both).sum(-1, keepdims=True)
    odds = np.sort(odds, -1)
    chosen = np.argsort(odds[:, -1] - odds[:, -2])[:6]
    sure = np.setdiff1d(np.arange(40), chosen)
    np.testing.assert_allclose(final[chosen], whole[chosen], atol=1e-5)
    np.testing.assert_array_equal(final[sure], both[sure])
    assert (np.abs(whole[sure] - both[sure]).max(-1) > 1e-3).all()

    everything = cifar10_fast.votes(linear_logits, jnp.asarray(x), 40)[2]
    np.testing.assert_allclose(everything, whole, atol=1e-5)


def test_accuracies_are_those_of_the_network():
    (x, y), (test_x, test_y) = pictures(100), pictures(60, seed=1)
    trained, _ = program()(np.uint32(0), x, y)
    evaluate = jax.jit(functools.partial(cifar10_fast.evaluate, TINY, jnp.float32))
    plain, both, _ = evaluate(trained, test_x, test_y)

    net = cifar10_fast.Net(TINY.width, jnp.float32, rngs=nnx.Rngs(9))
    nnx.update(net, trained.params, trained.stats)
    net = nnx.view(net, use_running_average=True)
    logits = [
        net(batches.normalise(images), trained.kernel)
        for images in (test_x, test_x[:, :, ::-1])
    ]
    for ours, vote in ((plain, logits[0]), (both, logits[0] + logits[1])):
        accuracy = 100 * np.mean(np.asarray(vote).argmax(-1) == test_y)
        assert float(ours) == pytest.approx(
            accuracy, abs=1.7
        )  # of 60: one may be a tie
        assert accuracy > 15  # the images are not all of one class to it


# ---------------------------------------------------------------------------
# the whole job
# ---------------------------------------------------------------------------


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """Such pictures in the official format, sixty a batch."""
    folder, checksums = tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        x, y = pictures(60, seed)
        pixels = x.transpose(0, 3, 1, 2).reshape(60, 3072)
        raw = pickle.dumps({b"data": pixels, b"labels": y.tolist()}, protocol=2)
        (folder / name).write_bytes(raw)
        checksums[name] = hashlib.md5(raw).hexdigest()
    for name in list(data.CIFAR10_MD5):
        monkeypatch.delitem(data.CIFAR10_MD5, name)
    for name, md5 in checksums.items():
        monkeypatch.setitem(data.CIFAR10_MD5, name, md5)
    return tmp_path


def test_the_whole_job_and_one_that_is_killed(tmp_path, cifar_dir, capsys, monkeypatch):
    config = dataclasses.replace(
        TINY, data_dir=cifar_dir, out=tmp_path / "runs", name="a", seeds=3, first_seed=5
    )
    folder = cifar10_fast.main(config)
    printed = capsys.readouterr().out
    files = {"config.json", "curves.png", "metrics.jsonl", "results.json"}
    assert {path.name for path in folder.iterdir()} == files

    settings = json.loads((folder / "config.json").read_text())
    assert settings["batch_size"] == 20
    assert settings["versions"]["jax"] == jax.__version__

    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    runs = [json.loads(line) for line in lines]
    assert [run["seed"] for run in runs] == [5, 6, 7]
    for run in runs:
        both = run["train_seconds"] + run["evaluate_seconds"]
        assert run["seconds"] == pytest.approx(both)
        assert f"seed {run['seed']}: {run['accuracy']:.2f} %" in printed

    results = json.loads((folder / "results.json").read_text())
    accuracies = [run["accuracy"] for run in runs]
    assert results["accuracy"] == {
        "n": 3,
        "mean": pytest.approx(np.mean(accuracies)),
        "std": pytest.approx(np.std(accuracies, ddof=1)),
        "standard_error": pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(3)),
    }
    reached = np.mean([accuracy >= 20 for accuracy in accuracies])
    assert results["share_at_target"] == pytest.approx(reached)
    assert results["cold_seconds"] > results["compile_seconds"] > 0
    assert f"accuracy: {np.mean(accuracies):.3f} % (n = 3, std" in printed
    assert "\ntrain_seconds: " in printed

    # a finished run stays as it is
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for changes, message in (
        ({}, "name: .* has all of these seeds"),
        ({"b2": 0.9}, "name: .* b2 = 0.99, now 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            cifar10_fast.main(dataclasses.replace(config, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(
            cifar10_fast.record, "environment", lambda: {"devices": "2 x tpu"}
        )
        with pytest.raises(ValueError, match="has times of 2 x cpu, this is 2 x tpu"):
            cifar10_fast.main(dataclasses.replace(config, seeds=4))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    # killed while it wrote the second seed
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
    cifar10_fast.main(config)
    again = (folder / "metrics.jsonl").read_text().splitlines(True)
    assert again[0] == lines[0]  # with its times: it was not repeated
    results_again = json.loads((folder / "results.json").read_text())
    for key in ("accuracy", "loss"):
        assert [json.loads(line)[key] for line in again] == [run[key] for run in runs]
        assert results_again[key] == results[key]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("train_size", 0, "at least 1"),
        ("train_size", 301, r"in \[1, 300\]"),
        ("eval_size", 0, "at least 1"),
        ("eval_size", 61, r"in \[1, 60\]"),
        ("width", 0.01, "at least 0.1"),
        ("width", float("nan"), "at least 0.1"),
        ("epochs", 0.0, "above 0"),
        ("epochs", float("inf"), "above 0"),
        ("batch_size", 0, r"in \[1, 100\]"),
        ("batch_size", 101, r"in \[1, 100\]"),
        ("learning_rate", -1.0, "above 0"),
        ("weight_decay", -1.0, ">= 0"),
        ("b2", 1.0, r"in \[0, 1"),
        ("warm_up", 0.0, r"in \(0, 1\)"),
        ("warm_up", 1.0, r"in \(0, 1\)"),
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("translate", -1, r"in \[0, 31\]"),
        ("translate", 32, r"in \[0, 31\]"),
        ("unsure", 0, r"in \[1, 60\]"),
        ("unsure", 61, r"in \[1, 60\]"),
        ("target", 100.0, r"in \(0, 100\)"),
        ("seeds", 1, "at least 2"),
        ("first_seed", -1, "in "),
    ],
)
def test_bad_settings(tmp_path, cifar_dir, option, value, allowed):
    config = dataclasses.replace(
        TINY, data_dir=cifar_dir, out=tmp_path / "runs", **{option: value}
    )
    with pytest.raises(ValueError, match=f"{option}.*{allowed}.* got .?{value}"):
        cifar10_fast.main(config)
    assert not (tmp_path / "runs").exists()


def test_the_command_and_what_it_does_not_need():
    code = (
        "import sys\n"
        "for name in ('tyro', 'torch', 'sklearn', 'tensorflow_datasets'):"
        "    sys.modules[name] = None\n"
        "import train.cifar10_fast"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "train.cifar10_fast", "--b1", "0.9", "0.8"]
    done = subprocess.run(
        [*command, "--epochs", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ValueError: epochs must be above 0, got 0" in done.stderr
