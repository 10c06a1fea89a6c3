"""AWD-LSTM and AWD-QRNN, the article's language models, and their loss.

An embedding, recurrent layers, and a decoder with a bias that shares the embedding's
weights. Tokens are (time, batch). Dropout masks are drawn beforehand, by `draw_masks`,
so that a step is a pure function of its arguments.

Sources: Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models",
2017, https://arxiv.org/abs/1708.02182; Bradbury, Merity, Xiong and Socher,
"Quasi-recurrent neural networks", 2016, https://arxiv.org/abs/1611.01576; fastai 0.7,
`lm_rnn.py`, for where dropout is applied.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from train.models.recurrent import cudnn_lstm, forget_mult, lstm

# ---------------------------------------------------------------------------
# dropout
# ---------------------------------------------------------------------------


class Rates(NamedTuple):
    """Dropout probabilities."""

    words: float = 0.1  # whole words, in the input only
    input: float = 0.6  # of the embedded words
    hidden: float = 0.2  # between layers
    output: float = 0.4  # after the last layer
    weights: float = 0.5  # of the recurrent kernels; QRNN: of all layer kernels


class Masks(NamedTuple):
    """Factors, 0 or 1 / (1 - rate), shared by all time steps of a batch."""

    words: jax.Array  # (words, 1)
    input: jax.Array  # (batch, width)
    hidden: tuple[jax.Array, ...]  # (batch, width) after each layer but the last
    output: jax.Array  # (batch, width)
    weights: tuple[jax.Array, ...]  # of the kernel of each layer


def draw_masks(key, net: "AWD", rates: Rates, batch_size: int) -> Masks:
    """Draws the masks of one batch; `net` may have shapes in place of arrays."""
    layers = list(net.layers)
    dtype = net.embedding.dtype
    keys = iter(jax.random.split(key, 3 + 2 * len(layers)))

    def draw(rate, *shape):
        keep = jax.random.bernoulli(next(keys), 1.0 - rate, shape)
        return keep.astype(dtype) / jnp.asarray(1 - rate, dtype)

    return Masks(
        draw(rates.words, net.embedding.shape[0], 1),
        draw(rates.input, batch_size, net.embedding.shape[1]),
        tuple(draw(rates.hidden, batch_size, layer.width) for layer in layers[:-1]),
        draw(rates.output, batch_size, layers[-1].width),
        tuple(draw(rates.weights, *layer.kernel.shape) for layer in layers),
    )


# ---------------------------------------------------------------------------
# layers
# ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, kernel, dtype):
    """x @ kernel with factors in `dtype`, also in the gradients, and sums in x.dtype.

    None: the kernel's dtype. Plain autodiff would multiply the gradient in float32.
    """
    dtype = dtype or kernel.dtype
    return jnp.dot(
        x.astype(dtype), kernel.astype(dtype), preferred_element_type=x.dtype
    )


def _product_forward(x, kernel, dtype):
    return product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype, factors, d_product):
    x, kernel = factors
    over_rows = tuple(range(x.ndim - 1))
    d_kernel = jnp.tensordot(
        x.astype(dtype or kernel.dtype),
        d_product.astype(dtype or kernel.dtype),
        (over_rows, over_rows),
        preferred_element_type=kernel.dtype,
    )
    return product(d_product, kernel.T, dtype), d_kernel


product.defvjp(_product_forward, _product_backward)


def uniform(rngs: nnx.Rngs, bound: float, *shape: int) -> nnx.Param:
    key = rngs.params()
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


class LSTM(nnx.Module):
    """As in PyTorch: gates i, f, g, o, two biases, weights within ±1 / sqrt(width)."""

    def __init__(
        self, inputs: int, width: int, *, cudnn=False, dtype=None, rngs: nnx.Rngs
    ):
        bound = width**-0.5
        self.width, self.cudnn, self.dtype = width, cudnn, dtype
        self.input_kernel = uniform(rngs, bound, inputs, 4 * width)
        self.kernel = uniform(
            rngs, bound, width, 4 * width
        )  # subject to weight dropout
        self.input_bias = uniform(rngs, bound, 4 * width)
        self.bias = uniform(rngs, bound, 4 * width)

    def initial_state(self, batch_size: int):
        zeros = jnp.zeros((batch_size, self.width), self.kernel.dtype)
        return zeros, zeros

    def __call__(self, x, state, weights, last):
        kernel, bias = self.kernel * weights, self.input_bias[...] + self.bias[...]
        if self.cudnn:
            h, c = state
            return cudnn_lstm(x, self.input_kernel[...], kernel, bias, h, c, last + 1)
        inputs = product(x, self.input_kernel, self.dtype) + bias
        hs, cs = lstm(inputs, kernel.astype(self.dtype or kernel.dtype), *state)
        return hs, (hs[last], cs[last])


class QRNN(nnx.Module):
    """Gates from the input and, with window 2, the previous one; pooling over time."""

    def __init__(
        self, inputs: int, width: int, *, window: int, dtype=None, rngs: nnx.Rngs
    ):
        bound = (window * inputs) ** -0.5
        self.width, self.dtype, self.inputs, self.window = width, dtype, inputs, window
        self.kernel = uniform(rngs, bound, window * inputs, 3 * width)
        self.bias = uniform(rngs, bound, 3 * width)

    def initial_state(self, batch_size: int):
        dtype, widths = self.kernel.dtype, [self.width, self.inputs][: self.window]
        return tuple(jnp.zeros((batch_size, width), dtype) for width in widths)

    def __call__(self, x, state, weights, last):
        c, *x_before = state
        new_state = (x[last],)[: self.window - 1]
        if x_before:
            x = jnp.concatenate([x, jnp.concatenate([x_before[0][None], x[:-1]])], -1)
        gates = product(x, self.kernel * weights, self.dtype) + self.bias[...]
        z, f, o = jnp.split(gates, 3, axis=-1)
        cs = forget_mult(jnp.tanh(z), jax.nn.sigmoid(f), c)
        return jax.nn.sigmoid(o) * cs, (cs[last], *new_state)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


class Outputs(NamedTuple):
    raw: jax.Array  # (time, batch, width) of the last layer
    dropped: jax.Array  # for the decoder
    state: Any  # after `length` tokens


class AWD(nnx.Module):
    """A language model of LSTM or QRNN layers.

    Args:
        words: size of the vocabulary.
        embedding: width of the embedding and of the last layer, since the decoder is
            the same matrix. In the article: 400.
        width: of the other layers. In the article: 1150, QRNN 1550.
        layers: in total. In the article: 3, QRNN 4.
        kind: of the layers. The first QRNN layer also sees the previous word.
        cudnn: run LSTM layers with cuDNN, in float32 only.
        dtype: of matrix products; None: that of the parameters, float32. States, gates
            and sums have the dtype of the parameters.
        rngs: with a key for "params".
    """

    def __init__(
        self,
        words: int,
        embedding: int = 400,
        width: int = 1150,
        layers: int = 3,
        *,
        kind: Literal["lstm", "qrnn"] = "lstm",
        cudnn: bool = False,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        widths = [embedding, *[width] * (layers - 1), embedding]

        def layer(i: int):
            options: Any = {"dtype": dtype, "rngs": rngs}
            if kind == "lstm":
                return LSTM(*widths[i : i + 2], cudnn=cudnn, **options)
            return QRNN(*widths[i : i + 2], window=2 if i == 0 else 1, **options)

        self.dtype = dtype
        self.embedding = uniform(rngs, 0.1, words, embedding)
        self.layers = nnx.List(layer(i) for i in range(layers))
        self.bias = nnx.Param(jnp.zeros(words))

    def initial_state(self, batch_size: int):
        return tuple(layer.initial_state(batch_size) for layer in self.layers)

    def __call__(
        self, tokens, state, masks: Masks | None = None, length=None
    ) -> Outputs:
        """Without masks, evaluates. Tokens from `length` on are padding."""
        last = (tokens.shape[0] if length is None else length) - 1
        x = self.embedding[...][tokens]
        if masks is not None:
            x = x * masks.words[tokens] * masks.input
        new_state = []
        for i, layer in enumerate(self.layers):
            weights = masks.weights[i] if masks is not None else 1
            x, s = layer(x, state[i], weights, last)
            new_state.append(s)
            if masks is not None and i < len(self.layers) - 1:
                x = x * masks.hidden[i]
        dropped = x if masks is None else x * masks.output
        return Outputs(x, dropped, tuple(new_state))

    def logits(self, x):
        return product(x, self.embedding[...].T, self.dtype) + self.bias[...]


# ---------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def cross_entropy(x, embedding, bias, targets, weights, chunk, dtype=None):
    """Sum of weights times -log softmax(x @ embedding.T + bias)[target].

    Computes the logits of `chunk` entries of the first axis at a time, with their
    gradients: all logits are never in memory at once, and none is computed twice.

    Args:
        x: (..., width), such as (time, batch, width).
        embedding: (words, width).
        bias: (words,).
        targets: (...) int32.
        weights: (...), without a gradient.
        chunk: number of entries of the first axis.
        dtype: of matrix products; None: that of the embedding.
    """
    return _cross_entropy_forward(x, embedding, bias, targets, weights, chunk, dtype)[0]


def _cross_entropy_forward(x, embedding, bias, targets, weights, chunk, dtype):
    chunk = min(chunk, len(x))
    words = jnp.arange(len(embedding), dtype=targets.dtype)
    over_rows = tuple(range(x.ndim - 1))

    def in_chunks(a):
        a = jnp.pad(a, [(0, -len(a) % chunk)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, chunk, *a.shape[1:])

    def step(sums, now):
        loss, d_embedding, d_bias = sums
        x, targets, weights = now[0], now[1][..., None], now[2][..., None]
        logits = product(x, embedding.T, dtype) + bias
        logits -= logits.max(-1, keepdims=True)
        total = jnp.exp(logits).sum(-1, keepdims=True)
        correct = jnp.take_along_axis(logits, targets, -1)
        loss += (weights * (jnp.log(total) - correct)).sum()
        d_logits = weights * (jnp.exp(logits) / total - (words == targets))
        rounded = d_logits.astype(dtype or embedding.dtype)
        d_embedding += jnp.tensordot(
            rounded,
            x.astype(rounded.dtype),
            (over_rows, over_rows),
            preferred_element_type=d_embedding.dtype,
        )
        d_bias += d_logits.sum(over_rows)
        return (loss, d_embedding, d_bias), product(d_logits, embedding, dtype)

    sums, d_x = lax.scan(
        step,
        (jnp.zeros((), x.dtype), jnp.zeros_like(embedding), jnp.zeros_like(bias)),
        (in_chunks(x), in_chunks(targets), in_chunks(weights)),
    )
    loss, d_embedding, d_bias = sums
    d_x = d_x.reshape(-1, *x.shape[1:])[: len(x)]
    return loss, (d_x, d_embedding, d_bias)


def _cross_entropy_backward(chunk, dtype, gradients, d_loss):
    return (*(d_loss * g for g in gradients), None, None)


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def activation_penalties(x, length, alpha: float, beta: float, ar=None):
    """AR, alpha * mean(x[t]**2), and TAR, beta * mean((x[t + 1] - x[t])**2).

    Args:
        x: (time, batch, width) of the last layer.
        length: steps from there on are padding.
        alpha: factor of AR.
        beta: factor of TAR.
        ar: used for AR; None: x, as in the article's code.
    """
    ar = x if ar is None else ar
    times, (_, batch, width) = jnp.arange(len(x))[:, None, None], x.shape
    size = jnp.asarray(length * batch * width, x.dtype)
    squares = jnp.where(times < length, ar**2, 0).sum() / size
    steps = jnp.where(times[1:] < length, (x[1:] - x[:-1]) ** 2, 0).sum()
    # a single token has no change
    steps /= jnp.maximum(size - batch * width, 1)
    return alpha * squares + beta * steps
