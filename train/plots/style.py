"""Colours and layout shared by all figures."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

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
    """A logarithmic y axis with plain numbers at more ticks than powers of ten.

    Call it when everything is drawn.
    """
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    for most, subs in ((10, (1, 1.5, 2, 3, 4, 5, 7)), (50, (1, 2, 5)), (1e3, (1, 3))):
        if high < most * low:
            ax.yaxis.set_major_locator(LogLocator(subs=subs))
            break
    if sum(low <= tick <= high for tick in ax.get_yticks()) < 3:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def show_plain_numbers(*axes: Axes) -> None:
    """Tick labels of linear axes without a factor or an offset beside the axis."""
    for ax in axes:
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")


def place_legend(ax: Axes, columns: int = 4, above: bool = False) -> None:
    """A legend outside of the axes, where it hides nothing: below, or above."""
    anchor, loc = ((0.5, 1), "lower center") if above else ((0.5, 0), "upper center")
    ax.legend(frameon=False, loc=loc, bbox_to_anchor=anchor, ncols=columns)
