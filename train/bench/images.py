"""Does the device wait for its images? A training step of train.cars and what feeds it.

    python -m train.bench_images                      # ResNet-50, 224 pixels
    python -m train.bench_images --architecture resnet18 --width 16 --size 64 \\
        --steps 8 --data-dir DIR                      # on a CPU, images of your own

Times, in turns and in one process: reading and augmenting images alone, with one thread
and with all; a step on images that are there already, with the body frozen and without,
here and in PyTorch; and training as train.cars does it, with both at once. What this
takes longer than its step alone is what reading costs. On a CPU threads and step share
the cores, so that there it is not little. Without --data-dir the images are JPEGs of
900 x 600 pixels, near the size of Stanford Cars', made for the purpose.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from train import cars
from train.bench import timing
from train.data import pictures as images
from train.run import devices, record
from train.run.report import markdown

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Times a step of train.cars, the reading of its images, and both at once."""

    data_dir: Path | None = None  # as in train.cars; None: made for the purpose
    architecture: cars.Architecture = "resnet50"
    width: int = 64  # channels behind the first convolution
    size: int = 224  # pixels of a side
    batch_size: int = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    steps: int = 100  # per turn, many more than threads
    turns: int = 5  # best and median of them are reported
    workers: int | None = None  # threads that read images; None: one for each core
    matmul: int | None = None  # rows of the matrix product; None: 8192, CPU 2048
    torch: bool = True  # time PyTorch as well

    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: bench-images-DATE
    overwrite: bool = False  # replace the results of an earlier run of that name


def settings_of(config: Config, data_dir: Path) -> cars.Config:
    """Two stages, as with weights."""
    names = ("architecture", "width", "size", "batch_size", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"frozen_epochs": 1, "epochs": 1, "divisors": (9, 3, 1)}
    weights = Path("none.pth")  # never read: it takes as long with any
    return cars.settled(cars.Config(data_dir, weights=weights, **settings))


def made_images(folder: Path, count: int) -> Path:
    """JPEGs of noise that is smooth, as photographs are, in two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / str(i % 2) / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))
        small.resize((900, 600), Image.Resampling.BICUBIC).save(path, quality=85)
    return folder


# ---------------------------------------------------------------------------
# what is timed
# ---------------------------------------------------------------------------


def batches_of(config: Config, files: images.Files, workers: int | None):
    """As many as a turn has steps, and no more, so that none is read in vain."""
    count = config.steps * config.batch_size
    paths = (files.paths * -(-count // len(files.paths)))[:count]
    files = images.Files(paths, np.resize(files.labels, count))
    return images.train_batches(
        *(files, config.size, config.batch_size),
        **{"seed": 0, "epochs": 1, "workers": workers},
    )


def reading(config: Config, files: images.Files, workers: int | None):
    def turn():
        for _ in batches_of(config, files, workers):
            pass

    return turn


def here(config: Config, settings, frozen: bool, files: images.Files | None = None):
    """Steps on one batch or, with files, on those that are read meanwhile."""
    programs = cars.build(settings, config.batch_size, 196)
    stage = programs.stages[0 if frozen else 1]
    everywhere, place = cars.everywhere(), cars.batch_place(config.batch_size)
    whole = {"out_shardings": everywhere}
    weights = jax.jit(programs.initial, **whole)(np.int32(0))
    begin = functools.partial(programs.begin, stage)
    state = jax.jit(begin, **whole)(np.int32(stage.first), *weights)
    step = functools.partial(programs.train_step, stage)
    step = jax.jit(step, donate_argnums=0, **whole)
    there = jax.device_put(random_batch(config), place)
    step = step.lower(state, *there, np.int32(0)).compile()

    def turn():
        nonlocal state
        ahead = []
        batches = itertools.repeat(None, config.steps)
        if files is not None:
            batches = batches_of(config, files, config.workers)
        for read in batches:
            x, y = (read["image"], read["label"]) if read else there
            batch = jax.device_put((x, y), place)
            if len(ahead) == 2:  # as in train.cars
                ahead.pop(0).block_until_ready()
            state, loss = step(state, *batch, np.int32(0))
            ahead.append(loss)
        jax.block_until_ready(ahead)

    return turn


def random_batch(config: Config):
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.size, config.size, 3)
    x = rng.integers(0, 256, shape, np.uint8)
    return x, rng.integers(0, 196, config.batch_size).astype(np.int32)


def in_pytorch(config: Config, settings) -> Callable[[], None]:
    """The same step, all of the network: channels last, autocast."""
    import torch

    from train.references import resnet as torch_resnet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    net: Any = torch_resnet.ResNet(config.architecture, config.width)
    net = net.to(device, memory_format=torch.channels_last)
    adam = torch.optim.Adam(
        net.parameters(), 3e-4, (0.95, 0.99), weight_decay=settings.l2, fused=True
    )
    mean, std = (
        torch.tensor(255 * v, device=device) for v in (images.MEAN, images.STD)
    )
    x, y = (torch.tensor(a, device=device) for a in random_batch(config))
    bfloat16 = settings.dtype == "bfloat16"

    def turn():
        for _ in range(config.steps):
            adam.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = net(((x - mean) / std).permute(0, 3, 1, 2))
                loss = torch.nn.functional.cross_entropy(logits, y.long())
            loss.backward()
            adam.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


def image_flops(settings) -> int:
    """Of an image, forward."""
    net = cars.network(settings.architecture, settings.width, "float32", 196)
    shapes = jax.eval_shape(net.initial, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, settings.size, settings.size, 3), jnp.uint8)
    return timing.flops(lambda *args: net.logits(*args)[0], *shapes, x)


# ---------------------------------------------------------------------------
# turns and report
# ---------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Prints a table and writes it to bench.json; returns what is there."""
    for option in ("steps", "turns"):
        if getattr(config, option) < 1:
            value = getattr(config, option)
            raise ValueError(f"{option} must be at least 1, got {value!r}")
    with tempfile.TemporaryDirectory() as folder:
        if config.data_dir is None:
            data_dir = made_images(Path(folder), 10 * max(13, config.batch_size // 8))
        else:
            data_dir = config.data_dir
        pictures = images.read(data_dir)
        settings = settings_of(config, data_dir)
        cars.check(settings, max(len(pictures.train.labels), 2 * config.batch_size))
        return measure(config, settings, pictures.train)


def measure(config: Config, settings, files: images.Files) -> dict[str, Any]:
    folder = record.new_folder(config, "bench-images")
    n = config.matmul or (2048 if jax.default_backend() == "cpu" else 8192)
    mesh = devices.data_mesh()
    product, product_flops = timing.matmul_program(n, jnp.dtype(settings.dtype), mesh)
    step, frozen = "a step", "a step, the body frozen"
    both, torch = "reading and a step, as in training", "PyTorch's step, eager"
    makers: dict[str, Any] = {
        "matrix product": lambda: lambda: jax.block_until_ready(product()),
        "reading, one thread": lambda: reading(config, files, 1),
        "reading, all threads": lambda: reading(config, files, config.workers),
        frozen: lambda: here(config, settings, True),
        step: lambda: here(config, settings, False),
        f"reading and {frozen}": lambda: here(config, settings, True, files),
        both: lambda: here(config, settings, False, files),
    }
    if config.torch:
        makers[torch] = lambda: in_pytorch(config, settings)
    seconds, ready, failed = timing.in_turns(makers, config.turns, (torch,))

    rate = product_flops / min(seconds.pop("matrix product"))
    flops = image_flops(settings) * config.batch_size
    floors = {frozen: flops / rate, step: 3 * flops / rate}
    rows = {
        name: {
            "best_ms": 1e3 * min(turns) / config.steps,
            "median_ms": 1e3 * float(np.median(turns)) / config.steps,
            "images_per_second": (
                config.steps * config.batch_size / float(np.median(turns))
            ),
            "floor_ms": 1e3 * floors[name] if name in floors else None,
            "ready_seconds": ready[name],
            "turns_ms": [1e3 * turn / config.steps for turn in turns],
        }
        for name, turns in seconds.items()
    }
    median = {name: row["median_ms"] for name, row in rows.items()}
    results: dict[str, Any] = {
        "rows": rows,
        "failed": failed,
        "matmul_tflops": rate / 1e12,
        # of the median times; None where one was not timed
        "training_over_step": median[both] / median[step],
        "frozen_training_over_step": median[f"reading and {frozen}"] / median[frozen],
        "here_over_eager": median[step] / median[torch] if torch in median else None,
    }
    environment = record.environment()
    page = report(config, settings, results, environment)
    record.write_bench(folder, config, environment, results, page)
    return results


def report(config: Config, settings, results: dict[str, Any], environment) -> str:
    where = "images of 900 x 600 pixels" if config.data_dir is None else "given images"
    lines = [
        f"{config.architecture}, width {config.width}, batches of {config.batch_size} "
        f"at {config.size} pixels from {where}, {settings.dtype}, on "
        f"{environment['devices']} with {environment['cores']} cores; floors at the "
        f"{results['matmul_tflops']:.3g} TFLOP/s of a large matrix product. "
        f"{config.turns} turns of {config.steps} steps.",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("", "ms per batch, best", "median", "images/s", "floor, ms")
    ]
    for name, row in results["rows"].items():
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3g}"
        rows.append(
            (name, f"{row['best_ms']:.3g}", f"{row['median_ms']:.3g}")
            + (f"{row['images_per_second']:,.0f}", floor)
        )
    rows += [(name, why, "", "", "") for name, why in results["failed"].items()]
    lines += [markdown(rows), ""]
    lines.append(
        f"With reading, training takes {results['training_over_step']:.2f} x its steps "
        f"alone, {results['frozen_training_over_step']:.2f} x with the body frozen."
    )
    if results["here_over_eager"] is not None:
        ratio = f"{results['here_over_eager']:.2f}"
        lines.append(f"A step here takes {ratio} x one of PyTorch, eager.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    config = tyro.cli(Config)
    devices.use_all_cores(config.batch_size)
    main(config)
