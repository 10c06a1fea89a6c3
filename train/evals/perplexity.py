"""The log-probability of every token of a text, read as one stream.

A recurrent model reads one token after the other, which is slow: a batch of one. Here
the text is cut into columns that are read side by side, at first each from an empty
state; then again, each from the state in which the column before it ended, until these
states no longer change. What is left at the end is the single stream, whatever the
number of columns. As a state forgets what was long ago, some three passes make the
perplexity right to four digits, and ten or twenty settle the last bit; at the worst it
takes as many as there are columns, since each pass settles one more for good.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

COLUMNS = 64  # read side by side
ROWS = 1024  # of a column, at most: what is in memory does not grow with the text
BLOCK = 16  # rows whose gates and logits are in memory at once
TOLERANCE = 4e-6  # of the states where columns meet, which are float32


class Segment(NamedTuple):
    """A stretch of the text, in its order; the last one is padded."""

    log_probs: jax.Array  # (tokens,) of the targets
    states: jax.Array  # (tokens, width), of the last layer, which tell them
    targets: jax.Array  # (tokens,) int32; -1: padding
    passes: jax.Array  # int32 []


def reader(graphdef, columns: int = COLUMNS, tolerance: float = TOLERANCE):
    """A compiled function: params, state, tokens, targets -> Segment, state.

    The state is that of a batch of one; tokens, int32, fill the columns, and these are
    a multiple of BLOCK long, or shorter.
    """

    def read(params, state, tokens, targets):
        net = nnx.merge(graphdef, params)
        x = tokens.reshape(columns, -1).T
        blocks = x.reshape(-1, min(BLOCK, len(x)), columns)

        def behind(ends):
            """A column starts where the one before it has ended."""
            return jax.tree.map(lambda s, e: jnp.concatenate([s, e[:-1]]), state, ends)

        def relative(new, old):
            size = jnp.maximum(1, jnp.abs(new).max(initial=0))
            return jnp.abs(new - old).max(initial=0) / size

        def one_pass(starts):
            def block(state, x):
                raw, _, state = net(x, state)
                return state, raw

            ends, raw = lax.scan(block, starts, blocks)
            new = behind(ends)
            moved = jax.tree.map(relative, new, starts)
            return jnp.stack(jax.tree.leaves(moved)).max(), new, ends, raw

        def again(loop):
            passes, (_, starts, *_) = loop
            return passes + 1, one_pass(starts)

        def unsettled(loop):
            return loop[1][0] > tolerance

        empty = jax.tree.map(lambda s: jnp.repeat(0 * s, columns, 0), state)
        loop = jnp.int32(1), one_pass(behind(empty))
        passes, (_, _, ends, raw) = lax.while_loop(unsettled, again, loop)

        def tell(now):
            raw, targets = now
            log_probs = jax.nn.log_softmax(net.logits(raw))
            return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

        in_blocks = jnp.maximum(targets, 0).reshape(columns, -1).T.reshape(blocks.shape)
        log_probs = lax.map(tell, (raw, in_blocks))

        def in_order(a):
            a = a.reshape(len(x), columns, *a.shape[3:])
            return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])

        segment = Segment(in_order(log_probs), in_order(raw), targets, passes)
        return segment, jax.tree.map(lambda e: e[-1:], ends)

    return jax.jit(read)


def segments(read, params, state, text: np.ndarray, columns: int = COLUMNS):
    """Yields the segments of a text, whose first token is given.

    Args:
        read: a `reader` of as many columns.
        params: of its network.
        state: of a batch of one, to start from.
        text: (tokens,) int32.
        columns: read side by side.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(text) < 2:
        raise ValueError(f"text must have at least 2 tokens, got {len(text)}")
    rows = min(ROWS, -(-(len(text) - 1) // columns))
    size = columns * -(-rows // BLOCK) * BLOCK
    # where all the others will be: another place would be another program
    state = jax.device_put(state, jax.tree.leaves(params)[0].sharding)
    for begin in range(0, len(text) - 1, size):
        part = text[begin : begin + size + 1]
        padding = (0, size + 1 - len(part))
        tokens = np.pad(part[:-1], padding)
        targets = np.pad(part[1:], padding, constant_values=-1)
        segment, state = read(params, state, tokens, targets)
        yield segment


def log_probs(read, params, state, text: np.ndarray, columns: int = COLUMNS):
    """(tokens - 1,) float64, of every token but the first."""
    parts = [
        np.asarray(segment.log_probs, np.float64)
        for segment in segments(read, params, state, text, columns)
    ]
    return np.concatenate(parts)[: len(text) - 1]
