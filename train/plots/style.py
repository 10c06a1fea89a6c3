"""Colours and layout shared by all figures."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {  # of the optimizers in `train.compare`
    "sgd": "#7f7f7f",
    "adam-l2": "#d1495b",
    "adamw": "#00798c",
    "amsgrad-l2": "#edae49",
    "amsgradw": "#6a4c93",
}
TRAINING, HELD_OUT = COLOURS["adamw"], COLOURS["adam-l2"]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def hide_spines(*axes: Axes, right: bool = True) -> None:
    """Removes the upper edge and, unless a second y axis is there, the right one."""
    for ax in axes:
        ax.spines[["top", "right"] if right else ["top"]].set_visible(False)


def set_log_scale(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers at more ticks than powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
