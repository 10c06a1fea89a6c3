"""The neural cache: a language model that looks up what it has just read.

A pair of the state that predicted a word and that word is kept for the last W words.
Of a word y at the state h the cache thinks

    p_cache(y) = sum_{i: y_i = y} e^{theta h.h_i} / sum_i e^{theta h.h_i},

and the model then (1 - lambda) p_vocabulary + lambda p_cache. Nothing is trained.

Only the words that came are asked for, so nothing here has the size of the vocabulary.
States are compared a block at a time, in one matrix product. A text can be given in
pieces, on which nothing depends but rounding:

    history, total = empty(WINDOW, width), 0.0
    for positions, states, targets, vocab_log_probs in pieces:
        cache_log_probs, history = log_probs(history, states, targets, THETA)
        where = used(positions, WINDOW)
        total += mixed(vocab_log_probs, cache_log_probs, where, LAMBDA).sum()

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
    """The last W pairs, oldest first; what is not there yet has the target -1."""

    states: jax.Array  # (W, D)
    targets: jax.Array  # (W,), int32


def empty(window: int, width: int, dtype: Any = jnp.float32) -> History:
    """The history of a text that has yet to begin; `dtype` is that of the states."""
    _check_count("window", window)
    _check_count("width", width)
    _check_dtype("dtype", dtype, jnp.floating)
    return History(jnp.zeros((window, width), dtype), jnp.full(window, -1, jnp.int32))


def log_probs(
    history: History, states: Any, targets: Any, theta: Any, block: int = 256
) -> tuple[jax.Array, History]:
    """What the cache thinks of each word of a piece of text, and the history after it.

    A word is looked up in the W pairs before it, of this piece or of earlier ones.
    Works under `jit`, and under `vmap` for several texts side by side. Beside its
    arguments it takes memory for (W + block) x (block + D) numbers.

    Args:
        history: of the pieces before; from `empty` for the first.
        states: (N, D), those that predict the targets, in the dtype of the history.
            Dot products are summed in float32, or float64 for float64 states.
        targets: (N,), integers. At the end there may be padding, -1, which is neither
            looked up nor remembered.
        theta: >= 0; how much the nearest states count more than the others.
        block: states that are compared with the history at a time.

    Returns:
        (N,) log p_cache(target), -inf where the target is not in the history or there
        is none, and the new history.

    Raises:
        ValueError: an argument is out of its range, or shapes or dtypes do not agree.
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
    """Where the mixture is used, and not the vocabulary alone.

    Args:
        positions: integers, how many words of the text came before.
        window: W.
        convention: "article": wherever there is a history, that is from the second
            word on. "salesforce": where there are W pairs. Their pointer.py cuts its
            history to W at the end of a chunk and asks for more than W pairs, so that
            it also leaves out the first word of every later chunk.
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
    """log((1 - lambda) p_vocabulary + lambda p_cache); p_vocabulary where not used.

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
    """(windows, thetas, N) of them; no window is longer than the history."""
    targets = targets.astype(jnp.int32)
    whole = len(targets) // block

    def step(history, start):
        part = (lax.dynamic_slice_in_dim(x, start, block) for x in (states, targets))
        return _one_block(history, *part, thetas=thetas, windows=windows)

    parts = []
    if whole:
        history, logs = lax.scan(step, history, block * jnp.arange(whole))
        parts.append(jnp.moveaxis(logs, 0, 2).reshape(*logs.shape[1:3], -1))
    rest = slice(whole * block, None)
    history, logs = _one_block(history, states[rest], targets[rest], thetas, windows)
    return jnp.concatenate([*parts, logs], -1), history


def _one_block(history, states, targets, thetas, windows):
    """(windows, thetas, Q). Pairs are rows: XLA is faster at sums over columns."""
    length, size = len(history.targets), len(targets)
    keys = jnp.concatenate([history.states, states])
    words = jnp.concatenate([history.targets, targets])
    exact = {  # GPUs round float32 to TF32 unless told otherwise
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
        there = (key >= query) & (key < query + window) & (words[rows, None] >= 0)
        logs.append(_log_share(scores[rows], there, there & same[rows], thetas))
    # Padding is not remembered, so that the next piece finds all of its W pairs.
    come = jnp.sum(targets >= 0)
    kept = (lax.dynamic_slice_in_dim(x, come, length) for x in (keys, words))
    return History(*kept), jnp.stack(logs)


def _log_share(scores, there, hit, thetas):
    """(thetas, Q): log of the share that the hits in a column have of e^{theta score}.

    Each sum is relative to its own largest term: neither can overflow, and that of the
    hits does not vanish, however far they are below the best score.
    """

    def top(where):
        best = jnp.max(scores, 0, initial=-jnp.inf, where=where)
        return jnp.where(best > -jnp.inf, best, 0)

    def total(theta, where, top):
        terms = jnp.exp(theta * (scores - top[None, :]))
        return jnp.sum(jnp.where(where, terms, 0), 0)

    best, best_hit = top(there), top(hit)

    def log_share(theta):
        hits, every = total(theta, hit, best_hit), total(theta, there, best)
        log = jnp.log(hits) - jnp.log(every) + theta * (best_hit - best)
        # Any hits sum to 1 at least, or to NaN, which XLA's maximum can lose.
        return jnp.where(hits == 0, -jnp.inf, log)

    return lax.map(log_share, thetas.astype(scores.dtype))


# ---------------------------------------------------------------------------
# its three numbers
# ---------------------------------------------------------------------------


class Tuned(NamedTuple):
    """Perplexities of a grid, and where they are lowest."""

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
    """The best window, theta and lambda for a text, which has to be validation text.

    Theta depends on the length of the states: the best one of another model is no
    guess. The states are compared once for the whole grid.

    Args:
        vocab_log_probs: (N,), log p_vocabulary(target), for the whole text.
        states: (N, D), as for `log_probs`; NumPy's are sent to the device in pieces.
        targets: (N,), the words, all of them >= 0.
        windows: to be tried.
        thetas: to be tried.
        lambdas: to be tried.
        convention: see `used`.
        chunk: see `used`.
        block: see `log_probs`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not agree.
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
    count, piece, since = len(targets), 8 * block, time.perf_counter()
    for start in range(0, count, piece):
        stop = min(start + piece, count)
        padding = start + piece - stop  # of the last piece: one program for all
        vocab = np.pad(vocab_log_probs[start:stop], (0, padding))
        words = np.pad(targets[start:stop], (0, padding), constant_values=-1)
        keys = jnp.pad(jnp.asarray(states[start:stop]), ((0, padding), (0, 0)))
        cache, history = _log_probs(history, keys, words, grid[0], windows, block)
        places = np.arange(start, start + piece)
        where = jnp.stack([used(places, w, convention, chunk) for w in windows])
        logs = np.asarray(_mixed_grid(vocab, cache, where, grid[1]))
        losses -= logs[..., : stop - start].sum(-1, dtype=np.float64)
        now = time.perf_counter()
        if now - since > 5 and stop < count:
            since = now
            print(f"  cache: {stop} of {count} words", flush=True)

    with np.errstate(over="ignore"):
        perplexities = np.exp(losses / count)
    if np.isnan(perplexities).any():
        raise ValueError("states must be finite, got others")
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


def _check_number(name: str, value: Any, most: float) -> None:
    """A traced one has no value yet."""
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return
    if np.ndim(value) or not 0 <= float(value) <= most or math.isinf(value):
        allowed = "finite and >= 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be a number, {allowed}; got {value!r}")


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
    if not highest < 1e-3:  # rounding puts some above 0; NaN is none
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
