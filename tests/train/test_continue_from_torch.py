"""train.continue_from_torch on few images: one run in two libraries, its files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from train import continue_from_torch

pytestmark = pytest.mark.usefixtures("lenient")

TINY = continue_from_torch.Config(
    begin=3, middle=2, end=2, width=2, train_size=24, batch_size=8, name="run"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        results = continue_from_torch.main(dataclasses.replace(TINY, out=folder))
    return folder / "run", results


def test_it_is_one_run(run):
    _, results = run
    losses, stayed = np.array(results["losses"]), np.array(results["stayed"])
    assert len(losses) == len(stayed) == TINY.steps
    assert (losses[3:] != stayed[3:]).any()  # it has been in another library
    np.testing.assert_allclose(losses, stayed, rtol=1e-9)
    assert results["loss_difference"] == np.abs(losses - stayed).max()
    assert results["weight_difference"] < 1e-9
    # The moments matter: without them the second loss in Flax is another.
    without = np.array(results["without_moments"])
    assert without[0] == losses[3]
    assert abs(without[1] - losses[4]) > 1e-3


def test_files(run):
    folder, results = run
    written = json.loads((folder / "results.json").read_text())
    assert written["losses"] == results["losses"]
    assert imread(folder / "losses.png").shape == (720, 960, 4)
    table = (folder / "results.md").read_text()
    for step, name in enumerate(["PyTorch"] * 3 + ["Flax"] * 2 + ["PyTorch"] * 2):
        if f"| {step} " in table:
            loss = results["losses"][step]
            assert f"| {step}    | {name:7} | {loss:.6f} |" in table
    first, second = (
        torch.load(folder / "checkpoints" / name, weights_only=True)
        for name in ("begin.pt", "middle.pt")
    )
    for part in ("model", "optimizer", "scheduler"):
        assert first[part].keys() == second[part].keys()
    assert second["scheduler"]["last_epoch"] == 5
    assert second["model"]["bn1.num_batches_tracked"] == 5
    assert {float(s["step"]) for s in second["optimizer"]["state"].values()} == {5}


def test_bad_arguments(run):
    folder, _ = run
    with pytest.raises(ValueError, match="exists; choose another"):
        continue_from_torch.main(dataclasses.replace(TINY, out=folder.parent))
    for change in ({"middle": 0}, {"batch_size": 1}, {"batch_size": 25}):
        with pytest.raises(ValueError, match=next(iter(change))):
            continue_from_torch.main(dataclasses.replace(TINY, **change))
