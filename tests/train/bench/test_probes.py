"""FLOPs by hand, and what the probes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.bench import probes
from train.run import devices


def test_flops_of_a_product():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 5), (5, 7)))
    assert probes.flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8), (2, 7)])
def test_flops_of_a_convolution(stride, size):
    """Taps outside of the image are not counted."""
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, size, size, 4), (3, 3, 4, 6))
    )

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    centres = range(0, size, stride)
    taps = sum(0 <= i + k < size for i in centres for k in (-1, 0, 1))
    assert probes.flops(convolve, x, w) == 2 * taps**2 * 4 * 6


def test_a_loop_counts_once():
    """As the docstring warns."""
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def powers(x):
        return jax.lax.fori_loop(0, 10, lambda i, y: x @ y, x)

    assert 2 * 4**3 <= probes.flops(powers, x) < 1.2 * 2 * 4**3


def test_a_large_product():
    probe = probes.matrix_product(16, np.float32, devices.data_mesh())
    program = probe.make()
    assert program.run().shape == (jax.device_count(), 16, 16)
    assert (program.work, program.calls) == (jax.device_count() * 2 * 16**3, 1)
    assert probes.matmul_rows(64) == 64


def test_a_copy():
    program = probes.copy(10, 3).make()
    program.run()
    program.run()
    assert (program.work, program.calls) == (80, 3)
