"""The Flax network equals a PyTorch one of the same construction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import adamw_jax as aj
from train.data import batches
from train.models.wide_resnet import WideResNet
from train.references.wide_resnet import WideResNet as TorchWideResNet
from train.references.wide_resnet import crop_and_flip

pytestmark = pytest.mark.usefixtures("lenient", "x64", "cache")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


BLOCKS, WIDTH, STEPS = 2, 4, 20


NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
NAMES |= {"mean": "running_mean", "var": "running_var"}


def to_torch(state):
    """Flax leaves under the names and in the layouts of the PyTorch network."""
    leaves = {}
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf[...])
        if path[-1] == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        name = ".".join(map(str, (*path[:-1], NAMES[path[-1]])))
        leaves[name] = torch.tensor(value)
    return leaves


def both(dtype):
    """The same network twice, the weights' and activations' dtype given by name."""
    ours = WideResNet(BLOCKS, WIDTH, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(ours)
    ours = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))
    theirs = TorchWideResNet(BLOCKS, WIDTH).to(getattr(torch, dtype))
    missing, extra = theirs.load_state_dict(
        to_torch(nnx.state(ours, (nnx.Param, nnx.BatchStat))), strict=False
    )
    assert not extra and all(name.endswith("num_batches_tracked") for name in missing)
    return ours, theirs


@pytest.fixture
def nets():
    return both("float64")


rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(STEPS, 8, 16, 16, 3))
LABELS = rng.integers(0, 10, (STEPS, 8))


def nchw(x):
    return torch.tensor(x.transpose(0, 3, 1, 2))


def close(ours, theirs, tolerance=1e-9):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_parameters_of_wrn22():
    net = nnx.eval_shape(lambda: WideResNet(rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert sum(p.size for p in params) == 9_658_458


@pytest.mark.slow
def test_initial_values():
    """U(0, 1) for the scale of each block's first norm and of the last, else 1."""
    net = WideResNet(2, 32, rngs=nnx.Rngs(0))
    for i, block in enumerate(net.blocks):
        scale = np.asarray(block.norm1.scale[...])
        assert 0 <= scale.min() < 0.2 and 0.8 < scale.max() <= 1
        assert (block.norm2.scale[...] == 1).all()
        assert (block.norm1.bias[...] == 0).all()
        fan_in = 9 * (32 * 2 ** ((i - 1) // 2) if i else 16)
        bound = 1 / np.sqrt(fan_in)
        weights = np.abs(block.conv1.kernel[...])
        assert 0.98 * bound < weights.max() <= bound
    assert net.norm.scale[...].std() > 0.2
    assert np.abs(net.head.bias[...]).max() <= 1 / np.sqrt(128)


def test_eval_mode(nets):
    ours, theirs = nets
    for block in theirs.blocks:  # running statistics that are not 0 and 1
        torch.nn.init.uniform_(block.norm1.running_mean)
        torch.nn.init.uniform_(block.norm1.running_var, 0.5, 2)
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        block.norm1.mean[...] = jnp.asarray(other.norm1.running_mean.numpy())
        block.norm1.var[...] = jnp.asarray(other.norm1.running_var.numpy())
    ours.eval(), theirs.eval()
    close(ours(IMAGES[0]), theirs(nchw(IMAGES[0])).detach())


@pytest.mark.slow
def test_single_precision():
    """Logits and gradients in float32, in the units of the largest one."""
    ours, theirs = both("float32")
    graph, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)
    x = IMAGES[0].astype(np.float32)

    @jax.jit
    def loss_fn(params):
        logits = nnx.merge(graph, params, stats, copy=True)(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[0])
        return loss.mean(), logits

    grads, logits = jax.grad(loss_fn, has_aux=True)(params)
    their_logits = theirs(nchw(x))
    torch.nn.functional.cross_entropy(their_logits, torch.tensor(LABELS[0])).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = [(torch.tensor(np.asarray(logits)), their_logits.detach())]
    pairs += [(grad, expected[name]) for name, grad in to_torch(grads).items()]
    for one, other in pairs:
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 5e-5 * other.abs().max()


def test_train_mode_and_gradients(nets):
    ours, theirs = nets
    graph, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)

    @jax.jit
    def loss_fn(params):
        net = nnx.merge(graph, params, stats, copy=True)
        logits = net(IMAGES[0])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[0])
        return loss.mean(), (logits, nnx.state(net, nnx.BatchStat))

    grads, (logits, stats) = jax.grad(loss_fn, has_aux=True)(params)
    their_logits = theirs(nchw(IMAGES[0]))
    torch.nn.functional.cross_entropy(their_logits, torch.tensor(LABELS[0])).backward()
    close(logits, their_logits.detach())
    expected = dict(theirs.named_parameters())
    for name, grad in to_torch(grads).items():
        close(grad, expected[name].grad)
    # PyTorch keeps the unbiased variance: n / (n - 1) of Flax's, n = images x pixels.
    buffers = dict(theirs.named_buffers())
    # The image's side at each norm; the second of a block follows its stride.
    sides = {"blocks.0": (16, 16), "blocks.1": (16, 16), "blocks.2": (16, 8)}
    sides |= {"blocks.3": (8, 8), "blocks.4": (8, 4), "blocks.5": (4, 4)}
    for name, value in to_torch(stats).items():
        theirs_now = buffers[name]
        if name.endswith("running_var"):
            block, _, norm = name.removesuffix(".running_var").rpartition(".")
            side = sides[block][norm == "norm2"] if block else 4
            n = 8 * side**2
            theirs_now = 0.9 + (theirs_now - 0.9) * (n - 1) / n
        close(value, theirs_now)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)],
)
def test_twenty_steps_of_adamw_and_one_cycle(dtype, tolerance):
    ours, theirs = both(dtype)
    images = IMAGES.astype(dtype)
    graph, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)
    phases = aj.one_cycle_torch(3e-3, STEPS)
    tx = aj.adamw(phases, b2=0.99, weight_decay=0.1, bias_correction="torch")

    @jax.jit
    def train(params, stats):
        def step(carry, batch):
            params, stats, opt = carry

            def loss_fn(params):
                net = nnx.merge(graph, params, stats, copy=True)
                loss = optax.softmax_cross_entropy_with_integer_labels(
                    net(batch[0]), batch[1]
                )
                return loss.mean(), nnx.state(net, nnx.BatchStat)

            grads, stats = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), stats, opt), None

        carry = params, stats, tx.init(params)
        return jax.lax.scan(step, carry, (images, LABELS))[0][0]

    opt = torch.optim.AdamW(
        theirs.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=STEPS)
    for i in range(STEPS):
        opt.zero_grad()
        logits = theirs(nchw(images[i]))
        torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS[i])).backward()
        opt.step()
        if i < STEPS - 1:
            scheduler.step()
    expected = dict(theirs.named_parameters())
    for name, value in to_torch(train(params, stats)).items():
        assert value.dtype == getattr(torch, dtype)
        close(value, expected[name].detach(), tolerance)


def test_crops_and_flips_in_pytorch():
    """So that both are timed with the same images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 40, 40, 3), np.uint8)
    crops = batches.crops_and_flips(rng, (20,))
    with jax.enable_x64(False):
        ours = jax.vmap(batches.crop_and_flip)(jnp.array(x), jnp.array(crops))
    order = rng.permutation(20)
    theirs = crop_and_flip(
        torch.tensor(x), torch.tensor(order), torch.tensor(crops[order])
    )
    np.testing.assert_array_equal(ours[order], theirs)
