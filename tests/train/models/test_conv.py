"""The convolution against JAX's own, and max pooling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from train.models.conv import DIMENSIONS, conv, max_pool

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

CASES = [  # height, width, kernel, stride, padding
    (8, 8, 3, 1, "SAME"),
    (7, 9, 3, 2, "SAME"),
    (11, 11, 2, 3, "VALID"),
    (10, 10, 3, 2, ((1, 1), (0, 2))),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (8, 8, 3, 2, "SAME"),
            (9, 8, 5, 3, "SAME"),
            (8, 8, 1, 1, "SAME"),
            (9, 9, 1, 2, "SAME"),
            (8, 8, 3, 2, "VALID"),
        )
    ),
]


@pytest.mark.parametrize(("h", "w", "k", "stride", "padding"), CASES)
def test_conv_is_that_of_jax(h, w, k, stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((4, h, w, 3), (k, k, 3, 5))
    )
    theirs = functools.partial(lax.conv_general_dilated, dimension_numbers=DIMENSIONS)
    shape = jax.eval_shape(lambda: theirs(x, kernel, (stride, stride), padding)).shape
    g = rng.normal(size=shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(convolve, x, kernel, g):
        y, vjp = jax.vjp(
            lambda *args: convolve(*args, (stride, stride), padding), x, kernel
        )
        return y, *vjp(g)

    ours, expected = (output_and_gradients(c, x, kernel, g) for c in (conv, theirs))
    for our, their in zip(ours, expected, strict=True):
        np.testing.assert_allclose(our, their, atol=2e-5)


@pytest.mark.parametrize(
    ("option", "value"), [("feature_group_count", 2), ("rhs_dilation", (2, 2))]
)
def test_conv_refuses_groups_and_dilation(option, value):
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    with pytest.raises(ValueError, match=option):
        conv(x, kernel, (1, 1), "SAME", **{option: value})


def test_max_pool():
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(max_pool(x), nnx.max_pool(x, (2, 2), (2, 2)))
