"""Predictions of a classifier: on labelled pictures, and on images of one's own."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from train.data import loader, pictures
from train.data.image_files import Files, printable
from train.models import classifier

# ---------------------------------------------------------------------------
# labelled pictures
# ---------------------------------------------------------------------------


def log_probabilities(
    predict: Callable[[np.ndarray], np.ndarray],
    files: Files,
    size: int,
    batch_size: int,
    *,
    augment_seed: int | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """(images, classes) float64, in the order of the files.

    Args:
        predict: (batch_size, size, size, 3) uint8 -> (batch_size, classes).
        files: the pictures.
        size: side of the views, in pixels.
        batch_size: the last batch is padded to it.
        augment_seed: of augmented views; None: the plain ones.
        workers: threads that read; None: one per core.
    """
    parts = []
    for batch in loader.eval_batches(
        files, size, batch_size, augment_seed=augment_seed, workers=workers
    ):
        padding = batch_size - len(batch["image"])
        pixels = np.pad(batch["image"], ((0, padding), (0, 0), (0, 0), (0, 0)))
        parts.append(predict(pixels))
    return np.concatenate(parts)[: len(files.labels)].astype(np.float64)


def write_predictions(
    path: Path,
    probabilities: np.ndarray,
    files: Files,
    classes: tuple[str, ...],
    data_dir: Path,
) -> None:
    """Writes a table in UTF-8 with a row per picture, atomically.

    Bytes of a file name that are no UTF-8, and line breaks, are escaped.
    """
    draft = path.with_suffix(".tmp")
    with draft.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "class", "prediction", "probability", "of the class"])
        for p, image, label in zip(
            probabilities, files.paths, files.labels, strict=True
        ):
            best = p.argmax()
            name = printable(image.relative_to(data_dir).as_posix())
            rows.writerow(
                [name, classes[label], classes[best]]
                + [f"{p[best]:.6f}", f"{p[label]:.6f}"]
            )
    draft.replace(path)


# ---------------------------------------------------------------------------
# images of one's own
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predict:
    """Prints the most likely classes of images."""

    images: tuple[Path, ...]  # files
    model: Path | None = None  # written by this script; None: the newest in runs/
    top: int = 5  # classes to print
    views: int = 0  # augmented views to average with the plain one
    seed: int = 0  # of those views


def predict(config: Predict) -> dict[Path, np.ndarray]:
    """Prints the top classes of each image; returns the probabilities of all."""
    if not config.images:
        raise ValueError("images must be at least one file, got none")
    for option, least in (("top", 1), ("views", 0), ("seed", 0)):
        if (value := getattr(config, option)) < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    path = config.model or classifier.newest_model(Path("runs"))
    model = classifier.load_model(path)
    print(f"{path}: {len(model.classes)} classes, {model.size} pixels")
    probabilities, errors = {}, []
    for image_path in config.images:
        try:
            image = pictures.open_image(image_path, model.size)
        except ValueError as error:  # predicts the others all the same
            errors.append(str(error))
            continue
        p = classifier.class_probabilities(model, image, config.views, config.seed)
        probabilities[image_path] = p
        print(printable(image_path))
        for best in p.argsort()[::-1][: config.top]:
            print(f"  {100 * p[best]:6.2f} %  {model.classes[best]}")
    if errors:
        raise ValueError(f"images that cannot be read: {'; '.join(errors)}")
    return probabilities
