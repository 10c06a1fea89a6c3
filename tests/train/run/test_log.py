"""Logs and JSON files survive a kill."""

import pytest

from train.run.log import (
    append_line,
    read_events,
    read_json,
    read_lines,
    rewind_log,
    write_json,
)


def test_a_partial_last_line_is_dropped(tmp_path):
    path = tmp_path / "log"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"c": 3})
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_events_by_kind_and_seed(tmp_path):
    assert read_events(tmp_path) == []
    lines = [
        {"event": "start"},
        {"event": "epoch", "seed": 0},
        {"event": "epoch", "seed": 1},
        {"event": "end", "seed": 0},
    ]
    for line in lines:
        append_line(tmp_path / "metrics.jsonl", line)
    assert read_events(tmp_path) == lines
    assert read_events(tmp_path, "epoch") == lines[1:3]
    assert read_events(tmp_path, "epoch", 0) == lines[1:2]
    assert read_events(tmp_path, seed=0) == lines[1::2]


def test_a_log_is_rewound_to_a_checkpoint(tmp_path):
    path = tmp_path / "log"
    lines = [
        {"event": "start"},
        {"event": "epoch", "seed": 1, "step": 8},
        {"event": "epoch", "seed": 0, "step": 4},
        {"event": "epoch", "seed": 0, "step": 8},
        {"event": "diverged", "seed": 0, "step": 9},
    ]
    for line in lines:
        append_line(path, line)
    with pytest.raises(ValueError, match="1 epochs of seed 0, its checkpoint 2"):
        rewind_log(path, 0, 4, 2)
    assert read_lines(path) == lines
    rewind_log(path, 0, 4, 1)
    assert read_lines(path) == lines[:3]
    rewind_log(path, 0, 0, 0)
    assert read_lines(path) == lines[:2]


def test_json_is_an_object_or_empty(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    for text in ("[1]", "{", "\x00"):
        path.write_text(text)
        assert read_json(path) == {}
    write_json(path, {"path": tmp_path})
    assert read_json(path) == {"path": str(tmp_path)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
