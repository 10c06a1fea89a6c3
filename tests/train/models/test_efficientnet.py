"""EfficientNet-Lite0 against PyTorch's: names, logits, gradients, dropped blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import adamw_jax as aj
from train.models import classifier, efficientnet, pretrained
from train.models.efficientnet import Block, EfficientNetLite0, relu6, scale_channels
from train.references import efficientnet as torch_efficientnet
from train.references.efficientnet import EfficientNetLite0 as TorchNet

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

# Every kind of block: without expansion, at stride 2, and with shortcuts.
SHALLOW = ((1, 3, 1, 1, 32), (2, 3, 2, 2, 32))
WIDTH, CLASSES = 8, 3


@pytest.fixture
def shallow(monkeypatch):
    for module in (efficientnet, torch_efficientnet):
        monkeypatch.setattr(module, "STAGES", SHALLOW)


def random_torch_network(**options):
    """Random statistics as well."""
    torch.manual_seed(0)
    net = TorchNet(WIDTH, CLASSES, **options)
    for name, x in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            torch.nn.init.normal_(x, std=0.1)
        elif x.ndim == 1:
            torch.nn.init.uniform_(x, 0.5, 2)
    return net


def body_and_shapes(width=WIDTH):
    body = nnx.eval_shape(lambda: EfficientNetLite0(width, rngs=nnx.Rngs(0)))
    return nnx.split(body, nnx.Param, nnx.BatchStat)


def images(n, size, dtype):
    return np.random.default_rng(0).normal(size=(n, size, size, 3)).astype(dtype)


def assert_close(ours, theirs, tolerance):
    """Relative to the largest value."""
    atol = tolerance * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_channels_are_those_of_the_publisher():
    assert [scale_channels(c, 32) for c in (16, 24, 320, 1280)] == [16, 24, 320, 1280]
    # `round_filters` of the publisher's code, for a factor of 1.1, 0.25 and 2
    assert [scale_channels(c, 35.2) for c in (24, 40, 112, 320)] == [24, 48, 120, 352]
    assert [scale_channels(c, 8) for c in (16, 40, 112, 1280)] == [8, 16, 32, 320]
    assert scale_channels(40, 64) == 80


def test_names_and_shapes():
    """Of all weights of the whole network with fast.ai's head, to PyTorch and back."""
    net = classifier.make_network("efficientnet_lite0", 32, "float32", CLASSES)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with torch.device("meta"):
        theirs = TorchNet(classes=CLASSES).state_dict()
    ours = pretrained.to_tensors(*zeros, 0)
    assert {k: x.shape for k, x in ours.items()} == {
        k: x.shape for k, x in theirs.items()
    }
    loaded = pretrained.load(ours, *shapes, source="x", head=True)
    assert jax.tree.structure(loaded) == jax.tree.structure(shapes)


def test_the_librarys_conversion_fills_it(shallow):
    """From the publisher's state_dict, whose classifier is another."""
    theirs = random_torch_network(head=False).state_dict()
    _, params, stats = body_and_shapes()
    state = nnx.merge_state(params, stats)
    filled = aj.params_from_torch_state_dict(theirs, state, skip="_fc")
    filled = nnx.split_state(filled, nnx.Param, nnx.BatchStat)
    loaded = pretrained.load(
        {name: x.numpy() for name, x in theirs.items()},
        {"body": params},
        {"body": stats},
        source="x",
        head=False,
    )
    for one, other in zip(
        jax.tree.leaves(filled), jax.tree.leaves(loaded), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("train", "size", "dtype", "tolerance"),
    [
        (False, 13, "float64", 1e-10),
        pytest.param(True, 16, "float64", 1e-10, marks=pytest.mark.slow),
        pytest.param(False, 16, "float32", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_equal_pytorch(
    shallow, monkeypatch, x64, train, size, dtype, tolerance
):
    """With and without running statistics, for odd and even sizes."""
    monkeypatch.setattr(efficientnet, "DROP_RATE", 0.0)
    theirs = random_torch_network(drop_rate=0.0).to(getattr(torch, dtype)).train(train)
    body = nnx.eval_shape(
        lambda: EfficientNetLite0(WIDTH, dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, shapes = nnx.split(body)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    before = {name: x.numpy().copy() for name, x in theirs.state_dict().items()}
    state = aj.params_from_torch_state_dict(before, shapes, skip="_fc")
    x = images(4, size, dtype)

    @jax.jit
    def run(params, stats):
        def loss(params):
            net = nnx.merge(graph, params, stats, copy=True)
            maps = net(x, train=train, key=jax.random.key(0))
            return (maps**2).sum() / 2, (maps, nnx.state(net, nnx.BatchStat))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (maps, stats)), grads = run(*nnx.split_state(state, nnx.Param, nnx.BatchStat))
    expected = theirs.maps(torch.tensor(x.transpose(0, 3, 1, 2)))
    ((expected**2).sum() / 2).backward()
    assert maps.dtype == dtype
    assert_close(maps.transpose(0, 3, 1, 2), expected.detach().numpy(), tolerance)
    ours = pretrained.to_tensors({"body": grads}, {"body": stats}, 1)
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        if not name.startswith("_fc"):
            atol = float(tolerance * largest)
            grad = parameter.grad.numpy()
            np.testing.assert_allclose(
                ours[name], grad, rtol=0, atol=atol, err_msg=name
            )
    for name, x in theirs.state_dict().items():
        if name.endswith("running_mean") and not name.startswith("_fc"):
            assert_close(ours[name], x.numpy(), tolerance)
            changed = (ours[name] != before[name]).any()
            assert changed == train


def test_relu6():
    """The gradient at the edges is 0, as PyTorch's; and no NaN is hidden."""
    x = np.array([-1.0, 0.0, 0.5, 6.0, 7.0], np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    torch.nn.functional.relu6(theirs).sum().backward()
    y, grad = jax.jit(jax.vmap(jax.value_and_grad(relu6)))(x)
    np.testing.assert_array_equal(y, torch.nn.functional.relu6(theirs).detach())
    np.testing.assert_array_equal(grad, theirs.grad)
    assert jnp.isnan(relu6(jnp.float32(np.nan)))


def test_blocks_are_dropped_for_some_images():
    """At their rate, each whole; the others are scaled, so that the mean stays."""
    rate = 0.2
    x = jnp.asarray(images(200, 2, np.float32) @ np.ones((3, 8), np.float32))

    @jax.jit
    def run(x):
        blocks = (
            Block(8, 8, 3, 1, 1, r, jnp.float32, nnx.Rngs(0)) for r in (rate, 0.0)
        )
        return [block(x, train=True, key=jax.random.key(0)) - x for block in blocks]

    dropped, whole = run(x)
    kept = np.asarray(jnp.abs(dropped).max((1, 2, 3)) > 0)
    assert 0.7 < kept.mean() < 0.9
    np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - rate), atol=1e-5)
    np.testing.assert_array_equal(dropped[~kept], 0)


def test_rates_grow_from_block_to_block():
    blocks = nnx.eval_shape(lambda: EfficientNetLite0(8, rngs=nnx.Rngs(0)))._blocks
    rates = [block.drop_rate for block in blocks]
    assert len(rates) == 16
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_training_needs_a_key(shallow):
    graph, params, stats = body_and_shapes()
    net = nnx.merge(graph, params, stats)
    with pytest.raises(ValueError, match=r"key must be a jax.random.key in training"):
        net(None, train=True)


@pytest.mark.slow
@pytest.mark.skipif(not pretrained.packaged(), reason="needs the extra `pretrained`")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)]
)
def test_logits_of_imagenets_1000_classes(x64, dtype, tolerance):
    """With the published weights, against PyTorch with all of them."""
    tensors, _ = pretrained.read(pretrained.packaged())
    theirs = TorchNet(classes=1000, head=False)
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    theirs = theirs.to(getattr(torch, dtype)).eval()
    body = nnx.eval_shape(lambda: EfficientNetLite0(dtype=dtype, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(body)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    state = aj.params_from_torch_state_dict(tensors, shapes, skip="_fc")
    weight, bias = (tensors[f"_fc.{name}"].astype(dtype) for name in ("weight", "bias"))
    x = images(2, 64, dtype)

    @jax.jit
    def logits(state):
        maps = nnx.merge(graph, state)(x, train=False)
        return maps.mean((1, 2)) @ weight.T + bias

    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    assert_close(logits(state), expected, tolerance)
