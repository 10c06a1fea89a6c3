"""update_and_apply asks for a step, hides nothing, and says which way it takes."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from ways import draws

import adamw_jax as aj
from adamw_jax.fused import build

PARAMS = {"kernel": draws((5, 3), 0), "bias": draws(3, 1)}


def test_any_object_with_a_step(lenient):
    """Not only ours: the attribute is the contract."""

    class WithStep(optax.GradientTransformationExtraArgs):
        def step(self, grads, state, params, **extra_args):
            return jax.tree.map(lambda p: p + extra_args["by"], params), "new"

    params, state = aj.update_and_apply(
        WithStep(*optax.identity()), PARAMS, "old", PARAMS, by=1
    )
    chex.assert_trees_all_close(params, jax.tree.map(lambda p: p + 1, PARAMS))
    assert state == "new"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: aj.chain(aj.clip_by_global_norm(1.0), tx),
        lambda tx: aj.freeze_leaves(tx, aj.mask_by_path("bias")),
        lambda tx: aj.accumulate_gradients(tx, 2),
        lambda tx: optax.chain(tx),
    ],
    ids=["adamw", "chain", "freeze", "accumulate", "optax"],
)
def test_it_traces_once(wrap):
    """And evaluates the schedule once."""
    seen = []

    def schedule(step):
        seen.append(step)
        return 0.1 / (1 + step.astype(jnp.float32))

    tx = wrap(aj.adamw(schedule))
    state = tx.init(PARAMS)
    seen.clear()
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(lambda g, s, p: aj.update_and_apply(tx, g, s, p), n=1)
    )
    for _ in range(3):
        params, state = step(PARAMS, state, PARAMS)
    chex.assert_tree_all_finite(params)
    assert len(seen) == 1


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: aj.chain(tx)])
def test_no_exception_is_hidden(wrap):
    def mask(params):
        raise RuntimeError("of the user")

    tx, state = wrap(aj.adamw(0.1, mask=mask)), wrap(aj.adamw(0.1)).init(PARAMS)
    with pytest.raises(RuntimeError, match="of the user"):
        aj.update_and_apply(tx, PARAMS, state, PARAMS)


@pytest.mark.skipif(build.why_no_kernel() is not None, reason="no kernel")
def test_what_describe_step_says(monkeypatch):
    half = jax.tree.map(lambda p: p.astype("float16"), PARAMS)
    mixed = PARAMS | {"bias": half["bias"]}
    tx = aj.chain(aj.clip_by_global_norm(1.0), aj.adamw(0.1))
    kernel = "one pass of the compiled kernel over each leaf"
    xla = "XLA computes the others, whose dtypes it does not support"
    other = "update, then apply_updates: "
    for each, params, expected in [
        (tx, None, kernel),
        (tx, PARAMS, f"{kernel}, 2 of 2"),
        (tx, mixed, f"{kernel}, 1 of 2; {xla}"),
        (aj.freeze_leaves(tx, aj.mask_by_path("bias")), mixed, f"{kernel}, 1 of 1"),
        (
            aj.accumulate_gradients(tx, 2),
            PARAMS,
            f"at the end of a window: {kernel}, 2 of 2; before, only a sum",
        ),
        (
            aj.adamw(0.1, mu_dtype="bfloat16"),
            None,
            f"{other}moments are rounded stochastically",
        ),
        (aj.adamw(0.1, epsilon_hat=True), None, f"{other}the kernel does not support"),
        (aj.sgd(0.1), None, f"{other}scheduled has no step"),
        (optax.chain(tx), None, f"{other}chain has no step"),
        (optax.adamw(0.1), None, f"{other}chain has no step"),
    ]:
        assert aj.describe_step(each, params).startswith(expected)
    monkeypatch.setenv("ADAMW_JAX_KERNEL", "0")
    assert aj.describe_step(aj.adamw(0.1)) == f"{other}ADAMW_JAX_KERNEL is 0"


def test_parameters_that_no_update_reaches():
    params = {"a": jnp.array(1.0), "b": jnp.array([1, 2])}
    new = aj.apply_updates(params, {"a": None, "b": jnp.array([1, 1])})
    chex.assert_trees_all_equal(new, params | {"b": jnp.array([2, 3])})
