"""Tables, numbers and lines of progress."""

import dataclasses

import pytest

from train.run import report
from train.run.output import Output


def test_a_table():
    rows = [("recipe", "accuracy, %"), ("sgd", "94.10"), ("adamw", "–")]
    assert report.markdown(rows) == (
        "| recipe   | accuracy, %   |\n"
        "|----------|---------------|\n"
        "| sgd      | 94.10         |\n"
        "| adamw    | –             |"
    )


def test_mean_and_deviation():
    numbers = report.summary([1.0, 2.0, 4.5])
    assert numbers == {"mean": 2.5, "std": pytest.approx(1.8028, rel=1e-4)} | {
        "runs": [1.0, 2.0, 4.5]
    }
    assert report.spread(numbers) == "2.50 ± 1.80"
    single = report.summary([1.0])
    assert single["std"] is None and report.spread(single) == "1.00"


def test_a_run_on_several_machines():
    starts = [
        {"devices": "2 x cpu", "compile_seconds": 1.0},
        {"devices": "1 x abacus", "compile_seconds": 2.0},
        {"devices": "2 x cpu", "compile_seconds": 3.0},
    ]
    assert report.machine(starts) == {
        "compile_seconds": [1.0, 2.0, 3.0],
        "devices": "1 x abacus and 2 x cpu",
    }


def test_changed_settings(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config(Output):
        epochs: int = 1
        seed: int = 0

    changed = report.changed_settings(
        Config(epochs=2, seed=3, out=tmp_path, name="x"), Config(), ("seed",)
    )
    assert changed == {"epochs": 2}


def test_a_line_of_progress():
    line = {"seed": 0, "epoch": 2, "step": 8, "loss": 0.5, "learning_rate": 1e-3}
    options = {"epochs": 3, "steps": 12, "seconds_left": 61.2}
    assert report.progress_line(line, **options) == (
        "seed 0 epoch 2/3 step 8/12 loss 0.5000 lr 1.00e-03 0:01:01 left"
    )
    line["b1"] = 0.85
    assert report.progress_line(
        line, **options, results="test 0.4000 90.00 %", speed="7 images/s"
    ) == (
        "seed 0 epoch 2/3 step 8/12 loss 0.5000 test 0.4000 90.00 % lr 1.00e-03 "
        "b1 0.850 7 images/s 0:01:01 left"
    )


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_line_on_a_terminal_fits(width, monkeypatch):
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    line = {"seed": 10, "epoch": 12, "step": 46_920, "loss": 0.5, "b1": 0.85}
    text = report.progress_line(
        line | {"learning_rate": 1e-3},
        epochs=30,
        steps=117_300,
        seconds_left=7261.2,
        results="valid 0.4000 (perplexity 123.45)",
        speed="1,234 images/s (12% waiting for them)",
    )
    assert len(text) <= width
    assert "epoch 12/30" in text and "valid 0.4000 (perplexity 123.45)" in text
    assert ("2:01:01 left" in text) == (width >= 80)
    assert ("b1 0.850" in text) == (width == 200)
