"""What Optax and PyTorch do where this library differs: docs/exactness.md, row by row.

The tests of Optax's behaviour hold for one version of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from reference import compiled_update

import adamw_jax as aj

pytestmark = [
    pytest.mark.usefixtures("lenient"),
    pytest.mark.skipif(
        optax.__version__ != "0.2.8", reason="these are facts about Optax 0.2.8"
    ),
]


def first_update(tx):
    g = jnp.array([0.3, -2.0])
    return np.asarray(jax.jit(tx.update)(g, tx.init(g))[0])


def test_first_update_in_float32():
    sign = np.array([1.0, -1.0])
    theirs = optax.scale_by_adam(b2=0.99999, eps=0.0)
    ours = aj.scale_by_adam(b2=0.99999, eps=0.0)
    assert np.abs(first_update(theirs) - sign).max() > 6e-4
    assert np.abs(first_update(ours) - sign).max() < 3e-7


def test_cycled_b1():
    """Under a constant gradient of 1, the tenth of 50 steps of 1cycle should be 1."""
    cycle = aj.one_cycle_torch(1.0, 50)
    b1 = cycle.schedule("b1")

    def tenth(tx):
        state = tx.init(jnp.ones(1))
        for _ in range(10):
            u, state = tx.update(jnp.ones(1), state)
        return -float(u[0])

    theirs = optax.inject_hyperparams(optax.adam)(1.0, b1=b1, b2=0.9, eps=0.0)
    assert tenth(theirs) == pytest.approx(0.771, abs=1e-3)
    assert tenth(aj.adam(1.0, b1=b1, b2=0.9, eps=0.0)) == pytest.approx(1, abs=1e-6)

    p = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.9), eps=0.0)
    for step in range(10):
        opt.param_groups[0]["betas"] = (cycle.at(step)["b1"], 0.9)
        before = p.item()
        p.grad = torch.ones(1)
        opt.step()
    assert before - p.item() == pytest.approx(0.771, abs=1e-3)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_amsgrad_is_not_pytorchs_with_any_flag(flags):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(200, 20)).astype(np.float32)
    grads[0] *= 10
    p = torch.nn.Parameter(torch.zeros(20))
    opt = torch.optim.Adam([p], lr=1e-2, amsgrad=True)
    for g in grads:
        p.grad = torch.tensor(g)
        opt.step()
    theirs, displacement = p.detach().numpy(), p.detach().abs().mean().item()

    def final_params(tx):
        q, state, update = jnp.zeros(20), tx.init(jnp.zeros(20)), jax.jit(tx.update)
        for g in grads:
            updates, state = update(jnp.asarray(g), state)
            q = q + updates
        return np.asarray(q)

    by_optax = optax.amsgrad(
        1e-2, bias_correction_mu=flags[0], bias_correction_nu=flags[1]
    )
    assert np.abs(final_params(by_optax) - theirs).mean() > 0.3 * displacement
    assert np.abs(final_params(aj.amsgrad(1e-2)) - theirs).max() < 5e-6


def test_one_cycle():
    phases = aj.one_cycle_torch(1.0, 100)
    schedule = optax.cosine_onecycle_schedule(100, 1.0)
    gap = max(
        abs(float(schedule(k)) - phases.at(k)["learning_rate"]) for k in range(100)
    )
    assert gap == pytest.approx(0.030, abs=1e-3)  # of the peak


def test_bfloat16_parameters_in_inject_hyperparams():
    p = jnp.ones(3, jnp.bfloat16)
    tx = optax.inject_hyperparams(optax.adamw)(1e-3)
    assert np.isnan(np.asarray(tx.update(p, tx.init(p), p)[0], np.float32)).all()
    tx = aj.adamw(1e-3)
    assert np.isfinite(np.asarray(tx.update(p, tx.init(p), p)[0], np.float32)).all()


def test_callable_mask_in_inject_hyperparams():
    p = jnp.ones((2, 2))

    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    def decay(tx):
        return np.asarray(tx.update(jnp.zeros((2, 2)), tx.init(p), p)[0])

    with np.errstate(all="ignore"):
        theirs = optax.inject_hyperparams(optax.adamw)(
            0.1, weight_decay=0.1, mask=lambda x: getattr(x, "ndim", 0) > 1
        )
    assert (decay(theirs) == 0).all()  # silently switched off
    np.testing.assert_allclose(decay(aj.adamw(0.1, weight_decay=0.1, mask=mask)), -0.01)


def test_override_of_a_scheduled_value():
    schedule = optax.linear_schedule(0.1, 0.1, 10)
    theirs = optax.inject_hyperparams(optax.sgd)(schedule)
    state = theirs.init(jnp.ones(1))
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    assert float(theirs.update(jnp.ones(1), state)[0][0]) == pytest.approx(-0.1)
    ours = aj.sgd(schedule)
    state = aj.override_hyperparams(ours.init(jnp.ones(1)), learning_rate=0.0)
    assert float(ours.update(jnp.ones(1), state)[0][0]) == 0.0


def test_none_gradient():
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    g = {"a": jnp.ones(1), "b": None}
    theirs, ours = optax.adamw(1e-3), aj.adamw(1e-3)
    with pytest.raises(ValueError):
        theirs.update(g, theirs.init(p), p)
    assert ours.update(g, ours.init(p), p)[0]["b"] is None


@pytest.mark.parametrize(("b1", "theirs"), [(0.9, 0.969), (0.99, 0.6875)])
def test_bfloat16_mu(b1, theirs):
    """A constant gradient of 1; ours is in adamw_jax/transforms/test_moments.py."""
    tx = optax.scale_by_adam(b1=b1, mu_dtype=jnp.bfloat16)
    g = jnp.ones(8)
    step = jax.jit(lambda _, state: tx.update(g, state)[1])
    state = jax.lax.fori_loop(0, 2000, step, tx.init(g))
    assert float(state.mu[0]) == pytest.approx(theirs, abs=1e-3)


def test_nu_never_decays_with_bfloat16_parameters():
    tx = optax.scale_by_adam()
    g = jnp.ones(2, jnp.bfloat16)
    _, state = tx.update(g, tx.init(g))
    first = float(state.nu[0])
    step = jax.jit(lambda _, state: tx.update(jnp.zeros_like(g), state)[1])
    assert float(jax.lax.fori_loop(0, 2000, step, state).nu[0]) == first


def test_small_updates_of_bfloat16_parameters():
    """300 updates of 1e-3, from 1; ours is in adamw_jax/transforms/test_moments.py."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = torch.optim.SGD([p], lr=1e-3)
    q, update = jnp.ones(1, jnp.bfloat16), jnp.full(1, -1e-3)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        opt.step()
        q = optax.apply_updates(q, update)
    assert p.item() == 1.0 and float(q[0]) == 1.0


def test_maximizing_makes_the_decay_grow():
    """flip_sign=False flips the sign of the decay as well."""
    p = jnp.ones(1)
    theirs = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.1, flip_sign=False),
    )
    ours = aj.adamw(0.1, weight_decay=0.1, maximize=True)
    assert float(theirs.update(jnp.zeros(1), theirs.init(p), p)[0][0]) > 0
    assert float(ours.update(jnp.zeros(1), ours.init(p), p)[0][0]) < 0


def test_counters():
    """AdamW with three schedules: five counters there; here the phases' and Adam's."""

    def counters(tx):
        """The int32 leaves of the state that an update increments."""
        p = jnp.ones(1)
        before = tx.init(p)
        after = tx.update(p, before, p)[1]
        pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
        return sum(x.dtype == jnp.int32 and int(y) == int(x) + 1 for x, y in pairs)

    line = optax.linear_schedule(0.1, 0.2, 10)
    theirs = optax.inject_hyperparams(optax.adamw)(line, b1=line, weight_decay=line)
    ours = aj.adamw(line, b1=line, weight_decay=line)
    assert counters(theirs) == 5
    assert counters(ours) == 2


def test_nan_in_a_micro_batch():
    """Optax multiplies the sum of the previous window by 0."""
    grads = [jnp.array([jnp.nan]), *[jnp.ones(1)] * 3]
    last = {}
    for name, accumulate in (
        ("Optax", optax.MultiSteps),
        ("here", aj.accumulate_gradients),
    ):
        tx = accumulate(optax.sgd(1.0), 2)
        state = tx.init(jnp.ones(1))
        for g in grads:
            u, state = tx.update(g, state, jnp.ones(1))
        last[name] = float(u[0])
    assert np.isnan(last["Optax"]) and last["here"] == -1


def test_nan_leaks_from_optax():
    """The inner transformation divides by a norm; the first gradient is zero."""
    p, zeros = jnp.ones(2), jnp.zeros(2)
    normalize = optax.stateless(lambda u, _: u / jnp.linalg.norm(u))
    theirs = optax.MultiSteps(normalize, 2)
    assert np.isnan(theirs.update(zeros, theirs.init(p), p)[0]).all()
    ours = aj.accumulate_gradients(normalize, 2)
    updates, state = ours.update(zeros, ours.init(p), p)
    np.testing.assert_array_equal(updates, 0)
    updates, _ = ours.update(jnp.array([3.0, 4.0]), state, p)
    np.testing.assert_allclose(updates, [0.6, 0.8])


def test_the_clipped_gradient_is_written(lenient):
    """Optax writes it to another buffer, PyTorch in place; here it is never written."""
    size = 100_000

    def temporary(clip):
        tx = optax.chain(clip, optax.adamw(1e-3))
        memory = compiled_update(tx, jnp.ones(size)).memory_analysis()
        return memory.temp_size_in_bytes / size

    assert temporary(optax.clip_by_global_norm(1.0)) == pytest.approx(4, abs=0.1)
    assert temporary(aj.clip_by_global_norm(1.0)) == pytest.approx(0, abs=0.1)
    leaf = torch.nn.Parameter(torch.ones(2))
    leaf.grad = grad = torch.ones(2)
    torch.nn.utils.clip_grad_norm_([leaf], 1.0)
    assert leaf.grad is grad and grad[0] < 1


def test_the_derivative_of_clipping_at_zero_gradients():
    def total(clip):
        return lambda g: clip.update(g, clip.init(g))[0].sum()

    zeros = jnp.zeros(2)
    assert np.isnan(jax.grad(total(optax.clip_by_global_norm(1.0)))(zeros)).all()
    ours = jax.grad(total(aj.clip_by_global_norm(1.0)))(zeros)
    np.testing.assert_array_equal(ours, 1)
    leaf = torch.zeros(2, requires_grad=True)
    factor = torch.clamp(1 / (torch.linalg.vector_norm(leaf) + 1e-6), max=1)
    (factor * leaf).sum().backward()
    np.testing.assert_array_equal(leaf.grad, 1)


def test_pytorchs_count_stands_still_without_a_gradient():
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in "pq")
    opt = torch.optim.AdamW([p, q])
    for grad in (torch.ones(1), None, torch.ones(1)):
        p.grad, q.grad = torch.ones(1), grad
        opt.step()
    assert float(opt.state[p]["step"]) == 3 and float(opt.state[q]["step"]) == 2
