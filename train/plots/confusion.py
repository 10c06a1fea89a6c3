"""Plots of a classifier's errors: the confusion matrix and the worst mistakes.

Labels and predictions are class numbers, `classes` their names.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from train.evals.statistics import plural

MAX_CLASSES = 20  # in the matrix; of more, those with the most confusions
LISTED = 10  # confusions, and classes, in the text beside the matrix
COLUMNS = 5  # images side by side
PIXELS = 500  # larger photographs are shrunk before drawing
# Lines are wrapped by characters, which all have the same width in this font.
MONOSPACE: dict[str, Any] = {"family": "monospace", "fontsize": 7, "parse_math": False}
CHARACTERS_PER_INCH = 72 / 7 / 0.61


# ---------------------------------------------------------------------------
# numbers
# ---------------------------------------------------------------------------


def most_confused(
    labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str], count: int = 10
) -> list[dict[str, Any]]:
    """The most frequent confusions: class, prediction, and how often, most first."""
    counts = _counts(labels, predictions, classes)
    _check_count(count)
    sizes = counts.sum(1)
    wrong = counts * ~np.eye(len(classes), dtype=bool)
    rows, columns = np.nonzero(wrong)
    times, totals = wrong[rows, columns], sizes[rows]
    first = np.lexsort((totals, -times))[:count]  # on ties, the rarer class first
    return [
        {
            "is": classes[rows[i]],
            "taken for": classes[columns[i]],
            "times": int(times[i]),
            "of": int(totals[i]),
        }
        for i in first
    ]


def _counts(labels, predictions, classes: Sequence[str]) -> np.ndarray:
    """(classes, classes): images by class and prediction."""
    labels = _class_numbers("labels", labels, len(classes))
    predictions = _class_numbers("predictions", predictions, len(classes))
    if len(predictions) != len(labels):
        raise ValueError(
            f"predictions must have the length of labels, {len(labels)}, "
            f"got {len(predictions)}"
        )
    cells = np.bincount(
        labels * len(classes) + predictions, minlength=len(classes) ** 2
    )
    return cells.reshape(len(classes), len(classes))


def _class_numbers(name: str, values, classes: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a list of one or more class numbers, got {values.dtype} "
            f"with shape {values.shape}"
        )
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(
            f"{name} must be in [0, {classes - 1}], "
            f"got {values.min()} to {values.max()}"
        )
    return values.astype(np.int64)


def _probabilities(probabilities, labels: np.ndarray, classes: int) -> np.ndarray:
    values, shape = np.asarray(probabilities, np.float64), (len(labels), classes)
    if values.shape != shape:
        raise ValueError(
            f"probabilities must have shape (images, classes) = {shape}, "
            f"got {values.shape}"
        )
    sums = values.sum(1)
    if not (values.min() >= 0 and np.abs(sums - 1).max() < 0.02):  # also refuses NaN
        raise ValueError(
            "probabilities must not be negative and must sum to 1 in each row, got "
            f"a minimum of {values.min():g}, sums from {sums.min():g} to {sums.max():g}"
        )
    return values


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _most_confused_classes(counts: np.ndarray) -> np.ndarray:
    """In ascending order, the classes with the most confusions, both ways."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    pairs = wrong + wrong.T
    order = np.argsort(-pairs, axis=None, kind="stable")
    rows, _ = np.unravel_index(order, pairs.shape)
    _, first = np.unique(rows, return_index=True)  # a class enters with its worst pair
    return np.sort(rows[np.sort(first)][:MAX_CLASSES])


# ---------------------------------------------------------------------------
# text
# ---------------------------------------------------------------------------


def _abridge(name: str, characters: int) -> str:
    name = " ".join(name.split())
    return name if len(name) <= characters else f"{name[: characters - 1].rstrip()}…"


def _wrap(text: str, inches: float) -> list[str]:
    width = int(inches * CHARACTERS_PER_INCH)
    return textwrap.wrap(text, width, subsequent_indent="    ")


def _percent(share: float) -> str:
    if share < 0.001:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%"
    if share > 0.999:
        return ">\N{NO-BREAK SPACE}99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share:.{0 if 0.01 <= share <= 0.99 else 1}f}\N{NO-BREAK SPACE}%"


def _findings(
    counts: np.ndarray, pairs: list[dict], classes: Sequence[str]
) -> list[str]:
    """The text beside the matrix: frequent confusions and difficult classes."""
    sizes, right = counts.sum(1), counts.diagonal()
    accuracies = right / np.maximum(sizes, 1)
    worst = np.lexsort((-sizes, accuracies))  # on ties, the larger class first
    worst = [i for i in worst if sizes[i] and right[i] < sizes[i]][:LISTED]
    lines = ["Most often confused" if pairs else "No mistakes"]
    for pair in pairs:
        name, prediction = (_abridge(pair[key], 60) for key in ("is", "taken for"))
        text = f"{pair['times']} of {pair['of']}: {name}, taken for {prediction}"
        lines += _wrap(text, 4.5)
    if worst:
        lines += ["", "Lowest accuracy"]
    for i in worst:
        name = _abridge(classes[i], 60)
        text = f"{100 * accuracies[i]:.1f} %: {name}, {right[i]} of {sizes[i]}"
        lines += _wrap(text, 4.5)
    return lines


# ---------------------------------------------------------------------------
# plots
# ---------------------------------------------------------------------------


def plot_confusion(
    labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str], path: Path
) -> None:
    """Draws the share of each class that was taken for each other class, in %.

    Of more than 20 classes, shows the 20 that are confused most often.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = _counts(labels, predictions, classes)
    sizes = counts.sum(1)
    shown = np.arange(len(classes))
    if len(classes) > MAX_CLASSES:
        shown = _most_confused_classes(counts)
    shares = 100 * counts / np.maximum(sizes, 1)[:, None]
    shares = shares[np.ix_(shown, shown)]
    names = [_abridge(classes[int(i)], 30) for i in shown]

    side = 3 + 0.4 * len(shown)
    figure = Figure(figsize=(side + 5, side), layout="constrained", dpi=120)
    ax, panel = figure.subplots(1, 2, width_ratios=(side, 5))
    # The square root shows one mistake in fifty; what never happened stays white.
    colours = PowerNorm(0.5, 1e-9, 100)
    display = ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=ax,
        cmap=colormaps["magma_r"].with_extremes(under="white"),
        im_kw={"norm": colours},
        values_format=".1f",
        xticks_rotation="vertical",
        colorbar=False,
    )
    for (row, column), text in np.ndenumerate(display.text_):
        share = shares[row, column]
        text.set(color="white" if colours(share) > 0.5 else "black", fontsize=8)
        if not share:
            text.set_text("")
    rows = [f"{name} ({sizes[i]})" for i, name in zip(shown, names, strict=True)]
    ax.set_yticks(range(len(shown)), rows)
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set(fontsize=8, parse_math=False)  # a $ is a $
    ax.set(xlabel="taken for, % of the class", ylabel="class (images)")
    part = (
        ""
        if len(shown) == len(classes)
        else f"; {len(shown)} of {len(classes)} classes"
    )
    accuracy = 100 * counts.trace() / counts.sum()
    ax.set_title(f"accuracy {accuracy:.2f} % (n = {counts.sum()}){part}")

    lines = _findings(counts, most_confused(labels, predictions, classes), classes)
    panel.set_axis_off()
    panel.text(0, 1, "\n".join(lines), va="top", linespacing=1.3, **MONOSPACE)
    figure.savefig(path, bbox_inches="tight")


def plot_mistakes(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    load_image: Callable[[int], np.ndarray | Image.Image],
    path: Path,
    count: int = 20,
) -> None:
    """Draws the misclassified images with the highest cross-entropy, highest first.

    Args:
        probabilities: (images, classes).
        labels: (images,) class numbers.
        classes: their names.
        load_image: maps an index to an image: PIL's, or an array of shape (height,
            width) or (height, width, channels), uint8 or floats in [0, 1].
        path: where the plot is written.
        count: maximum number of images.
    """
    _check_count(count)
    labels = _class_numbers("labels", labels, len(classes))
    probabilities = _probabilities(probabilities, labels, len(classes))
    predictions = probabilities.argmax(1)
    of_class = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predictions != labels)
    # sorted by the probability of the class, since log(0) would not sort
    worst = wrong[np.lexsort((-probabilities.max(1)[wrong], of_class[wrong]))][:count]
    if not len(worst):
        figure = Figure(figsize=(6, 1.5), dpi=120)
        title = f"no mistakes (n = {len(labels)})"
        figure.text(0.5, 0.5, title, ha="center", va="center")
        figure.savefig(path)
        return

    columns, cell = min(COLUMNS, len(worst)), 2.9  # inches
    rows = -(-len(worst) // columns)
    size = (cell * columns, cell * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    title = (
        f"{len(worst)} of {plural(len(wrong), 'mistake')} (n = {len(labels)}), "
        "the highest cross-entropy first"
    )
    title = "\n".join(_wrap(title, (size[0] - 0.3) * 7 / 10))
    figure.suptitle(title, family="monospace", fontsize=10, x=0.05 / size[0], ha="left")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
        ax.set_anchor("NW")  # below the beginning of its text
    for ax, i in zip(axes, worst, strict=False):
        _show(ax, load_image(int(i)))
        lines = []
        for verb, label in (("is", labels[i]), ("taken for", predictions[i])):
            name, share = _abridge(classes[label], 90), probabilities[i, label]
            lines += _wrap(f"{verb} {name}, {_percent(share)}", 2.5)
        ax.set_title("\n".join(lines), loc="left", **MONOSPACE)
    figure.savefig(path)


def _show(ax, image: Any) -> None:
    if isinstance(image, Image.Image):
        image = image.convert("RGB")  # a copy
        image.thumbnail((PIXELS, PIXELS))
    image = np.asarray(image)
    if image.ndim != 2 and (image.ndim != 3 or image.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            "load_image must return shape (height, width) or (height, width, channels) "
            f"with 1, 3 or 4 channels, got {image.shape}"
        )
    maximum = 255 if image.dtype == np.uint8 else 1
    if not (image.min() >= 0 and image.max() <= maximum):
        raise ValueError(
            "load_image must return uint8 or floats in [0, 1], got "
            f"{image.dtype} from {image.min():g} to {image.max():g}"
        )
    ax.imshow(image, cmap="gray", vmin=0, vmax=maximum)
