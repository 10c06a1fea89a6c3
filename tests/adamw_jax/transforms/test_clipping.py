"""Clipping by global norm against Optax and PyTorch, and its cost in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import compiled_update
from tiers import examples
from ways import needs_xla_of_jax_0_10

import adamw_jax as aj

rng = np.random.default_rng(2)
GRADS = {"a": rng.normal(size=(7, 3)), "b": {"w": rng.normal(size=5)}, "c": 2.0}


def as_arrays(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def clip(grads, *args, **kwargs):
    tx = aj.clip_by_global_norm(*args, **kwargs)
    return jax.jit(lambda g: tx.update(g, tx.init(g))[0])(grads)


def compare(new, expected, **kwargs):
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **kwargs)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 100.0])
def test_against_numpy_and_optax(x64, lenient, max_norm):
    grads = as_arrays(GRADS, jnp.float64)
    new = clip(grads, max_norm)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(GRADS)))
    expected = jax.tree.map(lambda g: g * min(1, max_norm / norm), GRADS)
    compare(new, expected, rtol=1e-14)
    theirs = optax.clip_by_global_norm(max_norm)
    compare(new, theirs.update(grads, theirs.init(grads))[0], rtol=1e-14)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 100.0])
def test_against_pytorch(x64, max_norm):
    grads = as_arrays(GRADS, jnp.float64)
    leaves = [torch.zeros(g.shape, dtype=float) for g in jax.tree.leaves(grads)]
    for leaf, g in zip(leaves, jax.tree.leaves(grads), strict=True):
        leaf.grad = torch.tensor(np.asarray(g))
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    new = jax.tree.leaves(clip(grads, max_norm, eps=1e-6))
    compare(new, [leaf.grad.numpy() for leaf in leaves], rtol=1e-14)


# XLA flushes subnormal numbers to zero on a CPU.
NUMBERS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@jax.jit
def clip_traced(grads, max_norm):
    tx = aj.clip_by_global_norm(max_norm)
    return tx.update(grads, tx.init(grads))[0]


@examples(300)
@given(
    st.lists(NUMBERS, min_size=1, max_size=5),
    st.floats(2.0**-10, 1000, width=32),
)
def test_the_norm_is_bounded_and_the_direction_kept(values, max_norm):
    with jax.numpy_dtype_promotion("strict"):
        grads = jnp.array(values, jnp.float32)
        new = np.asarray(clip_traced(grads, jnp.float32(max_norm)), float)
    values = np.array(values)
    assert np.linalg.norm(new) <= max_norm * (1 + 1e-6)
    if np.linalg.norm(values) < max_norm * (1 - 1e-6):
        np.testing.assert_array_equal(new, values)  # to the bit
    else:
        expected = values * max_norm / max(np.linalg.norm(values), 1e-30)
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-37)


def test_narrow_gradients_are_not_rounded_again():
    """Their squares overflow float16, and bfloat16 sums stop growing."""
    values = rng.normal(size=10_000).astype(np.float32)
    for dtype, scale in ((jnp.float16, 1e4), (jnp.bfloat16, 1.0)):
        grads = jnp.asarray(scale * values).astype(dtype)
        tx = aj.chain(aj.clip_by_global_norm(1.0), wide_updates=True)
        new, _ = tx.update(grads, tx.init(grads))
        np.testing.assert_array_equal(clip(grads, 1.0), new.astype(dtype))
        wide = np.asarray(grads, np.float64)
        np.testing.assert_allclose(new, wide / np.linalg.norm(wide), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradients_propagate(bad):
    new = clip({"a": jnp.array([bad, 1.0]), "b": jnp.array(1.0)}, 1.0)
    assert np.isnan(new["a"][0])
    # As in Optax and PyTorch: inf / inf is NaN, 1 / inf is 0.
    np.testing.assert_array_equal(new["a"][1], np.nan if np.isnan(bad) else 0)
    np.testing.assert_array_equal(new["b"], np.nan if np.isnan(bad) else 0)


def test_zero_and_missing_gradients():
    grads = {"a": jnp.zeros(3), "b": None, "c": optax.MaskedNode()}
    new = clip(grads, 1.0)
    assert new["b"] is None and new["c"] == optax.MaskedNode()
    np.testing.assert_array_equal(new["a"], 0)
    assert clip({}, 1.0) == {}


def test_frozen_leaves_do_not_count():
    grads = {"a": jnp.array(3.0), "b": jnp.array(1e6)}
    tx = aj.freeze_leaves(aj.clip_by_global_norm(1.0), {"a": False, "b": True})
    updates, _ = tx.update(grads, tx.init(grads))
    assert float(updates["a"]) == pytest.approx(1.0)


def test_a_scheduled_norm():
    tx = aj.with_hyperparams(
        aj.clip_by_global_norm, max_norm=lambda step: 1.0 / (1.0 + step.astype(float))
    )
    state = tx.init(jnp.ones(1))
    for expected in (1.0, 0.5, 1 / 3):
        updates, state = tx.update(jnp.array([5.0]), state)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("gradient", [0.0, 5.0])
def test_a_norm_that_is_scheduled_to_zero(gradient, eps):
    """PyTorch clips to 0 as well; its eps keeps 0 / 0 away."""
    tx = aj.with_hyperparams(
        lambda max_norm: aj.clip_by_global_norm(max_norm, eps=eps),
        max_norm=lambda step: jnp.maximum(0.0, 1.0 - step.astype(float)),
    )
    grads = {"a": jnp.full(2, gradient), "b": jnp.array(gradient)}
    state, update = tx.init(grads), jax.jit(tx.update)
    first, state = update(grads, state)
    norm = np.sqrt(3 * gradient**2)
    compare(first, jax.tree.map(lambda g: g / max(norm, 1), grads), rtol=2e-6)
    second, state = update(grads, state)
    compare(second, jax.tree.map(jnp.zeros_like, grads))
    leaf = torch.zeros(3)
    leaf.grad = torch.full((3,), gradient)
    torch.nn.utils.clip_grad_norm_([leaf], 0.0)
    np.testing.assert_array_equal(second["a"], leaf.grad.numpy()[:2])
    # The same as the factor that update_and_apply hands to AdamW.
    optimizer = aj.chain(tx, aj.adamw(0.1, weight_decay=0.0))
    start = (state, optimizer.init(grads)[1])
    step = jax.jit(lambda *args: aj.update_and_apply(optimizer, *args))
    compare(step(grads, start, grads)[0], grads)


def jacobian_by_hand(g, max_norm, eps):
    """I inside the ball; outside n / (|g| + eps) (I - g g' / (|g| (|g| + eps)))."""
    norm = np.linalg.norm(g)
    if norm + eps < max_norm:
        return np.eye(len(g))
    if max_norm == 0:
        return np.zeros((len(g), len(g)))
    outer = np.outer(g, g) / (norm * (norm + eps))
    return max_norm / (norm + eps) * (np.eye(len(g)) - outer)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
@pytest.mark.parametrize(
    "g",
    [(0.0, 0.0, 0.0), (1e-30, 0.0, 0.0), (1e-25, 2e-25, 0.0), (1.0, -2.0, 0.5)],
)
def test_the_derivative_of_clipping(g, max_norm, eps):
    """At zero gradients, and at those whose squares vanish in float32, too."""

    @jax.jit
    def clipped(g, max_norm):
        tx = aj.clip_by_global_norm(max_norm, eps=eps)
        return tx.update({"a": g}, tx.init(None))[0]["a"]

    g, max_norm = jnp.array(g), jnp.float32(max_norm)
    jacobians = jax.jacrev(clipped)(g, max_norm), jax.jacfwd(clipped)(g, max_norm)
    expected = jacobian_by_hand(np.asarray(g, float), float(max_norm), eps)
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, expected, rtol=1e-5, atol=1e-6)
    hessian = jax.jacfwd(jax.jacrev(clipped))(g, max_norm)
    assert np.isfinite(hessian).all()


def test_the_derivative_of_clipping_in_pytorch(x64):
    def loss(g):
        tx = aj.clip_by_global_norm(1.0, eps=1e-6)
        return jnp.sin(tx.update(g, tx.init(g))[0]).sum()

    def torch_loss(g):
        norm = torch.linalg.vector_norm(g)
        return torch.sin(g * torch.clamp(1.0 / (norm + 1e-6), max=1.0)).sum()

    for g in ((0.0, 0.0), (0.3, 0.4), (3.0, -4.0)):
        leaf = torch.tensor(g, dtype=float, requires_grad=True)
        torch_loss(leaf).backward()
        np.testing.assert_allclose(
            jax.jit(jax.grad(loss))(jnp.array(g)), leaf.grad.numpy(), rtol=1e-12
        )


@needs_xla_of_jax_0_10
def test_clipping_adds_one_read_of_the_gradients():
    """XLA materialises the gradients that Optax clips; ours are only read."""
    size = 100_000

    def cost(clip):
        tx = optax.chain(clip, aj.adamw(1e-3))
        compiled = compiled_update(tx, jnp.ones(size))
        return (
            round(compiled.cost_analysis()["bytes accessed"] / size, 1),
            round(compiled.memory_analysis().temp_size_in_bytes / size, 1),
        )

    plain, temporary = cost(optax.identity())
    assert cost(aj.clip_by_global_norm(1.0)) == (plain + 4, temporary)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_norm": 0.0}, "max_norm must be > 0, got 0.0"),
        ({"max_norm": -1.0}, "max_norm must be .* got -1.0"),
        ({"max_norm": np.nan}, "max_norm must be .* got nan"),
        ({"max_norm": 1.0, "eps": -1.0}, "eps must be .* got -1.0"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        aj.clip_by_global_norm(**args)


def test_integer_gradients_do_not_count():
    """They belong to leaves that are not trained; jax.grad gives them as float0."""
    zeros = np.zeros(3, jax.dtypes.float0)
    new = clip({"a": jnp.array([3.0, 4.0]), "b": zeros}, 1.0)
    np.testing.assert_allclose(new["a"], [0.6, 0.8], rtol=1e-6)
    assert new["b"].dtype == jax.dtypes.float0
    with pytest.raises(TypeError, match="update a/b has dtype int32"):
        clip({"a": {"b": jnp.arange(3)}}, 1.0)
