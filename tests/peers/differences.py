"""Where this library differs from Optax, and why: the table and its generator.

`python tests/peers/differences.py` writes the table to docs/results/optax/, from where
`make docs` copies it. Each row names the test that asserts both behaviours; the tests
of this folder fail for a difference that has no row, and for a row without one.
"""

from pathlib import Path
from typing import NamedTuple

import tabulate

PAGE = Path(__file__).parents[2] / "docs" / "results" / "optax" / "differences.md"


class Difference(NamedTuple):
    """A row of the table; `check` is the name of a test in this folder."""

    function: str
    optax: str
    here: str
    why: str
    check: str


ROWS = [
    # ---- numbers ----
    Difference(
        "`scale_by_adam`, `adam`, `adamw`: bias correction",
        "`1 - b2**t` in float32: the first step is 7e-4 off for b2 = .99999",
        "exact to 3e-7",
        "the difference cancels; `expm1` does not",
        "test_first_update_in_float32",
    ),
    Difference(
        "the same, with a scheduled b1",
        "the current b1 to the power t: .77 where a constant gradient should give 1",
        'the product of all b1: 1; `bias_correction="torch"` for Optax\'s',
        "momentum is cycled in 1cycle",
        "test_cycled_b1",
    ),
    Difference(
        "`amsgrad`, `scale_by_amsgrad`",
        "the maximum of the corrected second moments",
        "PyTorch's, of the raw ones; `convention=\"optax\"` for Optax's",
        "Optax's never forgets the first gradient",
        "test_amsgrad_is_not_pytorchs_with_any_flag",
    ),
    Difference(
        "moments of bfloat16 and float16 parameters",
        "in the parameters' dtype",
        'float32; `mu_dtype="params"`, `nu_dtype="params"` for Optax\'s',
        "in bfloat16 the second moment never decays, because .999 rounds to 1",
        "test_dtype_of_moments_by_default",
    ),
    Difference(
        "`mu_dtype=jnp.bfloat16`",
        "b1 is rounded too: a constant gradient of 1 gives .969 (b1 = .9) or .69 (.99)",
        "1 on average: float32 arithmetic, stochastic rounding",
        "the moment should be the gradient's mean",
        "test_bfloat16_mu",
    ),
    Difference(
        "`mu_dtype=jnp.bfloat16` with complex parameters",
        "real moments: the imaginary part is lost",
        "complex ones",
        "a silent mistake",
        "test_real_mu_dtype_of_complex_parameters",
    ),
    Difference(
        "`scale_by_adam` with a traced or scheduled beta: the state",
        "as for a number; a schedule is refused",
        "also has the product of the betas, `log_b1` or `log_b2`",
        "the bias correction is exact for any schedule",
        "test_state_of_a_traced_beta",
    ),
    Difference(
        "`chain`, in bfloat16",
        "rounds the updates after every link",
        "float32 between the links, rounded once at the end",
        "no digits are lost between links",
        "test_chain_of_bfloat16_gradients",
    ),
    Difference(
        "`clip_by_global_norm`, max_norm = 0",
        "NaN for zero gradients",
        "0",
        "max_norm may be scheduled to 0",
        "test_max_norm_of_zero",
    ),
    Difference(
        "`clip_by_global_norm`, its derivative",
        "NaN at zero gradients",
        "1",
        "meta-gradients go through it",
        "test_the_derivative_of_clipping_at_zero_gradients",
    ),
    # ---- hyperparameters ----
    Difference(
        "`adam`, `adamw`, `amsgrad`, `sgd`: the state",
        "has no rates; `inject_hyperparams` adds them",
        "has `hyperparams`: rates are read and set in every state",
        "a run is logged and steered without a wrapper",
        "test_get_the_learning_rate",
    ),
    Difference(
        '`optax.tree.get(state, "learning_rate")` of a schedule',
        "KeyError with `inject_hyperparams`: the name is there twice",
        "the rate",
        "one name, one value",
        "test_get_the_learning_rate_that_is_injected",
    ),
    Difference(
        '`optax.tree.get(state, "count")` with a schedule',
        "KeyError: a count for each schedule",
        "Adam's count; the schedules' is `step`",
        "all schedules of an optimizer are read at one step",
        "test_get_the_count_of_a_scheduled_optimizer",
    ),
    Difference(
        "`adam`, `adamw`, `amsgrad`, `sgd`: the structure of the state",
        "a tuple, of which `state[0]` are the moments",
        "that tuple is `state.inner_state`, beside the hyperparameters",
        '`optax.tree.get(state, "mu")` finds the moments in both',
        "test_structure_of_the_state",
    ),
    Difference(
        '`inject_hyperparams(adamw)` and `optax.tree.get(state, "learning_rate")`',
        "the rate",
        "KeyError: the rate is also in the inner state; use `state.hyperparams`",
        "there is no need to wrap them",
        "test_get_the_learning_rate_that_is_injected_around",
    ),
    Difference(
        "schedules for `learning_rate`, `b1` and `weight_decay`",
        "five counters with `inject_hyperparams`",
        "two",
        "the same",
        "test_counters",
    ),
    Difference(
        "a scheduled value that is set in the state",
        "ignored",
        "holds until it is released",
        "a rate that was set is meant",
        "test_override_of_a_scheduled_value",
    ),
    Difference(
        "a callable mask beside injected hyperparameters",
        "taken for a schedule: no leaf decays",
        "a mask",
        "a silent mistake",
        "test_callable_mask_in_inject_hyperparams",
    ),
    Difference(
        "bfloat16 parameters beside injected hyperparameters",
        "NaN: b2 is rounded to 1",
        "finite",
        "hyperparameters are float32",
        "test_bfloat16_parameters_in_inject_hyperparams",
    ),
    Difference(
        "descent upwards, with a decay",
        "`flip_sign=False`: the decay makes weights grow",
        "`maximize=True`: they shrink",
        "PyTorch's `maximize`",
        "test_maximizing_makes_the_decay_grow",
    ),
    # ---- what is accepted ----
    Difference(
        "negative rates of `adam`, `adamw`, `amsgrad`, `sgd`",
        "ascends",
        "ValueError that names `maximize=True`; the links accept them",
        "a sign is a common mistake, and the decay would grow",
        "test_negative_learning_rate_of_an_optimizer",
    ),
    Difference(
        "other hyperparameters of these, out of range or NaN",
        "accepted",
        "ValueError",
        "found when the optimizer is built, not in the loss",
        "test_hyperparameters_out_of_range",
    ),
    Difference(
        "a learning rate for each element, in these",
        "broadcasts",
        "TypeError; the links accept it, `scale_by_group` has rates for groups",
        "the state holds scalars, which are logged",
        "test_a_rate_for_each_element_of_an_optimizer",
    ),
    Difference(
        "`add_decayed_weights(...).update(grads, state)`",
        "TypeError: missing argument",
        "ValueError that says why `params` are needed",
        "as in Optax's other rules",
        "test_message_of_a_decay_without_parameters",
    ),
    # ---- leaves ----
    Difference(
        "a gradient that is None",
        "an error in `adam`, `adamw` and `amsgrad`",
        "the leaf stays as it is",
        "a part of the model has no gradient",
        "test_gradient_that_is_none",
    ),
    Difference(
        "`apply_updates` with an update that is None",
        "TypeError",
        "the parameter stays as it is",
        "the same",
        "test_apply_updates_of_none",
    ),
    Difference(
        "integer and bool leaves, with `jax.grad(..., allow_int=True)`",
        "TypeError: float0 gradients have no arithmetic",
        "stay as they are",
        "tables and counters may lie among the parameters",
        "test_integer_leaves_under_allow_int",
    ),
    Difference(
        "integer gradients of a float parameter",
        "as floats",
        "TypeError that names the leaf",
        "`jax.grad` gives none, so they are a mistake",
        "test_integer_gradients_of_a_float_parameter",
    ),
    Difference(
        "integer leaves with integer gradients",
        "move by a float update, which is then truncated",
        "stay as they are",
        "integers are not trained",
        "test_integer_leaves_with_integer_gradients",
    ),
    # ---- accumulation ----
    Difference(
        "`MultiSteps`; here `accumulate_gradients`: NaN in a micro-batch",
        "NaN for ever: the sum is multiplied by 0",
        "in its own window only",
        "a skipped step should be over",
        "test_nan_in_a_micro_batch",
    ),
    Difference(
        "the same, where the inner transformation divides by a norm",
        "its NaN of zero gradients reaches the updates",
        "it is called once per window",
        "a step that is not taken is not computed",
        "test_nan_leaks_from_optax",
    ),
]
DIFFERENCES = {row.check: row for row in ROWS}


def table() -> str:
    """The rows as Markdown."""
    header = ["", "Optax 0.2.8", "here", "why"]
    rows = [(row.function, row.optax, row.here, row.why) for row in ROWS]
    return tabulate.tabulate(rows, header, tablefmt="pipe")


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(table() + "\n", "utf-8")
