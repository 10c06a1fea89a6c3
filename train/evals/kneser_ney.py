"""Interpolated modified Kneser-Ney: what counting alone makes of a text.

The baseline of the language models, after Chen and Goodman (1998, TR-10-98): the
probability of a word after a context is its discounted count there, and what the
discounts leave over goes to its probability after the context without the first word.
Shorter contexts count in how many different ones a word was seen, not how often; the
last to get a share is the uniform distribution.
"""

import numpy as np


def log_probs(
    train: np.ndarray, test: np.ndarray, vocabulary_size: int, eos: int, order: int = 5
) -> np.ndarray:
    """The log probability of each test token after the `order - 1` before it, float64.

    Args:
        train: ids that are counted.
        test: ids to predict; nothing is learned from them.
        vocabulary_size: the probabilities of that many ids sum to one.
        eos: the id that stands in front of both streams.
        order: longest n-gram; 1 is the frequency of the words, smoothed.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if len(train) == 0:
        raise ValueError("train must not be empty: there is nothing to count")
    front = np.full(order - 1, eos)
    stream = np.concatenate([front, train, front, test]).astype(np.int64)
    if stream.min() < 0 or stream.max() >= vocabulary_size:
        raise ValueError(
            f"ids must be in [0, {vocabulary_size}), which is vocabulary_size, got "
            f"{stream.min()} to {stream.max()}"
        )
    ends = np.arange(len(stream))[order - 1 :]  # of n-grams: train's, front's, test's
    trained, tested = ends[: len(train)], ends[len(train) + order - 1 :]

    # grams[k][i] is the number of the gram of k + 1 words that ends at i, the same for
    # the same words. Its context is the gram of k words that ends one before.
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
        taken = _discounts(counts)[np.minimum(counts, 3)]
        # Of each context: all counts, and all discounts, of the words seen after it.
        after, seen, size = context[kinds[k]], gram[kinds[k]], context.max() + 1
        total = np.bincount(after, counts[seen], minlength=size)
        left = np.bincount(after, taken[seen], minlength=size)
        known = total[context[tested]] > 0
        word, here = gram[tested[known]], context[tested[known]]
        p[known] = (counts[word] - taken[word] + left[here] * p[known]) / total[here]
    return np.log(p)


def perplexity(
    train: np.ndarray, test: np.ndarray, vocabulary_size: int, eos: int, order: int = 5
) -> float:
    """`exp` of the mean negative log probability of the test tokens."""
    if len(test) == 0:
        raise ValueError("test must not be empty: there is nothing to predict")
    logs = log_probs(train, test, vocabulary_size, eos, order)
    return float(np.exp(-logs.mean()))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (np.sum(counts == c) for c in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        if min(found) > 0:
            return np.array([0, *found])
    # Too few n-grams for estimates, or strange ones: KenLM's --discount_fallback.
    return np.array([0, 0.5, 1, 1.5])
