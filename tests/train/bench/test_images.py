"""The benchmark of train.cars and its images, on a tiny network."""

import itertools

import pytest
from PIL import Image

from train.bench import images
from train.data import pictures
from train.models import resnet
from train.references import resnet as torch_resnet

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")


@pytest.fixture
def shallow(monkeypatch):
    counts = (1, 1, 1, 1)
    monkeypatch.setitem(resnet.LAYERS, "resnet18", (resnet.BasicBlock, counts))
    monkeypatch.setitem(torch_resnet.LAYERS, "resnet18", (False, counts))


def tiny(tmp_path, **changes):
    options = {"architecture": "resnet18", "width": 4, "size": 32, "batch_size": 4}
    options |= {"steps": 3, "turns": 2, "matmul": 64, "out": tmp_path, "name": "bench"}
    return images.Config(**options | changes)


@pytest.mark.slow
def test_a_bench(tmp_path, shallow):
    results = images.main(tiny(tmp_path))
    rows = results["rows"]
    assert list(rows) == [
        *("reading, one thread", "reading, all threads"),
        *("step, frozen body", "step"),
        *("training, frozen body", "training", "PyTorch's step, eager"),
    ]
    assert not results["failed"]
    for row in rows.values():
        assert row["images_per_second"] * row["median_ms"] == pytest.approx(4e3)
    assert 3 * rows["step, frozen body"]["flops"] == rows["step"]["flops"]
    assert not {"flops", "floor_ms"} & rows["training"].keys()
    assert {name: list(row["over"]) for name, row in rows.items() if "over" in row} == {
        "step": ["PyTorch's step, eager"],
        "training, frozen body": ["step, frozen body"],
        "training": ["step"],
    }
    page = (tmp_path / "bench" / "bench.md").read_text()
    assert "from random JPEGs of 900 x 600 pixels" in page


@pytest.mark.slow
def test_training_reads_a_batch_per_step(tmp_path, shallow, monkeypatch):
    config, read = tiny(tmp_path), []
    files = pictures.read(images.write_images(tmp_path, 10)).train
    turn_batches = images.turn_batches

    def count(*args):
        for batch in turn_batches(*args):
            read.append(batch["image"].shape)
            yield batch

    monkeypatch.setattr(images, "turn_batches", count)
    settings = images.make_settings(config, tmp_path)
    program = images.jax_program(config, settings, True, files)
    program.run()
    assert read == [(4, 32, 32, 3)] * config.steps
    assert program.work is None and program.calls == config.steps


def test_each_turn_reads_all_its_batches(tmp_path):
    """Also from fewer images than a turn needs."""
    files = pictures.read(images.write_images(tmp_path, 20)).train
    batches = list(images.turn_batches(tiny(tmp_path, steps=7), files, 2))
    assert [batch["image"].shape for batch in batches] == [(4, 32, 32, 3)] * 7
    with Image.open(files.paths[0]) as image:
        assert image.size == (900, 600)


def taps(module, size: int) -> int:
    """Multiply-adds of a convolution over an image, without taps outside of it."""
    stride, kernel, padding = (
        x[0] for x in (module.stride, module.kernel_size, module.padding)
    )
    starts = range(-padding, size + padding - kernel + 1, stride)
    along = sum(0 <= i + k < size for i, k in itertools.product(starts, range(kernel)))
    return along**2 * module.in_channels * module.out_channels


def test_flops(tmp_path):
    """All of ResNet-50, counted on PyTorch's network, and the head by hand."""
    import torch

    net, macs = torch_resnet.ResNet("resnet50"), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda module, args, _: macs.append(taps(module, args[0].shape[-1]))
            )
    with torch.device("meta"):
        net.eval().to("meta")(torch.zeros(1, 3, 224, 224))
    head = 4096 * 512 + 512 * images.CLASSES
    settings = images.make_settings(
        tiny(tmp_path, architecture="resnet50", width=64, size=224), tmp_path
    )
    flops = images.image_flops(settings)
    assert 1 < flops / (2 * (sum(macs) + head)) < 1.01  # and norms


@pytest.mark.parametrize("option", ["steps", "turns"])
def test_bad_options(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        images.main(tiny(tmp_path, **{option: 0}))
    assert not list(tmp_path.iterdir())
