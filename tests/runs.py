"""What two runs of one seed must have in common: results without times, bits."""

import warnings

from train.run import checkpoint
from train.run.log import read_lines

TIMES = (
    *("seconds", "images_per_second", "tokens_per_second"),
    "share_waiting_for_images",
)


def untimed(folder):
    """The results in a run's log, without the times, which differ between runs."""
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_lines(folder / "metrics.jsonl")
        if line["event"] in ("epoch", "end")
    ]


def final_state(folder, seed=0):
    with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sharding info not provided")
            return checkpoints.load(None)
