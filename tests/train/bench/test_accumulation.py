"""The benchmark of gradient accumulation, on few parameters."""

import dataclasses

import chex
import numpy as np
import pytest

from train.bench import accumulation
from train.bench.accumulation import ADAMW_NAME, BARE_SUM, Step, make_steps, random_tree

pytestmark = pytest.mark.usefixtures("lenient")


TINY = accumulation.Config(parameters=12, leaves=3, every_k=3, turns=2)


def test_a_bench(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path, name="b")
    rows = accumulation.main(config)["rows"]
    assert len(rows) == 12
    floors = {"inside a window": 12, "end of a window": 32, "mean": (2 * 12 + 32) / 3}
    for name, row in rows.items():
        _, _, micro_batch = name.partition(": ")
        floor = floors.get(micro_batch, 12 if name == BARE_SUM else 28)
        assert row["floor_bytes"] == pytest.approx(12 * floor)
        # with the AdamW that is applied in the same way
        way = "two calls" if "two calls" in name else "update_and_apply"
        assert list(row["over"]) == [f"{ADAMW_NAME}, {way}"]
    for way in ("update_and_apply", "two calls"):
        assert rows[f"{ADAMW_NAME}, {way}"]["over"][f"{ADAMW_NAME}, {way}"] == 1
    windows = "accumulate_gradients, update_and_apply: "
    inside, end, mean = (np.array(rows[windows + x]["turns_ms"]) for x in floors)
    np.testing.assert_allclose(mean, (2 * inside + end) / 3)


def test_a_turn_is_a_window():
    """The row of its end does what is left: the update."""
    programs = accumulation.make_bench(TINY).programs
    name = "accumulate_gradients, update_and_apply"
    inside, end = (
        programs[f"{name}: {row}"]() for row in ("inside a window", "end of a window")
    )
    step = inside.run.func.__self__
    assert step is end.run.func.__self__  # one state
    for _ in range(2):
        before = numpy_copy(step.params)
        inside.run()
        chex.assert_trees_all_equal(step.params, before)
        end.run()
        assert all((step.params[key] != before[key]).all() for key in before)


def numpy_copy(tree):
    return {key: np.array(value) for key, value in tree.items()}


def test_the_steps_agree():
    """After a window all have the same parameters: the same work is timed."""
    grads, ends = random_tree(1, TINY), {}
    for name, (init, step) in make_steps(TINY.every_k).items():
        program = Step(TINY, grads, init, step)
        program.run(TINY.every_k if accumulation.accumulates(name) else 1)
        ends[name] = program.params
    unchanged = ends.pop(BARE_SUM)
    chex.assert_trees_all_equal(unchanged, random_tree(0, TINY))
    expected = ends[f"{ADAMW_NAME}, two calls"]
    for end in ends.values():
        chex.assert_trees_all_close(end, expected, rtol=1e-6)
        assert (end["leaf1"] != unchanged["leaf1"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_k": 1}, "every_k must be at least 2, got 1"),
        ({"turns": 0}, "turns must be at least 1, got 0"),
        ({"leaves": 3}, "parameters must be a positive multiple of the 3 leaves"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    config = accumulation.Config(**{"parameters": 8, "out": tmp_path} | changes)
    with pytest.raises(ValueError, match=message):
        accumulation.main(config)
    assert not list(tmp_path.iterdir())
