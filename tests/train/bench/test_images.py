"""train.bench_images on a tiny network: what is timed, and the page."""

import json
import re

import pytest
from PIL import Image

from train.bench import images as bench_images
from train.data import pictures as images
from train.models import resnet
from train.references import resnet as torch_resnet

pytestmark = pytest.mark.usefixtures("lenient", "cache")


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    counts = (1, 1, 1, 1)
    monkeypatch.setitem(resnet.LAYERS, "resnet18", (resnet.BasicBlock, counts))
    monkeypatch.setitem(torch_resnet.LAYERS, "resnet18", (False, counts))


def tiny(tmp_path, **changes):
    options = {"architecture": "resnet18", "width": 4, "size": 32, "batch_size": 4}
    options |= {"steps": 3, "turns": 2, "matmul": 64, "out": tmp_path, "name": "bench"}
    return bench_images.Config(**options | changes)


def test_a_bench(tmp_path):
    results = bench_images.main(tiny(tmp_path))
    rows, folder = results["rows"], tmp_path / "bench"
    assert len(rows) == 7 and not results["failed"]
    for row in rows.values():
        assert len(row["turns_ms"]) == 2
        assert row["best_ms"] == min(row["turns_ms"])
        per_second = 4 / (row["median_ms"] / 1e3)
        assert row["images_per_second"] == pytest.approx(per_second)
    both = rows["reading and a step, as in training"]["median_ms"]
    alone = rows["a step"]["median_ms"]
    assert results["training_over_step"] == pytest.approx(both / alone)
    eager = rows["PyTorch's step, eager"]["median_ms"]
    assert results["here_over_eager"] == pytest.approx(alone / eager)
    page = (folder / "bench.md").read_text()
    assert len(re.findall(r"^\|", page, re.MULTILINE)) == 9
    assert f"takes {both / alone:.2f} x its steps" in page
    assert json.loads((folder / "bench.json").read_text()) == results


def test_each_turn_reads_all_its_batches(tmp_path):
    """Also from fewer images than a turn needs."""
    data = bench_images.made_images(tmp_path, 20)
    files = images.read(data).train
    batches = list(bench_images.batches_of(tiny(tmp_path, steps=7), files, 2))
    assert [batch["image"].shape for batch in batches] == [(4, 32, 32, 3)] * 7
    with Image.open(files.paths[0]) as image:
        assert image.size == (900, 600)


def test_flops(tmp_path):
    """The first convolution and the head, counted by hand, and all of ResNet-50."""
    config = tiny(tmp_path, architecture="resnet50", width=64, size=224)
    settings = bench_images.settings_of(config, tmp_path)
    flops = bench_images.image_flops(settings)
    head = 2 * (4096 * 512 + 512 * 196)
    assert flops == pytest.approx(2 * 4.089e9 + head, rel=2e-3)  # torchvision: 4.09 G


@pytest.mark.parametrize("option", ["steps", "turns"])
def test_options_are_checked(tmp_path, option):
    with pytest.raises(ValueError, match=option):
        bench_images.main(tiny(tmp_path, **{option: 0}))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "bench").mkdir()
    with pytest.raises(ValueError, match="exists"):
        bench_images.main(tiny(tmp_path))
