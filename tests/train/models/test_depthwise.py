"""The depthwise convolution and its gradients, against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from train.models.conv import DIMENSIONS
from train.models.depthwise import depthwise_conv

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

JAXS = functools.partial(lax.conv_general_dilated, dimension_numbers=DIMENSIONS)
CASES = [  # height, width, kernel, stride, padding
    (8, 7, 3, 1, "SAME"),
    (9, 8, 3, 2, "SAME"),
    (8, 9, 5, 2, "SAME"),
    (5, 6, 5, 1, "SAME"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (1, 2, 5, 2, "SAME"),
            (2, 1, 5, 1, "SAME"),
            (1, 1, 3, 2, "SAME"),
            (16, 18, 5, 2, "SAME"),
            (11, 13, 3, 2, "SAME"),
            (8, 8, 3, 3, "SAME"),
            (9, 9, 3, 2, "VALID"),
            (8, 8, 5, 1, "VALID"),
            (9, 8, 3, 2, ((1, 1), (0, 2))),
            (8, 8, 5, 2, ((3, 3), (0, 0))),
        )
    ),
]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def output_and_gradients(convolve, x, kernel, stride, padding):
    """The gradients are those of the sum of the squares."""

    def run(x, kernel):
        options = {"feature_group_count": x.shape[-1]}
        y = convolve(x, kernel, (stride, stride), padding, **options)
        return (y**2).sum() / 2, y

    (_, y), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(x, kernel)
    return y, *gradients


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("h", "w", "k", "stride", "padding"), CASES)
def test_it_is_that_of_jax(h, w, k, stride, padding):
    """To 1e-14 and 1e-6 of the largest value, in float64 and float32."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, h, w, 6)), rng.normal(size=(k, k, 1, 6))
    for dtype, tolerance in ((np.float64, 1e-14), (np.float32, 1e-6)):
        args = x.astype(dtype), kernel.astype(dtype), stride, padding
        ours, expected = (
            output_and_gradients(c, *args) for c in (depthwise_conv, JAXS)
        )
        for our, their in zip(ours, expected, strict=True):
            assert our.dtype == their.dtype == dtype
            atol = tolerance * np.abs(their).max()
            np.testing.assert_allclose(our, their, rtol=0, atol=atol)


def test_as_nnx_calls_it():
    """In bfloat16, whose products are rounded: to two of its bits."""
    options = {"feature_group_count": 8, "use_bias": False, "dtype": jnp.bfloat16}
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))

    @functools.partial(jax.jit, static_argnums=0)
    def run(convolve, x):
        options["conv_general_dilated"] = convolve
        rngs = nnx.Rngs(0)
        return nnx.Conv(8, 8, (3, 3), 2, padding="SAME", rngs=rngs, **options)(x)

    ours, theirs = (run(c, x) for c in (depthwise_conv, lax.conv_general_dilated))
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        *(np.asarray(y, np.float32) for y in (ours, theirs)), rtol=2**-6, atol=2**-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_group_count": 2}, "must be the 4 channels of x, got 2 and"),
        ({"rhs_dilation": (2, 2)}, "rhs_dilation must be 1"),
        ({"strides": (1, 2)}, r"equal and at most 3, got \(1, 2\)"),
        ({"strides": (4, 4)}, r"equal and at most 3, got \(4, 4\)"),
        ({"kernel": jnp.zeros((3, 3, 1, 8))}, r"kernel \(3, 3, 1, 8\)"),
    ],
)
def test_what_it_refuses(changes, message):
    options = {"x": jnp.zeros((1, 8, 8, 4)), "kernel": jnp.zeros((3, 3, 1, 4))}
    options |= {"strides": (1, 1), "padding": "SAME", "feature_group_count": 4}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**options | changes)
