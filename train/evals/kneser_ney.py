"""Interpolated modified Kneser-Ney n-grams: the baseline of the language models.

After Chen and Goodman (1998, TR-10-98). The probability of a word after a context is
its discounted count, plus the mass of the discounts times its probability after the
context without its first word. Counts of shorter contexts are numbers of distinct
longer contexts, not of occurrences. The recursion ends at the uniform distribution.
"""

import numpy as np


def log_probs(
    train: np.ndarray, test: np.ndarray, vocabulary_size: int, eos: int, order: int = 5
) -> np.ndarray:
    """float64 log-probability of each test token given the `order - 1` before it.

    Args:
        train: ids to count.
        test: ids to predict; nothing is learned from them.
        vocabulary_size: number of ids, whose probabilities sum to one.
        eos: the id that precedes both streams.
        order: longest n-gram; 1 is the smoothed frequency of the words.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if len(train) == 0:
        raise ValueError("train must not be empty: there is nothing to count")
    start = np.full(order - 1, eos)
    stream = np.concatenate([start, train, start, test]).astype(np.int64)
    if stream.min() < 0 or stream.max() >= vocabulary_size:
        raise ValueError(
            f"ids must be in [0, {vocabulary_size}), which is vocabulary_size, got "
            f"{stream.min()} to {stream.max()}"
        )
    ends = np.arange(len(stream))[order - 1 :]  # of n-grams: train's, start's, test's
    trained, tested = ends[: len(train)], ends[len(train) + order - 1 :]

    # grams[k][i] identifies the gram of k + 1 words that ends at i: equal grams have
    # equal numbers. Its context is the gram of k words that ends one before.
    grams, contexts = [stream], [np.zeros_like(stream)]
    for _ in range(order - 1):
        before = np.concatenate([[0], grams[-1][:-1]])
        pairs = before * vocabulary_size + stream
        contexts.append(before)
        grams.append(np.unique(pairs, return_inverse=True)[1])
    kinds = [trained[np.unique(g[trained], return_index=True)[1]] for g in grams]

    p = np.full(len(test), 1 / vocabulary_size)
    for k, (gram, context) in enumerate(zip(grams, contexts, strict=True)):
        counted = trained if k == order - 1 else kinds[k + 1]
        counts = np.bincount(gram[counted], minlength=gram.max() + 1)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        # for each context, the sums of counts and discounts of the words seen after it
        after, seen, size = context[kinds[k]], gram[kinds[k]], context.max() + 1
        total = np.bincount(after, counts[seen], minlength=size)
        mass = np.bincount(after, discounts[seen], minlength=size)
        known = total[context[tested]] > 0
        g, c = gram[tested[known]], context[tested[known]]
        p[known] = (counts[g] - discounts[g] + mass[c] * p[known]) / total[c]
    return np.log(p)


def perplexity(
    train: np.ndarray, test: np.ndarray, vocabulary_size: int, eos: int, order: int = 5
) -> float:
    """exp of the mean negative log-probability of the test tokens."""
    if len(test) == 0:
        raise ValueError("test must not be empty: there is nothing to predict")
    logs = log_probs(train, test, vocabulary_size, eos, order)
    return float(np.exp(-logs.mean()))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts of counts of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (np.sum(counts == c) for c in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        estimates = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        if min(estimates) > 0:
            return np.array([0, *estimates])
    # Too few n-grams for an estimate, or odd ones: KenLM's --discount_fallback.
    return np.array([0, 0.5, 1, 1.5])
