"""A convolution and two poolings whose gradients are fast and correct on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, strides, padding, **unused):
    """`lax.conv_general_dilated` for NHWC images, with hand-written gradients.

    XLA's CPU backend has a fast path for NHWC/HWIO convolutions only, and brings others
    into that form only outside of loops. JAX's own kernel gradient has another form and
    becomes a naive loop inside `lax.scan`, 10 to 76 times slower
    (https://github.com/jax-ml/jax/issues/12868). Here both gradients are NHWC/HWIO. On
    other devices this is JAX's own convolution with its own gradients.

    Takes the arguments with which `nnx.Conv(conv_general_dilated=conv)` calls it, but
    implements neither dilation nor groups.
    """
    if unused.pop("feature_group_count", 1) != 1:
        raise ValueError("feature_group_count must be 1: grouped is not implemented")
    for name in ("lhs_dilation", "rhs_dilation"):
        if any(d != 1 for d in unused.pop(name, None) or ()):
            raise ValueError(f"{name} must be 1: dilation is not implemented")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            x.shape[1:3], kernel.shape[:2], strides, padding.upper()
        )
    convolve = _conv_on_cpu if jax.default_backend() == "cpu" else _conv
    return convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def _conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=DIMENSIONS
    )


_conv_on_cpu = jax.custom_vjp(_conv, nondiff_argnums=(2, 3))


def _conv_forward(x, kernel, strides, padding):
    return _conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides, padding, saved, g):
    x, kernel = saved
    # per axis: (image size, kernel size, stride, padding before, output size)
    axes = [
        (x.shape[1 + a], kernel.shape[a], strides[a], padding[a][0], g.shape[1 + a])
        for a in (0, 1)
    ]
    # dx: the output's gradient, dilated by the stride, with the flipped kernel
    dx = lax.conv_general_dilated(
        g,
        kernel[::-1, ::-1].transpose(0, 1, 3, 2),
        window_strides=(1, 1),
        padding=[(k - 1 - lo, n + lo - 1 - (m - 1) * s) for n, k, s, lo, m in axes],
        lhs_dilation=strides,
        dimension_numbers=DIMENSIONS,
    )
    # dkernel: the images convolved with the output's gradient, where channels are the
    # batch and the batch is the channels
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=[(lo, (m - 1) * s + k - n - lo) for n, k, s, lo, m in axes],
        rhs_dilation=strides,
        dimension_numbers=DIMENSIONS,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_conv_on_cpu.defvjp(_conv_forward, _conv_backward)


def max_pool(x):
    """2 x 2 maximum, by reshape, since `nnx.max_pool` has a gradient slow on CPUs."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def global_max(maps):
    """Maximum over the image; the gradient goes to its first occurrence, as in PyTorch.

    The gradient of `jnp.max` can be wrong. It goes to the elements *equal* to the
    result, and there are none where XLA recomputes the maps and rounds differently.
    """
    n, h, w, c = maps.shape
    maps = maps.reshape(n, h * w, c)
    first = jnp.argmax(maps, axis=1, keepdims=True)
    pixels = jnp.arange(h * w)[:, None]
    return jnp.where(pixels == first, maps, 0).sum(1)
