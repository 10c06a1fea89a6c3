"""The compiled runs of the comparison against Python loops over their steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison_runs import TINY, TINY_CIFAR, build, build_once, train_two
from flax import nnx
from tiers import matrix

from train.data import batches, cifar10, digits
from train.recipes import compare as recipe

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")


@pytest.fixture
def two_optimizers(monkeypatch):
    """Compiles two branches of the program instead of five."""
    two = {name: recipe.OPTIMIZERS[name] for name in ("adam-l2", "adamw")}
    monkeypatch.setattr(recipe, "OPTIMIZERS", two)


@pytest.fixture
def adamw_only(monkeypatch):
    """Compiles one branch of the program instead of five."""
    one = {"adamw": recipe.OPTIMIZERS["adamw"]}
    monkeypatch.setattr(recipe, "OPTIMIZERS", one)


@pytest.mark.parametrize("name", matrix(list(recipe.OPTIMIZERS), quick=["adamw"]))
def test_a_run_is_a_loop_over_steps(name):
    splits, lr, decay = digits.load_digits(40, 50), 0.05, 0.02
    run, results = train_two(
        build_once(TINY), TINY, name, splits, [lr, 0.1], [decay, 0.0]
    )

    def forward(params, x):
        hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        return jax.nn.relu(hidden) @ params["head"]["kernel"] + params["head"]["bias"]

    @jax.jit
    def loss_and_grads(params, x, y):
        def loss_fn(params):
            logits = forward(params, x)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

        return jax.value_and_grad(loss_fn)(params)

    cycle = recipe.make_schedule(TINY)
    tx = recipe.OPTIMIZERS[name](
        lambda step: lr * cycle.schedule("learning_rate")(step),
        cycle.schedule("b1"),
        decay,
    )
    params = nnx.to_pure_dict(run["params"])
    state, update, losses, expected = tx.init(params), jax.jit(tx.update), [], []
    for k, index in enumerate(run["order"]):
        x, y = splits.train.x[index] / np.float32(16), run["labels"][index]
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


@pytest.mark.slow
def test_vectorized_runs_equal_sequential_ones(adamw_only):
    splits = digits.load_digits(40, 50)
    one, other = (
        train_two(build(TINY, mode), TINY, "adamw", splits, [0.1, 0.02], [0.1, 0.0])[1]
        for mode in (False, True)
    )
    np.testing.assert_allclose(one[..., 1], other[..., 1], rtol=1e-5)
    np.testing.assert_allclose(one[..., 0], other[..., 0], atol=2.1)  # of 50 images


@pytest.mark.slow
def test_a_run_with_crops_and_batch_norm_is_a_loop(cifar_dir, two_optimizers):
    splits = cifar10.load_cifar10(cifar_dir, 40, 50)
    run, results = train_two(
        build(TINY_CIFAR), TINY_CIFAR, "adamw", splits, [0.02, 0.01], [0.1, 0.1]
    )
    cycle = recipe.make_schedule(TINY_CIFAR)
    tx = recipe.OPTIMIZERS["adamw"](
        lambda step: 0.02 * cycle.schedule("learning_rate")(step),
        cycle.schedule("b1"),
        0.1,
    )
    net = recipe.make_network(TINY_CIFAR, 1)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    padded, expected, losses = batches.padded(splits.train.x), [], []

    @nnx.jit
    def train_step(net, optimizer, x, y):
        def loss_fn(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(net)
        optimizer.update(net, grads)
        return loss

    @nnx.jit
    def predict(net, x):
        return nnx.view(net, use_running_average=True)(x).argmax(-1)

    for k, (index, crops) in enumerate(zip(run["order"], run["crops"], strict=True)):
        x = np.stack(
            [
                image[row : row + 32, column : column + 32][:, :: -1 if flip else 1]
                for image, (row, column, flip) in zip(padded[index], crops, strict=True)
            ]
        )
        x, y = batches.normalise(x), run["labels"][index]
        losses.append(train_step(net, optimizer, x, y))
        if (k + 1) % 4 == 0:
            guess = predict(net, batches.normalise(splits.test.x))
            accuracy = 100 * np.mean(guess == splits.test.y)
            expected.append([accuracy, np.mean(losses[-4:])])
    np.testing.assert_allclose(results[0, :, 1], np.array(expected)[:, 1], rtol=1e-4)
    np.testing.assert_allclose(results[0, :, 0], np.array(expected)[:, 0], atol=2.1)
