"""The mapping from PyTorch: names, arrays, layouts and parameter groups."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import path_string

Rename = Callable[[str], str] | Mapping[str, str] | None

# From the last part of a name in PyTorch to its names in Flax.
_LEAF_NAMES = {
    "weight": ("kernel", "scale", "embedding"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}

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


class Layout(NamedTuple):
    """How arrays are laid out in the two libraries: two functions of (path, array).

    Each takes the path of the JAX leaf, such as `conv1/kernel`, and a NumPy array, and
    returns an array. They only permute elements, and each must be the inverse of the
    other, which is checked.
    """

    from_torch: Callable[[str, np.ndarray], np.ndarray]
    to_torch: Callable[[str, np.ndarray], np.ndarray]


def _is_kernel(path: str, array: np.ndarray) -> bool:
    return path.split("/")[-1] == "kernel" and array.ndim >= 2


def _to_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (1, 0), (-2, -1)) if _is_kernel(path, array) else array


def _from_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-2, -1), (1, 0)) if _is_kernel(path, array) else array


# Kernels are (out, in, ...) in PyTorch and (..., in, out) in Flax: OIHW becomes HWIO,
# and matrices are transposed. All other leaves stay as they are. Attention, recurrent
# cells and transposed convolutions need a layout of their own, which can call this one
# for the other leaves.
flax_layout = Layout(_to_flax, _from_flax)


# ---------------------------------------------------------------------------
# names and leaves
# ---------------------------------------------------------------------------


class Problems:
    """Collects all mismatches, to report them in one error."""

    def __init__(self, title: str):
        self.title, self.lines = title, []

    def add(self, location: str, problem: str) -> None:
        line = f"  {location}: {problem}"
        if line not in self.lines:
            self.lines.append(line)

    def raise_if_any(self) -> None:
        if self.lines:
            raise ValueError("\n".join([self.title, *self.lines]))


class Parameter(NamedTuple):
    """A parameter of PyTorch, with its group and its state in the state dict."""

    number: int
    name: str
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def torch_parameters(
    state_dict: Mapping[str, Any],
    params: Any,
    names: Sequence[str] | None,
    rename: Rename,
    problems: Problems,
) -> dict[str, Parameter]:
    """A dict from the path of a leaf to its parameter, in PyTorch's order."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        check_group(group)
    numbers = [(n, group) for group in groups for n in group["params"]]
    if names is None:
        if not all("param_names" in group for group in groups):
            raise ValueError(
                "names must be given, because this state dict has none: pass [name for "
                "name, _ in net.named_parameters()] in the order of the groups"
            )
        names = [name for group in groups for name in group["param_names"]]
    if isinstance(names, str) or len(names) != len(numbers):
        raise ValueError(
            f"names must be {len(numbers)} names, one for each parameter in the "
            f"groups, got {names if isinstance(names, str) else len(names)}"
        )
    found = find_leaves(names, rename, leaf_paths(params), problems)
    for number in sorted(set(states) - {number for number, _ in numbers}, key=str):
        problems.add(f"parameter {number}", "has a state, but is in no group")
    return {
        found[name]: Parameter(number, name, group, states.get(number, {}))
        for name, (number, group) in zip(names, numbers, strict=True)
        if name in found
    }


def find_leaves(
    names: Iterable[str], rename: Rename, leaves: set[str], problems: Problems
) -> dict[str, str]:
    """A dict from PyTorch's names to the paths of leaves, one to one."""
    found: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        if isinstance(rename, Mapping):
            path = rename.get(name, name)
        else:
            path = rename(name) if rename is not None else name
        path = path if path in leaves else path.replace(".", "/")
        module, slash, last = path.rpartition("/")
        candidates = [path]
        candidates += [module + slash + other for other in _LEAF_NAMES.get(last, ())]
        matches = [path for path in candidates if path in leaves]
        if not matches:
            problems.add(
                f"parameter {name}", f"there is no leaf {' or '.join(candidates)}"
            )
        elif len(matches) > 1:
            problems.add(
                f"parameter {name}", f"could be leaf {' or '.join(matches)}: use rename"
            )
        elif name in found or matches[0] in used:
            problems.add(f"parameter {name}", f"leaf {matches[0]} is already taken")
        else:
            found[name] = matches[0]
            used.add(matches[0])
    return found


def leaf_paths(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_string(path) for path, _ in leaves}


# ---------------------------------------------------------------------------
# arrays
# ---------------------------------------------------------------------------


def to_array(x: Any) -> np.ndarray:
    """A NumPy array from a tensor, or from anything that NumPy accepts."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        # NumPy has no bfloat16; float32 holds its values exactly.
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    return np.asarray(x)


def to_tensor(array: np.ndarray) -> Any:
    """A tensor that owns its memory, because PyTorch writes to it."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def put_like(old: Any, array: np.ndarray) -> jax.Array:
    """A copy of the array with the dtype and on the devices of the old one."""
    array = np.array(array, old.dtype)
    if getattr(old, "committed", False):
        return jax.device_put(array, old.sharding)
    return jnp.array(array)


def put_number(old: Any, value: Any) -> Any:
    """Replaces a scalar, also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(lambda x: put_like(x, np.asarray(value)), old)


def put_array(
    path: str, key: str, old: Any, array: np.ndarray, problems: Problems
) -> Any:
    """Replaces an array by one of the same shape, if its dtype loses no bits."""
    if array.shape != old.shape:
        problems.add(
            f"leaf {path}", f"{key} has shape {array.shape}, expected {old.shape}"
        )
        return old
    with np.errstate(all="ignore"):
        cast = array.astype(old.dtype)
        exact = np.array_equal(cast.astype(array.dtype), array, equal_nan=True)
    if not exact:
        problems.add(
            f"leaf {path}",
            f"{key} has dtype {array.dtype}, and {old.dtype} would lose bits of it",
        )
        return old
    return put_like(old, cast)


def convert_layout(
    layout: Layout, path: str, array: np.ndarray, to: str, problems: Problems
) -> np.ndarray:
    """Converts to the other layout, after checking that this is invertible."""
    convert, invert = layout if to == "from_torch" else layout[::-1]
    order = np.arange(array.size).reshape(array.shape)
    owner = "PyTorch's " if to == "from_torch" else ""
    shape = f"{owner}shape {array.shape}"
    try:
        invertible = np.array_equal(invert(path, convert(path, order)), order)
        converted = convert(path, array)
    except ValueError as error:  # of a reshape or transpose in NumPy
        problems.add(f"leaf {path}", f"layout fails for {shape}: {error}")
        return array
    if not invertible:
        problems.add(f"leaf {path}", f"layout does not undo itself for {shape}")
    return converted


# ---------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------


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
