"""`train.awd` in PyTorch: equal to it in float64, and timed beside it.

Tokens are (time, batch), parameters in PyTorch's layout: kernels are transposed. Masks
are those of `train.awd`, as tensors: see `as_masks` and `draw_masks`.
"""

from typing import Any, Literal

import jax
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

from train.models.awd import Masks, Rates

# ---------------------------------------------------------------------------
# layers
# ---------------------------------------------------------------------------


class LSTM(torch.nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.width = width
        self.rnn = torch.nn.LSTM(inputs, width)

    @property
    def dropped(self) -> Any:
        return self.rnn.weight_hh_l0

    def initial_state(self, batch_size: int):
        zeros = self.dropped.new_zeros(batch_size, self.width)
        return zeros, zeros

    def forward(self, x, state, weights=None):
        h, c = state
        args = x, (h[None], c[None])
        if weights is None:
            hs, (h, c) = self.rnn(*args)
        else:  # cuDNN has a fresh kernel to copy to the others, and warns of it
            kernel = {"weight_hh_l0": self.dropped * weights}
            hs, (h, c) = torch.func.functional_call(self.rnn, kernel, args)
        return hs, (h[0], c[0])


class QRNN(torch.nn.Module):
    def __init__(self, inputs: int, width: int, window: int):
        super().__init__()
        self.width, self.inputs, self.window = width, inputs, window
        self.linear = torch.nn.Linear(window * inputs, 3 * width)

    @property
    def dropped(self) -> Any:
        return self.linear.weight

    def initial_state(self, batch_size: int):
        widths = [self.width, self.inputs][: self.window]
        return tuple(self.dropped.new_zeros(batch_size, width) for width in widths)

    def forward(self, x, state, weights=None):
        c, *x_before = state
        new_state = (x[-1],)[: self.window - 1]
        if x_before:
            x = torch.cat([x, torch.cat([x_before[0][None], x[:-1]])], -1)
        kernel = self.dropped if weights is None else self.dropped * weights
        z, f, o = F.linear(x, kernel, self.linear.bias).to(c.dtype).chunk(3, -1)
        cs = []
        # Ten times as fast on a CPU as with f[t], whose gradient is of the size of f.
        for z_now, f_now in zip(z.tanh().unbind(), f.sigmoid().unbind(), strict=True):
            c = torch.lerp(c, z_now, f_now)  # (1 - f) * c + f * z
            cs.append(c)
        return o.sigmoid() * torch.stack(cs), (c, *new_state)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


class AWD(torch.nn.Module):
    """Called as that of `train.awd`; returns its `Outputs` as a tuple."""

    def __init__(
        self,
        words: int,
        embedding: int = 400,
        width: int = 1150,
        layers: int = 3,
        kind: Literal["lstm", "qrnn"] = "lstm",
    ):
        super().__init__()
        widths = [embedding, *[width] * (layers - 1), embedding]
        self.embedding = torch.nn.Parameter(
            torch.empty(words, embedding).uniform_(-0.1, 0.1)
        )
        self.layers = torch.nn.ModuleList(
            LSTM(*sizes) if kind == "lstm" else QRNN(*sizes, window=1 + (i == 0))
            for i, sizes in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.bias = torch.nn.Parameter(torch.zeros(words))

    def initial_state(self, batch_size: int):
        layers: Any = self.layers
        return tuple(layer.initial_state(batch_size) for layer in layers)

    def forward(self, tokens, state, masks=None):
        x = F.embedding(tokens, self.embedding)
        if masks is not None:
            x = x * masks.words[tokens] * masks.input
        new_state = []
        for i, layer in enumerate(self.layers):
            x, s = layer(x, state[i], None if masks is None else masks.weights[i])
            new_state.append(s)
            if masks is not None and i < len(self.layers) - 1:
                x = x * masks.hidden[i]
        dropped = x if masks is None else x * masks.output
        return x, dropped, tuple(new_state)

    def logits(self, x):
        return F.linear(x, self.embedding, self.bias)


def draw_masks(net: AWD, rates: Rates, batch_size: int) -> Masks:
    layers: Any = net.layers

    def draw(rate, *shape) -> Any:
        return net.embedding.new_empty(shape).bernoulli_(1 - rate).div_(1 - rate)

    return Masks(
        draw(rates.words, len(net.embedding), 1),
        draw(rates.input, batch_size, net.embedding.shape[1]),
        tuple(draw(rates.hidden, batch_size, layer.width) for layer in layers[:-1]),
        draw(rates.output, batch_size, layers[-1].width),
        tuple(draw(rates.weights, *layer.dropped.shape) for layer in layers),
    )


# ---------------------------------------------------------------------------
# training step
# ---------------------------------------------------------------------------


def loss_of(net: AWD, tokens, targets, state, masks, alpha: float, beta: float):
    """Cross-entropy, AR of the output before dropout, and TAR; and the new state."""
    raw, dropped, state = net(tokens, state, masks)
    loss = F.cross_entropy(net.logits(dropped).flatten(0, 1), targets.flatten())
    loss = loss + alpha * raw.square().mean()
    if len(raw) > 1:
        loss = loss + beta * (raw[1:] - raw[:-1]).square().mean()
    return loss, state


def train_step(
    net: AWD,
    optimizer: torch.optim.Optimizer,
    tokens,
    targets,
    state,
    *,
    rates: Rates,
    alpha: float,
    beta: float,
    clip: float,
    masks=None,
):
    """One update in place; masks are drawn if none are given.

    Returns:
        The loss, and the state to go on with.
    """
    if masks is None:
        masks = draw_masks(net, rates, tokens.shape[1])
    loss, state = loss_of(net, tokens, targets, state, masks, alpha, beta)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    return loss.detach(), tuple(tuple(s.detach() for s in layer) for layer in state)


# ---------------------------------------------------------------------------
# from and to the layout of train.awd
# ---------------------------------------------------------------------------

NAMES = {"weight_ih_l0": "input_kernel", "weight_hh_l0": "kernel", "weight": "kernel"}
NAMES |= {"bias_ih_l0": "input_bias", "bias_hh_l0": "bias"}


def parameters(net: AWD) -> dict[tuple, torch.nn.Parameter]:
    """By their paths in `train.awd.AWD`."""
    named = {}
    for name, parameter in net.named_parameters():
        *path, last = name.split(".")
        start = ("layers", int(path[1])) if path else ()
        named[*start, NAMES.get(last, last)] = parameter
    return named


def transposed(path, array):
    return array.T if path[-1].endswith("kernel") else array


def load(net: AWD, params) -> None:
    """Takes over the `nnx.State` of the parameters of a `train.awd.AWD`."""
    own, given = parameters(net), dict(nnx.to_flat_state(params))
    if own.keys() != given.keys():
        raise ValueError(f"params must be of {sorted(own)}, got {sorted(given)}")
    with torch.no_grad():
        for path, parameter in own.items():
            array = transposed(path, np.array(given[path][...]))
            if parameter.shape != array.shape:
                raise ValueError(
                    f"params must have {tuple(parameter.shape)} at {path}, got "
                    f"{array.shape}, both as in PyTorch"
                )
            parameter.copy_(torch.from_numpy(array))


def read(net: AWD, what: Literal["data", "grad"]) -> dict[tuple, np.ndarray]:
    """Parameters or gradients by path, in the layout of `train.awd.AWD`."""
    return {
        path: transposed(path, getattr(parameter, what).numpy(force=True)).copy()
        for path, parameter in parameters(net).items()
    }


def as_masks(masks: Masks) -> Masks:
    """Those of `train.awd.draw_masks` as tensors."""
    tensors: Any = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), masks)
    return tensors._replace(weights=tuple(a.T.contiguous() for a in tensors.weights))
