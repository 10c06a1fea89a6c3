"""Weights from and to PyTorch's files, and the messages about unusable files."""

import argparse
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from train.models import pretrained
from train.models.resnet import Head, ResNet
from train.references.resnet import ResNet as TorchResNet

pytestmark = pytest.mark.usefixtures("lenient")

CLASSES = 3


def make_shapes(architecture="resnet18", width=2, classes=CLASSES):
    """Shapes of params and stats."""

    def modules():
        body = ResNet(architecture, width, rngs=nnx.Rngs(0))
        return {"body": body, "head": Head(body.features, classes, rngs=nnx.Rngs(1))}

    shapes = {}, {}
    for name, module in nnx.eval_shape(modules).items():
        _, shapes[0][name], shapes[1][name] = nnx.split(
            module, nnx.Param, nnx.BatchStat
        )
    return shapes


def torch_network(architecture="resnet18", width=2):
    """Random values everywhere, after 12 batches."""
    torch.manual_seed(0)
    net = TorchResNet(architecture, width, CLASSES)
    for x in net.state_dict().values():
        x.fill_(12) if x.dtype == torch.int64 else torch.nn.init.uniform_(x, 0.1, 1)
    return net.eval()


@pytest.fixture(scope="module")
def shapes():
    return make_shapes()


@pytest.fixture(scope="module")
def state_dict():
    return torch_network().state_dict()


@pytest.fixture
def tensors(state_dict):
    return {name: x.numpy().copy() for name, x in state_dict.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        x, y = np.asarray(one[name]), np.asarray(other[name])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


# ---------------------------------------------------------------------------
# round trips
# ---------------------------------------------------------------------------


def test_from_pytorch_and_back(tmp_path, state_dict, shapes):
    """Every bit, through files of both formats."""
    for name in ("one.pth", "one.pth.tar"):
        torch.save(state_dict, tmp_path / name)
    safetensors.torch.save_file(state_dict, tmp_path / "two.safetensors", {"by": "us"})
    torch.save(state_dict, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, expected in (
        ("one.pth", {}),
        ("one.pth.tar", {}),
        ("two.safetensors", {"by": "us"}),
        ("old.pt", {}),
    ):
        tensors, metadata = pretrained.read(tmp_path / name)
        assert metadata == expected
        same(tensors, state_dict)
        params, stats = pretrained.load(tensors, *shapes, source=name, head=True)
        same(pretrained.to_tensors(params, stats, 12), state_dict)


def test_into_pytorch_and_back(tmp_path, shapes):
    """PyTorch loads it strictly and computes the same; reading restores every bit."""
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), shapes
    )
    path = tmp_path / "model.safetensors"
    pretrained.write(path, pretrained.to_tensors(params, stats, 5), {"format": "pt"})
    theirs = torch_network()
    theirs.load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert theirs.layer4[1].bn2.num_batches_tracked == 5
    x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    graphs = [
        nnx.graphdef(module)
        for module in nnx.eval_shape(
            lambda: (
                ResNet("resnet18", 2, rngs=nnx.Rngs(0)),
                Head(16, CLASSES, rngs=nnx.Rngs(0)),
            )
        )
    ]

    @jax.jit
    def logits(params, stats):
        body, head = (
            nnx.merge(graph, params[k], stats[k])
            for graph, k in zip(graphs, ("body", "head"), strict=True)
        )
        return head(body(x, train=False), train=False)

    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(logits(params, stats), expected, rtol=1e-4)
    again = pretrained.load(pretrained.read(path)[0], *shapes, source="it", head=True)
    assert jax.tree.structure(again) == jax.tree.structure((params, stats))
    for one, other in zip(*map(jax.tree.leaves, (again, (params, stats))), strict=True):
        assert one.dtype == other.dtype and (one == other).all()


@pytest.mark.parametrize(
    "architecture",
    ["resnet34", "resnet50", pytest.param("resnet101", marks=pytest.mark.slow)],
)
def test_architectures(architecture):
    """Names and shapes, against PyTorch's networks."""
    theirs = torch_network(architecture).state_dict()
    theirs = {name: x.numpy() for name, x in theirs.items()}
    ours = make_shapes(architecture)
    params, stats = pretrained.load(theirs, *ours, source="torch", head=True)
    same(pretrained.to_tensors(params, stats, 12), theirs)


def test_body_alone(tensors, shapes):
    """With any classifier in the file; the head stays as it was."""
    names = [name for name in tensors if name.startswith("fc.")]
    bare = {name: x for name, x in tensors.items() if name not in names}
    classifier = {"fc.weight": np.ones((1000, 16)), "fc.bias": np.ones(1000)}
    for others in ({}, classifier, {name: tensors[name] for name in names}):
        params, stats = pretrained.load(bare | others, *shapes, source="x", head=False)
        assert params["head"] is shapes[0]["head"]
        assert stats["head"] is shapes[1]["head"]
        leaf = params["body"]["layer1"][0]["conv1"]["kernel"]
        expected = tensors["layer1.0.conv1.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(leaf[...], expected)


def test_dtype_is_that_of_the_network(tensors, shapes, x64):
    double = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float64"), shapes)
    leaves = jax.tree.leaves(pretrained.load(tensors, *double, source="x", head=True))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float64")}
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_loading_copies(tensors, shapes):
    """A step donates the state, and the next seed loads the tensors again."""
    before = {name: x.copy() for name, x in tensors.items()}
    state = pretrained.load(tensors, *shapes, source="x", head=True)
    zero = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
    jax.block_until_ready(zero(state))
    same(tensors, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_other_dtypes_become_float32(tmp_path, name, dtype):
    x = torch.linspace(-3, 3, 50).to(getattr(torch, dtype))
    content = {"x": x, "count": torch.tensor(7)}
    if name == "w.bin":
        torch.save(content, tmp_path / name)
    else:
        safetensors.torch.save_file(content, tmp_path / name)
    same(
        pretrained.read(tmp_path / name)[0], {"x": x.float(), "count": torch.tensor(7)}
    )


@pytest.mark.parametrize(
    "content",
    [
        lambda d: {"state_dict": d, "epoch": 3, "arch": "resnet18"},
        lambda d: {"model": d, "optimizer": {"state": {}}, "args": None},
        lambda d: {"model_state_dict": d},
        lambda d: {"checkpoint": 1, "state_dict": {"model": d}},
        lambda d: {"module." + name: x for name, x in d.items()},
        lambda d: {"state_dict": {"model." + name: x for name, x in d.items()}},
        lambda d: {"module._orig_mod." + name: x for name, x in d.items()},
        lambda d: {
            "net._orig_mod.module.net.model." + name: x for name, x in d.items()
        },
        lambda d: {  # fastai's learn.save
            "model": d,
            "opt": {"state": [{"step": 3}], "hypers": [{"lr": 0.1}]},
        },
        lambda d: {  # beside tensors, torchvision's options and timm's metric
            "args": argparse.Namespace(lr=0.1, workers=4),
            "metric": np.float64(76.5),
            "state_dict": d,
        },
        lambda d: {  # the averages of torchvision's and timm's training scripts
            "model": {name: 0 * x for name, x in d.items()},
            "model_ema": {"n_averaged": torch.tensor(2)}
            | {"module." + name: x for name, x in d.items()},
        },
        lambda d: (
            {"state_dict": {name: 0 * x for name, x in d.items()}}
            | {"state_dict_ema": d}
        ),
    ],
)
def test_files_of_training_scripts(tmp_path, state_dict, content):
    torch.save(content(state_dict), tmp_path / "checkpoint.pth")
    same(pretrained.read(tmp_path / "checkpoint.pth")[0], state_dict)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.tar", "epoch=3.ckpt"])
def test_suffixes_of_training_scripts(tmp_path, state_dict, name):
    torch.save({"state_dict": state_dict}, tmp_path / name)
    same(pretrained.read(tmp_path / name)[0], state_dict)


def test_write_is_atomic(tmp_path, monkeypatch):
    path, x = tmp_path / "model.safetensors", np.arange(6, dtype=np.float32)
    pretrained.write(path, {"x": x.reshape(2, 3).T}, {"one": "1"})  # not contiguous
    tensors, metadata = pretrained.read(path)
    np.testing.assert_array_equal(tensors["x"], x.reshape(2, 3).T)
    assert metadata == {"one": "1"}
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode

    def fail(self, raw):
        with self.open("wb") as file:
            file.write(raw[:40])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrained.write(path, {"x": 2 * x}, {})
    same(pretrained.read(path)[0], tensors)


# ---------------------------------------------------------------------------
# unreadable files
# ---------------------------------------------------------------------------


def unreadable():
    def zipped(path):
        torch.save({"x": torch.ones(300)}, path)

    return {
        "model.onnx": (
            b"",
            "must end in .safetensors, .pth, .pth.tar, .tar, .ckpt, .pt or .bin",
        ),
        "nowhere.pth": (None, "no such file"),
        "nowhere.safetensors": (None, "no such file"),
        "text.safetensors": (b"hello world", "damaged or not a safetensors file"),
        "short.safetensors": (
            safetensors.numpy.save({"x": np.ones(9)})[:-4],
            "damaged or not a safetensors file",
        ),
        "none.safetensors": (safetensors.numpy.save({}), "contains no tensors"),
        "text.pth": (b"hello world", "damaged, or not written by torch.save"),
        "empty.pth": (b"", "damaged, or not written by torch.save"),
        "short.pth": (zipped, "damaged, or not written by torch.save"),
        "pickle.pth": (pickle.dumps({"x": np.ones(3)}), "not written by torch.save"),
        "module.pth": (
            lambda path: torch.save(torch.nn.Linear(2, 2), path),
            "holds torch.nn.modules.linear.Linear, whose code would have to run",
        ),
        "list.bin": (
            lambda path: torch.save([torch.ones(2)], path),
            "must contain a state_dict, a dictionary of tensors, got a list",
        ),
        "others.pt": (
            lambda path: torch.save({"a": torch.ones(2), "epoch": 3, 4: "b"}, path),
            "must contain a state_dict, .*, but 'epoch', 4 are not tensors",
        ),
        "none.pth": (lambda path: torch.save({}, path), "contains no tensors"),
    }


@pytest.mark.parametrize("name", unreadable())
def test_unreadable_files(tmp_path, name):
    content, message = unreadable()[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    if name == "short.pth":
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + message):
        pretrained.read(path)


def test_without_pytorch(tmp_path, monkeypatch, state_dict):
    torch.save(state_dict, tmp_path / "w.pth")
    safetensors.torch.save_file(state_dict, tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError, match=r"w.pth: .* needs PyTorch, .* does not need it"
    ):
        pretrained.read(tmp_path / "w.pth")
    assert len(pretrained.read(tmp_path / "w.safetensors")[0]) == len(state_dict)


def install(folder, *files, name=pretrained.PACKAGE):
    """A distribution as pip leaves it, whose code must not run."""
    metadata = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise SystemExit")


def test_the_file_of_the_extra(tmp_path, monkeypatch):
    weights = "package/models/efficientnet-lite0-57934424.pth"
    install(tmp_path, "package/__init__.py", weights)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert pretrained.packaged() == tmp_path / weights
    (tmp_path / weights).unlink()
    assert pretrained.packaged() is None


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert pretrained.packaged() is None


def test_the_older_format_needs_no_pytorch(tmp_path, monkeypatch, state_dict):
    """That of the extra's file."""
    path = tmp_path / "w.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    with_pytorch, _ = pretrained.read(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    same(pretrained.read(path)[0], with_pytorch)


def test_files_of_other_efficientnets(shapes):
    names = {"_conv_stem.weight": (32, 3, 3, 3)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in names.items()}
    hint = problems(tensors, shapes)[-1]
    assert "The file is of a efficientnet_lite0 of width 32, " in hint
    tensors["_blocks.0._se_reduce.weight"] = np.ones((8, 32, 1, 1), np.float32)
    assert "larger EfficientNet than Lite0" in problems(tensors, shapes)[-1]


# ---------------------------------------------------------------------------
# files of other networks
# ---------------------------------------------------------------------------


def problems(tensors, shapes, head=True):
    with pytest.raises(ValueError) as error:
        pretrained.load(tensors, *shapes, source="some.pth", head=head)
    first, *lines = str(error.value).split("\n  ")
    assert first == "some.pth does not fit this network"
    return lines


def test_every_problem_is_named_at_once(tensors, shapes):
    del tensors["bn1.running_var"], tensors["layer2.0.downsample.0.weight"]
    tensors["attention.weight"] = np.ones((3, 4), np.float32)
    tensors["conv1.weight"] = tensors["conv1.weight"][..., :3, :3]
    tensors["fc.6.weight"] = np.ones((10, 512), np.float32)
    tensors["layer1.0.bn1.weight"][1] = np.nan
    tensors["layer1.0.bn2.running_mean"][0] = np.inf
    tensors["fc.4.bias"] = np.ones(512, np.int8)
    assert sorted(problems(tensors, shapes)) == sorted(
        [
            "missing: bn1.running_var (2,)",
            "missing: layer2.0.downsample.0.weight (4, 2, 1, 1)",
            "unexpected: attention.weight (3, 4)",
            "conv1.weight has shape (2, 3, 3, 3), expected (2, 3, 7, 7)",
            "fc.6.weight has shape (10, 512), expected (3, 512)",
            "layer1.0.bn1.weight has values that are not finite",
            "layer1.0.bn2.running_mean has values that are not finite",
            "fc.4.bias has dtype int8, expected floating point",
        ]
    )


def test_head_must_be_in_the_file(tensors, shapes):
    body = {name: x for name, x in tensors.items() if not name.startswith("fc.")}
    body["fc.weight"] = np.ones((1000, 16), np.float32)
    lines = problems(body, shapes)
    assert "missing: fc.0.running_mean (32,)" in lines
    assert "missing: fc.2.weight (512, 32)" in lines
    assert "unexpected: fc.weight (1000, 16)" in lines
    assert len(lines) == 13


def test_numbers_too_large_for_float32(tmp_path, tensors, shapes):
    """Become infinite and are refused."""
    for name in ("w.pth", "w.safetensors"):
        wide = {name: torch.tensor(x) for name, x in tensors.items()}
        wide["bn1.bias"] = torch.tensor([1.0, 1e300], dtype=torch.float64)
        if name == "w.pth":
            torch.save(wide, tmp_path / name)
        else:
            safetensors.torch.save_file(wide, tmp_path / name)
        lines = problems(pretrained.read(tmp_path / name)[0], shapes)
        assert lines == ["bn1.bias has values that are not finite"]


@pytest.mark.parametrize(
    ("architecture", "width", "hint"),
    [
        ("resnet34", 2, "of a resnet34 of width 2, this network is a resnet18 of"),
        ("resnet50", 2, "of a resnet50 of width 2, this network is a resnet18 of"),
        ("resnet18", 4, "of a resnet18 of width 4, this network is a resnet18 of"),
    ],
)
def test_hint_at_another_network(architecture, width, hint, shapes):
    theirs = torch_network(architecture, width).state_dict()
    theirs = {name: x.numpy() for name, x in theirs.items()}
    assert hint in problems(theirs, shapes, head=False)[-1]


def test_other_hints(tensors, shapes):
    deep = {"conv1.0.weight": tensors.pop("conv1.weight")} | tensors
    assert "starts with three convolutions" in problems(deep, shapes)[-1]
    moco = {"encoder_q." + name: x for name, x in tensors.items()}
    hint = "Its names fit after 'encoder_q.': save a file of those alone"
    assert problems(moco | deep, shapes)[-1].startswith("The file's network starts")
    assert problems(moco, shapes)[-1] == hint
    other = {name.replace("layer", "stage"): x for name, x in tensors.items()}
    assert "are not those of a ResNet of torchvision" in problems(other, shapes)[-1]
    wide = tensors | {"conv1.weight": deep["conv1.0.weight"]}
    wide["layer1.0.conv1.weight"] = np.ones((4, 2, 3, 3), np.float32)
    assert "a ResNeXt or wide ResNet" in problems(wide, shapes)[-1]
