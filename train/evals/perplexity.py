"""The log-probability of every token of a text, read as a single stream.

A recurrent model reads one token after the other, which is slow with a batch of one.
Here the text is read as parallel columns, repeatedly: first each column starts from an
empty state, then from the final state of the previous column, until the states at the
column boundaries stop changing. The result equals that of a single stream, for any
number of columns. Since the model forgets, three passes or so give the perplexity to
four digits, and ten or twenty give the last bit. The worst case is as many passes as
columns: each pass makes one more of them final.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from train.evals import neural_cache

COLUMNS = 64  # read in parallel
ROWS = 1024  # maximum length of a column, so that memory does not grow with the text
BLOCK = 16  # rows whose gates and logits are in memory at once
TOLERANCE = 4e-6  # of the states at the column boundaries, which are float32
ARTICLE_CHUNK = 2000  # tokens; the article evaluated full chunks only


class Segment(NamedTuple):
    """A part of the text, in order; the last one is padded."""

    log_probs: jax.Array  # (tokens,) of the targets
    states: jax.Array  # (tokens, width) of the last layer, which predict the targets
    targets: jax.Array  # (tokens,) int32; -1: padding
    passes: jax.Array  # int32 []


def reader(graphdef, columns: int = COLUMNS, tolerance: float = TOLERANCE):
    """A compiled function: params, state, tokens, targets -> Segment, state.

    The state is that of a batch of one. The int32 tokens fill the columns, whose length
    is a multiple of BLOCK or less than it.
    """

    def read(params, state, tokens, targets):
        net = nnx.merge(graphdef, params)
        x = tokens.reshape(columns, -1).T
        blocks = x.reshape(-1, min(BLOCK, len(x)), columns)

        def shift(ends):
            """Starts each column from the end of the previous one."""
            return jax.tree.map(lambda s, e: jnp.concatenate([s, e[:-1]]), state, ends)

        def relative_change(new, old):
            size = jnp.maximum(1, jnp.abs(new).max(initial=0))
            return jnp.abs(new - old).max(initial=0) / size

        def one_pass(starts):
            def block(state, x):
                raw, _, state = net(x, state)
                return state, raw

            ends, raw = lax.scan(block, starts, blocks)
            new = shift(ends)
            changes = jax.tree.map(relative_change, new, starts)
            return jnp.stack(jax.tree.leaves(changes)).max(), new, ends, raw

        def next_pass(loop):
            passes, (_, starts, *_) = loop
            return passes + 1, one_pass(starts)

        def not_converged(loop):
            return loop[1][0] > tolerance

        empty = jax.tree.map(lambda s: jnp.repeat(0 * s, columns, 0), state)
        loop = jnp.int32(1), one_pass(shift(empty))
        passes, (_, _, ends, raw) = lax.while_loop(not_converged, next_pass, loop)

        def block_log_probs(block):
            raw, targets = block
            log_probs = jax.nn.log_softmax(net.logits(raw))
            return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

        in_blocks = jnp.maximum(targets, 0).reshape(columns, -1).T.reshape(blocks.shape)
        log_probs = lax.map(block_log_probs, (raw, in_blocks))

        def in_order(a):
            a = a.reshape(len(x), columns, *a.shape[3:])
            return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])

        segment = Segment(in_order(log_probs), in_order(raw), targets, passes)
        return segment, jax.tree.map(lambda e: e[-1:], ends)

    return jax.jit(read)


def segments(
    read, params, state, text: np.ndarray, columns: int = COLUMNS
) -> Iterator[Segment]:
    """Yields the segments of a text. Its first token is given, not predicted.

    Args:
        read: a `reader` with the same number of columns.
        params: of its network.
        state: of a batch of one, to start from.
        text: (tokens,) int32.
        columns: read in parallel.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(text) < 2:
        raise ValueError(f"text must have at least 2 tokens, got {len(text)}")
    rows = min(ROWS, -(-(len(text) - 1) // columns))
    size = columns * -(-rows // BLOCK) * BLOCK
    # with the sharding of all later states: another one would be another program
    state = jax.device_put(state, jax.tree.leaves(params)[0].sharding)
    for start in range(0, len(text) - 1, size):
        part = text[start : start + size + 1]
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


def evaluate(
    segments: Iterable[Segment],
    targets: int,
    *,
    theta: float = neural_cache.THETA,
    lambda_: float = neural_cache.LAMBDA,
    window: int = neural_cache.WINDOW,
    convention: neural_cache.Convention = "article",
) -> dict[str, Any]:
    """Perplexity of a text, without the neural cache and with it.

    Args:
        segments: of the text.
        targets: how many tokens of the segments are not padding.
        theta: see `neural_cache.log_probs`.
        lambda_: see `neural_cache.mixed`.
        window: see `neural_cache.used`.
        convention: see `neural_cache.used`.
    """
    plain, cached, history = [], [], None
    for segment in segments:
        if history is None:
            width = segment.states.shape[1]
            history = neural_cache.empty(min(window, targets), width)
        cache_log_probs, history = neural_cache.log_probs(
            history, segment.states, segment.targets, theta
        )
        plain.append(np.asarray(segment.log_probs, np.float64))
        cached.append(np.asarray(cache_log_probs, np.float64))
    plain, cached = (np.concatenate(parts)[:targets] for parts in (plain, cached))
    used = neural_cache.used(np.arange(targets), window, convention)
    mixed = neural_cache.mixed(plain, cached, used, lambda_)
    mixed = np.asarray(mixed, np.float64)
    full = targets // ARTICLE_CHUNK * ARTICLE_CHUNK

    def perplexity(log_probs):
        return float(np.exp(-log_probs.mean())) if len(log_probs) else None

    return {
        "tokens": targets,
        "perplexity": perplexity(plain),
        "with_cache": perplexity(mixed),
        # as the article's code counts; None: the text is shorter than a chunk
        "tokens_in_full_chunks": full,
        "perplexity_of_full_chunks": perplexity(plain[:full]),
        "with_cache_of_full_chunks": perplexity(mixed[:full]),
    }
