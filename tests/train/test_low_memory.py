"""The table on tiny settings, and the sizes of optimizer states."""

import dataclasses
import functools
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adamw_jax import adamw
from train import low_memory
from train.data import batches, cifar10

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

TINY = low_memory.Config(
    train_size=40, eval_size=50, width=4, epochs=2, batch_size=10, min_size=256,
    seeds=2, name="tiny",
)  # fmt: skip
PARAMETERS = 9 * (3 * 4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16) + 16 * 10 + 10
QUANTIZED = 9 * (4 * 8 + 8 * 16)


@pytest.fixture
def two_of_ours(monkeypatch):
    """Compiles two programs instead of five."""
    for name in set(low_memory.OPTIMIZERS) - {"float32", "8 bits"}:
        monkeypatch.delitem(low_memory.OPTIMIZERS, name)


@pytest.mark.slow
def test_parameters_in_bfloat16(cifar_dir, tmp_path, monkeypatch):
    """Five optimizers; Optax's moments are half as large as ours of float32."""
    config = dataclasses.replace(
        TINY, data_dir=cifar_dir, out=tmp_path, param_dtype="bfloat16"
    )
    folder = low_memory.main(config)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert list(rows) == list(low_memory.BFLOAT16_PARAMS)
    assert all(np.isfinite(row["loss"]["runs"]).all() for row in rows.values())
    sizes = {name: row["bytes_per_parameter"] for name, row in rows.items()}
    assert 4 < sizes["bfloat16, to nearest, optax.adamw"] < 4.1
    assert 8 < sizes["float32"] < 8.1
    assert "Parameters in bfloat16." in (folder / "results.md").read_text()


@pytest.mark.slow
def test_the_table(cifar_dir, tmp_path, monkeypatch, capsys, two_of_ours):
    pytest.importorskip("torch")
    for module in ("torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    config = dataclasses.replace(TINY, data_dir=cifar_dir, out=tmp_path)
    folder = low_memory.main(config)
    assert folder == tmp_path / "tiny"
    results = json.loads((folder / "results.json").read_text())
    rows = results["rows"]
    assert list(rows) == ["float32", "8 bits", "float32, PyTorch"]
    assert results["parameters"] == PARAMETERS
    for row in rows.values():
        assert row["loss"]["mean"] == pytest.approx(np.mean(row["loss"]["runs"]))
        assert len(row["accuracy"]["runs"]) == 2

    # step, count; four hyperparameters, their last values, flags; logs of b1 and b2
    scalars = 4 * (2 + 4 + 4 + 4 + 4)
    float32 = rows["float32"]["bytes_per_parameter"] * PARAMETERS
    assert 8 * PARAMETERS < float32 <= 8 * PARAMETERS + scalars
    saved = float32 - rows["8 bits"]["bytes_per_parameter"] * PARAMETERS
    blocks = 9 * (4 * 8 // 32 + 1) + 9 * (8 * 16 // 128)  # at least
    assert 6 * QUANTIZED - 8 * 2 * blocks < saved < 6 * QUANTIZED

    # the same in PyTorch, and nearly the same with eight bits, seed by seed
    ours, theirs, eight = (
        np.array(rows[name]["loss"]["runs"])
        for name in ("float32", "float32, PyTorch", "8 bits")
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    np.testing.assert_allclose(ours, eight, rtol=2e-2)
    assert (ours != eight).all()
    change = rows["8 bits"]["loss_minus_float32"]
    assert change["mean"] == pytest.approx((eight - ours).mean())
    assert "loss_minus_float32" not in rows["float32"]

    text = (folder / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert sum(line.startswith("|") for line in text.splitlines()) == 2 + len(rows)
    for name in ("torchao", "bitsandbytes"):
        assert re.search(rf"^Not measured: 8 bits, {name} .*{name}", text, re.MULTILINE)
    with pytest.raises(ValueError, match="exists"):
        low_memory.main(config)


@pytest.mark.slow
def test_the_loss_is_the_mean_of_the_last_epoch(cifar_dir):
    """With next to no learning rate it is that of the initial network."""
    config = dataclasses.replace(TINY, data_dir=cifar_dir, learning_rate=1e-12)
    splits = cifar10.load_cifar10(cifar_dir, 40, 50)
    x, y = batches.padded(splits.train.x), splits.train.y
    run = low_memory.draw_run(config, 0)
    images = jax.device_put((x, y, *batches.in_batches(splits.test)))
    train = jax.jit(functools.partial(low_memory.train, "float32", config))
    loss, accuracy, _ = train(run, *images)

    @nnx.jit
    def loss_fn(net, x, y, crop):
        x = batches.normalise(jax.vmap(batches.crop_and_flip)(x, crop))
        logits = nnx.view(net, use_running_average=False)(x)
        return -jax.nn.log_softmax(logits)[np.arange(10), y].mean()

    net, losses = low_memory.make_network(config, 0), []
    for index, crop in list(zip(run["order"], run["crops"], strict=True))[4:]:
        losses.append(loss_fn(net, x[index], y[index], crop))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert 0 <= float(accuracy) <= 100


def test_bytes_of_optax_states():
    params = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(5)}
    state = adamw(1e-3, mu_dtype=jnp.bfloat16).init(params)
    moments = 20 * (2 + 4)
    others = [x for x in jax.tree.leaves(state) if x.size < 5]
    assert low_memory.state_bytes(state) >= moments
    assert low_memory.state_bytes(state) == moments + sum(x.nbytes for x in others)


def test_bytes_of_pytorch_states():
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(30)).sum().backward()
    optimizer.step()
    assert low_memory.torch_state_bytes(optimizer.state) == 8 * 620 + 2 * 4
    # A shared table of codes counts once, a subclass of tensors by its parts.
    shared = torch.zeros(256)
    parts = SimpleNamespace(codes=torch.zeros(10, dtype=torch.uint8), qmap=shared)
    parts.__tensor_flatten__ = lambda: (["codes", "qmap"], None)
    state = {0: {"step": 3, "exp_avg": parts}, 1: {"qmap": shared}}
    assert low_memory.torch_state_bytes(state) == 10 + 4 * 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"batch_size": 41}, r"batch_size must be in \[1, 40\], got 41"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        low_memory.main(dataclasses.replace(TINY, **changes))
