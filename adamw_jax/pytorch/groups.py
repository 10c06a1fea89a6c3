"""Parameter groups of PyTorch's Adam, AdamW and SGD: options, rates, counts."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .arrays import to_array
from .problems import Problems

# The options in a group, in PyTorch 1.0 to 2.13. The first five are in all versions.
_ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
_LATER_OPTIONS = ("maximize", "foreach", "differentiable", "fused")
_LATER_ADAM_OPTIONS = ("capturable", "decoupled_weight_decay")
# Names, and what schedulers store (timm's, lr_scale); none of it acts in an update.
_LABELS = (
    *("params", "param_names", "name", "group_name"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale"),
    *("base_momentum", "max_momentum"),
)


class Parameter(NamedTuple):
    """A parameter of PyTorch, with its group and its state in the state dict."""

    number: int
    name: str
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def check_group(group: Mapping[str, Any]) -> None:
    """Raises unless the group is one of PyTorch's Adam, AdamW or SGD."""
    options = _SGD_OPTIONS if is_sgd(group) else _ADAM_OPTIONS
    if not set(options) <= set(group):
        raise ValueError(
            "param_groups must be those of PyTorch's Adam, AdamW or SGD, got a group "
            f"with {', '.join(map(str, group))}"
        )
    known = {*options, *_LATER_OPTIONS, *_LABELS}
    if not is_sgd(group):
        known.update(_LATER_ADAM_OPTIONS)
    if unknown := [str(option) for option in group if option not in known]:
        name = "SGD" if is_sgd(group) else "Adam and AdamW"
        raise ValueError(
            "param_groups must be those of PyTorch's Adam, AdamW or SGD, got a group "
            f"with {', '.join(unknown)}, which {name} do not have: delete it from the "
            "groups if it does not change the update"
        )


def is_sgd(group: Mapping[str, Any]) -> bool:
    return "betas" not in group


def get_betas(group: Mapping[str, Any]) -> tuple[float, float]:
    b1, b2 = group.get("betas", (0.0, 0.0))
    return float(b1), float(b2)


_ONE_FOR_EACH = (
    "pass a learning_rate for each group to optimizer_from_torch_state_dict, or build "
    "an optimizer with a schedule of its own for each, with optax.partition, and fill "
    "its state with from_torch_state_dict"
)


def rate_ratio(group: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """The ratio of the learning rate of a group to that of the first group.

    Raises ValueError if a scheduler has not kept it since its start.
    """
    if group is first:
        return 1.0
    rate, base = float(group["lr"]), float(first["lr"])
    if ("initial_lr" in group) != ("initial_lr" in first):
        raise ValueError(
            "the learning rates of the groups have no constant ratio: a scheduler "
            f"drives only some of the groups (with initial_lr); {_ONE_FOR_EACH}"
        )
    if "initial_lr" in group:
        initial_rate, initial_base = map(_initial_rate, (group, first))
        # A tensor is float32, and a scheduler rounds it at every step.
        tensors = any(hasattr(g["lr"], "dtype") for g in (group, first))
        tolerance = 1e-5 if tensors else 1e-9
        now, then = rate * initial_base, base * initial_rate
        if not math.isclose(now, then, rel_tol=tolerance, abs_tol=0.0):
            raise ValueError(
                "the learning rates of the groups have no constant ratio: they were "
                f"{initial_base:g} and {initial_rate:g}, are {base:g} and {rate:g} "
                "(a scheduler with eta_min or with a function for each group); "
                f"{_ONE_FOR_EACH}"
            )
        if base == 0:
            rate, base = initial_rate, initial_base
    if rate == base:
        return 1.0
    if base == 0:
        raise ValueError(
            "the learning rates of the groups have no ratio: the first group has the "
            f"learning rate 0, another {rate}"
        )
    return rate / base


def _initial_rate(group: Mapping[str, Any]) -> float:
    """The rate from which a scheduler started; timm's multiply it by lr_scale."""
    return float(group["initial_lr"]) * float(group.get("lr_scale", 1.0))


def step_count(path: str, parameter: Parameter, problems: Problems) -> int:
    """The step count of a parameter; 0 before its first gradient and for SGD."""
    state, step = parameter.state, parameter.state.get("step")
    if is_sgd(parameter.group):
        if step is not None:
            problems.add(f"leaf {path}", "has a step, which PyTorch's SGD does not")
        return 0
    if step is None:
        if any(value is not None for value in state.values()):
            problems.add(
                f"leaf {path}",
                "its state has no step, which PyTorch's Adam stores: another optimizer "
                f"made it; set state_dict['state'][{parameter.number!r}]['step'] to "
                "the number of updates done if the update is the same",
            )
        return 0
    count = float(to_array(step))
    if not count >= 0 or count % 1:
        problems.add(f"leaf {path}", f"step must be an integer >= 0, got {count}")
        return 0
    return int(count)
