"""Where a command writes its results."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The options about the folder of results, which every configuration inherits."""

    out: Path = Path("runs")  # the folder of a run is made in here
    name: str | None = None  # of the folder; None: made from the other options
    overwrite: bool = False  # replace an earlier run of that name, finished or not
