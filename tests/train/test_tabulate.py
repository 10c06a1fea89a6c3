"""train.tabulate: which results it takes, and the table of updates.

That its tables are those of docs/results is tested in tests/docs.
"""

import json

import pytest

from train import tabulate


def write(folder, name, file, content, config=None):
    (folder / name).mkdir(parents=True)
    (folder / name / file).write_text(json.dumps(content))
    (folder / name / "config.json").write_text(json.dumps(config or {}))


CONFIG = {"leaves": "large", "step": "adamw", "dtype": "float32"}


def rows(*names):
    return {
        name: {"median_ms": 4.0 + i, "floor_ms": 2.0, "floor_bytes": 280}
        for i, name in enumerate(names)
    }


def cells(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]


@pytest.mark.parametrize("ours", ["here", "adamw_jax"])
def test_updates(tmp_path, ours):
    """Of earlier benchmarks, whose row was `here`, and of today's, which has a name."""
    bench = {"parameters": 10, "leaves": 2}
    config = CONFIG if ours == "here" else CONFIG | {"bench": "update"}
    measured = {"rows": rows(ours, "Optax", "PyTorch, fused")}
    write(tmp_path, "a", "bench.json", bench | measured, config | {"step": "full"})
    write(tmp_path, "b", "bench.json", bench | {"rows": rows(ours, "Optax")}, config)
    head, _, adamw, full = cells(tabulate.table(tmp_path))
    assert head[:4] == ["parameters", "step", "floor, ms", ours]
    assert head[4:7] == ["Optax", "PyTorch, fused", f"{ours} / PyTorch, fused"]
    start = ["10 float32 in 2 leaves"]
    assert adamw == [*start, "adamw", "2", "4", "5", "–", "–", "28", "–", "–"]
    assert full == [*start, "full", "2", "4", "5", "6", "0.67", "28", "–", "–"]


def test_folders_of_nothing_or_of_two_commands(tmp_path):
    with pytest.raises(
        ValueError, match="folder must have results of one of train.cif"
    ):
        tabulate.table(tmp_path)
    bench = {"parameters": 10, "leaves": 2, "rows": rows("here")}
    write(tmp_path, "other", "bench.json", bench, CONFIG | {"bench": "packing"})
    with pytest.raises(ValueError, match="folder must have"):
        tabulate.table(tmp_path)
    write(tmp_path, "update", "bench.json", bench, CONFIG)
    assert "10 float32 in 2 leaves" in tabulate.table(tmp_path)
    write(tmp_path, "run", "results.json", {"recipe": "adamw-30"})
    with pytest.raises(ValueError, match=f"one of .*, got {tmp_path}"):
        tabulate.table(tmp_path)
