"""Colours and layout shared by all figures."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def hide_top_spines(*axes: Axes) -> None:
    for ax in axes:
        ax.spines["top"].set_visible(False)
