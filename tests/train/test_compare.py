"""The comparison on tiny settings: its command line, its files, its page."""

import dataclasses
import json
import subprocess
import sys

import comparison_runs
import jax
import numpy as np
import pytest

from train import compare
from train.recipes import compare as recipe
from train.references import loop as torch_loop

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

TINY = compare.Config(**vars(comparison_runs.TINY))
TINY_CIFAR = compare.Config(**vars(comparison_runs.TINY_CIFAR))
NAMES = list(recipe.OPTIMIZERS)


@pytest.fixture
def two_optimizers(monkeypatch):
    """Compiles two branches of the program instead of five."""
    two = {name: recipe.OPTIMIZERS[name] for name in ("adam-l2", "adamw")}
    monkeypatch.setattr(recipe, "OPTIMIZERS", two)
    return two


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fast_compile):
    """A comparison without PyTorch: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        patch.setitem(sys.modules, "torch", None)
        printed: list[str] = []
        patch.setattr(sys.stdout, "write", printed.append)
        folder = compare.main(dataclasses.replace(TINY, out=out, name="one"))
    return folder, "".join(printed)


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def test_files(finished):
    folder, _ = finished
    assert folder.name == "one"
    files = {"config.json", "results.json", "results.md", "heatmap.png", "curves.png"}
    assert {path.name for path in folder.iterdir()} == files
    for picture in folder.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert picture.stat().st_size > 10_000
    settings = json.loads((folder / "config.json").read_text())
    assert settings["train_size"] == 40
    assert settings["versions"]["jax"] == jax.__version__
    assert settings["devices"] == "2 x cpu"


def test_results(finished):
    results = read_results(finished[0])
    assert list(results["tuning"]) == list(results["test"]) == NAMES
    for name in NAMES:
        grid, best = results["tuning"][name]["grid"], results["tuning"][name]
        accuracy = np.array(grid["accuracies"])
        assert accuracy.shape == (2, 2, 2)
        assert best["accuracy"] == pytest.approx(accuracy.mean(-1).max(), abs=0.01)
        assert best["lr"] in grid["learning_rates"]
        assert np.array(results["test"][name]["accuracy"]).shape == (3, 2)


def test_page(finished):
    folder, printed = finished
    page = (folder / "results.md").read_text()
    assert printed.rstrip().endswith(page.rstrip())
    assert "55 of 55 runs" in printed
    rows = [line.split("|")[1:-1] for line in page.splitlines() if "|" in line]
    assert len(rows) == 2 + len(NAMES)
    assert {len(row) for row in rows} == {7}
    assert "Not compared with PyTorch" in page
    assert page.rstrip().endswith(f"**{read_results(folder)['finding']}**")


def test_a_folder_is_overwritten_only_on_request(finished, two_optimizers):
    """With two of the optimizers and in other chunks, which changes no number."""
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    config = dataclasses.replace(TINY, out=folder.parent, name=folder.name)
    with pytest.raises(ValueError, match="one exists; .* --overwrite"):
        compare.main(config)
    assert (folder / "results.json").read_bytes() == before

    five = read_results(folder)
    compare.main(dataclasses.replace(config, overwrite=True, chunk=7, torch=False))
    two = read_results(folder)
    for results in (five, two):
        for tuning in results["tuning"].values():
            del tuning["seconds_per_run"]
    for part in ("tuning", "test"):
        assert two[part] == {name: five[part][name] for name in two_optimizers}
    assert two["adamw_minus_adam_l2"] == five["adamw_minus_adam_l2"]
    assert two["finding"] == five["finding"]


@pytest.mark.slow
def test_cifar10(tmp_path, cifar_dir, capsys, two_optimizers):
    config = dataclasses.replace(TINY_CIFAR, data_dir=cifar_dir, out=tmp_path)
    folder = compare.main(config)
    assert folder.name.startswith("compare-cifar10-")
    results = read_results(folder)
    assert results["test"]["adamw"]["n"] == 3
    if torch_loop.is_available():
        assert "A PyTorch loop on one core takes" in capsys.readouterr().out
        assert list(results["speed"]["torch"]) == list(two_optimizers)


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------

SETTINGS = [
    f"--{key.replace('_', '-')}={value}"
    for key, value in vars(TINY).items()
    if key not in ("data_dir", "torch", "out", "name", "overwrite")
]


def test_parse_args(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path)
    assert compare.parse_args([*SETTINGS, f"--out={tmp_path}"]) == config
    assert vars(compare.parse_args([])).items() >= vars(recipe.Config()).items()
    config = compare.parse_args(["--dataset", "cifar10", "--seeds", "3"])
    expected = dataclasses.replace(recipe.RECIPES["cifar10"], seeds=3)
    assert vars(config).items() >= vars(expected).items()


@pytest.mark.slow
def test_the_command(tmp_path):
    """As a user starts it, with every core a device."""
    command = [sys.executable, "-m", "train.compare", *SETTINGS, f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs/s" in done.stdout
    assert "With learning rate and decay tuned for each" in done.stdout
    (folder,) = tmp_path.iterdir()
    flags = json.loads((folder / "config.json").read_text())["xla_flags"]
    assert "host_platform_device_count" in flags


@pytest.mark.slow
def test_importing_needs_neither_tyro_nor_torch_nor_sklearn():
    code = (
        "import sys\n"
        "for name in ('tyro', 'torch', 'sklearn', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
        "import train.compare"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("dataset", "mnist", "one of digits, cifar10"),
        ("data_dir", "here", "None for digits"),
        ("train_size", 0, "at least 1"),
        ("train_size", 5000, r"\[1, 1795\]"),
        ("eval_size", 5000, r"\[1, 878\]"),
        ("eval_size", 0, r"\[1, 878\]"),
        ("label_noise", 1.0, r"\[0, 1\)"),
        ("label_noise", float("nan"), r"\[0, 1\)"),
        ("width", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, r"\[1, 40\]"),
        ("batch_size", 41, r"\[1, 40\]"),
        ("evaluate_every", 4, r"one of \[1, 2, 3, 6\]"),
        ("target", 100.0, r"\(0, 100\)"),
        ("grid", 1, "at least 2"),
        ("tune_seeds", 0, "at least 1"),
        ("seeds", 1, "at least 2"),
        ("chunk", 0, "at least 1"),
    ],
)
def test_bad_settings(tmp_path, option, value, allowed):
    config = dataclasses.replace(TINY, out=tmp_path, **{option: value})
    with pytest.raises(ValueError, match=f"{option} .*{allowed}.* got .?{value}"):
        compare.main(config)
    assert not list(tmp_path.iterdir())
