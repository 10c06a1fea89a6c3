"""nnx.Optimizer in one pass: the training and the state of Flax's own."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiers import matrix
from ways import assert_close, needs_flax, needs_kernel

import adamw_jax as aj

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

keeps_the_step = needs_flax(
    (0, 12, 5), "nnx.jit of this Flax rebuilds the transformation, without its step"
)
CYCLE = aj.one_cycle(0.05, steps=10)


# One object, so that tests share the programs that nnx.jit has compiled.
ADAMW = aj.adamw(CYCLE, weight_decay=0.1, mask=aj.no_decay_on_bias_and_norm)


class Net(nnx.Module):
    """With running statistics, random keys, an integer and a bool beside parameters."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(4, 1, rngs=rngs) for _ in range(2)])
        self.calls = nnx.Variable(jnp.array(0))
        self.frozen = nnx.Variable(jnp.array(True))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.dropout(nnx.tanh(self.norm(self.hidden(x))))
        return self.heads[0](x) + self.heads[1](x)


class Stacked(nnx.Module):
    """Three layers in one, applied by a scan; one more that is shared."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = layers(rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)
        self.tied = self.head

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.tanh(layer(x))

        return self.head(self.tied(forward(x, self.layers)))


class Adapted(nnx.Module):
    """A layer with a low-rank adapter, which alone is trained."""

    def __init__(self, rngs):
        self.layer = nnx.LoRALinear(3, 2, lora_rank=1, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, x):
    def loss(model):
        return ((model(x) - 1) ** 2).mean()

    argnums = nnx.DiffState(0, optimizer.wrt)
    optimizer.update(model, nnx.grad(loss, argnums=argnums)(model))


def batch(i):
    return jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32)


def train(optimizer_class, tx, network=Net, wrt=nnx.Param, steps=5):
    model = network(nnx.Rngs(0))
    optimizer = optimizer_class(model, tx, wrt=wrt)
    for i in range(steps):
        train_step(model, optimizer, batch(i))
    return model, optimizer


def arrays(*nodes):
    """All variables, with the data of random keys in place of the keys."""

    def data(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, [nnx.to_pure_dict(nnx.state(node)) for node in nodes])


OPTIMIZERS = {
    "adamw": lambda: ADAMW,
    "clipped": lambda: aj.chain(aj.clip_by_global_norm(0.1), ADAMW),
    "accumulated": lambda: aj.accumulate_gradients(ADAMW, 2),
    "frozen": lambda: aj.freeze_leaves(ADAMW, aj.mask_by_path("^heads/")),
    "no step": lambda: aj.amsgrad(0.01),
    "from Optax": lambda: optax.adamw(0.01),
}


@pytest.mark.parametrize("name", matrix(OPTIMIZERS, quick=("adamw",)))
def test_a_training(name):
    """The model and the whole optimizer are those of nnx.Optimizer."""
    ours = train(aj.nnx.Optimizer, OPTIMIZERS[name]())
    theirs = train(nnx.Optimizer, OPTIMIZERS[name]())
    assert_close(arrays(*ours), arrays(*theirs), ulps=50)
    (model, optimizer), start = ours, Net(nnx.Rngs(0))
    assert optimizer.step[...] == model.calls[...] == 5
    assert not np.array_equal(model.hidden.kernel[...], start.hidden.kernel[...])
    head, before = model.heads[0].kernel[...], start.heads[0].kernel[...]
    assert np.array_equal(head, before) == (name == "frozen")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "wrt"), [(Stacked, nnx.Param), (Adapted, nnx.LoRAParam)]
)
def test_networks(network, wrt):
    ours = train(aj.nnx.Optimizer, ADAMW, network, wrt, steps=3)
    theirs = train(nnx.Optimizer, ADAMW, network, wrt, steps=3)
    assert_close(arrays(*ours), arrays(*theirs), ulps=50)


def lower(optimizer_class, tx):
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = optimizer_class(model, tx, wrt=nnx.Param)
    return train_step.lower(model, optimizer, jnp.ones((4, 64)))


@needs_kernel
@keeps_the_step
def test_the_kernel_is_called_with_donated_buffers():
    lowered = lower(aj.nnx.Optimizer, ADAMW)
    assert "custom_call @adamw_jax_one_pass" in lowered.as_text()
    assert "adamw_jax_one_pass" not in lower(nnx.Optimizer, ADAMW).as_text()
    parameters = 64 * 64 + 64
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= 12 * parameters


def test_extra_arguments_reach_the_transformation():
    """A window of accumulate_gradients that is closed early."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = aj.nnx.Optimizer(
        model, aj.accumulate_gradients(aj.adamw(0.1), 8), wrt=nnx.Param
    )
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    before = np.asarray(model.kernel[...])
    assert optimizer.update(model, grads, last=nnx.Variable(jnp.array(False))) is None
    np.testing.assert_array_equal(model.kernel[...], before)
    optimizer.update(model, grads, last=True)
    np.testing.assert_allclose(before - np.asarray(model.kernel[...]), 0.1, rtol=1e-3)
    with pytest.raises(TypeError, match="grads"):
        optimizer.update(model)


def test_the_state_is_that_of_nnx_optimizer():
    """Restored from a checkpoint of Flax's class, split and merged."""
    model, optimizer = train(nnx.Optimizer, ADAMW, steps=2)
    checkpoint = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    ours = Net(nnx.Rngs(1))
    ours = (ours, aj.nnx.Optimizer(ours, ADAMW, wrt=nnx.Param))
    assert jax.tree.structure(checkpoint) == jax.tree.structure(nnx.state(ours))
    nnx.update(ours, checkpoint)
    ours = nnx.merge(*nnx.split(ours))
    train_step(model, optimizer, batch(2))
    train_step(*ours, batch(2))
    assert isinstance(ours[1], aj.nnx.Optimizer) and ours[1].step[...] == 3
    assert_close(arrays(*ours), arrays(model, optimizer), ulps=50)


@needs_kernel
@keeps_the_step
def test_sharded_parameters():
    """Over two devices: moments as their parameters, and no leaf is gathered."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel_init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
    results = []
    with jax.set_mesh(mesh):
        for optimizer_class in (aj.nnx.Optimizer, nnx.Optimizer):
            model = nnx.Linear(3, 4, kernel_init=kernel_init, rngs=nnx.Rngs(0))
            optimizer = optimizer_class(model, ADAMW, wrt=nnx.Param)
            if optimizer_class is aj.nnx.Optimizer:
                text = train_step.lower(model, optimizer, batch(0)).compile().as_text()
                assert "adamw_jax_one_pass" in text and "all-gather" not in text
            for i in range(3):
                train_step(model, optimizer, batch(i))
            results.append(arrays(model, optimizer))
            expected = NamedSharding(mesh, PartitionSpec(None, "model"))
            moments = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim == 2]
            assert len(moments) == 2
            for leaf in (model.kernel[...], *moments):
                assert leaf.sharding.is_equivalent_to(expected, 2)
    assert_close(*results, ulps=50)


def test_the_module_is_imported_at_its_first_use():
    assert aj.nnx is importlib.import_module("adamw_jax.nnx")
    with pytest.raises(AttributeError, match="has no attribute 'haiku'"):
        aj.haiku  # noqa: B018
