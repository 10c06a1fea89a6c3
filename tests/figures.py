"""What tests read from the figures that a module draws."""

from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread


@contextmanager
def saved_figures():
    """The figures that are saved inside, which are still written."""
    figures, savefig = [], Figure.savefig

    def save(figure, path, **options):
        savefig(figure, path, **options)
        height, width = imread(path).shape[:2]
        assert np.allclose((width, height), figure.get_size_inches() * figure.dpi)
        figures.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield figures


def lines(ax):
    """By label, the (x, y) of its first line."""
    found = {}
    for line in ax.lines:
        found.setdefault(line.get_label(), np.array(line.get_data()))
    return found


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]
