"""Training loops as people write them, with an optimizer of ours in Optax's place.

Each is a program of another library's style, by hand where the library would be needed
for a few lines only, in float32 and in bfloat16. Promotion of dtypes is forbidden, so
`p + u` also says that the update has the dtype of the parameter. The numbers are those
of a float64 loop.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import adam_loop, sgd_loop
from tiers import matrix

import adamw_jax as aj

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS = 8
P0 = np.linspace(0.25, 1.0, 6)
GRADS = np.random.default_rng(0).uniform(0.5, 2.0, (STEPS, 6)).astype(jnp.bfloat16)
CYCLE = aj.one_cycle_torch(0.05, STEPS)
RATE, B1 = (lambda t, name=name: CYCLE.at(t)[name] for name in ("learning_rate", "b1"))
OPTIMIZERS = {
    "adamw": (
        lambda: aj.adamw(CYCLE, weight_decay=0.1),
        lambda p, g: adam_loop(p, g, RATE, B1, weight_decay=0.1),
    ),
    "sgd": (
        lambda: aj.sgd(0.02, momentum=0.9),
        lambda p, g: sgd_loop(p, g, lambda t: 0.02, lambda t: 0.9),
    ),
}


def grad(params, g):
    """The gradient of a loss, which is `g`."""

    def loss(params):
        return sum((params[k] * g[k]).sum() for k in params)

    return jax.grad(loss)(params)


def add(params, updates):
    return jax.tree.map(lambda p, u: p + u, params, updates)


def in_a_loop(tx, params, grads):
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, g):
        updates, state = tx.update(grad(params, g), state, params)
        return add(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, jax.tree.map(lambda g, i=i: g[i], grads))
    return params


def in_a_scan(tx, params, grads):
    """The carry keeps its dtypes, or scan refuses it."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(grad(params, g), state, params)
        return (add(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads)[0][0])(params)


def in_a_while_loop(tx, params, grads):
    def body(carry):
        i, params, state = carry
        g = jax.tree.map(lambda g: g[i], grads)
        updates, state = tx.update(grad(params, g), state, params)
        return i + 1, add(params, updates), state

    start = (jnp.int32(0), params, tx.init(params))
    return jax.lax.while_loop(lambda carry: carry[0] < STEPS, body, start)[1]


def an_ensemble(tx, params, grads):
    """Two members by vmap, of which the second is returned."""
    params = jax.tree.map(lambda p: jnp.stack([p * 0, p]), params)

    @jax.vmap
    def train(params):
        return in_a_scan(tx, params, grads)

    return jax.tree.map(lambda p: p[1], train(params))


class Module(NamedTuple):
    """In the way of Equinox: a tree of arrays and of other things, like functions."""

    w: jax.Array
    activation: object
    b: jax.Array


def equinox(tx, params, grads):
    """eqx.filter, eqx.filter_grad and eqx.apply_updates, as Equinox defines them."""

    def is_array(x):
        return isinstance(x, jax.Array)

    def filtered(tree):
        return jax.tree.map(lambda x: x if is_array(x) else None, tree)

    def apply_updates(model, updates):
        def apply(u, p):
            return p if u is None else p + u

        return jax.tree.map(apply, updates, model, is_leaf=lambda x: x is None)

    model = Module(params["w"], jnp.tanh, params["b"])
    state = tx.init(filtered(model))
    for i in range(STEPS):
        g = grad({"w": model.w, "b": model.b}, {k: g[i] for k, g in grads.items()})
        g = Module(g["w"], None, g["b"])
        updates, state = tx.update(g, state, filtered(model))
        model = apply_updates(model, updates)
    assert model.activation is jnp.tanh
    return {"w": model.w, "b": model.b}


def haiku(tx, params, grads):
    """A dict for each module, whose name is a path."""
    names = {"w": ("mlp/~/linear_0", "w"), "b": ("mlp/~/linear_0", "b")}

    def nested(tree):
        return {names["w"][0]: {k: tree[k] for k in ("w", "b")}}

    params, state = nested(params), tx.init(nested(params))

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(
            nested(grad(params["mlp/~/linear_0"], g)), state, params
        )
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, jax.tree.map(lambda g, i=i: g[i], grads))
    return params["mlp/~/linear_0"]


def jmp(tx, params, grads):
    """Parameters of the policy, computation in bfloat16, a scaled loss.

    A step whose gradients are not finite is undone by a select over everything.
    """
    dtype, scale, state = params["w"].dtype, 1024.0, tx.init(params)

    @jax.jit
    def step(params, state, g):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        g = grad(half, jax.tree.map(lambda g: g.astype(jnp.bfloat16) * scale, g))
        g = jax.tree.map(lambda g: (g / scale).astype(dtype), g)
        finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in g.values()]))
        updates, new_state = tx.update(g, state, params)
        new = (add(params, updates), new_state)
        return jax.tree.map(
            lambda new, old: jax.lax.select(jnp.full(new.shape, finite), new, old),
            new,
            (params, state),
        )

    for i in range(STEPS):
        g = jax.tree.map(lambda g, i=i: g[i], grads)
        if i == 3:
            broken = jax.tree.map(lambda g: g * jnp.inf, g)
            params, state = step(params, state, broken)
        params, state = step(params, state, g)
    return params


def apply_if_finite(tx, params, grads):
    return in_a_scan(optax.apply_if_finite(tx, 3), params, grads)


def conditionally_mask(tx, params, grads):
    """Each gradient twice; the step of every other one is masked."""
    tx = optax.conditionally_mask(tx, lambda step: step % 2 == 0)
    return in_a_scan(tx, params, jax.tree.map(lambda g: jnp.repeat(g, 2, 0), grads))


def multi_steps(tx, params, grads):
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
    return in_a_scan(tx, params, jax.tree.map(lambda g: jnp.repeat(g, 2, 0), grads))


def in_an_optax_chain(tx, params, grads):
    return in_a_scan(optax.chain(optax.clip_by_global_norm(1e3), tx), params, grads)


def over_devices(tx, params, grads):
    """Each device has half of the batch; gradients are averaged."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    batches = jax.tree.map(lambda g: jnp.stack([g * 0, g * 2], 1), grads)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, "batch")),
        out_specs=jax.P(),
        check_vma=False,
    )
    def train(params, batches):
        def step(carry, g):
            params, state = carry
            g = jax.lax.pmean(grad(params, jax.tree.map(lambda g: g[0], g)), "batch")
            updates, state = tx.update(g, state, params)
            return (add(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return jax.jit(train)(params, batches)


PROGRAMS = [
    *(in_a_loop, in_a_scan, in_a_while_loop, an_ensemble, equinox, haiku, jmp),
    *(apply_if_finite, conditionally_mask, multi_steps, in_an_optax_chain),
    over_devices,
]
# Parts of Optax do not run under strict promotion.
OF_OPTAX = (haiku, apply_if_finite, conditionally_mask, multi_steps, in_an_optax_chain)
CELLS = [
    (program, name, dtype)
    for program in PROGRAMS
    for name in OPTIMIZERS
    for dtype in ("float32", "bfloat16")
]
QUICK = [(program, "sgd", "bfloat16") for program in PROGRAMS]
QUICK += [(program, "adamw", "bfloat16") for program in (in_a_scan, equinox, jmp)]


@pytest.mark.parametrize(
    ("program", "name", "dtype"),
    matrix(CELLS, quick=QUICK),
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_program(program, name, dtype, request):
    if program in OF_OPTAX:
        request.getfixturevalue("lenient")
    optimizer, loop = OPTIMIZERS[name]
    p0, grads = (
        {"w": jnp.asarray(x[..., :4], dtype), "b": jnp.asarray(x[..., 4:], dtype)}
        for x in (P0, GRADS)
    )
    params = program(optimizer(), p0, grads)
    for k, p in params.items():
        assert p.dtype == dtype
        expected = loop(p0[k], grads[k])[-1]
        # A parameter in bfloat16, at most 1, is rounded at every step.
        atol = STEPS * 2**-9 * 1.1 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(p, np.float64), expected, 0, atol)
        assert np.abs(expected - np.asarray(p0[k], np.float64)).min() > 5 * atol
