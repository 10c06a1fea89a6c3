"""Batches of pictures, decoded and augmented by threads.

Grain supplies the order, the random numbers and the threads.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from train.data.augment import MAX_ZOOM, plain_view, train_view
from train.data.image_files import Files, open_image

MAX_CHUNK = 16  # images that a thread reads at a time; a chunk divides the batch


def train_batches(
    files: Files,
    size: int,
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    first_step: int = 0,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Training views, reshuffled each epoch. The last batch of an epoch may be short.

    Args:
        files: the pictures.
        size: side of a view, in pixels.
        batch_size: pictures per batch.
        seed: determines the order and the augmentation.
        epochs: passes over the pictures.
        first_step: batches to skip, at no cost, when a run resumes.
        workers: threads that read; None: one per core; 0: none. The batches do not
            depend on it.

    Returns:
        {"image": (n, size, size, 3) uint8, "label": (n,) int32}. `close()` stops the
        threads early.
    """
    workers = _check_options(files, size, batch_size, seed, workers)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    examples = grain.MapDataset.range(len(files.paths)).seed(seed).shuffle()
    examples = examples.random_map(functools.partial(_train_example, files, size))
    steps = epochs * -(-len(files.paths) // batch_size)
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step must be in [0, {steps}], got {first_step}")
    return _batches(examples, batch_size, epochs, first_step, workers)


def eval_batches(
    files: Files,
    size: int,
    batch_size: int,
    *,
    augment_seed: int | None = None,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, in order: plain views, or training views with a seed.

    The last batch may be short. See `train_batches` for the other arguments.
    """
    workers = _check_options(files, size, batch_size, augment_seed, workers)
    examples = grain.MapDataset.range(len(files.paths))
    if augment_seed is None:
        examples = examples.map(functools.partial(_plain_example, files, size))
    else:
        examples = examples.seed(augment_seed).random_map(
            functools.partial(_train_example, files, size)
        )
    return _batches(examples, batch_size, 1, 0, workers)


def _train_example(files: Files, size: int, i: int, rng) -> dict[str, Any]:
    image = open_image(files.paths[i], min_side=int(size * MAX_ZOOM))
    return {"image": train_view(image, rng, size), "label": files.labels[i]}


def _plain_example(files: Files, size: int, i: int) -> dict[str, Any]:
    image = open_image(files.paths[i], min_side=size)
    return {"image": plain_view(image, size), "label": files.labels[i]}


def _check_options(files: Files, size, batch_size, seed, workers: int | None) -> int:
    """Returns the number of threads."""
    if not files.paths:
        raise ValueError("files must have at least one picture, got none")
    for name, value in (("size", size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if workers is None:
        linux = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    return workers


def _batches(
    examples, batch_size: int, epochs: int, first_step: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Reads with threads, not processes: Pillow releases the interpreter's lock.

    Each thread reads a chunk of a batch, so that even the first batch is shared out.
    """
    chunk_size = max(n for n in range(1, MAX_CHUNK + 1) if batch_size % n == 0)
    chunks = examples.batch(chunk_size, drop_remainder=False)
    steps, per_batch = -(-len(examples) // batch_size), batch_size // chunk_size
    epoch, step = divmod(first_step, steps)
    first_chunk = epoch * len(chunks) + step * per_batch
    options = grain.ReadOptions(
        num_threads=workers, prefetch_buffer_size=max(2 * workers, 2 * per_batch)
    )
    iterator = iter(chunks.repeat(epochs)[first_chunk:].to_iter_dataset(options))
    try:
        for step in range(first_step, epochs * steps):
            start = step % steps * per_batch  # the last batch may be short
            count = min(per_batch, len(chunks) - start)
            parts = [next(iterator) for _ in range(count)]
            yield {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    finally:
        iterator.close()
