"""Recurrences over time with custom gradients: the LSTM and the QRNN's pooling.

Arrays are (time, batch, width). Whatever does not depend on the previous state is
computed by the caller, for all steps at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import rnn

# ---------------------------------------------------------------------------
# LSTM
# ---------------------------------------------------------------------------


@jax.custom_vjp
def lstm(inputs, kernel, h, c):
    """Computes all states of an LSTM.

        i, f, g, o = inputs[t] + h[t - 1] @ kernel
        c[t] = sigmoid(f) * c[t - 1] + sigmoid(i) * tanh(g)
        h[t] = sigmoid(o) * tanh(c[t])

    Gates are in the order of PyTorch and cuDNN. The gradient of the kernel is a single
    product over all steps, rather than a sum that each step reads and writes.

    Args:
        inputs: (time, batch, 4 * width), the inputs times their kernel, plus bias.
        kernel: (width, 4 * width). The product has its dtype, all else that of the
            inputs.
        h: (batch, width), the initial state.
        c: (batch, width), the initial cell state.

    Returns:
        h and c of every step, (time, batch, width) each.
    """
    return _lstm_forward(inputs, kernel, h, c)[0]


def _lstm_forward(inputs, kernel, h, c):
    def step(state, x):
        h, c = state
        product = jnp.dot(
            h.astype(kernel.dtype), kernel, preferred_element_type=x.dtype
        )
        i, f, g, o = jnp.split(x + product, 4, axis=-1)
        i, f, g, o = (
            jax.nn.sigmoid(i),
            jax.nn.sigmoid(f),
            jnp.tanh(g),
            jax.nn.sigmoid(o),
        )
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (h, c), (h, c, jnp.concatenate([i, f, g, o], -1))

    _, (hs, cs, gates) = lax.scan(step, (h, c), inputs)
    return (hs, cs), (kernel, h, c, hs, cs, gates)


def _lstm_backward(residuals, cotangents):
    kernel, h, c, hs, cs, gates = residuals
    earlier_h, earlier_c = (
        jnp.concatenate([first[None], states[:-1]])
        for first, states in ((h, hs), (c, cs))
    )
    # Transposed once: on a CPU, a product with the untransposed kernel is slower.
    transposed = lax.optimization_barrier(kernel.T)

    def step(carry, now):
        dh, dc = carry
        dh_output, dc_output, gates, c, c_before = now
        dh, dc = dh + dh_output, dc + dc_output
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        tanh_c = jnp.tanh(c)
        dc = dc + dh * o * (1 - tanh_c**2)
        d_inputs = jnp.concatenate(
            [
                dc * g * i * (1 - i),
                dc * c_before * f * (1 - f),
                dc * i * (1 - g**2),
                dh * tanh_c * o * (1 - o),
            ],
            -1,
        )
        dh = jnp.dot(
            d_inputs.astype(kernel.dtype),
            transposed,
            preferred_element_type=d_inputs.dtype,
        )
        return (dh, dc * f), d_inputs

    (dh, dc), d_inputs = lax.scan(
        step,
        (jnp.zeros_like(h), jnp.zeros_like(c)),
        (*cotangents, gates, cs, earlier_c),
        reverse=True,
    )
    d_kernel = jnp.einsum(
        "tbh,tbg->hg",
        earlier_h.astype(kernel.dtype),
        d_inputs.astype(kernel.dtype),
        preferred_element_type=d_inputs.dtype,
    )
    return d_inputs, d_kernel.astype(kernel.dtype), dh, dc


lstm.defvjp(_lstm_forward, _lstm_backward)


def cudnn_lstm(x, input_kernel, kernel, bias, h, c, length):
    """The same with cuDNN, from the raw inputs; for NVIDIA GPUs, float32 only.

    Args:
        x: (time, batch, inputs).
        input_kernel: (inputs, 4 * width).
        kernel: (width, 4 * width).
        bias: (4 * width,).
        h: (batch, width), the initial state.
        c: (batch, width), the initial cell state.
        length: steps from there on are padding, with an output of 0.

    Returns:
        h of every step, (time, batch, width), and the final state (h, c).
    """
    (inputs, width), batch = (x.shape[-1], h.shape[-1]), x.shape[1]
    weights = [input_kernel.T.ravel(), kernel.T.ravel(), bias, jnp.zeros_like(bias)]
    hs, h, c = rnn.lstm(
        x.swapaxes(0, 1),
        h[None],
        c[None],
        jnp.concatenate(weights),
        jnp.full(batch, length, jnp.int32),
        input_size=inputs,
        hidden_size=width,
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return hs.swapaxes(0, 1), (h[0], c[0])


# ---------------------------------------------------------------------------
# QRNN
# ---------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def forget_mult(z, f, c, recurrence="auto"):
    """The pooling of a QRNN, c[t] = f[t] * z[t] + (1 - f[t]) * c[t - 1], for all t.

    Note that f lets the new value in, whereas in an LSTM it keeps the old one.

    Args:
        z: (time, batch, width).
        f: (time, batch, width), in (0, 1).
        c: (batch, width), the initial state.
        recurrence: "sequential", "parallel" (log2(time) rounds over all steps at once)
            or "auto": sequential on a CPU, where it is faster, otherwise parallel.
    """
    return _linear(1 - f, f * z, c, recurrence, False)


def _forget_mult_forward(z, f, c, recurrence):
    cs = forget_mult(z, f, c, recurrence)
    return cs, (z, f, c, cs)


def _forget_mult_backward(recurrence, residuals, d_cs):
    z, f, c, cs = residuals
    earlier = jnp.concatenate([c[None], cs[:-1]])
    # The gradient of c[t] comes from its own step and, through 1 - f, from the next.
    keep = jnp.concatenate([1 - f[1:], jnp.zeros_like(f[:1])])
    d_cs = _linear(keep, d_cs, jnp.zeros_like(c), recurrence, True)
    return d_cs * f, d_cs * (z - earlier), d_cs[0] * (1 - f[0])


forget_mult.defvjp(_forget_mult_forward, _forget_mult_backward)


def _linear(keep, add, c, recurrence, reverse):
    """c[t] = keep[t] * c[t - 1] + add[t] for all t; in reverse, from c[t + 1]."""

    def sequential(keep, add, c):
        def step(c, now):
            c = now[0] * c + now[1]
            return c, c

        return lax.scan(step, c, (keep, add), reverse=reverse)[1]

    def parallel(keep, add, c):
        def combine(one, two):
            return one[0] * two[0], two[0] * one[1] + two[1]

        first = -1 if reverse else 0
        add = add.at[first].add(keep[first] * c)
        return lax.associative_scan(combine, (keep, add), reverse=reverse)[1]

    if recurrence == "auto":
        return lax.platform_dependent(keep, add, c, cpu=sequential, default=parallel)
    return {"sequential": sequential, "parallel": parallel}[recurrence](keep, add, c)
