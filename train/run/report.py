"""Tables of results."""

from typing import Any

import numpy as np


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in (rows[0], line, *rows[1:])
    )


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation of runs; None where there is one."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "runs": values}


def spread(numbers: dict[str, Any]) -> str:
    """Of a `summary`: 94.12 ± 0.15."""
    deviation = f" ± {numbers['std']:.2f}" if numbers["std"] is not None else ""
    return f"{numbers['mean']:.2f}{deviation}"
