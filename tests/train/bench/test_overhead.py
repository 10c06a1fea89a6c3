"""The benchmark of tiny updates."""

import dataclasses

import pytest

from train.bench import overhead

pytestmark = pytest.mark.usefixtures("lenient")

TINY = overhead.Config(leaves=2, size=1, eager_calls=1, compiled_calls=1, turns=2)


@pytest.mark.slow
def test_a_bench(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path, name="b")
    rows = overhead.main(config)["rows"]
    assert len(rows) == 2 * 4 * 3 + 1
    for name, row in rows.items():
        if name.endswith("adamw_jax"):
            own = name.removesuffix("adamw_jax")
            assert [peer.removeprefix(own) for peer in row["over"]] == [
                "optax",
                "optax.inject_hyperparams",
            ]
    (floor,) = (name for name in rows if "floor" in name)
    # count, step; four values and what their schedules gave; two products of betas
    assert rows[floor]["state_leaves"] == 2 + 4 + 4 + 2 * 2
    assert rows["compiled: adamw, adamw_jax"]["state_leaves"] == 14 + 2


def test_a_step_trains():
    ours, theirs, _ = overhead.make_optimizers()["sgd"]
    for tx in (ours, theirs):
        program = overhead.compiled(TINY, overhead.make_step(tx), tx.init)
        loop = program.run.func.__self__
        program.run()
        assert loop.params[0] == pytest.approx(1 - 0.1 * 0.1)
