"""Depthwise convolutions as sums of shifted products, which are fast on CPUs."""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from train.models.conv import DIMENSIONS

# Products, at most, that a step of the kernel's gradient sums: more rows at once save
# time in training, fewer in compilation.
PRODUCTS = 72


def depthwise_conv(x, kernel, strides, padding, **unused):
    """A convolution of each channel by itself, with hand-written gradients.

    XLA's CPU backend has naive loops for grouped convolutions. Here each element of the
    kernel multiplies a shifted view of the images, and XLA fuses the sum of all into
    one vectorized loop; so it does with the gradient of the images. That of the kernel
    sums over images and rows in a loop, since XLA's own reduction of all but the
    channels is slow. On other devices this is JAX's own convolution.

    Takes the arguments with which `nnx.Conv(conv_general_dilated=depthwise_conv)` calls
    it, for x (n, h, w, channels) and kernel (k, k, 1, channels). The strides must be
    equal and at most k; there is no dilation.
    """
    groups = unused.pop("feature_group_count", 1)
    if groups != x.shape[3] or kernel.shape[2:] != (1, x.shape[3]):
        raise ValueError(
            f"feature_group_count and the kernel's output channels must be the "
            f"{x.shape[3]} channels of x, got {groups} and a kernel {kernel.shape}"
        )
    for name in ("lhs_dilation", "rhs_dilation"):
        if any(d != 1 for d in unused.pop(name, None) or ()):
            raise ValueError(f"{name} must be 1: dilation is not implemented")
    stride, k = strides[0], min(kernel.shape[:2])
    if strides[0] != strides[1] or stride > k:
        raise ValueError(f"strides must be equal and at most {k}, got {strides}")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            x.shape[1:3], kernel.shape[:2], strides, padding.upper()
        )
    convolve = _conv_on_cpu if jax.default_backend() == "cpu" else _conv
    return convolve(x, kernel, stride, tuple(map(tuple, padding)))


def _conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[3],
    )


def _pad(x, padding):
    """With zeros; a negative padding crops."""
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    return lax.optimization_barrier(x)  # in the fused loop, it would be a branch


def _taps(kernel):
    return itertools.product(*map(range, kernel.shape[:2]))


def _sum_of_shifts(x, kernel, stride, height, width):
    """The convolution of padded images, without padding."""
    rows, columns = ((n - 1) * stride + 1 for n in (height, width))
    return sum(
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        for i, j in _taps(kernel)
    )


def _output_sizes(x, kernel, stride, padding):
    return [
        (n + sum(p) - k) // stride + 1
        for n, k, p in zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    ]


def _forward(x, kernel, stride, padding):
    sizes = _output_sizes(x, kernel, stride, padding)
    return _sum_of_shifts(_pad(x, padding), kernel, stride, *sizes)


_conv_on_cpu = jax.custom_vjp(_forward, nondiff_argnums=(2, 3))


def _image_gradient(x, kernel, stride, padding, g):
    """That of padded pixels `stride` apart takes every `stride`-th of the kernel.

    So there are stride x stride convolutions of g, with parts of the kernel, and their
    pixels alternate.
    """
    # per axis: the first row of a part's output, and how many there are
    first = [lo // stride for lo, _ in padding]
    skip = [lo % stride for lo, _ in padding]
    sizes = [-(-(s + n) // stride) for s, n in zip(skip, x.shape[1:3], strict=True)]

    def part(p, q):
        k = kernel[p::stride, q::stride][::-1, ::-1]
        around = [
            (k.shape[a] - 1 - first[a], first[a] + sizes[a] - g.shape[1 + a])
            for a in (0, 1)
        ]
        return _sum_of_shifts(_pad(g, around), k, 1, *sizes)

    if stride == 1:
        return part(0, 0)
    parts = [[part(p, q) for q in range(stride)] for p in range(stride)]
    y = jnp.stack([jnp.stack(row, 3) for row in parts], 2)
    y = y.reshape(y.shape[0], stride * sizes[0], stride * sizes[1], y.shape[-1])
    height, width = x.shape[1:3]
    return y[:, skip[0] : skip[0] + height, skip[1] : skip[1] + width]


def _kernel_gradient(x, kernel, stride, padding, g):
    """A loop over images and groups of rows; it adds up the columns at the end."""
    x = _pad(x, padding)
    n, height, width, channels = g.shape
    most = max(1, PRODUCTS // math.prod(kernel.shape[:2]))
    rows = max(r for r in range(1, most + 1) if height % r == 0)
    columns = (width - 1) * stride + 1
    read = (rows - 1) * stride + kernel.shape[0]  # rows of the images

    def add(step, sums):
        image, row = step // (height // rows), step % (height // rows) * rows
        g_rows = lax.dynamic_slice(g, (image, row, 0, 0), (1, rows, width, channels))[0]
        x_rows = lax.dynamic_slice(
            x, (image, row * stride, 0, 0), (1, read, x.shape[2], channels)
        )[0]
        return [
            total
            + sum(
                x_rows[i + r * stride, j : j + columns : stride] * g_rows[r]
                for r in range(rows)
            )
            for total, (i, j) in zip(sums, _taps(kernel), strict=True)
        ]

    zeros = [jnp.zeros((width, channels), g.dtype) for _ in _taps(kernel)]
    sums = lax.fori_loop(0, n * (height // rows), add, zeros)
    return jnp.stack([total.sum(0) for total in sums]).reshape(kernel.shape)


def _forward_and_save(x, kernel, stride, padding):
    return _forward(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, saved, g):
    x, kernel = saved
    return (
        _image_gradient(x, kernel, stride, padding, g),
        _kernel_gradient(x, kernel, stride, padding, g),
    )


_conv_on_cpu.defvjp(_forward_and_save, _backward)
