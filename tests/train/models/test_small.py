"""The convolutions of the small network take XLA's fast path on CPUs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params

from train.models.conv import DIMENSIONS
from train.models.small import CNN


def test_convolutions_and_their_gradients_are_nhwc():
    def convolutions(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                yield eqn.params["dimension_numbers"]
            for inner in jaxprs_in_params(eqn.params):
                yield from convolutions(inner)

    net = nnx.eval_shape(lambda: CNN(4, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    x = jnp.zeros((2, 32, 32, 3))
    step = jax.grad(lambda state: nnx.merge(graph, state, copy=True)(x).sum())
    found = list(convolutions(jax.make_jaxpr(step)(state).jaxpr))
    assert len(found) == 3 * 3  # forward, dx, dkernel
    fast = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, DIMENSIONS)
    assert set(found) == {fast}
