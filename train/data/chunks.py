"""A token stream as columns, and the chunks of random length that cut an epoch.

The stream is folded into `batch_size` columns of equal length. An epoch is a table of
chunks: the first row of each and its length, drawn about `bptt`. A compiled program
needs a fixed length, so every chunk is padded to the next of a few lengths.
"""

from typing import Literal, NamedTuple

import numpy as np

Style = Literal["article", "salesforce"]

FIRST_EXTRA = 25  # tokens by which the article's first chunk is longer than bptt
SPREAD = 5  # standard deviation of the lengths
SHORTEST = 5  # tokens


def columns(tokens: np.ndarray, batch_size: int) -> np.ndarray:
    """(rows, batch_size) int32. Each column continues where the previous one ends."""
    rows = len(tokens) // max(batch_size, 1)
    if batch_size < 1 or rows < 2:
        raise ValueError(
            f"batch_size must be in [1, {len(tokens) // 2}], to get at least 2 rows "
            f"from {len(tokens):,} tokens, got {batch_size}"
        )
    cut = np.asarray(tokens[: rows * batch_size], np.int32)
    return np.ascontiguousarray(cut.reshape(batch_size, rows).T)


def pad_columns(columns: np.ndarray, bptt: int) -> np.ndarray:
    """Appends rows, so that a padded chunk and its targets never run off the end."""
    return np.pad(columns, ((0, bptt + FIRST_EXTRA + 1), (0, 0)))


def chunk_table(
    rows: int, bptt: int, seed: int, epoch: int, style: Style = "article"
) -> np.ndarray:
    """(steps, 2) int32: first row and length of each chunk of an epoch, end to end.

    Lengths are about `bptt`; one in twenty is about half of it. The targets of a chunk
    lie one row later, so the last chunk starts at `rows - 2` or before.

    Args:
        rows: of `columns`.
        bptt: the usual length, at least 5.
        seed: of the run.
        epoch: every epoch draws its own lengths.
        style: "article": the first length is bptt + 25, and there are always
            rows // bptt - 1 chunks, which leave out the end of the stream (3 to 4 % of
            WikiText-2). "salesforce": all lengths are random, up to the end.
    """
    if style not in ("article", "salesforce"):
        raise ValueError(f"style must be 'article' or 'salesforce', got {style!r}")
    if bptt < SHORTEST:
        raise ValueError(f"bptt must be at least {SHORTEST}, got {bptt}")
    minimum = 2 * bptt if style == "article" else 3
    if rows < minimum:
        raise ValueError(
            f"rows must be at least {minimum} for bptt={bptt} in the style {style!r}, "
            f"got {rows}: a smaller batch_size gives more"
        )
    rng = np.random.default_rng([seed, epoch])
    if style == "article":
        lengths = _draw_lengths(rng, bptt, rows // bptt - 1)
        lengths[0] = bptt + FIRST_EXTRA
        # The schedule counts on every chunk, but the stream may end before the last
        # one: almost never with a bptt of 70, always with one of 5. So a chunk is cut
        # where it would leave less than the shortest length to each later one.
        later = np.arange(len(lengths))[::-1]
        ends = np.minimum(np.cumsum(lengths), rows - 1 - SHORTEST * later)
    else:
        lengths = _draw_lengths(rng, bptt, rows // SHORTEST + 1)
        ends = np.minimum(np.cumsum(lengths), rows - 1)
    starts = np.concatenate([[0], ends[:-1]])
    table = np.stack([starts, ends - starts], 1).astype(np.int32)
    return table if style == "article" else table[starts < rows - 2]


class Plan(NamedTuple):
    """The chunks of all epochs of a run."""

    tables: list[np.ndarray]  # of each epoch; padded with zeros to the same size
    ends: np.ndarray  # (epochs,): the steps at which epochs end

    def epoch(self, step: int) -> int:
        """The epoch to which a step belongs; also the number of finished epochs."""
        return int(np.searchsorted(self.ends, step, "right"))

    def position(self, step: int) -> tuple[int, int]:
        """The row of a step in the table of its epoch, and how many rows that has."""
        epoch = self.epoch(step)
        start = int(self.ends[epoch - 1]) if epoch else 0
        return step - start, int(self.ends[epoch]) - start


def plan(
    rows: int, bptt: int, seed: int, epochs: int, style: Style = "article"
) -> Plan:
    """The `chunk_table` of every epoch."""
    tables = [chunk_table(rows, bptt, seed, epoch, style) for epoch in range(epochs)]
    size = rows // SHORTEST + 1
    padded = [np.pad(table, ((0, size - len(table)), (0, 0))) for table in tables]
    return Plan(padded, np.cumsum([len(table) for table in tables]))


def padded_lengths(
    rows: int, bptt: int, count: int, style: Style = "article"
) -> np.ndarray:
    """The lengths to which chunks are padded: the `count` that pad least.

    Dynamic programming finds the set with the least padding in a hundred epochs. It
    does not depend on the seed of a run.
    """
    tables = [chunk_table(rows, bptt, 0, epoch, style) for epoch in range(100)]
    longest = bptt + FIRST_EXTRA
    histogram = np.bincount(np.concatenate(tables)[:, 1], minlength=longest + 1)
    # cost[a, b]: of padding all lengths in (a, b] to b; infinite where a > b
    a, b = np.ogrid[: longest + 1, : longest + 1]
    number = np.cumsum(histogram)
    total = np.cumsum(histogram * np.arange(longest + 1))
    cost = b * (number[b] - number[a]) - (total[b] - total[a])
    cost = np.where(a <= b, cost, np.inf)
    best, choices = cost[0], []
    for _ in range(min(count, longest) - 1):
        sums = best[:, None] + cost
        choices.append(sums.argmin(0))
        best = sums.min(0)
    lengths = [longest]
    for choice in reversed(choices):
        lengths.append(choice[lengths[-1]])
    return np.unique([n for n in lengths if n > 0])


def _draw_lengths(rng: np.random.Generator, bptt: int, n: int) -> np.ndarray:
    centres = np.where(rng.random(n) < 0.95, bptt, bptt / 2)
    lengths = rng.normal(centres, SPREAD).astype(np.int64)
    # No chunk is longer than the first: that would take another program.
    return np.clip(lengths, SHORTEST, bptt + FIRST_EXTRA)
