"""train.bench_flatten on few layers: the ways train alike, and the page is true."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.bench import packing as bench_flatten

pytestmark = pytest.mark.usefixtures("lenient")


def test_a_bench(tmp_path, capsys):
    config = bench_flatten.Config((1, 3), calls=2, turns=2, out=tmp_path, name="bench")
    rows = bench_flatten.main(config)["rows"]
    assert [(row["leaves"], row["way"]) for row in rows] == [
        (leaves, way) for leaves in (2, 6) for way in config.ways
    ]
    for row in rows:
        assert row["best_ms"] == min(row["turns"])
        assert row["median_ms"] == pytest.approx(np.median(row["turns"]))
        assert min(row["trace_seconds"], row["compile_seconds"]) > 0
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert written == {"rows": rows}
    page = (tmp_path / "bench" / "bench.md").read_text()
    assert page in capsys.readouterr().out
    assert f"| {rows[-1]['median_ms']:.2g}" in page.splitlines()[-1]


def test_the_network():
    """Every leaf takes part."""
    params = bench_flatten.initial(3)
    grads = jax.grad(bench_flatten.network)(params, jnp.ones(bench_flatten.WIDTH))
    assert all(np.abs(g).min() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, r"layers must be at least 1, got \(\)"),
        ({"layers": (3, 0)}, r"layers must be at least 1, got \(3, 0\)"),
        ({"turns": 0}, "turns must be at least 1, got 0"),
        ({"ways": ()}, "ways must name at least one"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        bench_flatten.main(bench_flatten.Config(**options))
