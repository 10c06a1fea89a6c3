"""train.bench: what it counts, and that it runs."""

import dataclasses
import json

import numpy as np
import pytest

from train import bench

pytestmark = pytest.mark.usefixtures("lenient")

TINY = bench.Config(
    "cifar10", blocks=1, width=2, batch_size=4, steps=2, turns=2, matmul=64, name="b"
)


def test_arithmetic_of_an_image():
    """By hand, for one block a stage: the stem, two 3x3 and a 1x1 each, the head."""
    macs = 32**2 * 9 * 3 * 16  # stem
    n_in = 16
    for pixels, n_out in ((32**2, 2), (16**2, 4), (8**2, 8)):
        macs += pixels * (9 * n_in * n_out + 9 * n_out * n_out + n_in * n_out)
        n_in = n_out
    assert bench.forward_flops(1, 2) == 2 * (macs + 8 * 10)
    assert bench.forward_flops(3, 96) == pytest.approx(2.769e9, rel=1e-3)


def test_the_table(tmp_path, capsys):
    results = bench.main(dataclasses.replace(TINY, out=tmp_path, torch_compile=False))
    rows = results["rows"]
    assert list(rows) == ["here, an epoch", "here, step by step", "PyTorch, eager"]
    assert not results["failed"]
    for row in rows.values():
        assert len(row["turns_ms"]) == 2
        assert row["best_ms"] == min(row["turns_ms"])
        assert row["median_ms"] == pytest.approx(np.median(row["turns_ms"]))
        assert row["images_per_second"] == pytest.approx(4000 / row["median_ms"])
        share = results["floor_ms"] / row["median_ms"]
        assert row["share_of_matmul_rate"] == pytest.approx(share)
    assert results["step_gflop"] == pytest.approx(12 * bench.forward_flops(1, 2) / 1e9)
    assert results["here_over_compiled"] is None
    ratio = rows["here, an epoch"]["median_ms"] / rows["PyTorch, eager"]["median_ms"]
    assert results["here_over_eager"] == pytest.approx(ratio)
    assert json.loads((tmp_path / "b" / "bench.json").read_text()) == results
    assert f"{ratio:.2f} x one of PyTorch, eager" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists"):
        bench.main(dataclasses.replace(TINY, out=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"batch_size": 3}, "multiple of")],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.main(dataclasses.replace(TINY, out=tmp_path, **changes))
    assert not list(tmp_path.iterdir())
