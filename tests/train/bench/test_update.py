"""The benchmark of an update, on few parameters."""

import math

import jax
import numpy as np
import pytest

from train.bench import update
from train.references.resnet import ResNet as TorchResNet

pytestmark = pytest.mark.usefixtures("lenient")


def tiny(tmp_path, **changes):
    options = {"leaves": "large", "scale": 1e-4, "calls": 2, "turns": 2}
    options |= {"out": tmp_path, "name": "bench"}
    return update.Config(**options | changes)


OURS = ["adamw_jax", "adamw_jax, two calls"]
THEIRS = ["Optax", "PyTorch, fused", "PyTorch, foreach"]


@pytest.mark.parametrize(
    ("step", "dtype"),
    [
        ("full", "bfloat16"),
        pytest.param("adamw", "float32", marks=pytest.mark.slow),
        pytest.param("adamw", "bfloat16", marks=pytest.mark.slow),
        pytest.param("full", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_bench(tmp_path, step, dtype):
    results = update.main(tiny(tmp_path, step=step, dtype=dtype))
    rows = results["rows"]
    assert list(rows) == [*OURS, *THEIRS]
    assert not results["failed"]
    assert (results["parameters"], results["leaves"]) == (10_000, 10)
    # gradient, and for its norm; parameter in and out; two moments in and out
    p, full = {"float32": 4, "bfloat16": 2}[dtype], step == "full"
    for name, row in rows.items():
        moment = 4 if name in OURS else p  # theirs have the dtype of p
        expected = p * (1 + full) + 2 * p + 4 * moment
        assert row["floor_bytes"] / 10_000 == pytest.approx(expected, abs=0.1)
        assert row["floor_ms"] == pytest.approx(
            row["floor_bytes"] / results["copy_gb_per_second"] / 1e6
        )
    assert list(rows["adamw_jax"]["over"]) == [OURS[1], *THEIRS]
    for name in (*OURS, "Optax"):
        assert rows[name]["compile_seconds"] > 0
        assert rows[name]["bytes_accessed"] >= rows[name]["floor_bytes"] * 0.9
    page = (tmp_path / "bench" / "bench.md").read_text()
    assert page.startswith("clipping, " if full else "AdamW: 10,000 ")


@pytest.mark.parametrize("step", ["adamw", "full"])
def test_ours_is_applied_in_one_pass(tmp_path, step):
    assert hasattr(update.make_ours(tiny(tmp_path, step=step)), "step")
    assert not hasattr(update.make_optax(tiny(tmp_path, step=step)), "step")


@pytest.mark.slow
def test_small_leaves_packed(tmp_path):
    """The same bytes: here the buffers need no padding."""
    config = tiny(tmp_path, leaves="tiny", scale=0.016, torch=False)  # 64 of 64
    rows = update.main(config)["rows"]
    assert list(rows) == [*OURS, "adamw_jax, packed", "Optax"]
    tree, packed = rows["adamw_jax"], rows["adamw_jax, packed"]
    assert packed["floor_bytes"] == pytest.approx(tree["floor_bytes"], abs=200)


@pytest.mark.slow
def test_leaves(tmp_path):
    """Those of torchvision's ResNet-50, in number and size; and of the others."""
    shapes = update.leaf_shapes(tiny(tmp_path, leaves="resnet50", scale=1.0))
    theirs = dict(TorchResNet("resnet50").named_parameters())
    body = [x for name, x in theirs.items() if not name.startswith("fc.")]
    assert len(shapes) == len(body) + 2 == 161
    sizes = [math.prod(shape) for shape in shapes.values()]
    assert sorted(sizes) == sorted([x.numel() for x in body] + [2_048_000, 1000])
    for leaves, count, size in (
        ("tiny", 4000, 256_000),
        ("large", 10, 100_000_000),
        ("transformer", 290, 1.0e9),
    ):
        shapes = update.leaf_shapes(tiny(tmp_path, leaves=leaves, scale=1.0))
        sizes = [math.prod(shape) for shape in shapes.values()]
        assert len(sizes) == pytest.approx(count, abs=5)
        assert sum(sizes) == pytest.approx(size, rel=0.03)


@pytest.mark.slow
def test_the_same_update(tmp_path):
    """Ours and Optax's agree up to rounding: neither is spared anything."""
    for step in ("adamw", "full"):
        config = tiny(tmp_path, step=step)
        params, grads = (update.random_leaves(config, i) for i in (0, 1))
        ours, theirs = (
            jax.jit(tx.update)(grads, tx.init(params), params)[0]
            for tx in (update.make_ours(config), update.make_optax(config))
        )
        for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            scale = np.abs(other).max()
            if step == "full":  # Optax's 1cycle starts from another rate
                one, other, scale = one / np.abs(one).max(), other / scale, 1
            np.testing.assert_allclose(one, other, atol=2e-3 * scale)


@pytest.mark.slow
def test_without_pytorch(tmp_path):
    results = update.main(tiny(tmp_path, torch=False))
    assert list(results["rows"]) == [*OURS, "Optax"]


@pytest.mark.parametrize(
    ("option", "value"), [("calls", 0), ("turns", 0), ("scale", 0), ("scale", 2)]
)
def test_options_are_checked(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        update.main(tiny(tmp_path, **{option: value}))
    assert not list(tmp_path.iterdir())
