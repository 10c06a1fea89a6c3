"""The PyTorch twin of `train.models.awd`: equal in float64, and timed beside it.

Tokens are (time, batch). Parameters have PyTorch's layout: kernels are transposed.
Masks are those of `train.models.awd` as tensors: see `as_masks` and `draw_masks`.
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
        else:  # cuDNN copies the new kernel into its flat buffer, and warns
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
        # On a CPU ten times faster than f[t], whose gradient has the size of f.
        for z_now, f_now in zip(z.tanh().unbind(), f.sigmoid().unbind(), strict=True):
            c = torch.lerp(c, z_now, f_now)  # (1 - f) * c + f * z
            cs.append(c)
        return o.sigmoid() * torch.stack(cs), (c, *new_state)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


class AWD(torch.nn.Module):
    """Takes the arguments of `train.models.awd.AWD`; returns a plain tuple."""

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


def loss_fn(net: AWD, tokens, targets, state, masks, alpha: float, beta: float):
    """Cross-entropy plus AR, of the output before dropout, plus TAR; and the state."""
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
    """One update, in place. None: draws new masks.

    Returns:
        The loss, and the next state.
    """
    if masks is None:
        masks = draw_masks(net, rates, tokens.shape[1])
    loss, state = loss_fn(net, tokens, targets, state, masks, alpha, beta)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    return loss.detach(), tuple(tuple(s.detach() for s in layer) for layer in state)


# ---------------------------------------------------------------------------
# conversion from and to train.models.awd
# ---------------------------------------------------------------------------

NAMES = {"weight_ih_l0": "input_kernel", "weight_hh_l0": "kernel", "weight": "kernel"}
NAMES |= {"bias_ih_l0": "input_bias", "bias_hh_l0": "bias"}


def parameters(net: AWD) -> dict[tuple, torch.nn.Parameter]:
    """The parameters, by their paths in `train.models.awd.AWD`."""
    named = {}
    for name, parameter in net.named_parameters():
        *path, last = name.split(".")
        start = ("layers", int(path[1])) if path else ()
        named[*start, NAMES.get(last, last)] = parameter
    return named


def transpose_kernel(path, array):
    return array.T if path[-1].endswith("kernel") else array


def load(net: AWD, params) -> None:
    """Copies the parameters of a `train.models.awd.AWD`, an `nnx.State`."""
    own, arrays = parameters(net), dict(nnx.to_flat_state(params))
    if own.keys() != arrays.keys():
        raise ValueError(f"params must have {sorted(own)}, got {sorted(arrays)}")
    with torch.no_grad():
        for path, parameter in own.items():
            array = transpose_kernel(path, np.array(arrays[path][...]))
            if parameter.shape != array.shape:
                raise ValueError(
                    f"params must have the shape {tuple(parameter.shape)} at {path}, "
                    f"got {array.shape}, both in PyTorch's layout"
                )
            parameter.copy_(torch.from_numpy(array))


def read(net: AWD, attribute: Literal["data", "grad"]) -> dict[tuple, np.ndarray]:
    """Parameters or gradients by path, in the layout of `train.models.awd.AWD`."""
    return {
        path: transpose_kernel(
            path, getattr(parameter, attribute).numpy(force=True)
        ).copy()
        for path, parameter in parameters(net).items()
    }


def as_masks(masks: Masks) -> Masks:
    """The masks of `train.models.awd.draw_masks` as tensors."""
    tensors: Any = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), masks)
    return tensors._replace(weights=tuple(a.T.contiguous() for a in tensors.weights))
