"""Arguments by the names of PyTorch, fastai, Keras and Optax: an error says ours.

The tables name what people type; no argument is renamed silently, because the same
name often means something else, such as `weight_decay` of PyTorch's Adam.
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_DECAY = "pass weight_decay for decoupled decay, l2 for a decay in the gradient"

# From a foreign name to what to do instead.
OPTIMIZER = {
    **dict.fromkeys(("lr", "lr_max", "max_lr", "step_size"), "pass learning_rate"),
    **dict.fromkeys(("beta1", "beta_1", "mom"), "pass b1"),
    **dict.fromkeys(("beta2", "beta_2", "sqr_mom"), "pass b2"),
    "betas": "pass b1 and b2",
    "momentum": "pass b1",
    "epsilon": "pass eps",
    **dict.fromkeys(("wd", "decouple_wd", "weight_decouple"), _DECAY),
    "decoupled_weight_decay": _DECAY,
    "amsgrad": "call adamw_jax.amsgrad",
    "momentum_decay": "PyTorch's NAdam is not here; nesterov=True is Dozat's rule",
    "params": "pass the parameters to init and update",
    **dict.fromkeys(
        ("foreach", "fused", "capturable", "jit_compile"),
        "leave it out, jax.jit compiles the step",
    ),
    **dict.fromkeys(
        ("clipnorm", "global_clipnorm"),
        "chain clip_by_global_norm before the optimizer",
    ),
}
ADAM = OPTIMIZER | dict.fromkeys(
    ("wd", "weight_decay", "decouple_wd", "weight_decouple", "decoupled_weight_decay"),
    "pass l2 for a decay in the gradient, or call adamw for decoupled decay",
)
ADAMW = OPTIMIZER | {
    "wd": "pass weight_decay",
    **dict.fromkeys(
        ("l2", "decouple_wd", "weight_decouple", "decoupled_weight_decay"),
        "pass weight_decay for decoupled decay, or call adam for l2",
    ),
}
AMSGRAD = OPTIMIZER | {"amsgrad": "leave it out, this is AMSGrad"}
SGD = OPTIMIZER | {
    **dict.fromkeys(("mom", "b1", "beta1", "beta_1", "betas"), "pass momentum"),
    **dict.fromkeys(("b2", "beta2", "beta_2", "sqr_mom"), "call adam or adamw"),
    **dict.fromkeys(("eps", "epsilon"), "call adam or adamw"),
    "dampening": "pass dampened=True, which dampens the first gradient as well",
}

_RATE = ("lr", "lr_max", "max_lr", "peak_lr", "peak_value", "init_value")
_RATE += ("initial_learning_rate",)
_MOMENTA = ("moms", "momentum", "base_momentum", "max_momentum")
_STEPS = ("total_steps", "num_steps", "transition_steps", "decay_steps", "max_iters")
_SCHEDULE = {
    **dict.fromkeys(_RATE, "pass learning_rate"),
    **dict.fromkeys(_STEPS, "pass steps"),
    **dict.fromkeys(("n_epoch", "num_epochs", "cyc_len"), "pass epochs"),
    **dict.fromkeys(("wd", "wds"), "pass weight_decay"),
    "optimizer": "pass the phases to the optimizer as learning_rate",
    "last_epoch": "leave it out, the step is in the state of the optimizer",
    "T_max": "call cosine_restarts with cycles=1 and steps",
}
ONE_CYCLE = _SCHEDULE | {
    **dict.fromkeys(_MOMENTA, "pass b1=(high, low)"),
    "betas": "pass b1=(high, low) and b2",
    "div_factor": "pass div",
    **dict.fromkeys(
        ("pct_start", "final_div_factor", "three_phase", "cycle_momentum"),
        "call one_cycle_torch, whose phases are PyTorch's",
    ),
    **dict.fromkeys(("div_final", "final_div"), "choose the last rate with end"),
    "anneal_strategy": "pass end='cosine' or 'linear'",
}
ONE_CYCLE_PLATEAU = ONE_CYCLE | dict.fromkeys(
    ("end", "anneal_strategy", "div_final", "final_div"),
    "leave it out, the last annealing is a cosine to 0",
)
ONE_CYCLE_TORCH = _SCHEDULE | {
    **dict.fromkeys(("steps", *_STEPS[1:]), "pass total_steps"),
    **dict.fromkeys(
        ("epochs", "n_epoch", "num_epochs", "cyc_len", "steps_per_epoch"),
        "pass total_steps, which is epochs * steps_per_epoch",
    ),
    **dict.fromkeys(
        ("wd", "wds", "weight_decay"), "set the decay of the optimizer instead"
    ),
    **dict.fromkeys(("moms", "momentum"), "pass base_momentum and max_momentum"),
    "b1": "pass base_momentum and max_momentum",
    "div": "pass div_factor",
    "pct": "pass pct_start",
    "end": "pass anneal_strategy",
    "verbose": "leave it out, print the phases instead",
}
RESTARTS = _SCHEDULE | {
    **dict.fromkeys(("T_0", "T_max", "first_decay_steps"), "pass steps"),
    "cycle_len": "pass epochs",
    **dict.fromkeys(("T_mult", "t_mul", "cycle_mult"), "pass mult"),
    **dict.fromkeys(("eta_min", "alpha", "min_lr"), "pass final_learning_rate"),
    "n_cycles": "pass cycles",
}
RANGE_TEST = {
    **dict.fromkeys(("start_lr", "min_lr", "base_lr"), "pass start"),
    **dict.fromkeys(("end_lr", "max_lr"), "pass end"),
    **dict.fromkeys(("num_it", "num_iter", "num_training", *_STEPS), "pass steps"),
    **dict.fromkeys(("step_mode", "mode"), "pass kind='exponential' or 'linear'"),
}
PHASE = _SCHEDULE | {
    **dict.fromkeys(("momentum", "moms"), "pass b1, which drives the momentum of sgd"),
    **dict.fromkeys(("beta", "beta2", "beta_2"), "pass b2"),
    "betas": "pass b1 and b2",
    "lr_decay": "pass learning_rate=(start, end, kind)",
    "momentum_decay": "pass b1=(start, end, kind)",
    "opt_fn": "leave it out, the optimizer is not part of a phase",
    "wd_loss": "set l2 or weight_decay of the optimizer instead",
}
ACCUMULATE = {
    **dict.fromkeys(
        ("every_k_schedule", "accumulation_steps", "k_steps"), "pass every_k"
    ),
    "should_skip_update_fn": "pass skip_nonfinite=True",
    "opt": "pass inner",
}


def explain_names(
    table: dict[str, str],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function: a TypeError for a name in the table says what it is here.

    The signature stays that of the function, for `inspect.signature` and for editors.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters
        name = function.__qualname__.removesuffix(".__init__")
        hints = {key: hint for key, hint in table.items() if key not in known}

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for key in kwargs:
                if key in hints:
                    raise TypeError(f"{name} has no argument {key}: {hints[key]}")
            return function(*args, **kwargs)

        return wrapper

    return decorate
