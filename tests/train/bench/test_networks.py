"""train.bench and train.timing: what they count, and that they run."""

import dataclasses
import json
import runpy
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from train import language_model
from train.bench import networks as bench
from train.bench import timing
from train.references import awd as torch_awd
from train.run import devices

pytestmark = pytest.mark.usefixtures("lenient")

TINY = bench.Cifar10(
    blocks=1, width=2, batch_size=4, steps=2, turns=2, matmul=64, name="b"
)
TINY_LM = bench.LanguageModel(
    words=50, embedding=6, width=8, layers=2, batch_size=4, bptt=30, steps=2, turns=2,
    matmul=64, name="b", torch_compile=False,
)  # fmt: skip


# ---------------------------------------------------------------------------
# arithmetic
# ---------------------------------------------------------------------------


def test_arithmetic_of_an_image():
    """By hand, for one block a stage: the stem, two 3x3 and a 1x1 each, the head."""
    macs = 32**2 * 9 * 3 * 16  # stem
    n_in = 16
    for pixels, n_out in ((32**2, 2), (16**2, 4), (8**2, 8)):
        macs += pixels * (9 * n_in * n_out + 9 * n_out * n_out + n_in * n_out)
        n_in = n_out
    assert bench.image_flops(1, 2) == 2 * (macs + 8 * 10)
    assert bench.image_flops(3, 96) == pytest.approx(2.769e9, rel=1e-3)


def test_arithmetic_of_a_token():
    """By hand: every weight of a kernel once, and the embedding as decoder."""
    article = bench.LanguageModel()
    macs = sum(4 * n * (m + n) for m, n in ((400, 1150), (1150, 1150), (1150, 400)))
    macs += 400 * 33_279
    settings = bench.language_model_settings(article)
    assert bench.token_flops(settings, article.words) == 2 * macs
    assert 3 * 2 * macs == pytest.approx(201e6, rel=2e-3)

    qrnn = bench.language_model_settings(dataclasses.replace(article, model="qrnn"))
    macs = 3 * (2 * 400 * 1550 + 2 * 1550 * 1550 + 1550 * 400) + 400 * 1471
    assert bench.token_flops(qrnn, 1471) == 2 * macs


def test_a_large_product():
    product, flops = timing.matmul_program(16, np.float32, devices.data_mesh())
    assert product().shape == (jax.device_count(), 16, 16)
    assert flops == jax.device_count() * 2 * 16**3


# ---------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "names", "units", "flops"),
    [
        (
            dataclasses.replace(TINY, torch_compile=False),
            ["here, an epoch", "here, step by step", "PyTorch, eager"],
            ("images", 4),
            12 * bench.image_flops(1, 2),
        ),
        (
            TINY_LM,
            ["here, a stretch", "here, step by step", "PyTorch, eager"],
            ("tokens", 120),
            3 * 120 * 2 * (4 * 8 * (6 + 8) + 4 * 6 * (8 + 6) + 50 * 6),
        ),
        (
            dataclasses.replace(TINY_LM, model="qrnn"),
            [
                "here, a stretch",
                "here, step by step",
                "PyTorch, eager, a loop over time",
            ],
            ("tokens", 120),
            3 * 120 * 2 * (3 * (2 * 6 * 8 + 8 * 6) + 50 * 6),
        ),
    ],
    ids=["cifar10", "lstm", "qrnn"],
)
def test_the_table(config, names, units, flops, tmp_path, capsys):
    results = bench.main(dataclasses.replace(config, out=tmp_path))
    rows = results["rows"]
    assert list(rows) == names
    assert not results["failed"]
    unit, of_a_step = units
    for row in rows.values():
        assert len(row["turns_ms"]) == 2
        assert row["best_ms"] == min(row["turns_ms"])
        assert row["median_ms"] == pytest.approx(np.median(row["turns_ms"]))
        speed = 1000 * of_a_step / row["median_ms"]
        assert row[f"{unit}_per_second"] == pytest.approx(speed)
        share = results["floor_ms"] / row["median_ms"]
        assert row["share_of_matmul_rate"] == pytest.approx(share)
    assert results["step_gflop"] == pytest.approx(flops / 1e9)
    floor = results["step_gflop"] / results["matmul_tflops"]
    assert results["floor_ms"] == pytest.approx(floor)
    assert results["here_over_compiled"] is None
    first, loop, eager = (rows[name]["median_ms"] for name in names)
    assert results["scan_over_loop"] == pytest.approx(first / loop)
    assert results["here_over_eager"] == pytest.approx(first / eager)
    assert json.loads((tmp_path / "b" / "bench.json").read_text()) == results
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (settings["task"], settings["steps"]) == (config.task, 2)
    printed = capsys.readouterr().out
    assert f"{first / eager:.2f} x one of {names[2]}.\n" in printed
    assert (tmp_path / "b" / "bench.md").read_text() in printed
    with pytest.raises(ValueError, match="exists"):
        bench.main(dataclasses.replace(config, out=tmp_path))


def test_many_milliseconds_are_legible():
    row = {"best_ms": 0.01234, "median_ms": 6123.4, "tokens_per_second": 1143.2}
    results = {
        "rows": {"here, a stretch": row | {"share_of_matmul_rate": 0.5}},
        **{"failed": {}, "matmul_tflops": 0.1, "step_gflop": 1.0, "floor_ms": 11_600.4},
        **dict.fromkeys(("scan_over_loop", "here_over_eager", "here_over_compiled")),
    }
    task = bench.language_model_task(TINY_LM)
    page = bench.report(TINY_LM, task, results, {"devices": "1 x cpu"})
    assert "| 0.0123            | 6,123  | 1,143    | 50.0% " in page
    assert "1.0 GFLOP a step, 11,600 ms at" in page


def in_no_time(makers, turns, may_fail):
    """`timing.in_turns` where those that may fail do."""
    seconds = {name: [1.0] * turns for name in makers if name not in may_fail}
    return seconds, dict.fromkeys(makers, 0.0), dict.fromkeys(may_fail, "No: not today")


def test_pytorch_may_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_turns", in_no_time)
    config = dataclasses.replace(TINY_LM, out=tmp_path, torch_compile=True)
    results = bench.main(config)
    assert list(results["rows"]) == ["here, a stretch", "here, step by step"]
    failed = dict.fromkeys(["PyTorch, eager", "PyTorch, compiled"], "No: not today")
    assert results["failed"] == failed
    assert results["here_over_eager"] is None and results["scan_over_loop"] == 1
    page = (tmp_path / "b" / "bench.md").read_text()
    assert "| PyTorch, eager     | No: not today" in page


def test_turns_alternate_and_the_first_does_not_count(capsys):
    calls = []

    def maker(name, error=None):
        def turn():
            if error:
                raise error
            calls.append(name)

        return lambda: turn

    bad = maker("c", ValueError("no compiler\nat all"))
    makers = {"a": maker("a"), "b": maker("b"), "c": bad}
    seconds, ready, failed = timing.in_turns(makers, 2, ["b", "c"])
    assert calls == ["a", "b"] * 3
    assert {name: len(turns) for name, turns in seconds.items()} == {"a": 2, "b": 2}
    assert ready.keys() == makers.keys()
    assert failed == {"c": "ValueError: no compiler"}
    assert "c: ValueError: no compiler\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no compiler"):
        timing.in_turns(makers, 2, ["b"])


# ---------------------------------------------------------------------------
# what is timed in a language model
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("bptt", [30, 31, 70])
def test_no_chunk_is_padded(bptt):
    config = dataclasses.replace(TINY_LM, bptt=bptt)
    settings = bench.language_model_settings(config)
    lengths = language_model.padded_lengths(settings, 100 * bptt)
    assert len(lengths) == 2 and lengths[-1] == bptt


@pytest.mark.parametrize("at_once", [1, 3])
def test_all_steps_are_done(at_once):
    """All chunks in their order; the state goes on from turn to turn."""
    done = []

    def train(state, columns, table, first, beyond, seed):
        done.extend((state, int(i)) for i in range(first, beyond))
        return state + 1, np.zeros(3)

    program = SimpleNamespace(initial_state=lambda seed: 0, train=train)
    config = dataclasses.replace(TINY_LM, steps=3)
    turn = bench.language_model_here(config, at_once, program, None, None)
    turn()
    turn()
    calls = 3 // at_once
    expected = [(i // at_once, i % 3) for i in range(6)]
    assert done == expected and done[-1][0] == 2 * calls - 1


def test_pytorch_does_the_same_chunks(monkeypatch):
    config = dataclasses.replace(TINY_LM, steps=3)
    tokens = np.arange(91)[:, None].repeat(4, 1) % 50
    seen = []

    def train_step(net, optimizer, *, tokens, targets, state, **options):
        seen.append((tokens.numpy(), targets.numpy(), state, options))
        return None, f"state {len(seen)}"

    monkeypatch.setattr(torch_awd, "train_step", train_step)
    settings = bench.language_model_settings(config)
    bench.language_model_in_pytorch(config, settings, False, tokens)()
    np.testing.assert_array_equal(np.concatenate([x for x, *_ in seen]), tokens[:-1])
    np.testing.assert_array_equal(np.concatenate([y for _, y, *_ in seen]), tokens[1:])
    assert [state for _, _, state, _ in seen[1:]] == ["state 1", "state 2"]
    options = seen[0][3]
    assert options["rates"] == (0.1, 0.6, 0.2, 0.4, 0.5)  # the article's
    assert [options[name] for name in ("alpha", "beta", "clip")] == [3, 1.5, 0.12]


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("task", "cores"),
    [("cifar10", [4]), ("language_model", []), ("language-model", [])],
)
def test_the_command(task, cores, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(devices, "use_all_cores", used.append)
    monkeypatch.setattr(timing, "in_turns", in_no_time)
    options = {"width": 4, "batch-size": 4, "steps": 1, "turns": 3, "matmul": 8}
    options |= {"out": tmp_path, "name": "c"}
    command = ["bench", task, *(f"--{key}={value}" for key, value in options.items())]
    monkeypatch.setattr(sys, "argv", [*command, "--no-torch"])
    runpy.run_module("train.bench", run_name="__main__")
    assert used == cores  # one device: its matrix products use them all
    results = json.loads((tmp_path / "c" / "bench.json").read_text())
    assert len(results["rows"]) == 2 and not results["failed"]
    assert all(row["turns_ms"] == [1e3] * 3 for row in results["rows"].values())


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TINY, {"steps": 0}, "steps must be at least 1, got 0"),
        (TINY, {"blocks": 0}, "blocks must be at least 1, got 0"),
        (TINY, {"batch_size": 3}, "multiple of"),
        (TINY_LM, {"turns": 0}, "turns must be at least 1, got 0"),
        (TINY_LM, {"words": 1}, "words must be at least 2, got 1"),
        (TINY_LM, {"bptt": 29}, "bptt must be at least 30, got 29"),
        (TINY_LM, {"width": 0}, "width must be at least 1, got 0"),
        (TINY_LM, {"batch_size": 3}, "batch_size must be a multiple of the 2 devices"),
    ],
)
def test_bad_settings(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.main(dataclasses.replace(config, out=tmp_path, **changes))
    assert not list(tmp_path.iterdir())
