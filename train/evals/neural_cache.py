"""The neural cache: a language model that looks up what it has just read.

The cache holds the last W words, each with the state that predicted it. It assigns the
word y at the state h the probability

    p_cache(y) = sum_{i: y_i = y} e^{theta h.h_i} / sum_i e^{theta h.h_i},

and the model predicts (1 - lambda) p_vocabulary + lambda p_cache. Nothing is trained.

Only the words of the text are evaluated, so nothing here has the size of the
vocabulary. States are compared a block at a time, in one matrix product. A text can be
processed in pieces, whose sizes change nothing but the rounding:

    history, total = empty(WINDOW, width), 0.0
    for positions, states, targets, vocab_log_probs in pieces:
        cache_log_probs, history = log_probs(history, states, targets, THETA)
        use = used(positions, WINDOW)
        total += mixed(vocab_log_probs, cache_log_probs, use, LAMBDA).sum()

Source: Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous
Cache" (2017).
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

THETA, LAMBDA, WINDOW = 0.662, 0.1279, 3785  # the article's, and Salesforce's
Convention = Literal["article", "salesforce"]


# ---------------------------------------------------------------------------
# the cache
# ---------------------------------------------------------------------------


class History(NamedTuple):
    """The last W pairs, oldest first. Unfilled entries have the target -1."""

    states: jax.Array  # (W, D)
    targets: jax.Array  # (W,), int32


def empty(window: int, width: int, dtype: Any = jnp.float32) -> History:
    """The history at the start of a text; `dtype` is that of the states."""
    _check_count("window", window)
    _check_count("width", width)
    _check_dtype("dtype", dtype, jnp.floating)
    return History(jnp.zeros((window, width), dtype), jnp.full(window, -1, jnp.int32))


def log_probs(
    history: History, states: Any, targets: Any, theta: Any, block: int = 256
) -> tuple[jax.Array, History]:
    """The cache's log-probability of each word of a piece of text.

    A word is looked up in the W pairs before it, in this piece or earlier ones. Works
    under `jit`, and under `vmap` for several texts in parallel. Besides its arguments
    it takes memory for (W + block) x (block + D) numbers.

    Args:
        history: after the previous pieces; from `empty` for the first.
        states: (N, D), which predict the targets, in the dtype of the history. Dot
            products are summed in float32, or float64 for float64 states.
        targets: (N,), integers. Trailing -1s are padding, neither looked up nor stored.
        theta: >= 0; how sharply the cache prefers near states.
        block: number of states compared with the history at a time.

    Returns:
        (N,) log p_cache(target), -inf where the target is not in the history; and the
        new history.

    Raises:
        ValueError: an argument is out of its range, or shapes or dtypes do not match.
    """
    history = History(*map(jnp.asarray, history))
    states, targets = jnp.asarray(states), jnp.asarray(targets)
    width, dtype = history.states.shape[-1], history.states.dtype
    _check_pairs(states, targets)
    if states.shape[1:] != (width,) or states.dtype != dtype:
        raise ValueError(
            f"states must be (N, {width}) of {dtype} like the history, got "
            f"{states.shape} of {states.dtype}"
        )
    _check_number("theta", theta, math.inf)
    _check_count("block", block)
    thetas, windows = jnp.asarray(theta, float)[None], (len(history.targets),)
    logs, history = _log_probs(history, states, targets, thetas, windows, block)
    return logs[0, 0], history


def used(
    positions: Any,
    window: int = WINDOW,
    convention: Convention = "article",
    chunk: int = 5000,
) -> jax.Array:
    """Where to mix in the cache, rather than use the vocabulary alone.

    Args:
        positions: integers, the number of preceding words in the text.
        window: W.
        convention: "article": from the second word on, wherever there is a history.
            "salesforce": where there are W pairs. Their pointer.py cuts its history to
            W at the end of a chunk and requires more than W pairs, so it also skips
            the first word of every later chunk.
        chunk: words per evaluation of Salesforce's model.
    """
    positions = jnp.asarray(positions)
    _check_dtype("positions", positions.dtype, jnp.integer)
    _check_count("window", window)
    _check_count("chunk", chunk)
    _check_convention(convention)
    if convention == "article":
        return positions >= 1
    index = positions % chunk
    return jnp.minimum(positions - index, window) + index > window


def mixed(
    vocab_log_probs: Any, cache_log_probs: Any, used: Any, lambda_: Any
) -> jax.Array:
    """log((1 - lambda) p_vocabulary + lambda p_cache); log p_vocabulary where not used.

    Args:
        vocab_log_probs: log p_vocabulary(target).
        cache_log_probs: log p_cache(target), of the same shape.
        used: booleans, of the same shape.
        lambda_: in [0, 1].
    """
    vocab, cache, used = map(jnp.asarray, (vocab_log_probs, cache_log_probs, used))
    if not vocab.shape == cache.shape == used.shape:
        raise ValueError(
            "vocab_log_probs, cache_log_probs and used must have the same shape, got "
            f"{vocab.shape}, {cache.shape} and {used.shape}"
        )
    _check_number("lambda_", lambda_, 1)
    dtype = np.promote_types(vocab.dtype, cache.dtype)
    share, vocab, cache = (jnp.asarray(x, dtype) for x in (lambda_, vocab, cache))
    both = jnp.logaddexp(jnp.log1p(-share) + vocab, jnp.log(share) + cache)
    return jnp.where(used, both, vocab)


@functools.partial(jax.jit, static_argnames=("windows", "block"))
def _log_probs(history, states, targets, thetas, windows, block):
    """(windows, thetas, N). No window is longer than the history."""
    targets = targets.astype(jnp.int32)
    full_blocks = len(targets) // block

    def step(history, start):
        part = (lax.dynamic_slice_in_dim(x, start, block) for x in (states, targets))
        return _one_block(history, *part, thetas=thetas, windows=windows)

    parts = []
    if full_blocks:
        history, logs = lax.scan(step, history, block * jnp.arange(full_blocks))
        parts.append(jnp.moveaxis(logs, 0, 2).reshape(*logs.shape[1:3], -1))
    rest = slice(full_blocks * block, None)
    history, logs = _one_block(history, states[rest], targets[rest], thetas, windows)
    return jnp.concatenate([*parts, logs], -1), history


def _one_block(history, states, targets, thetas, windows):
    """(windows, thetas, Q). Pairs are rows, since XLA sums faster over columns."""
    length, size = len(history.targets), len(targets)
    keys = jnp.concatenate([history.states, states])
    words = jnp.concatenate([history.targets, targets])
    exact = {  # by default, GPUs round float32 to TF32
        "precision": lax.Precision.HIGHEST,
        "preferred_element_type": np.promote_types(states.dtype, np.float32),
    }
    scores = jnp.einsum("kd,qd->kq", keys, states, **exact)
    same = words[:, None] == targets[None, :]
    query = jnp.arange(size)[None, :]
    logs = []
    for window in windows:
        rows = slice(length - window, length + size)
        key = jnp.arange(window + size)[:, None]
        valid = (key >= query) & (key < query + window) & (words[rows, None] >= 0)
        logs.append(_log_share(scores[rows], valid, valid & same[rows], thetas))
    # Padding is not stored, so that the next piece finds all of its W pairs.
    added = jnp.sum(targets >= 0)
    kept = (lax.dynamic_slice_in_dim(x, added, length) for x in (keys, words))
    return History(*kept), jnp.stack(logs)


def _log_share(scores, valid, hit, thetas):
    """(thetas, Q): log of the hits' share in each column's sum of e^{theta score}.

    Each sum is relative to its own largest term. So neither overflows, and the sum of
    the hits does not vanish, however far they are below the best score.
    """

    def top(where):
        best = jnp.max(scores, 0, initial=-jnp.inf, where=where)
        return jnp.where(best > -jnp.inf, best, 0)

    def total(theta, where, top):
        terms = jnp.exp(theta * (scores - top[None, :]))
        return jnp.sum(jnp.where(where, terms, 0), 0)

    best, best_hit = top(valid), top(hit)

    def log_share(theta):
        hits, every = total(theta, hit, best_hit), total(theta, valid, best)
        log = jnp.log(hits) - jnp.log(every) + theta * (best_hit - best)
        # Hits sum to at least 1, or to NaN, which XLA's maximum can lose.
        return jnp.where(hits == 0, -jnp.inf, log)

    return lax.map(log_share, thetas.astype(scores.dtype))


# ---------------------------------------------------------------------------
# tuning
# ---------------------------------------------------------------------------


class Tuned(NamedTuple):
    """Perplexities of a grid, and the point with the lowest."""

    perplexities: np.ndarray  # (windows, thetas, lambdas), float64
    window: int
    theta: float
    lambda_: float


def tune(
    vocab_log_probs: Any,
    states: Any,
    targets: Any,
    windows: Sequence[int] = (500, 1000, 2000, WINDOW),
    thetas: Sequence[float] = (0.1, 0.2, 0.4, THETA, 1.0, 1.5),
    lambdas: Sequence[float] = (0.05, 0.1, LAMBDA, 0.2, 0.3),
    convention: Convention = "article",
    chunk: int = 5000,
    block: int = 256,
) -> Tuned:
    """Finds the best window, theta and lambda for a text: the validation text.

    The best theta depends on the norm of the states, so it does not transfer between
    models. The states are compared once for the whole grid.

    Args:
        vocab_log_probs: (N,), log p_vocabulary(target) of the whole text.
        states: (N, D), as for `log_probs`; NumPy arrays are sent to the device in
            pieces.
        targets: (N,), all >= 0.
        windows: to try.
        thetas: to try.
        lambdas: to try.
        convention: see `used`.
        chunk: see `used`.
        block: see `log_probs`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    vocab_log_probs, targets = np.asarray(vocab_log_probs), np.asarray(targets)
    _check_text(vocab_log_probs, states, targets)
    _check_grid(windows, thetas, lambdas)
    _check_convention(convention)
    _check_count("chunk", chunk)
    _check_count("block", block)

    windows = tuple(map(int, windows))
    grid = jnp.asarray(thetas, float), jnp.asarray(lambdas, float)
    history = empty(max(windows), states.shape[1], jnp.asarray(states[:1]).dtype)
    losses = np.zeros((len(windows), len(thetas), len(lambdas)))
    count, piece, printed = len(targets), 8 * block, time.perf_counter()
    for start in range(0, count, piece):
        stop = min(start + piece, count)
        padding = start + piece - stop  # of the last piece, to use the same program
        vocab = np.pad(vocab_log_probs[start:stop], (0, padding))
        words = np.pad(targets[start:stop], (0, padding), constant_values=-1)
        keys = jnp.pad(jnp.asarray(states[start:stop]), ((0, padding), (0, 0)))
        cache, history = _log_probs(history, keys, words, grid[0], windows, block)
        positions = np.arange(start, start + piece)
        use = jnp.stack([used(positions, w, convention, chunk) for w in windows])
        logs = np.asarray(_mixed_grid(vocab, cache, use, grid[1]))
        losses -= logs[..., : stop - start].sum(-1, dtype=np.float64)
        now = time.perf_counter()
        if now - printed > 5 and stop < count:
            printed = now
            print(f"  cache: {stop} of {count} words", flush=True)

    with np.errstate(over="ignore"):
        perplexities = np.exp(losses / count)
    if np.isnan(perplexities).any():
        raise ValueError("states must be finite, got NaN or infinity")
    i, j, k = map(int, np.unravel_index(perplexities.argmin(), perplexities.shape))
    return Tuned(perplexities, windows[i], float(thetas[j]), float(lambdas[k]))


@jax.jit
def _mixed_grid(vocab_log_probs, cache_log_probs, used, lambdas):
    """(windows, thetas, lambdas, N)."""
    over = jax.vmap(mixed, (None, None, None, 0))
    over = jax.vmap(over, (None, 0, None, None))
    over = jax.vmap(over, (None, 0, 0, None))
    return over(vocab_log_probs, cache_log_probs, used, lambdas)


# ---------------------------------------------------------------------------
# checks
# ---------------------------------------------------------------------------


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_number(name: str, value: Any, maximum: float) -> None:
    """A traced number has no value to check."""
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return
    if np.ndim(value) or not 0 <= float(value) <= maximum or math.isinf(value):
        allowed = "finite and >= 0" if maximum == math.inf else f"in [0, {maximum:g}]"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def _check_dtype(name: str, dtype: Any, kind: Any) -> None:
    if not jnp.issubdtype(dtype, kind):
        raise ValueError(f"{name} must be {kind.__name__}, got {jnp.dtype(dtype)}")


def _check_convention(convention: str) -> None:
    if convention not in ("article", "salesforce"):
        raise ValueError(
            f"convention must be 'article' or 'salesforce', got {convention!r}"
        )


def _check_pairs(states: Any, targets: Any) -> None:
    if states.ndim != 2 or targets.shape != states.shape[:1]:
        raise ValueError(
            f"states must be (N, D) and targets (N,), got {states.shape} and "
            f"{targets.shape}"
        )
    _check_dtype("states", states.dtype, jnp.floating)
    _check_dtype("targets", targets.dtype, jnp.integer)


def _check_text(vocab_log_probs: np.ndarray, states: Any, targets: np.ndarray) -> None:
    _check_pairs(states, targets)
    if vocab_log_probs.shape != targets.shape or not len(targets):
        raise ValueError(
            "vocab_log_probs and targets must be (N,) with N >= 1, got "
            f"{vocab_log_probs.shape} and {targets.shape}"
        )
    lowest, highest = targets.min(), vocab_log_probs.max()
    if lowest < 0:
        raise ValueError(f"targets must be >= 0, got {lowest}")
    if not highest < 1e-3:  # rounding lifts some above 0; NaN fails, too
        raise ValueError(f"vocab_log_probs must be <= 0, got {highest}")


def _check_grid(windows: Any, thetas: Any, lambdas: Any) -> None:
    grid = {"windows": windows, "thetas": thetas, "lambdas": lambdas}
    for name, values in grid.items():
        if not len(values):
            raise ValueError(f"{name} must have at least one value, got {values!r}")
    for window in windows:
        _check_count("windows", window)
    for theta in thetas:
        _check_number("thetas", theta, math.inf)
    for share in lambdas:
        _check_number("lambdas", share, 1)
