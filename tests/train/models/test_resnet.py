"""The Flax networks equal PyTorch ones of the same construction."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import matrix

from train.models import pretrained, resnet
from train.models.resnet import BasicBlock, Bottleneck, Head, ResNet, max_pool
from train.references import resnet as torch_resnet
from train.references.resnet import BasicBlock as TorchBasicBlock
from train.references.resnet import Bottleneck as TorchBottleneck
from train.references.resnet import ResNet as TorchResNet

# x64 also in single precision, so that dropout draws the same masks
pytestmark = pytest.mark.usefixtures("lenient", "x64")

CLASSES = 7
BLOCKS = TorchBasicBlock, TorchBottleneck


class Case(NamedTuple):
    architecture: str
    width: int
    pixels: int
    images: int
    blocks: tuple[int, ...] | None = None  # at each resolution; None: all of them


RESNET50 = Case("resnet50", 64, 64, 16)
RESNET18 = Case("resnet18", 8, 72, 24)
SHALLOW50 = Case("resnet50", 4, 64, 8, (1, 2, 1, 1))
SHALLOW18 = Case("resnet18", 4, 40, 16, (1, 1, 1, 1))


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def name(case):
    return f"{'shallow-' if case.blocks else ''}{case.architecture}"


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def networks(architecture, width, *, dtype=jnp.float32):
    """The graphdefs of body and head, and the shapes of params and stats."""

    def modules():
        body = ResNet(architecture, width, dtype=dtype, rngs=nnx.Rngs(0))
        return {"body": body, "head": Head(body.features, CLASSES, rngs=nnx.Rngs(1))}

    params, stats, graphs = {}, {}, {}
    for name, module in nnx.eval_shape(modules).items():
        graphs[name], params[name], stats[name] = nnx.split(
            module, nnx.Param, nnx.BatchStat
        )
    return graphs, params, stats


def torch_network(architecture, width, dtype):
    """Scales, shifts and statistics are random instead of 1 and 0.

    The last scale of each branch is small, as after training; otherwise rounding errors
    grow from block to block.
    """
    torch.manual_seed(0)
    net = TorchResNet(architecture, width, CLASSES)
    for module in net.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    for module in net.modules():
        if isinstance(module, BLOCKS):
            last = module.bn3 if hasattr(module, "bn3") else module.bn2
            torch.nn.init.uniform_(last.weight, 0.1, 0.3)
    return net.to(dtype)


class Masked(torch.nn.Module):
    """Dropout with a fixed mask."""

    def __init__(self, mask, rate):
        super().__init__()
        self.mask, self.rate = torch.tensor(np.asarray(mask)), rate

    def forward(self, x):
        return torch.where(self.mask, x / (1 - self.rate), 0) if self.training else x


def in_torch(state):
    """Leaves under PyTorch's names, in its layout."""
    tensors = pretrained.to_tensors({"all": state}, {}, 0)
    return {n: x for n, x in tensors.items() if not n.endswith("num_batches_tracked")}


@functools.cache
def compute_both(case, dtype, *, frozen=False):
    """Returns our and PyTorch's outputs, gradients and statistics on the same images.

    frozen: the body in evaluation mode, and gradients of the head alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        if case.blocks:
            for layers in (resnet.LAYERS, torch_resnet.LAYERS):
                block, _ = layers[case.architecture]
                patch.setitem(layers, case.architecture, (block, case.blocks))
        return _compute_both(case, dtype, frozen)


def _compute_both(case, dtype, frozen):
    architecture, width, pixels, images, _ = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, pixels, pixels, 3)).astype(dtype)
    labels = rng.integers(0, CLASSES, images)
    theirs = torch_network(architecture, width, getattr(torch, dtype))
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    # copies: the buffers change in place
    tensors = {name: x.copy() for name, x in tensors.items()}

    graphs, *shapes = networks(architecture, width, dtype=jnp.dtype(dtype))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    params, stats = pretrained.load(tensors, *shapes, source="PyTorch", head=True)
    key = jax.random.key(0)

    def loss_fn(params, stats, x, train):
        body, head = (
            nnx.merge(graphs[k], params[k], stats[k], copy=True) for k in graphs
        )
        maps = body(x, train=train and not frozen)
        maps = jax.lax.stop_gradient(maps) if frozen else maps
        logits = head(maps, train=train, key=key if train else None)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        stats = {"body": nnx.state(body, nnx.BatchStat)}
        stats |= {"head": nnx.state(head, nnx.BatchStat)}
        return loss, (maps, logits, stats)

    evaluate = jax.jit(functools.partial(loss_fn, train=False))
    train = jax.jit(jax.grad(functools.partial(loss_fn, train=True), has_aux=True))
    _, (maps, logits, unchanged) = evaluate(params, stats, x)
    grads, (_, train_logits, new_stats) = train(params, stats, x)
    ours = {"maps": maps, "logits": logits, "train_logits": train_logits}
    ours = {name: np.asarray(x) for name, x in ours.items()}
    ours |= {"unchanged": in_torch(unchanged["body"]) | in_torch(unchanged["head"])}
    ours |= {"grads": in_torch(grads["body"]) | in_torch(grads["head"])}
    ours |= {"stats": in_torch(new_stats["body"]) | in_torch(new_stats["head"])}

    keys, features = jax.random.split(key), maps.shape[-1]
    for i, channels, rate, k in ((1, 2 * features, 0.25, 0), (5, 512, 0.5, 1)):
        mask = jax.random.bernoulli(keys[k], 1 - rate, (images, channels))
        theirs.fc[i] = Masked(mask, rate)
    x = torch.tensor(x.transpose(0, 3, 1, 2))
    theirs.eval()
    with torch.no_grad():
        expected = {"maps": theirs.maps(x).permute(0, 2, 3, 1).numpy()}
        expected["logits"] = theirs(x).numpy()
    (theirs.fc if frozen else theirs).train()
    counts = {}  # values of a channel that each batch norm sees
    for name, module in theirs.named_modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.register_forward_pre_hook(
                lambda _, args, name=name: counts.update(
                    {name: args[0].numel() // args[0].shape[1]}
                )
            )
    logits = theirs(x)
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    expected["train_logits"] = logits.detach().numpy()
    expected["grads"] = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    expected["unchanged"] = {n: x for n, x in tensors.items() if "running" in n}
    expected["stats"] = {
        n: x.numpy() for n, x in theirs.named_buffers() if "running" in n
    }
    for name, value in expected["stats"].items():
        module, _, kind = name.rpartition(".")
        if kind == "running_var" and (module.startswith("fc") or not frozen):
            # PyTorch's is n / (n - 1) of the biased one, which is Flax's
            n, old = counts[module], 0.9 * tensors[name]
            expected["stats"][name] = old + (value - old) * (n - 1) / n
    return ours, expected


@pytest.fixture(
    params=[SHALLOW18, *map(slow, (SHALLOW50, RESNET50, RESNET18))], ids=name
)
def double(request):
    return compute_both(request.param, "float64")


def close(ours, expected, tolerance=1e-9):
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def all_close(ours, expected, tolerance=1e-9):
    assert ours.keys() == expected.keys()
    for name in ours:
        close(ours[name], expected[name], tolerance)


# ---------------------------------------------------------------------------
# against PyTorch
# ---------------------------------------------------------------------------


def test_eval_mode(double):
    ours, theirs = double
    assert ours["maps"].shape == theirs["maps"].shape
    assert ours["maps"].shape[1] in (2, 3)
    for name in ("maps", "logits"):
        assert np.abs(theirs[name]).max() > 0.1
        close(ours[name], theirs[name])
    all_close(ours["unchanged"], theirs["unchanged"], 0)


def test_train_mode(double):
    ours, theirs = double
    assert np.abs(ours["train_logits"] - ours["logits"]).max() > 0.1
    close(ours["train_logits"], theirs["train_logits"])


def test_gradients(double):
    ours, theirs = double
    assert all(np.abs(grad).max() > 1e-6 for grad in theirs["grads"].values())
    all_close(ours["grads"], theirs["grads"])


def test_running_statistics(double):
    ours, theirs = double
    all_close(ours["stats"], theirs["stats"])


@pytest.mark.slow
def test_frozen_body():
    """Running statistics are used unchanged; only the head has gradients."""
    ours, theirs = compute_both(SHALLOW18, "float64", frozen=True)
    close(ours["train_logits"], theirs["train_logits"])
    all_close(ours["stats"], theirs["stats"])
    for name, grad in ours["grads"].items():
        if name.startswith("fc."):
            close(grad, theirs["grads"][name])
        else:
            assert not grad.any()
    for name, value in ours["stats"].items():
        same = (value == theirs["unchanged"].get(name)).all()
        assert same == (not name.startswith("fc."))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [SHALLOW18, *map(slow, (SHALLOW50, RESNET50, RESNET18))], ids=name
)
def test_single_precision(case):
    """Within 1e-4 of the largest value of the float64 result.

    Some gradients of ResNet-50 are further off, in PyTorch too, where a ReLU or a
    maximum decides differently. Those must be about as close as PyTorch's.
    """
    ours, theirs = compute_both(case, "float32")
    exact = compute_both(case, "float64")[1]

    def distance(one, other):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(other))
        apart = jax.tree.map(lambda x, y: np.abs(x - y).max() / largest, one, other)
        return max(jax.tree.leaves(apart))

    for name in exact:
        assert {x.dtype for x in jax.tree.leaves(ours[name])} == {np.dtype("float32")}
        limit = 1e-4
        if name == "grads" and case == RESNET50:
            limit = 3 * distance(theirs[name], exact[name])
        assert distance(ours[name], exact[name]) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(7, 8)]
    + [
        pytest.param(shape, marks=pytest.mark.slow)
        for shape in ((8, 8), (5, 9), (1, 2), (1, 1))
    ],
)
def test_max_pool(shape):
    """After a ReLU, so half of the values tie at zero; values and gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 3))
    pooled, vjp = jax.vjp(lambda x: max_pool(nnx.relu(x)), x)
    g = rng.normal(size=pooled.shape)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.max_pool2d(theirs.relu(), 3, 2, 1)
    expected.backward(torch.tensor(g.transpose(0, 3, 1, 2)))
    close(pooled, expected.detach().permute(0, 2, 3, 1))
    close(vjp(g)[0], theirs.grad.permute(0, 2, 3, 1))


# ---------------------------------------------------------------------------
# construction
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "parameters", "features"),
    matrix(
        [  # torchvision's, less the 1000 classes
            ("resnet18", 11_689_512 - 513_000, 512),
            ("resnet34", 21_797_672 - 513_000, 512),
            ("resnet50", 25_557_032 - 2_049_000, 2048),
            ("resnet101", 44_549_160 - 2_049_000, 2048),
        ],
        quick=[("resnet18", 11_689_512 - 513_000, 512)],
    ),
)
def test_parameter_counts(architecture, parameters, features):
    net = nnx.eval_shape(lambda: ResNet(architecture, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert sum(p.size for p in leaves) == parameters
    assert net.features == features
    theirs = TorchResNet(architecture)
    theirs = [p for n, p in theirs.named_parameters() if not n.startswith("fc.")]
    assert sum(p.numel() for p in theirs) == parameters


def test_parameter_counts_of_the_article():
    net = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0)))
    head = nnx.eval_shape(lambda: Head(net.features, 196, rngs=nnx.Rngs(0)))
    sizes = [
        sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
        for module in (net, head)
    ]
    assert sizes == [23_508_032, 2_207_428]


@pytest.mark.slow
def test_initial_values():
    """Normal, not truncated; scaled by fan_out in the body, by fan_in in the head."""
    block = Bottleneck(64, 32, 2, jnp.float32, nnx.Rngs(0))
    head = Head(64, 196, rngs=nnx.Rngs(1))
    for kernel, fan in (
        (block.conv1.kernel, 32),
        (block.conv2.kernel, 3 * 3 * 32),
        (block.downsample[0].kernel, 128),
        (head.fc[2].kernel, 128),
        (head.fc[6].kernel, 512),
    ):
        z = np.asarray(kernel[...]) * np.sqrt(fan / 2)
        assert abs(z.mean()) < 5 / np.sqrt(z.size)
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
        assert np.abs(z).max() > 2.5
    for norm in (block.bn1, block.bn2, block.bn3, block.downsample[1]):
        assert (norm.scale[...] == 1).all() and not norm.bias[...].any()
        assert (norm.var[...] == 1).all() and not norm.mean[...].any()
    for norm, linear in ((head.fc[0], head.fc[2]), (head.fc[4], head.fc[6])):
        scale = np.asarray(norm.scale[...])
        assert 0 <= scale.min() < 0.05 and 0.95 < scale.max() < 1
        assert not norm.bias[...].any() and not linear.bias[...].any()


@pytest.mark.slow
def test_dropout():
    """Rates of a quarter and a half; the rest is scaled, and the key matters."""
    head = Head(1000, 5, rngs=nnx.Rngs(0))
    for i, rate in ((1, 0.25), (5, 0.5)):
        y = head.fc[i](
            jnp.ones((40, 1000)), deterministic=False, rngs=jax.random.key(i)
        )
        assert abs((np.asarray(y) == 0).mean() - rate) < 0.01
        np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    graph, state = nnx.split(head)
    maps = np.random.default_rng(0).random((8, 2, 2, 1000), np.float32)

    @jax.jit
    def logits(seed):
        net = nnx.merge(graph, state, copy=True)
        return net(jnp.asarray(maps), train=True, key=jax.random.key(seed))

    assert (logits(0) == logits(0)).all() and (logits(0) != logits(1)).all()


def test_bfloat16():
    """Activations only; the head, parameters and statistics stay float32."""

    def run():
        body = ResNet("resnet18", 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        head = Head(body.features, 3, rngs=nnx.Rngs(0))
        maps = body(jnp.zeros((2, 32, 32, 3)), train=True)
        logits = head(maps, train=True, key=jax.random.key(0))
        states = [nnx.state(m, (nnx.Param, nnx.BatchStat)) for m in (body, head)]
        return maps, logits, states

    maps, logits, states = nnx.eval_shape(run)
    assert (maps.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(states)} == {np.dtype("float32")}
    # A running mean is not rounded to bfloat16, in which this one would be 1.
    norm = BasicBlock(4, 4, 1, jnp.bfloat16, nnx.Rngs(0)).bn1
    norm.mean[...] = jnp.full(4, 1.003, jnp.float32)
    y = norm(jnp.ones((1, 4), jnp.bfloat16), True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), -0.003, rtol=0.01)


@pytest.mark.slow
def test_over_two_devices():
    """Batch norm uses the statistics of the global batch."""
    graphs, *shapes = networks("resnet18", 4)
    tensors = torch_network("resnet18", 4, torch.float32).state_dict()
    tensors = {name: x.numpy() for name, x in tensors.items()}
    params, stats = pretrained.load(tensors, *shapes, source="PyTorch", head=True)
    x = np.random.default_rng(0).normal(size=(8, 64, 64, 3)).astype(np.float32)
    x[4:] += 2  # the halves differ

    @jax.jit
    def forward(params, stats, x):
        body, head = (
            nnx.merge(graphs[k], params[k], stats[k], copy=True) for k in graphs
        )
        logits = head(body(x, train=True), train=True, key=jax.random.key(0))
        return logits, nnx.state(body, nnx.BatchStat), nnx.state(head, nnx.BatchStat)

    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    replicated = jax.device_put((params, stats), NamedSharding(mesh, PartitionSpec()))
    ours, expected = forward(*replicated, split), forward(params, stats, x)
    assert len(ours[0].sharding.device_set) == 2
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20",), "architecture must be one of resnet18, .*, got 'resnet20'"),
        (("resnet18", 0), "width must be at least 1, got 0"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(*arguments, rngs=nnx.Rngs(0))


def test_training_needs_a_key():
    with pytest.raises(ValueError, match="key must be a jax.random.key in training"):
        Head(4, 2, rngs=nnx.Rngs(0))(jnp.zeros((2, 1, 1, 4)), train=True)
