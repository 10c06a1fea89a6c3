"""A run that switches libraries on few images: its losses and its files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from train import continue_from_torch

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

TINY = continue_from_torch.Config(
    begin=3, middle=2, end=2, width=2, train_size=24, batch_size=8, name="run"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, fast_compile):
    folder = tmp_path_factory.mktemp("runs")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        results = continue_from_torch.main(dataclasses.replace(TINY, out=folder))
    return folder / "run", results


@pytest.mark.slow
def test_switching_libraries_changes_nothing(run):
    _, results = run
    losses, stayed = np.array(results["losses"]), np.array(results["stayed"])
    assert len(losses) == len(stayed) == TINY.steps
    assert (losses[3:] != stayed[3:]).any()  # it was in another library
    np.testing.assert_allclose(losses, stayed, rtol=1e-9)
    assert results["loss_difference"] == np.abs(losses - stayed).max()
    assert results["weight_difference"] < 1e-9
    # The moments matter: without them the second loss in Flax differs.
    without = np.array(results["without_moments"])
    assert without[0] == losses[3]
    assert abs(without[1] - losses[4]) > 1e-3


@pytest.mark.slow
def test_files(run):
    folder, results = run
    written = json.loads((folder / "results.json").read_text())
    assert written["losses"] == results["losses"]
    assert imread(folder / "losses.png").shape == (720, 960, 4)
    page = (folder / "results.md").read_text()
    cells = [line.split("|")[1:4] for line in page.splitlines() if line[:1] == "|"]
    rows = [tuple(cell.strip() for cell in row) for row in cells[2:]]
    libraries = ["PyTorch"] * 3 + ["Flax"] * 2 + ["PyTorch"] * 2
    assert rows == [
        (str(step), library, f"{results['losses'][step]:.6f}")
        for step, library in enumerate(libraries)
        if step != 1  # shown are the steps around a switch
    ]
    assert f"at most {results['loss_difference']:.1e}" in page
    first, second = (
        torch.load(folder / "checkpoints" / name, weights_only=True)
        for name in ("begin.pt", "middle.pt")
    )
    for part in ("model", "optimizer", "scheduler"):
        assert first[part].keys() == second[part].keys()
    assert second["scheduler"]["last_epoch"] == 5
    assert second["model"]["bn1.num_batches_tracked"] == 5
    assert {float(s["step"]) for s in second["optimizer"]["state"].values()} == {5}


@pytest.mark.slow
def test_bad_arguments(run):
    folder, _ = run
    with pytest.raises(ValueError, match="exists; choose another"):
        continue_from_torch.main(dataclasses.replace(TINY, out=folder.parent))
    for change in ({"middle": 0}, {"batch_size": 1}, {"batch_size": 25}):
        with pytest.raises(ValueError, match=next(iter(change))):
            continue_from_torch.main(dataclasses.replace(TINY, **change))
