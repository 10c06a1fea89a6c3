"""The benchmark of packing, on few layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.bench import packing

pytestmark = pytest.mark.usefixtures("lenient")


def test_a_bench(tmp_path):
    config = packing.Config((1, 3), calls=2, turns=2, out=tmp_path, name="bench")
    rows = packing.main(config)["rows"]
    assert list(rows) == [
        f"{leaves} leaves, {layout}" for leaves in (2, 6) for layout in config.layouts
    ]
    for name, row in rows.items():
        assert min(row["trace_seconds"], row["compile_seconds"]) > 0
        assert list(row["over"]) == [f"{name[0]} leaves, tree"]


@pytest.mark.slow
def test_the_layouts_train_alike():
    ends = {}
    for layout in packing.Config().layouts:
        step, params, state = packing.make_step(layout, 2)
        for _ in range(3):
            params, state = jax.jit(step)(params, state, jnp.ones(packing.WIDTH))
        ends[layout] = params.tree if layout == "packed" else params
    for end in ends.values():
        chex.assert_trees_all_close(end, ends["tree"], rtol=1e-5)


def test_the_network():
    """Every leaf has a gradient."""
    params = packing.random_params(3)
    grads = jax.grad(packing.network)(params, jnp.ones(packing.WIDTH))
    assert all(np.abs(g).min() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, r"layers must be one number or more, at least 1, got \(\)"),
        ({"layers": (3, 0)}, r"layers must be .* at least 1, got \(3, 0\)"),
        ({"turns": 0}, "turns must be at least 1, got 0"),
        ({"layouts": ()}, "layouts must be at least one of tree"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        packing.main(packing.Config(**options))
