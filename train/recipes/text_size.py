"""Network, regularisation and training by the size of a text."""

from typing import Any, Literal

Size = Literal["small", "large"]

LARGE_FROM = 1_000_000  # training tokens: the article's settings; WikiText-2 has 2 M
SMALL_FROM = 40_000  # below, SMALLEST

SMALL: dict[str, Any] = {  # Python's documentation has 60,000 training words
    **{"embedding": 128, "width": 256, "layers": 2},
    **{"epochs": 24, "batch_size": 20, "bptt": 35, "lengths": 4},
    **{"words_dropout": 0.05, "input_dropout": 0.3, "hidden_dropout": 0.1},
    **{"output_dropout": 0.2, "weight_dropout": 0.25, "alpha": 2.0, "beta": 1.0},
}
# Few columns, so that an epoch has some steps, and all of the text in every epoch: the
# article's chunks leave out its end. More dropout and more epochs.
SMALLEST: dict[str, Any] = {
    **{"epochs": 30, "batch_size": 8, "lengths": 3, "chunks": "salesforce"},
    **{"words_dropout": 0.1, "input_dropout": 0.4, "hidden_dropout": 0.2},
    **{"output_dropout": 0.4, "weight_dropout": 0.4},
}


def choose_size(tokens: int) -> Size:
    """The size for a number of training tokens."""
    return "large" if tokens >= LARGE_FROM else "small"


def small_settings(tokens: int | None, model: str, recipe: str) -> dict[str, Any]:
    """What a small text changes in a recipe.

    Args:
        tokens: to train on; None: enough for `SMALL`, as Python's documentation.
        model: lstm or qrnn.
        recipe: its name.
    """
    settings = dict(SMALL)
    if model == "qrnn":
        settings |= {"layers": 3, "input_dropout": 0.2, "weight_dropout": 0.05}
    if recipe == "salesforce":
        # in so short a run, averaging must start early to start at all
        settings |= {"epochs": 40, "average_after": 1, "pointer": "article"}
    else:
        settings |= {"learning_rate": 1e-2}
    if tokens is not None and tokens < SMALL_FROM:
        settings |= SMALLEST | {"epochs": max(settings["epochs"], SMALLEST["epochs"])}
        if model == "qrnn":  # whose weight dropout is that of all kernels
            settings |= {"weight_dropout": 0.1}
    return settings
