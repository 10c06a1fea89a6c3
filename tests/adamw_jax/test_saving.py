"""Saved states come back bit for bit: Flax, Orbax, pickle, copies, typed keys."""

import copy
import functools
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import core, nnx, serialization
from flax.training import train_state
from tiers import matrix
from ways import needs_flax

import adamw_jax as aj

pytestmark = pytest.mark.usefixtures("fast_compile")

rng = np.random.default_rng(0)
P = {"w": jnp.asarray(rng.normal(size=(4, 64)), jnp.float32), "b": jnp.ones(64)}
CYCLE = aj.one_cycle(1e-2, steps=20, weight_decay=0.1)
eight_bit = functools.partial(aj.quantize_moments, min_size=128, block_size=32)

STATES = {
    "adamw": lambda: aj.adamw(CYCLE, mask=aj.no_decay_on_bias_and_norm),
    "amsgrad": lambda: aj.amsgrad(1e-2, mu_dtype=jnp.bfloat16),
    "sgd": lambda: aj.sgd(1e-2, 0.9),
    "eight bits": lambda: eight_bit(aj.adamw(CYCLE)),
    "to nearest": lambda: eight_bit(aj.amsgrad(1e-2), stochastic_rounding=False),
    "frozen": lambda: aj.freeze_leaves(aj.adamw(1e-2), aj.mask_by_path("b")),
    "accumulated": lambda: aj.accumulate_gradients(eight_bit(aj.adamw(1e-2)), 2),
    "rounded": lambda: aj.chain(aj.adamw(1e-2), aj.round_updates_stochastically()),
    "groups": lambda: aj.chain(
        aj.clip_by_global_norm(1.0),
        aj.adamw(1e-2),
        aj.scale_by_group({"a": 1.0, "b": 0.1}, {"w": "a", "b": "b"}),
    ),
    "partition": lambda: optax.partition(
        {"a": aj.adam(1e-2), "b": eight_bit(aj.adam(1e-2))}, {"w": "b", "b": "a"}
    ),
    "injected": lambda: optax.inject_hyperparams(aj.adamw)(learning_rate=1e-2),
}
PACKED = ["adamw", "amsgrad", "eight bits", "accumulated"]
WITH_KEYS = ["amsgrad", "eight bits", "rounded"]


def bits(tree):
    """What must not change: structure, dtypes, shapes, bytes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def trained(tx, params, steps=3):
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(steps):
        grads = jax.tree.map(lambda p, k=k: p * (1 + 0.3 * k), params)
        _, state = update(grads, state, params)
    return state


def save_and_restore(state, fresh):
    """By name, the state after each way of saving it."""
    through_bytes = serialization.to_bytes(state)
    as_dict = serialization.to_state_dict(state)
    packed_dict = serialization.msgpack_serialize(as_dict)
    return {
        "to_bytes": serialization.from_bytes(fresh, through_bytes),
        "to_state_dict": serialization.from_state_dict(fresh, as_dict),
        "msgpack": serialization.from_state_dict(
            fresh, serialization.msgpack_restore(packed_dict)
        ),
        "pickle": pickle.loads(pickle.dumps(state)),
        "deepcopy": copy.deepcopy(state),
    }


def check(tx, params):
    state = trained(tx, params)
    restored = save_and_restore(state, tx.init(params))
    for way, other in restored.items():
        assert bits(other) == bits(state), way
    update = jax.jit(tx.update)
    after = update(params, state, params)
    assert bits(update(params, restored["to_bytes"], params)) == bits(after)
    return state


@pytest.mark.parametrize("name", matrix(list(STATES), quick=["eight bits"]))
def test_every_state(lenient, name):
    check(STATES[name](), P)


@pytest.mark.parametrize("name", matrix(PACKED, quick=["eight bits"]))
def test_packed_states(lenient, name):
    params, tx = aj.pack(P, aj.no_decay_on_bias_and_norm), STATES[name]()
    restored = serialization.from_bytes(params, serialization.to_bytes(params))
    assert bits(restored) == bits(params)
    check(tx, params)


@pytest.mark.parametrize("name", matrix(WITH_KEYS, quick=["eight bits"]))
def test_typed_keys(lenient, name):
    """With jax_enable_custom_prng the states and the updates are the same bits."""
    dtype = jnp.bfloat16 if name == "rounded" else jnp.float32
    params = jax.tree.map(lambda x: x.astype(dtype), P)

    def run():
        tx = STATES[name]()
        state = check(tx, params)

        def body(state, _):
            updates, state = tx.update(params, state, params)
            return state, updates

        return bits(jax.lax.scan(body, state, length=2)), state

    expected, _ = run()
    with jax.enable_custom_prng(True):
        found, state = run()
        if name != "eight bits":  # codes have no average
            average = jax.tree.map(lambda a, b: (a + b) / 2, state, state)
            tx = STATES[name]()
            updates, _ = tx.update(params, average, params)
            assert bits(updates) == bits(tx.update(params, state, params)[0])
    assert found == expected


@pytest.mark.parametrize(
    ("name", "packed"),
    matrix(
        [(name, False) for name in STATES] + [(name, True) for name in PACKED],
        quick=[("eight bits", True)],
    ),
)
def test_orbax(lenient, tmp_path, name, packed):
    params, tx = P, STATES[name]()
    if packed:
        params = aj.pack(P, aj.no_decay_on_bias_and_norm)
    state = trained(tx, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(tx.init, params)
        assert bits(checkpointer.restore(tmp_path / "state", shapes)) == bits(state)


@pytest.mark.parametrize("packed", matrix([False, True], quick=[True]))
def test_in_a_train_state_of_flax(lenient, packed):
    """With the parameters frozen in a FrozenDict, as Linen had them."""
    params = aj.pack(P) if packed else core.freeze(P)

    def make():
        return train_state.TrainState.create(
            apply_fn=None, params=params, tx=STATES["eight bits"]()
        )

    state = make()
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    for _ in range(2):
        state = step(state)
    restored = serialization.from_bytes(make(), serialization.to_bytes(state))
    for part in ("params", "opt_state"):
        assert bits(getattr(restored, part)) == bits(getattr(state, part))
    assert restored.step == 2
    assert bits(step(restored).params) == bits(step(state).params)


@needs_flax((0, 12, 8), "older nnx.Optimizers make mappings of the blocks")
def test_in_an_optimizer_of_nnx(lenient):
    def make():
        net = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        return net, nnx.Optimizer(net, STATES["eight bits"](), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda net: (net(jnp.ones((1, 16))) ** 2).sum())(net)
        optimizer.update(net, grads)

    net, optimizer = make()
    before = jax.tree.structure(nnx.state(optimizer))
    for _ in range(2):
        step(net, optimizer)
    assert jax.tree.structure(nnx.state(optimizer)) == before  # and so no new trace
    other_net, other = make()
    for old, new in ((net, other_net), (optimizer, other)):
        saved = serialization.to_bytes(nnx.to_pure_dict(nnx.state(old)))
        state = nnx.state(new)
        fresh = nnx.to_pure_dict(state)
        nnx.replace_by_pure_dict(state, serialization.from_bytes(fresh, saved))
        nnx.update(new, state)
    kinds = {str(x.dtype) for x in jax.tree.leaves(nnx.state(other))}
    assert {"int8", "uint8"} <= kinds
    for _ in range(2):
        assert bits(nnx.state(other)) == bits(nnx.state(optimizer))
        assert bits(nnx.state(other_net)) == bits(nnx.state(net))
        step(net, optimizer)
        step(other_net, other)


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------


def test_a_packed_tree_with_other_leaves():
    a, b = {"a": jnp.ones(2), "b": jnp.zeros(3)}, {"a": jnp.ones(3), "b": jnp.zeros(2)}
    saved = serialization.to_bytes(aj.pack(a))  # buffers of one size
    message = r"packed in another way: expected a \(3,\) in float32, got a \(2,\) in"
    with pytest.raises(ValueError, match=message):
        serialization.from_bytes(aj.pack(b), saved)
    with pytest.raises(ValueError, match="expected nothing, got b"):
        serialization.from_bytes(aj.pack({"a": jnp.ones(2)}), saved)


def test_a_plain_tree_into_a_packed_one():
    plain = {"a": jnp.ones(2), "b": jnp.zeros(3)}
    packed, saved = aj.pack(plain), serialization.to_bytes(plain)
    with pytest.raises(ValueError, match=r"unpack\(target\).*pack_like"):
        serialization.from_bytes(packed, saved)
    restored = serialization.from_bytes(aj.unpack(packed), saved)  # as it says
    assert bits(aj.pack_like(restored, packed)) == bits(packed)


@pytest.mark.slow
def test_flax_is_imported_by_its_user_only():
    """And is registered with when the next packed tree is made."""
    code = """
import sys
import jax, jax.numpy as jnp
import adamw_jax as aj
params = aj.pack({"a": jnp.ones(2)})
assert not [name for name in sys.modules if name.split(".")[0] == "flax"]
from flax import serialization
params = jax.tree.map(lambda x: 2 * x, params)
restored = serialization.from_bytes(params, serialization.to_bytes(params))
assert restored.tree["a"].tolist() == [2.0, 2.0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
