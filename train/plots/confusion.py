"""Pictures of what a classifier takes for what, and of its worst mistakes.

Labels and predictions are class numbers, `classes` their names.
"""

import textwrap
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import ArrayLike
from PIL import Image

NUMBERED = 20  # classes at most for numbers in the cells
NAMED = 40  # names at most on an axis
LISTED = 10  # mistakes, and classes, in the text beside the matrix
BESIDE = 4.8  # inches at most for that text
COLUMNS = 5  # images side by side
PIXELS = 500  # photographs are drawn no larger
POINTS = 72  # of the font, in an inch
INDENT = " " * 4


# ---------------------------------------------------------------------------
# numbers
# ---------------------------------------------------------------------------


def most_confused(
    labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str], count: int = 10
) -> list[dict[str, Any]]:
    """Which class was taken for which other one how often; most first."""
    counts = _counts(labels, predictions, classes)
    _check_count(count)
    sizes = counts.sum(1)
    wrong = counts * ~np.eye(len(classes), dtype=bool)
    is_, taken = np.nonzero(wrong)
    times, of = wrong[is_, taken], sizes[is_]
    first = np.lexsort((of, -times))[:count]  # of equal ones, that of the rarer class
    return [
        {
            "is": classes[is_[i]],
            "taken for": classes[taken[i]],
            "times": int(times[i]),
            "of": int(of[i]),
        }
        for i in first
    ]


def _counts(labels, predictions, classes: Sequence[str]) -> np.ndarray:
    """(classes, classes): the images by their class and the one they were taken for."""
    labels = _class_numbers("labels", labels, len(classes))
    predictions = _class_numbers("predictions", predictions, len(classes))
    if len(predictions) != len(labels):
        raise ValueError(
            f"predictions must be as many as labels, {len(labels)}, "
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
            f"{name} must be a list of one or more class numbers, got an array of "
            f"{values.dtype} of shape {values.shape}"
        )
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(
            f"{name} must be from 0 to {classes - 1}, there are {classes} classes; "
            f"got {values.min()} to {values.max()}"
        )
    return values.astype(np.int64)


def _probabilities(probabilities, labels: np.ndarray, classes: int) -> np.ndarray:
    values, shape = np.asarray(probabilities, np.float64), (len(labels), classes)
    if values.shape != shape:
        raise ValueError(
            "probabilities must have a row for each label and a column for each "
            f"class, {shape}, got {values.shape}"
        )
    sums = values.sum(1)
    if not (values.min() >= 0 and np.abs(sums - 1).max() < 0.02):  # as NaN is not
        raise ValueError(
            "probabilities must not be negative and must add up to 1 in each row; got "
            f"{values.min():g} at least, sums from {sums.min():g} to {sums.max():g}"
        )
    return values


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


# ---------------------------------------------------------------------------
# text
# ---------------------------------------------------------------------------


def _short(name: str, characters: int) -> str:
    name = " ".join(name.split())
    return name if len(name) <= characters else f"{name[: characters - 1].rstrip()}…"


def _width(text: str, size: float) -> float:
    """In inches, of a line in Matplotlib's font."""
    font = get_font(findfont(FontProperties()))
    font.set_size(size, POINTS)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / POINTS


def _wrapped(text: str, inches: float, size: float) -> list[str]:
    """Lines that are not wider than that; all but the first are indented."""

    def wrap(characters: int) -> list[str]:
        return textwrap.wrap(text, characters, subsequent_indent=INDENT)

    def too_wide(characters: int) -> bool:
        return any(_width(line, size) > inches for line in wrap(characters))

    least = len(INDENT) + 1
    fit = bisect_left(range(least + 1, len(text) + 1), True, key=too_wide)
    return wrap(least + fit)


def _percent(share: float) -> str:
    if share < 0.001:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%"
    if share > 0.999:
        return ">\N{NO-BREAK SPACE}99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share:.{0 if 0.01 <= share <= 0.99 else 1}f}\N{NO-BREAK SPACE}%"


def _findings(
    counts: np.ndarray, pairs: list[dict], classes: Sequence[str], inches: float
) -> list[str]:
    """What stands beside the matrix: frequent mistakes and difficult classes."""
    sizes, right = counts.sum(1), counts.diagonal()
    accuracies = right / np.maximum(sizes, 1)
    worst = np.lexsort((-sizes, accuracies))  # of equal ones, the more certain
    worst = [i for i in worst if sizes[i] and right[i] < sizes[i]][:LISTED]
    lines = ["Most often confused" if pairs else "No mistakes"]
    for pair in pairs:
        is_, taken = (_short(pair[key], 60) for key in ("is", "taken for"))
        text = f"{pair['times']} of {pair['of']}: {is_}, taken for {taken}"
        lines += _wrapped(text, inches, 9)
    if worst:
        lines += ["", "Lowest accuracy"]
    for i in worst:
        name = _short(classes[i], 60)
        text = f"{100 * accuracies[i]:.1f} %: {name}, {right[i]} of {sizes[i]}"
        lines += _wrapped(text, inches, 9)
    return lines


# ---------------------------------------------------------------------------
# pictures
# ---------------------------------------------------------------------------


def plot_confusion(
    labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str], path: Path
) -> None:
    """Of the images of a class, the share that was taken for each; the worst as text.

    Of up to 20 classes with numbers, of more than 40 with the names of some.
    """
    counts, n = _counts(labels, predictions, classes), len(classes)
    sizes = counts.sum(1)
    shares = np.ma.masked_array(counts / np.maximum(sizes, 1)[:, None])
    shares[sizes == 0] = np.ma.masked
    shown = range(0, n, -(-n // NAMED))
    columns = [_short(classes[i], 30) for i in shown]
    rows = [f"{name} ({sizes[i]})" for i, name in zip(shown, columns, strict=True)]
    pairs = most_confused(labels, predictions, classes, LISTED)
    lines = _findings(counts, pairs, classes, BESIDE)

    # the matrix and what is around it, in inches
    side = min(8.5, 2.5 + 0.5 * n)
    left = side + 2 + max(_width(row, 8) for row in rows)
    bottom = max(_width(column, 8) for column in columns) if len(shown) == n else 0
    height = max(side + 1 + bottom, 0.5 + 9 * 1.3 / POINTS * len(lines))
    width = left + 0.4 + max(_width(line, 9) for line in lines)
    figure = Figure(figsize=(width, height), dpi=120)
    figure.set_layout_engine("constrained", rect=(0, 0, left / width, 1))
    ax = figure.subplots()
    # A mistake in fifty is to be seen. What never happened is transparent, and shows
    # the line behind, which is where a cell would be right.
    colours = PowerNorm(0.5, 1e-9, 1)
    scale = colormaps["magma_r"].with_extremes(under="none", bad="#cccccc")
    image = ax.imshow(shares, norm=colours, cmap=scale, interpolation="nearest")
    ax.axline((0, 0), slope=1, color="#cccccc", lw=1, zorder=-1)

    text: dict[str, Any] = {"fontsize": 8, "parse_math": False}  # a $ is a $
    ax.set_yticks(shown, rows, **text)
    ax.set_ylabel("class (images)")
    if len(shown) == n:
        text |= {"rotation": 90, "va": "center", "ha": "right"}
        ax.set_xticks(shown, columns, rotation_mode="anchor", **text)
        ax.set_xlabel("taken for")
    else:
        ax.set_xticks(shown, [])
        ax.set_xlabel("taken for, in the same order")
    if n <= NUMBERED:
        for row, column in np.argwhere(counts):
            share = shares[row, column]
            colour = "white" if colours(share) > 0.5 else "black"
            label = ax.text(column, row, f"{100 * share:.1f}", color=colour)
            label.set(fontsize=9, ha="center", va="center")
    ax.set_title(
        f"accuracy {100 * counts.trace() / counts.sum():.2f} % (n = {counts.sum()})"
    )
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    bar = figure.colorbar(image, ax=ax, pad=0.01, shrink=0.8)
    bar.set_ticks(ticks, labels=[f"{100 * tick:g}" for tick in ticks])
    empty = int((sizes == 0).sum())
    note = f"; grey: {empty} class(es) without images" if empty else ""
    bar.set_label(f"share of the class, %{note}")

    x, y = (left + 0.2) / width, 1 - 0.3 / height
    found = figure.text(x, y, "\n".join(lines), va="top", fontsize=9)
    found.set(parse_math=False, linespacing=1.3)
    figure.savefig(path)


def plot_mistakes(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    image_of: Callable[[int], np.ndarray | Image.Image],
    path: Path,
    count: int = 20,
) -> None:
    """The wrongly classified images of the highest cross-entropy, highest first.

    Args:
        probabilities: (images, classes).
        labels: (images,) class numbers.
        classes: their names.
        image_of: the image of an index: of PIL, or an array (height, width) or
            (height, width, channels) of uint8, or of floats from 0 to 1.
        path: of the picture.
        count: of images at most.
    """
    _check_count(count)
    labels = _class_numbers("labels", labels, len(classes))
    probabilities = _probabilities(probabilities, labels, len(classes))
    taken = probabilities.argmax(1)
    of_class = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(taken != labels)
    # the highest cross-entropy is the lowest probability, which may be 0
    worst = wrong[np.lexsort((-probabilities.max(1)[wrong], of_class[wrong]))][:count]
    if not len(worst):
        figure = Figure(figsize=(6, 1.5), dpi=120)
        title = f"no mistakes (n = {len(labels)})"
        figure.text(0.5, 0.5, title, ha="center", va="center")
        figure.savefig(path)
        return

    columns, cell, inner = min(COLUMNS, len(worst)), 2.9, 2.6  # inches
    rows = -(-len(worst) // columns)
    size = (cell * columns, cell * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    title = (
        f"{len(worst)} of {len(wrong)} mistake(s) (n = {len(labels)}), "
        "the highest cross-entropy first"
    )
    title = "\n".join(_wrapped(title, size[0] - 0.3, 12))
    figure.suptitle(title, fontsize=12, x=0.05 / size[0], ha="left")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
        ax.set_anchor("NW")  # beneath the beginning of its text
    for ax, i in zip(axes, worst, strict=False):
        _show(ax, image_of(int(i)))
        lines = []
        for verb, chosen in (("is", labels[i]), ("taken for", taken[i])):
            name, share = _short(classes[chosen], 90), probabilities[i, chosen]
            text = f"{verb} {name}, {_percent(share)}"
            lines += _wrapped(text, inner, 8)
        ax.set_title("\n".join(lines), fontsize=8, loc="left", parse_math=False)
    figure.savefig(path)


def _show(ax, image: Any) -> None:
    if isinstance(image, Image.Image):
        image = image.convert("RGB")  # a copy
        image.thumbnail((PIXELS, PIXELS))
    image = np.asarray(image)
    if image.ndim != 2 and (image.ndim != 3 or image.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            "image_of must return images of (height, width) or (height, width, 1, 3 or "
            f"4), got {image.shape}"
        )
    top = 255 if image.dtype == np.uint8 else 1
    if not (image.min() >= 0 and image.max() <= top):
        raise ValueError(
            "image_of must return uint8, or floats from 0 to 1; got "
            f"{image.dtype} from {image.min():g} to {image.max():g}"
        )
    ax.imshow(image, cmap="gray", vmin=0, vmax=top)
