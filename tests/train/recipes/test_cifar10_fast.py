"""The fast recipe: its parts against NumPy and PyTorch, its program against a loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import matrix
from tiny_cifar10_fast import TINY, pictures

from train.data import batches
from train.recipes import cifar10_fast

pytestmark = pytest.mark.usefixtures("lenient", "cache")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def program(dtype=jnp.float32):
    return jax.jit(functools.partial(cifar10_fast.train, TINY, dtype))


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


def tables(config, seed=0):
    drawn = cifar10_fast.draw_tables(config, jax.random.key(seed))
    return {key: np.asarray(table) for key, table in drawn.items()}


def test_an_epoch_sees_each_image_once_at_most():
    config = dataclasses.replace(TINY, batch_size=30, epochs=3.5)  # 10 are left out
    assert cifar10_fast.count_steps(config) == (3, 11)
    order = tables(config)["order"]
    assert order.shape == (11, 30)
    epochs = [order[i : i + 3].ravel() for i in range(0, 11, 3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(100))
    assert (epochs[0] != epochs[1]).any()
    assert set(epochs[0]) != set(epochs[1])  # others are left out each time
    assert cifar10_fast.count_steps(dataclasses.replace(TINY, epochs=9.9)) == (5, 50)
    assert cifar10_fast.count_steps(dataclasses.replace(TINY, epochs=0.6)) == (5, 3)


def test_an_image_is_mirrored_in_every_second_epoch():
    drawn = tables(dataclasses.replace(TINY, epochs=5))
    flips = np.empty((5, 100), bool)  # by epoch and image
    for epoch in range(5):
        steps = slice(5 * epoch, 5 * epoch + 5)
        flips[epoch, drawn["order"][steps].ravel()] = drawn["flip"][steps].ravel()
    for epoch in range(5):
        np.testing.assert_array_equal(flips[epoch], flips[0] ^ (epoch % 2 == 1))
    assert 30 < flips[0].sum() < 70


@pytest.mark.slow
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


@pytest.mark.parametrize("training", matrix([True, False], quick=[False]))
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


def test_the_schedule():
    config = dataclasses.replace(
        TINY, epochs=20, learning_rate=0.02, warm_up=0.3, b1=(0.9, 0.8)
    )
    schedule, k = cifar10_fast.make_schedule(config), np.arange(100)
    assert schedule.total_steps == 100
    for name, values in (
        ("learning_rate", [0.002, 0.02, 0.0002]),
        ("b1", [0.9, 0.8, 0.9]),
    ):
        expected = np.interp(k, [0, 30, 100], values)
        np.testing.assert_allclose(schedule.schedule(name)(k), expected, rtol=1e-12)


def test_only_kernels_decay():
    """Without a gradient a step is the decay alone."""
    net = nnx.eval_shape(lambda: cifar10_fast.Net(0.1, jnp.float32, rngs=nnx.Rngs(0)))
    params = jax.tree.map(
        lambda p: np.full(p.shape, 2, np.float32), nnx.state(net, nnx.Param)
    )
    tx = cifar10_fast.make_optimizer(TINY)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: tx.update(zeros, tx.init(params), params))()
    first = TINY.learning_rate / 10
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_kernel = "kernel" in jax.tree_util.keystr(path)
        expected = -first * TINY.weight_decay * 2 * is_kernel
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_run_is_a_loop_over_steps():
    """The same steps with NumPy's views, and a plain loss."""
    x, y = pictures(100)
    trained, losses = program()(np.uint32(3), x, y)

    net_key, draw_key = jax.random.split(jax.random.key(3))
    net = cifar10_fast.Net(TINY.width, jnp.float32, rngs=nnx.Rngs(net_key))
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    kernel = trained.kernel
    drawn = jax.tree.map(np.asarray, cifar10_fast.draw_tables(TINY, draw_key))
    edges = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    tx = cifar10_fast.make_optimizer(TINY)
    opt, update = tx.init(params), jax.jit(tx.update)

    @jax.jit
    def gradient(params, stats, x, labels):
        def loss_fn(params):
            net = nnx.merge(graphdef, params, stats, copy=True)
            logs = jax.nn.log_softmax(net(x, kernel))
            right = logs[jnp.arange(len(labels)), labels]
            s = TINY.label_smoothing
            loss = -jnp.mean((1 - s) * right + s * logs.mean(-1))
            return loss, nnx.state(net, nnx.BatchStat)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_unsure_images_get_all_views():
    x, _ = pictures(40)
    plain, both, final = map(
        np.asarray, cifar10_fast.votes(linear_logits, jnp.asarray(x), 6)
    )

    edges = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    all_views = 0
    for share, view in (
        (1 / 4, x),
        (1 / 8, edges[:, :32, :32]),
        (1 / 8, edges[:, 2:, 2:]),
    ):
        for images in (view, view[:, :, ::-1]):
            all_views = all_views + share * np.asarray(linear_logits(images))
    np.testing.assert_allclose(plain, linear_logits(x), atol=1e-5)
    mirrored = np.asarray(linear_logits(x[:, :, ::-1]))
    np.testing.assert_allclose(both, (plain + mirrored) / 2, atol=1e-5)

    odds = np.exp(both) / np.exp(both).sum(-1, keepdims=True)
    odds = np.sort(odds, -1)
    chosen = np.argsort(odds[:, -1] - odds[:, -2])[:6]
    sure = np.setdiff1d(np.arange(40), chosen)
    np.testing.assert_allclose(final[chosen], all_views[chosen], atol=1e-5)
    np.testing.assert_array_equal(final[sure], both[sure])
    assert (np.abs(all_views[sure] - both[sure]).max(-1) > 1e-3).all()

    everything = cifar10_fast.votes(linear_logits, jnp.asarray(x), 40)[2]
    np.testing.assert_allclose(everything, all_views, atol=1e-5)


@pytest.mark.slow
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
