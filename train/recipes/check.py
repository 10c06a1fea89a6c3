"""One sentence for every bad option."""

import importlib.util
from typing import Any

Rules = dict[str, tuple[Any, str]]


def check_options(config: Any, rules: Rules) -> None:
    """Raises where an option breaks its rule.

    Args:
        config: whose attributes are the options.
        rules: by option, whether its value is allowed, and which values are.

    Raises:
        ValueError: "OPTION must be ALLOWED, got VALUE".
    """
    for option, (valid, allowed) in rules.items():
        if not valid:
            raise ValueError(
                f"{option} must be {allowed}, got {getattr(config, option)!r}"
            )


def run_rules(config: Any, seed_limit: int = 2**31) -> Rules:
    """Of the options that all training scripts have: seed, seeds, tensorboard."""
    highest = seed_limit - config.seeds
    return {
        "seeds": (config.seeds >= 1, "at least 1"),
        "seed": (0 <= config.seed <= highest, f"in [0, {highest}]"),
        "tensorboard": (
            not config.tensorboard or importlib.util.find_spec("tensorboardX"),
            "False, since tensorboardX is not installed: pip install tensorboardX",
        ),
    }
