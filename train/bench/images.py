"""Does the device wait for its images? A training step of train.cars and its loader.

    python -m train.bench images                      # ResNet-50, 224 pixels
    python -m train.bench images --architecture resnet18 --width 16 --size 64 \\
        --steps 8 --data-dir DIR                      # on a CPU, with your own images

Times reading and augmenting images, with one thread and with all; a step on a batch
that is already on the device, with a frozen body and without, and in PyTorch; and
training as train.cars does it, which reads while it computes. What training takes
longer than its step alone is the cost of reading. On a CPU that is much, since threads
and step share the cores.

Without --data-dir the images are random JPEGs of 900 x 600 pixels, about the size of
Stanford Cars'. The floor is the arithmetic of the network at the rate of a large matrix
product in the same dtype: forward for a frozen body, forward and backward otherwise.
"""

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from train.bench import harness, probes
from train.bench.harness import Bench, Program
from train.data import augment, loader, pictures
from train.models import classifier
from train.recipes import cars as recipe
from train.run import devices

CLASSES = 196  # Stanford Cars'
WAITING = 2  # steps that may wait for the device, as in train.cars

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(harness.Turns):
    """Times a training step of train.cars, the reading of its images, and both."""

    data_dir: Path | None = None  # as for train.cars; None: random JPEGs
    architecture: recipe.Architecture = "resnet50"
    width: int = 64  # channels after the first convolution
    size: int = 224  # pixels per side
    batch_size: int = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    steps: int = 100  # per turn; many more than threads
    turns: int = 5  # best, median and spread of them are reported
    workers: int | None = None  # threads that read images; None: one for each core
    matmul: int | None = None  # rows of the matrix product; None: 8192, CPU 2048
    torch: bool = True  # time PyTorch as well


def make_settings(config: Config, data_dir: Path) -> recipe.Config:
    """Two stages, as with pretrained weights."""
    names = ("architecture", "width", "size", "batch_size", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"frozen_epochs": 1, "epochs": 1, "divisors": (9, 3, 1)}
    weights = Path("none.pth")  # never read: a step takes the same time with any
    return recipe.resolve(recipe.Config(data_dir, weights=weights, **settings))


def write_images(folder: Path, count: int) -> Path:
    """Writes JPEGs of noise that is smooth, as photographs are, in two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / str(i % 2) / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))
        small.resize((900, 600), Image.Resampling.BICUBIC).save(path, quality=85)
    return folder


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


def turn_batches(config: Config, files: pictures.Files, workers: int | None):
    """The batches of a turn, and no more, so that none is read in vain."""
    count = config.steps * config.batch_size
    paths = (files.paths * -(-count // len(files.paths)))[:count]
    files = pictures.Files(paths, np.resize(files.labels, count))
    return loader.train_batches(
        *(files, config.size, config.batch_size),
        **{"seed": 0, "epochs": 1, "workers": workers},
    )


def random_batch(config: Config) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.size, config.size, 3)
    x = rng.integers(0, 256, shape, np.uint8)
    return x, rng.integers(0, CLASSES, config.batch_size).astype(np.int32)


def reading_program(
    config: Config, files: pictures.Files, workers: int | None
) -> Program:
    def run():
        for _ in turn_batches(config, files, workers):
            pass

    return Program(run, config.steps)


def jax_program(
    config: Config,
    settings: recipe.Config,
    frozen: bool,
    files: pictures.Files | None = None,
) -> Program:
    """Steps on one batch or, with files, on batches that are read meanwhile."""
    programs = recipe.build(settings, config.batch_size, CLASSES)
    stage = programs.stages[0 if frozen else 1]
    sharding = recipe.batch_sharding(config.batch_size)
    jit = functools.partial(jax.jit, out_shardings=recipe.replicated())
    seed = np.int32(0)
    begin = jit(functools.partial(programs.begin_stage, stage))
    state = begin(np.int32(stage.first), *jit(programs.init)(seed))
    step = jit(functools.partial(programs.train_step, stage), donate_argnums=0)
    batch = jax.device_put(random_batch(config), sharding)
    compiled = step.lower(state, *batch, seed).compile()

    def run():
        nonlocal state
        waiting = []
        batches = itertools.repeat(None, config.steps)
        if files is not None:
            batches = turn_batches(config, files, config.workers)
        for read in batches:
            x, y = (read["image"], read["label"]) if read else batch
            if len(waiting) == WAITING:
                waiting.pop(0).block_until_ready()
            state, loss = compiled(state, *jax.device_put((x, y), sharding), seed)
            waiting.append(loss)
        jax.block_until_ready(waiting)

    work = None
    if files is None:
        passes = 1 if frozen else 3  # the backward pass is two forward passes
        work = passes * config.batch_size * image_flops(settings)
    return Program(run, config.steps, work)


def torch_program(config: Config, settings: recipe.Config) -> Program:
    """The same step of the whole network: channels last, autocast."""
    import torch

    from train.references.efficientnet import EfficientNetLite0
    from train.references.resnet import ResNet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    net: Any = (
        EfficientNetLite0(config.width)
        if config.architecture == classifier.EFFICIENTNET
        else ResNet(config.architecture, config.width)
    )
    net = net.to(device, memory_format=torch.channels_last)
    l2 = settings.l2 or 0.0
    adam = torch.optim.Adam(
        net.parameters(), 3e-4, (0.95, 0.99), weight_decay=l2, fused=True
    )
    mean, std = (
        torch.tensor(255 * values, device=device)
        for values in (augment.MEAN, augment.STD)
    )
    x, y = (torch.tensor(array, device=device) for array in random_batch(config))
    bfloat16 = settings.dtype == "bfloat16"

    def run():
        for _ in range(config.steps):
            adam.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = net(((x - mean) / std).permute(0, 3, 1, 2))
                loss = torch.nn.functional.cross_entropy(logits, y.long())
            loss.backward()
            adam.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Program(run, config.steps, 3 * config.batch_size * image_flops(settings))


def image_flops(settings: Any) -> float:
    """The FLOPs of an image, forward."""
    net = classifier.make_network(
        settings.architecture, settings.width, "float32", CLASSES
    )
    variables = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, settings.size, settings.size, 3), jnp.uint8)
    return probes.flops(lambda *args: net.logits(*args)[0], *variables, x)


# ---------------------------------------------------------------------------
# benchmark
# ---------------------------------------------------------------------------


def make_bench(config: Config, settings: recipe.Config, files: pictures.Files) -> Bench:
    source = "random JPEGs of 900 x 600 pixels"
    if config.data_dir is not None:
        source = "images of your own"
    step, frozen, torch = "step", "step, frozen body", "PyTorch's step, eager"
    training, frozen_training = "training", "training, frozen body"
    reading = functools.partial(reading_program, config, files)
    ours = functools.partial(jax_program, config, settings)
    programs = {
        "reading, one thread": functools.partial(reading, 1),
        "reading, all threads": functools.partial(reading, config.workers),
        frozen: functools.partial(ours, True),
        step: functools.partial(ours, False),
        frozen_training: functools.partial(ours, True, files),
        training: functools.partial(ours, False, files),
    }
    if config.torch:
        programs[torch] = functools.partial(torch_program, config, settings)
    rows = probes.matmul_rows(config.matmul)
    return Bench(
        f"{config.architecture}, width {config.width}, batches of {config.batch_size} "
        f"at {config.size} pixels from {source}, {settings.dtype}",
        "batch",
        f"{config.steps} batches",
        programs,
        probes.matrix_product(rows, jnp.dtype(settings.dtype), devices.data_mesh()),
        may_fail=(torch,),
        units=("images", config.batch_size),
        ratios=[(training, step), (frozen_training, frozen), (step, torch)],
    )


def main(config: Config) -> dict[str, Any]:
    """Prints the table and writes it; returns the content of bench.json."""
    harness.check_at_least(config, steps=1, turns=1)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = config.data_dir
        if data_dir is None:
            data_dir = write_images(Path(folder), 10 * max(13, config.batch_size // 8))
        files = pictures.read(data_dir).train
        settings = make_settings(config, data_dir)
        recipe.check(settings, max(len(files.labels), 2 * config.batch_size))
        return harness.run(config, "images", make_bench(config, settings, files))
