"""The recurrences and their gradients against plain autodiff, NumPy and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import rnn

from train.models import recurrent
from train.models.recurrent import forget_mult, lstm

pytestmark = pytest.mark.usefixtures("x64", "fast_compile")

RECURRENCES = ("sequential", "parallel", "auto")


few = settings(  # each shape is compiled
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def shapes(time, batch, width):
    return st.tuples(*(st.integers(1, n) for n in (time, batch, width)))


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def close(ours, expected, tolerance=1e-10):
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(f, args, cotangents):
    """The results of f and the gradients of all its arguments, in one list."""
    results, vjp = jax.vjp(f, *args)
    return [*jax.tree.leaves(results), *vjp(cotangents)]


# ---------------------------------------------------------------------------
# LSTM
# ---------------------------------------------------------------------------


def lstm_arguments(time, batch, width, seed=0):
    """Arguments, and cotangents of both results."""
    state, all_states = (batch, width), (time, batch, width)
    gates, kernel = (time, batch, 4 * width), (width, 4 * width)
    *args, dh, dc = normal(seed, gates, kernel, state, state, all_states, all_states)
    return args, (dh, dc)


def naive_lstm(inputs, kernel, h, c):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x + h @ kernel, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), (h, c)

    return lax.scan(step, (h, c), inputs)[1]


@pytest.mark.slow
@few
@given(shape=shapes(time=6, batch=3, width=4))
@example(shape=(1, 3, 4))
def test_lstm_is_a_naive_scan(shape):
    args, cotangents = lstm_arguments(*shape)
    ours, expected = (with_gradients(f, args, cotangents) for f in (lstm, naive_lstm))
    close(ours, expected)


@pytest.mark.parametrize("which", ["hs", "cs"])
def test_lstm_with_one_result_unused(which):
    args, (dh, dc) = lstm_arguments(4, 2, 3)
    one, index = (dh, 0) if which == "hs" else (dc, 1)
    ours, expected = (
        with_gradients(lambda *args, f=f: f(*args)[index], args, one)
        for f in (lstm, naive_lstm)
    )
    close(ours, expected)


def test_lstm_is_that_of_pytorch():
    time, batch, inputs, width = 7, 3, 5, 4
    (_, _, h, c), cotangents = lstm_arguments(time, batch, width)
    (x,) = normal(1, (time, batch, inputs))
    theirs = torch.nn.LSTM(inputs, width, dtype=torch.float64)
    input_weight, weight, *biases = (p.detach().numpy() for p in theirs.parameters())

    def ours(x, input_kernel, kernel, input_bias, bias, h, c):
        hoisted = x @ input_kernel + (input_bias + bias)[None, None]
        return lstm(hoisted, kernel, h, c)

    args = x, input_weight.T, weight.T, *biases, h, c
    hs, cs, *grads = with_gradients(ours, args, cotangents)

    x, h, c = (torch.tensor(a, requires_grad=True) for a in (x, h, c))
    close([hs], [theirs(x, (h[None], c[None]))[0].detach()])
    state, states = (h[None], c[None]), []
    for now in x:  # one at a time: it returns no c but the last
        _, state = theirs(now[None], state)
        states.append(state)
    states = [torch.cat(of_all) for of_all in zip(*states, strict=True)]
    torch.autograd.backward(states, [torch.tensor(d) for d in cotangents])
    close([hs, cs], [s.detach() for s in states])
    weights = theirs.weight_ih_l0.grad.T, theirs.weight_hh_l0.grad.T
    biases = theirs.bias_ih_l0.grad, theirs.bias_hh_l0.grad
    close(grads, [x.grad, *weights, *biases, h.grad, c.grad])


def test_lstm_goes_on_where_it_stopped():
    (inputs, kernel, h, c), _ = lstm_arguments(5, 2, 3)
    hs, cs = lstm(inputs, kernel, h, c)
    first = lstm(inputs[:2], kernel, h, c)
    then = lstm(inputs[2:], kernel, first[0][-1], first[1][-1])
    both = (jnp.concatenate(pair) for pair in zip(first, then, strict=True))
    close([hs, cs], both, 1e-15)


def test_lstm_with_a_bfloat16_kernel():
    args, cotangents = lstm_arguments(5, 3, 8)
    inputs, kernel, h, c = (jnp.float32(a) for a in args)
    args = inputs, kernel.astype(jnp.bfloat16), h, c
    results = with_gradients(lstm, args, tuple(jnp.float32(d) for d in cotangents))
    dtypes = [r.dtype for r in results]
    f32 = jnp.float32
    assert dtypes == [f32, f32, f32, jnp.bfloat16, f32, f32]
    args = (a.astype(jnp.float64) for a in args)
    expected = with_gradients(naive_lstm, tuple(args), cotangents)
    for result, other in zip(results, expected, strict=True):
        error = jnp.abs(result.astype(jnp.float64) - other).max()
        assert 0 < error < 0.02 * jnp.abs(other).max()


# ---------------------------------------------------------------------------
# QRNN
# ---------------------------------------------------------------------------


def forget_mult_arguments(time, batch, width):
    everything = (time, batch, width)
    z, f, c, d_cs = normal(0, everything, everything, everything[1:], everything)
    return (z, 1 / (1 + np.exp(-f)), c), d_cs


def naive_forget_mult(z, f, c):
    def step(c, now):
        z, f = now
        c = f * z + (1 - f) * c
        return c, c

    return lax.scan(step, c, (z, f))[1]


@pytest.mark.parametrize("recurrence", RECURRENCES)
@few
@given(shape=shapes(time=9, batch=3, width=4))
@example(shape=(1, 3, 4))
def test_forget_mult_is_a_naive_scan(recurrence, shape):
    args, d_cs = forget_mult_arguments(*shape)
    ours = with_gradients(lambda *args: forget_mult(*args, recurrence), args, d_cs)
    close(ours, with_gradients(naive_forget_mult, args, d_cs))


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_forget_mult_is_loops_of_numpy_and_pytorch(recurrence):
    (z, f, c), d_cs = forget_mult_arguments(11, 3, 5)
    ours = with_gradients(lambda *a: forget_mult(*a, recurrence), (z, f, c), d_cs)

    expected, last = [], c
    for z_now, f_now in zip(z, f, strict=True):
        last = f_now * z_now + (1 - f_now) * last
        expected.append(last)
    close(ours[:1], [np.stack(expected)])

    z, f, c = (torch.tensor(a, requires_grad=True) for a in (z, f, c))
    states, last = [], c
    for t in range(len(z)):
        last = f[t] * z[t] + (1 - f[t]) * last
        states.append(last)
    torch.stack(states).backward(torch.tensor(d_cs))
    close(ours, [torch.stack(states).detach(), z.grad, f.grad, c.grad])


def test_forget_mult_at_gates_that_are_open_or_shut():
    """f at 0 keeps the state, at 1 replaces it; gradients stay exact."""
    (z, _, c), d_cs = forget_mult_arguments(4, 2, 3)
    for gate, expected in ((0.0, np.broadcast_to(c, z.shape)), (1.0, z)):
        f = np.full_like(z, gate)
        for recurrence in RECURRENCES:
            got = with_gradients(
                lambda *args, r=recurrence: forget_mult(*args, r), (z, f, c), d_cs
            )
            np.testing.assert_array_equal(got[0], expected)
            close(got, with_gradients(naive_forget_mult, (z, f, c), d_cs))


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 2), ("cuda", 0)])
def test_auto_is_parallel_where_that_is_faster(platform, loops):
    """Lowered for either, and on any machine."""
    args, d_cs = forget_mult_arguments(8, 2, 3)
    lowered = with_gradients.trace(forget_mult, args, d_cs).lower(
        lowering_platforms=(platform,)
    )
    assert lowered.as_text().count("stablehlo.while") == loops


@pytest.mark.usefixtures("lenient")
def test_cudnn_is_called_with_what_it_wants(monkeypatch):
    """Without a GPU: JAX's own reference in its place, which takes the same."""

    def reference(x, h, c, weights, lengths, *, dropout, bidirectional, **sizes):
        parts = rnn.unpack_lstm_weights(weights, *sizes.values(), bidirectional)
        sizes = *sizes.values(), dropout, bidirectional
        return rnn.lstm_ref(x, h, c, *parts, lengths, *sizes)

    monkeypatch.setattr(recurrent.rnn, "lstm", reference)
    rng = np.random.default_rng(0)
    time, batch, inputs, width = 5, 3, 4, 6
    shapes = (time, batch, inputs), (inputs, 4 * width), (width, 4 * width)
    shapes += (4 * width,), (batch, width), (batch, width)
    x, input_kernel, kernel, bias, h, c = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes
    )
    hs, cs = recurrent.lstm(x @ input_kernel + bias, kernel, h, c)
    for length in (time, 2):
        ours, (last_h, last_c) = recurrent.cudnn_lstm(
            x, input_kernel, kernel, bias, h, c, length
        )
        np.testing.assert_allclose(ours[:length], hs[:length], atol=1e-6)
        np.testing.assert_allclose(last_h, hs[length - 1], atol=1e-6)
        np.testing.assert_allclose(last_c, cs[length - 1], atol=1e-6)
