"""The benchmark of train.cifar10, on a tiny network."""

import dataclasses

import pytest

from train.bench import cifar10

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

TINY = cifar10.Config(
    blocks=1, width=2, batch_size=4, steps=2, turns=2, matmul=64, name="b",
    torch_compile=False,
)  # fmt: skip


def multiply_adds(blocks: int, width: int) -> int:
    """Of an image, by hand: 3x3 convolutions without the taps outside of it."""

    def taps(size, stride=1):  # along one side
        return sum(
            0 <= i + k < size for i in range(0, size, stride) for k in (-1, 0, 1)
        )

    total, n_in = taps(32) ** 2 * 3 * 16, 16  # the stem
    for stage, size in enumerate((32, 16, 8)):
        n_out, larger = width * 2**stage, size if stage == 0 else 2 * size
        stride = larger // size
        total += taps(larger, stride) ** 2 * n_in * n_out + size**2 * n_in * n_out
        total += (2 * blocks - 1) * taps(size) ** 2 * n_out * n_out
        n_in = n_out
    return total + n_in * 10  # the head


def test_flops_of_an_image():
    """The article's network; norms and activations are little beside it."""
    flops = cifar10.image_flops(3, 96)
    assert 1 < flops / (2 * multiply_adds(3, 96)) < 1.005
    assert flops == pytest.approx(2.526e9, rel=1e-3)


@pytest.mark.slow
def test_a_bench(tmp_path):
    results = cifar10.main(dataclasses.replace(TINY, out=tmp_path))
    names = ["JAX, many steps a call", "JAX, one step a call", "PyTorch, eager"]
    assert list(results["rows"]) == names and not results["failed"]
    flops = 3 * 4 * cifar10.image_flops(1, 2)
    for row in results["rows"].values():
        assert row["flops"] == flops
        assert row["floor_ms"] == pytest.approx(flops / results["matmul_tflops"] / 1e9)
        assert row["images_per_second"] * row["median_ms"] == pytest.approx(4e3)
    assert list(results["rows"][names[0]]["over"]) == names[1:]
    page = (tmp_path / "b" / "bench.md").read_text()
    assert page.startswith("WideResNet, 1 blocks a stage, width 2, batches of 4, float")


@pytest.mark.parametrize(
    ("torch", "torch_compile", "peers"),
    [(False, True, 0), (True, False, 1), (True, True, 2)],
)
def test_pytorch_can_be_left_out_and_may_fail(torch, torch_compile, peers):
    config = dataclasses.replace(TINY, torch=torch, torch_compile=torch_compile)
    bench = cifar10.make_bench(config)
    pytorch = ("PyTorch, eager", "PyTorch, compiled")[:peers]
    assert tuple(bench.programs)[2:] == bench.may_fail == pytorch
    assert len(bench.ratios) == 1 + peers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be .* a multiple of the 2 devices, got 3"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cifar10.main(dataclasses.replace(TINY, out=tmp_path, **changes))
    assert not list(tmp_path.iterdir())
