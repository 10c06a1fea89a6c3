"""train.bench_update on few parameters: what is counted, and the page."""

import json
import math
import re

import jax
import numpy as np
import pytest

from train.bench import update as bench_update
from train.references.resnet import ResNet as TorchResNet

pytestmark = pytest.mark.usefixtures("lenient")


def tiny(tmp_path, **changes):
    options = {"leaves": "large", "scale": 1e-4, "calls": 2, "turns": 2}
    options |= {"out": tmp_path, "name": "bench"}
    return bench_update.Config(**options | changes)


@pytest.mark.parametrize("step", ["adamw", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bench(tmp_path, step, dtype):
    results = bench_update.main(tiny(tmp_path, step=step, dtype=dtype))
    rows = results["rows"]
    ours = ["here", "here, two calls"]
    assert list(rows) == [*ours, "Optax", "PyTorch, fused", "PyTorch, foreach"]
    assert not results["failed"]
    assert (results["parameters"], results["leaves"]) == (10_000, 10)
    # gradient, and for its norm; parameter in and out; two moments in and out
    p, full = {"float32": 4, "bfloat16": 2}[dtype], step == "full"
    for name, row in rows.items():
        moment = 4 if name in ours else p  # theirs are kept in the type of p
        expected = p * (1 + full) + 2 * p + 4 * moment
        assert row["floor_bytes"] / 10_000 == pytest.approx(expected, abs=0.1)
        assert row["floor_ms"] == pytest.approx(
            row["floor_bytes"] / results["copy_gb_per_second"] / 1e6
        )
        assert row["share_of_bandwidth"] == pytest.approx(
            row["floor_ms"] / row["median_ms"]
        )
        ratio = rows["here"]["median_ms"] / row["median_ms"]
        assert name == "here" or results["here_over"][name] == pytest.approx(ratio)
    for name in (*ours, "Optax"):
        assert rows[name]["compile_seconds"] > 0
        assert rows[name]["bytes_accessed"] >= rows[name]["floor_bytes"] * 0.9
    page = (tmp_path / "bench" / "bench.md").read_text()
    assert len(re.findall(r"^\|", page, re.MULTILINE)) == 7
    assert json.loads((tmp_path / "bench" / "bench.json").read_text()) == results


def test_small_leaves_flat(tmp_path):
    """The same bytes: here the buffers need no filling."""
    config = tiny(tmp_path, leaves="tiny", scale=0.016, torch=False)  # 64 of 64
    rows = bench_update.main(config)["rows"]
    assert list(rows) == ["here", "here, two calls", "here, flat", "Optax"]
    here, flat = rows["here"], rows["here, flat"]
    assert flat["floor_bytes"] == pytest.approx(here["floor_bytes"], abs=200)


def test_leaves(tmp_path):
    """Those of torchvision's ResNet-50, in number and size; and of the others."""
    shapes = bench_update.shapes_of(tiny(tmp_path, leaves="resnet50", scale=1.0))
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
        shapes = bench_update.shapes_of(tiny(tmp_path, leaves=leaves, scale=1.0))
        sizes = [math.prod(shape) for shape in shapes.values()]
        assert len(sizes) == pytest.approx(count, abs=5)
        assert sum(sizes) == pytest.approx(size, rel=0.03)


def test_the_same_update(tmp_path):
    """Here and in Optax, up to rounding: neither is spared anything."""
    for step in ("adamw", "full"):
        config = tiny(tmp_path, step=step)
        params, grads = (bench_update.random_leaves(config, i) for i in (0, 1))
        ours, theirs = (
            tx.update(grads, tx.init(params), params)[0]
            for tx in bench_update.optimizers(config).values()
        )
        for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            scale = np.abs(other).max()
            if step == "full":  # 1cycle begins elsewhere in Optax
                one, other, scale = one / np.abs(one).max(), other / scale, 1
            np.testing.assert_allclose(one, other, atol=2e-3 * scale)


def test_without_pytorch(tmp_path):
    results = bench_update.main(tiny(tmp_path, torch=False))
    assert list(results["rows"]) == ["here", "here, two calls", "Optax"]


@pytest.mark.parametrize(
    ("option", "value"), [("calls", 0), ("turns", 0), ("scale", 0), ("scale", 2)]
)
def test_options_are_checked(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        bench_update.main(tiny(tmp_path, **{option: value}))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "bench").mkdir()
    with pytest.raises(ValueError, match="exists"):
        bench_update.main(tiny(tmp_path))
