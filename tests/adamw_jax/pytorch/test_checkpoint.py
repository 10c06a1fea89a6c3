"""Files as training scripts write them, and other things in place of a state dict.

The layouts are those of the published scripts: keys, prefixes and the other objects in
the file. The network and its AdamW are small, and PyTorch's own.
"""

import argparse
import collections
import copy
import pathlib
import pickle
import re
import warnings
from datetime import timedelta

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import adamw_jax as aj


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        collections.OrderedDict(
            fc=torch.nn.Linear(2, 3),
            norm=torch.nn.BatchNorm1d(3),
            head=torch.nn.Linear(3, 1),
        )
    )


def empty():
    return {
        "fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        "norm": {k: jnp.zeros(3) for k in ("scale", "bias", "mean", "var")},
        "head": {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)},
    }


def trainable():
    params = empty()
    del params["norm"]["mean"], params["norm"]["var"]
    return params


@pytest.fixture(scope="module")
def run():
    """A network after three steps, its optimizer and its scheduler."""
    net = make_net()
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=20)
    for _ in range(3):
        opt.zero_grad()
        net(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().sum().backward()
        opt.step()
        scheduler.step()
    return net, opt, scheduler


def wrapped(net, prefix):
    return {prefix + name: x for name, x in net.state_dict().items()}


def averaged(net):
    """As `ema`, with other values."""
    ema = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    ema.update_parameters(net)
    return ema.state_dict()


ARGS = argparse.Namespace(
    model="resnet50", lr=0.1, betas=[0.9, 0.999], opt=None, device=torch.device("cpu")
)
# From a script to its file and to the keys of the network and of the optimizer.
LAYOUTS = {
    "nanoGPT": lambda net, opt, sch: (
        {
            "model": wrapped(net, "_orig_mod."),
            "optimizer": opt.state_dict(),
            "model_args": {"n_layer": 2, "bias": False},
            "iter_num": 3,
            "best_val_loss": torch.tensor(2.5),
            "config": {"learning_rate": 6e-4},
        },
        ["['model']"],
        ["['optimizer']"],
    ),
    "torchvision": lambda net, opt, sch: (
        {
            "model": net.state_dict(),
            "optimizer": opt.state_dict(),
            "lr_scheduler": sch.state_dict(),
            "epoch": 3,
            "args": ARGS,
            "model_ema": averaged(net),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        },
        ["['model']", "['model_ema']"],
        ["['optimizer']"],
    ),
    "timm": lambda net, opt, sch: (
        {
            "epoch": 3,
            "arch": "resnet50",
            "optimizer": opt.state_dict(),
            "version": 2,
            "args": ARGS,
            "amp_scaler": {"scale": 65536.0},
            "state_dict": net.state_dict(),
            "state_dict_ema": net.state_dict(),
            "metric": np.float64(76.1),
        },
        ["['state_dict']", "['state_dict_ema']"],
        ["['optimizer']"],
    ),
    "Lightning": lambda net, opt, sch: (
        {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": wrapped(net, "model.net."),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": 1}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': 'loss'}": {
                    "best_model_score": torch.tensor(0.5),
                    "best_model_path": "epoch=1.ckpt",
                    "best_k_models": {"epoch=1.ckpt": torch.tensor(0.5)},
                }
            },
            "optimizer_states": [opt.state_dict()],
            "lr_schedulers": [sch.state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": {"learning_rate": 0.1, "args": ARGS},
        },
        ["['state_dict']"],
        ["['optimizer_states'][0]"],
    ),
    "ImageNet example": lambda net, opt, sch: (
        {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": wrapped(net, "module."),
            "best_acc1": torch.tensor(0.5),
            "optimizer": opt.state_dict(),
            "scheduler": sch.state_dict(),
        },
        ["['state_dict']"],
        ["['optimizer']"],
    ),
    "fastai, with an optimizer of PyTorch": lambda net, opt, sch: (
        {"model": net.state_dict(), "opt": opt.state_dict()},
        ["['model']"],
        ["['opt']"],
    ),
    "DINO": lambda net, opt, sch: (
        {
            "student": wrapped(net, "module."),
            "teacher": wrapped(net, ""),
            "optimizer": opt.state_dict(),
            "epoch": 3,
            "args": ARGS,
            "dino_loss": {"center": torch.zeros(1, 3)},
            "fp16_scaler": {"scale": 65536.0},
        },
        ["['student']", "['teacher']"],
        ["['optimizer']"],
    ),
    "nested": lambda net, opt, sch: (
        {
            "state": {
                "model": wrapped(net, "module.module."),
                "optim": [opt.state_dict()],
            }
        },
        ["['state']['model']"],
        ["['state']['optim'][0]"],
    ),
}


def message(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_scripts(lenient, tmp_path, run, name):
    """Refused as a whole, with the keys of the parts, which are then read."""
    net, opt, scheduler = run
    content, networks, optimizers = LAYOUTS[name](*run)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path)
    checkpoint = aj.load_torch_checkpoint(path)
    assert checkpoint.keys() == content.keys()

    text = message(aj.params_from_torch_state_dict, checkpoint, empty())
    assert "a dict from name to tensor, got a whole checkpoint (" in text
    assert text.endswith(f"pass its {' or '.join(networks)}")
    weights = eval(f"checkpoint{networks[0]}")
    params = aj.params_from_torch_state_dict(weights, empty())
    back = aj.params_to_torch_state_dict(params, list(net.state_dict()))
    for key, x in back.items():
        assert torch.equal(x, net.state_dict()[key])

    text = message(aj.optimizer_from_torch_state_dict, checkpoint, trainable())
    assert "a dict with state and param_groups, got a whole checkpoint (" in text
    assert text.endswith(f"pass its {' or '.join(optimizers)}")
    state_dict = eval(f"checkpoint{optimizers[0]}")
    groups = state_dict["param_groups"]
    _, state = aj.optimizer_from_torch_state_dict(
        state_dict,
        trainable(),
        names=weights,
        learning_rate=aj.phases_from_torch_scheduler(scheduler.state_dict(), groups),
    )
    assert int(state.inner_state[0].count) == 3
    np.testing.assert_array_equal(
        state.inner_state[0].mu["fc"]["kernel"], opt.state[net.fc.weight]["exp_avg"].T
    )


def test_averages_are_read(tmp_path, run):
    net, *_ = run
    torch.save({"model_ema": averaged(net)}, tmp_path / "ema.pt")
    weights = aj.load_torch_checkpoint(tmp_path / "ema.pt")["model_ema"]
    params = aj.params_from_torch_state_dict(weights, empty())
    np.testing.assert_array_equal(params["fc"]["kernel"], net.fc.weight.detach().T)


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.float64(3.5),
        np.float32(3.5),
        np.float16(3.5),
        np.int64(-3),
        np.uint8(200),
        np.bool_(True),
        np.complex64(1j),
        np.str_("best"),
        np.arange(6.0).reshape(2, 3).T,
        np.random.default_rng(0).integers(9, size=4, dtype=np.uint32),
        argparse.Namespace(lr=0.1, nested=argparse.Namespace(betas=(0.9, 0.99))),
        argparse.Namespace(best=np.float64(1.0)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values_beside_tensors(tmp_path, value):
    path = tmp_path / "value.ckpt"
    torch.save({"value": value}, path)
    read = aj.load_torch_checkpoint(path)["value"]
    assert type(read) is type(value)
    if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(read, value)
    else:
        assert read == value


def test_numbers_of_numpy_1(tmp_path):
    """Its modules had other names."""
    path = tmp_path / "old.pt"
    torch.save({"value": np.float64(3.5)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw
    path.write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert aj.load_torch_checkpoint(path)["value"] == 3.5


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("hidden", [False, True])
def test_no_code_runs(tmp_path, hidden):
    """Nor in an attribute of an object that is allowed."""
    victim, path = tmp_path / "victim", tmp_path / "evil.pt"
    value = Malicious(victim)
    torch.save({"x": argparse.Namespace(y=value) if hidden else value}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: holds .*pathlib.*would have"):
        aj.load_torch_checkpoint(path)
    assert not victim.exists()
    objects = np.array([value], object)
    torch.save({"x": objects}, path)
    with pytest.raises(ValueError, match="evil"):
        aj.load_torch_checkpoint(path)
    assert not victim.exists()


def test_other_classes_are_named(tmp_path):
    """They can be allowed around the call."""
    path = tmp_path / "checkpoint.pt"
    torch.save({"took": timedelta(seconds=2), "where": pathlib.Path("runs")}, path)
    text = message(aj.load_torch_checkpoint, path)
    assert "holds datetime.timedelta, pathlib.PosixPath, whose code would" in text
    torch.save({"took": timedelta(seconds=2)}, path)
    with torch.serialization.safe_globals([timedelta]):
        assert aj.load_torch_checkpoint(path) == {"took": timedelta(seconds=2)}
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in message(aj.load_torch_checkpoint, path)


def test_files_that_are_none(tmp_path):
    missing = tmp_path / "missing.pt"
    assert message(aj.load_torch_checkpoint, missing) == f"{missing}: no such file"
    assert "by its format_utils.dcp_to" in message(aj.load_torch_checkpoint, tmp_path)
    (tmp_path / "x.safetensors").touch()
    text = message(aj.load_torch_checkpoint, tmp_path / "x.safetensors")
    assert "use safetensors.numpy.load_file" in text
    path = tmp_path / "checkpoint.pt"
    torch.save({"x": torch.ones(300)}, path)
    damaged = [b"", b"hello world", path.read_bytes()[:-300]]
    damaged.append(pickle.dumps({"x": 3}, protocol=2)[:-2])
    for raw in damaged:
        path.write_bytes(raw)
        text = message(aj.load_torch_checkpoint, path)
        assert text.startswith(f"{path}: damaged, or not written by torch.save (")


# ---------------------------------------------------------------------------
# something else in place of a state dict
# ---------------------------------------------------------------------------

NET = make_net()
OPT = torch.optim.AdamW(NET.parameters())
FASTAI = {"state": [{"grad_avg": torch.ones(2)}], "hypers": [{"lr": 0.1}]}
BOTH = {
    "None": (lambda: None, "None: pass {}"),
    "network": (lambda: NET, r"the network itself \(Sequential\): pass {}"),
    "optimizer": (lambda: OPT, r"the optimizer itself \(AdamW\): pass {}"),
    "generator": (
        NET.named_parameters,
        r"a generator, as net.named_parameters\(\) is: pass {}",
    ),
    "pairs": (
        lambda: list(NET.named_parameters()),
        r"pairs, as net.named_parameters\(\) has: pass {}",
    ),
    "list": (lambda: list(NET.parameters()), "a list of 6 Parameter: pass {}"),
    "path": (lambda: "a.pt", "the path a.pt: pass what load_torch_checkpoint reads"),
    "Path": (lambda: pathlib.Path("a.pt"), "the path a.pt: pass what load_torch"),
    "empty": (dict, "an empty dict: pass {}"),
    "tensor": (lambda: torch.ones(2), "an object of class Tensor: pass {}"),
    "scheduler": (
        lambda: torch.optim.lr_scheduler.ConstantLR(OPT),
        "an object of class ConstantLR: pass {}",
    ),
    "counts": (
        lambda: {"epoch": 3, "args": None},
        r"a dict of other things \(epoch, args\): pass {}",
    ),
}
NETWORKS = BOTH | {
    "of an optimizer": (
        OPT.state_dict,
        r"an optimizer's state dict \(state, param_groups\): pass net\.state_dict\(\)",
    ),
    "in a list": (lambda: [NET.state_dict()], r"a list: pass its \[0\]$"),
    "with a count": (
        lambda: NET.state_dict() | {"epoch": 3},
        "a dict in which 'epoch' is of class int: delete what is no tensor",
    ),
    "of numbers": (
        lambda: dict(enumerate(NET.parameters())),
        "a dict in which 0 is no name, 1 is no name, ",
    ),
}
OPTIMIZERS = BOTH | {
    "of a network": (
        NET.state_dict,
        r"a network's state dict \(fc.weight, fc.bias, .*\.\.\.\): pass optimizer\.s",
    ),
    "Lightning's list": (lambda: [OPT.state_dict()], r"a list: pass its \[0\]$"),
    "fastai": (lambda: FASTAI, "the state of fastai's own Optimizer, which does not"),
    "fastai's file": (
        lambda: {"model": NET.state_dict(), "opt": FASTAI},
        "the state of fastai's own Optimizer",
    ),
    "no groups": (lambda: {"state": {}}, r"a dict of other things \(state\): pass"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_in_place_of_a_network(name):
    make, expected = NETWORKS[name]
    expected = expected.replace("{}", r"net\.state_dict\(\)$")
    for function in (
        aj.params_from_torch_state_dict,
        aj.partial_params_from_torch_state_dict,
    ):
        text = message(function, make(), empty())
        assert re.search(f"from name to tensor, got {expected}", text), text


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_place_of_an_optimizer(name):
    make, expected = OPTIMIZERS[name]
    expected = expected.replace("{}", r"optimizer\.state_dict\(\)$")
    state = aj.adamw(1e-3).init(trainable())
    for function, args in (
        (aj.optimizer_from_torch_state_dict, ()),
        (aj.from_torch_state_dict, (state,)),
    ):
        text = message(function, make(), *args, trainable())
        assert re.search(f"state and param_groups, got {expected}", text), text


def test_groups_of_the_optimizer_itself():
    """They have tensors where those of its state dict have numbers."""
    params, tx = trainable(), aj.adamw(1e-3)
    expected = r"in which parameters are numbers, got a Parameter in a group"
    with pytest.raises(ValueError, match=expected):
        aj.to_torch_state_dict(tx.init(params), params, OPT.param_groups)
    both = {"state": copy.copy(OPT.state), "param_groups": OPT.param_groups}
    with pytest.raises(ValueError, match=expected):
        aj.optimizer_from_torch_state_dict(both, params)


def test_groups_without_parameters():
    """As some libraries write them that shard states."""
    groups = copy.deepcopy(OPT.state_dict()["param_groups"])
    del groups[0]["params"]
    for broken in (groups, [None]):
        with pytest.raises(ValueError, match="must be a list of dicts with params"):
            aj.optimizer_from_torch_state_dict(
                {"state": {}, "param_groups": broken}, trainable()
            )


@pytest.mark.slow
def test_a_folder_of_torch_distributed_checkpoint(lenient, tmp_path, run):
    """The way that the error names."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import format_utils
    from torch.distributed.checkpoint import state_dict as dcp_state

    net, opt, _ = run
    model, optimizer = dcp_state.get_state_dict(net, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process only
        content = {"model": model, "optim": optimizer}
        dcp.save(content, checkpoint_id=tmp_path / "folder", no_dist=True)
        format_utils.dcp_to_torch_save(tmp_path / "folder", tmp_path / "file.pt")
    checkpoint = aj.load_torch_checkpoint(tmp_path / "file.pt")
    params = aj.params_from_torch_state_dict(checkpoint["model"], empty())
    np.testing.assert_array_equal(params["fc"]["bias"], net.fc.bias.detach())
    _, state = aj.optimizer_from_torch_state_dict(
        checkpoint["optim"], trainable(), learning_rate=1e-2
    )
    np.testing.assert_array_equal(
        state.inner_state[0].nu["fc"]["bias"], opt.state[net.fc.bias]["exp_avg_sq"]
    )
