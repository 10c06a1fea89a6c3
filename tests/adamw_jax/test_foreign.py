"""Arguments by the names of other libraries: the error says what they are called."""

import inspect
import pickle
import re

import pytest

import adamw_jax as aj
from adamw_jax import _foreign

# What PyTorch, fastai, Keras and Optax call the arguments, and the name that the
# message must contain.
CALLS = [
    (aj.adam, {"lr": 1e-3}, "pass learning_rate"),
    (aj.adam, {"learning_rate": 1e-3, "betas": (0.9, 0.99)}, "pass b1 and b2"),
    (aj.adam, {"learning_rate": 1e-3, "weight_decay": 0.1}, "pass l2 .* or call adamw"),
    (aj.adam, {"learning_rate": 1e-3, "amsgrad": True}, "call adamw_jax.amsgrad"),
    (aj.adamw, {"lr": 1e-3, "weight_decay": 0.1}, "pass learning_rate"),
    (aj.adamw, {"learning_rate": 1e-3, "betas": (0.9, 0.99)}, "pass b1 and b2"),
    (aj.adamw, {"learning_rate": 1e-3, "wd": 0.1}, "pass weight_decay"),
    (aj.adamw, {"learning_rate": 1e-3, "weight_decouple": True}, "pass weight_decay"),
    (aj.adamw, {"learning_rate": 1e-3, "beta_1": 0.9}, "pass b1"),
    (aj.adamw, {"learning_rate": 1e-3, "epsilon": 1e-7}, "pass eps"),
    (aj.adamw, {"learning_rate": 1e-3, "mom": 0.9}, "pass b1"),
    (aj.adamw, {"learning_rate": 1e-3, "sqr_mom": 0.99}, "pass b2"),
    (aj.adamw, {"lr_max": 1e-3}, "pass learning_rate"),
    (aj.amsgrad, {"max_lr": 1e-3}, "pass learning_rate"),
    (aj.amsgrad, {"learning_rate": 1e-3, "decouple_wd": True}, "weight_decay .* l2"),
    (aj.sgd, {"lr": 0.1, "momentum": 0.9}, "pass learning_rate"),
    (
        aj.accumulate_gradients,
        {"inner": aj.sgd(0.1), "every_k_schedule": 2},
        "pass every_k",
    ),
    (aj.sgd, {"learning_rate": 0.1, "mom": 0.9}, "pass momentum"),
    (aj.sgd, {"learning_rate": 0.1, "dampening": 0.9}, "pass dampened=True"),
    (aj.sgd, {"learning_rate": 0.1, "wd": 0.9}, "weight_decay .* l2"),
    (aj.one_cycle, {"max_lr": 0.1, "total_steps": 9}, "pass learning_rate"),
    (aj.one_cycle, {"learning_rate": 0.1, "total_steps": 9}, "pass steps"),
    (aj.one_cycle, {"learning_rate": 0.1, "moms": (0.9, 0.8)}, r"pass b1=\(high, low"),
    (aj.one_cycle, {"learning_rate": 0.1, "pct_start": 0.3}, "call one_cycle_torch"),
    (aj.one_cycle_plateau, {"lr_max": 0.1}, "pass learning_rate"),
    (aj.one_cycle_torch, {"max_lr": 0.1, "total_steps": 9}, "pass learning_rate"),
    (aj.one_cycle_torch, {"learning_rate": 0.1, "steps": 9}, "pass total_steps"),
    (aj.one_cycle_torch, {"learning_rate": 0.1, "epochs": 9}, "epochs . steps_per"),
    (aj.cosine_restarts, {"learning_rate": 0.1, "T_max": 9}, "pass steps"),
    (aj.cosine_restarts, {"learning_rate": 0.1, "T_mult": 2}, "pass mult"),
    (aj.cosine_restarts, {"learning_rate": 0.1, "eta_min": 0}, "final_learning_rate"),
    (aj.range_test, {"start_lr": 1e-7, "num_it": 100}, "pass start"),
    (aj.Phase, {"steps": 9, "lr": 0.1}, "pass learning_rate"),
    (aj.Phase, {"epochs": 1, "momentum": 0.9}, "pass b1"),
    (aj.Phase, {"epochs": 1, "momentum_decay": 1}, r"pass b1=\(start, end, kind\)"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CALLS)
def test_a_foreign_name_is_explained(function, arguments, message):
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name} has no argument .*: .*{message}"):
        function(**arguments)


def test_any_other_name_is_unexpected_as_ever():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        aj.adamw(1e-3, colour=1)


TABLES = [
    (aj.adam, _foreign.ADAM),
    (aj.adamw, _foreign.ADAMW),
    (aj.amsgrad, _foreign.AMSGRAD),
    (aj.sgd, _foreign.SGD),
    (aj.one_cycle, _foreign.ONE_CYCLE),
    (aj.one_cycle_plateau, _foreign.ONE_CYCLE_PLATEAU),
    (aj.one_cycle_torch, _foreign.ONE_CYCLE_TORCH),
    (aj.cosine_restarts, _foreign.RESTARTS),
    (aj.range_test, _foreign.RANGE_TEST),
    (aj.Phase, _foreign.PHASE),
]


@pytest.mark.parametrize(("function", "table"), TABLES)
def test_every_name_to_pass_is_an_argument(function, table):
    """Also a function to call exists, and the signature is that of the function."""
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for foreign, hint in table.items():
        if foreign in parameters:
            continue
        for name in re.findall(r"pass (?:the )?(\w+)", hint):
            assert name in parameters or name in ("parameters", "phases"), (name, hint)
        for name in re.findall(r"call (?:adamw_jax\.)?(\w+)", hint):
            assert hasattr(aj, name), hint


def test_functions_can_be_pickled():
    for function in (aj.adam, aj.adamw, aj.one_cycle, aj.Phase):
        assert pickle.loads(pickle.dumps(function)) is function
    phase = aj.Phase(steps=3, b1=0.9)
    assert pickle.loads(pickle.dumps(phase)) == phase
