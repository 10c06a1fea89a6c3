"""What PyTorch has and where it belongs here: names, arrays, layouts, groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import path_string

Rename = Callable[[str], str] | Mapping[str, str] | None

# Flax's names for the last part of PyTorch's.
_LEAF_NAMES = {
    "weight": ("kernel", "scale", "embedding"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}


class Layout(NamedTuple):
    """How the arrays of the two libraries lie: two functions of (path, array).

    Each is given the path of our leaf, `conv1/kernel`, and a NumPy array, and returns
    one. They only move elements, and each undoes the other; that is checked.
    """

    from_torch: Callable[[str, np.ndarray], np.ndarray]
    to_torch: Callable[[str, np.ndarray], np.ndarray]


def _is_kernel(path: str, array: np.ndarray) -> bool:
    return path.split("/")[-1] == "kernel" and array.ndim >= 2


def _to_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (1, 0), (-2, -1)) if _is_kernel(path, array) else array


def _from_flax(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-2, -1), (1, 0)) if _is_kernel(path, array) else array


# Leaves named kernel: (out, in, ...) there, (..., in, out) here, that is OIHW to HWIO
# and a transposed matrix. All others stay as they are. Attention, recurrent cells and
# transposed convolutions are arranged otherwise: they need a layout of one's own, which
# can call these for the rest.
flax_layout = Layout(_to_flax, _from_flax)


# ---------------------------------------------------------------------------
# names and leaves
# ---------------------------------------------------------------------------


class Problems:
    """What does not fit, collected to be said at once."""

    def __init__(self, title: str):
        self.title, self.lines = title, []

    def add(self, where: str, what: str) -> None:
        line = f"  {where}: {what}"
        if line not in self.lines:
            self.lines.append(line)

    def raise_if_any(self) -> None:
        if self.lines:
            raise ValueError("\n".join([self.title, *self.lines]))


class Parameter(NamedTuple):
    """One of PyTorch's parameters; the group and the state are the dict's own."""

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
    """From our path to what PyTorch has for it, in PyTorch's order."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        check_kind(group)
    numbers = [(n, group) for group in groups for n in group["params"]]
    if names is None:
        if not all("param_names" in group for group in groups):
            raise ValueError(
                "names must be given, [name for name, _ in net.named_parameters()] in "
                "the order of the groups: this optimizer's state has numbers only"
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
    """From PyTorch's names to paths of leaves, each to another."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        if isinstance(rename, Mapping):
            path = rename.get(name, name)
        else:
            path = rename(name) if rename is not None else name
        path = path if path in leaves else path.replace(".", "/")
        module, slash, last = path.rpartition("/")
        others = [module + slash + other for other in _LEAF_NAMES.get(last, ())]
        there = [path for path in (path, *others) if path in leaves]
        if len(there) != 1:
            problems.add(
                f"parameter {name}",
                f"there is no leaf {' or '.join((path, *others))}"
                if not there
                else f"could be leaf {' or '.join(there)}: use rename",
            )
        elif name in found or there[0] in taken:
            problems.add(f"parameter {name}", f"leaf {there[0]} is already taken")
        else:
            found[name] = there[0]
            taken.add(there[0])
    return found


def leaf_paths(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_string(path) for path, _ in leaves}


# ---------------------------------------------------------------------------
# arrays
# ---------------------------------------------------------------------------


def to_array(x: Any) -> np.ndarray:
    """A NumPy array of a tensor, or of what NumPy takes."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        # NumPy has no bfloat16; a float32 holds it exactly.
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    return np.asarray(x)


def to_tensor(array: np.ndarray) -> Any:
    """A tensor with memory of its own, which PyTorch will write to."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def put(old: Any, array: np.ndarray) -> jax.Array:
    """A copy of the array, where the old one was."""
    array = np.array(array, old.dtype)
    if getattr(old, "committed", False):
        return jax.device_put(array, old.sharding)
    return jnp.array(array)


def put_number(old: Any, value: Any) -> Any:
    """A scalar in the place of another; also inside a Variable of nnx.Optimizer."""
    return jax.tree.map(lambda x: put(x, np.asarray(value)), old)


def put_array(
    path: str, key: str, old: Any, array: np.ndarray, problems: Problems
) -> Any:
    if array.shape != old.shape:
        problems.add(
            f"leaf {path}", f"{key} has shape {array.shape} here, expected {old.shape}"
        )
        return old
    with np.errstate(all="ignore"):
        cast = array.astype(old.dtype)
        exact = np.array_equal(cast.astype(array.dtype), array, equal_nan=True)
    if not exact:
        problems.add(
            f"leaf {path}",
            f"{key} has dtype {array.dtype}, of which {old.dtype} would lose bits",
        )
        return old
    return put(old, cast)


def turn(
    layout: Layout, path: str, array: np.ndarray, to: str, problems: Problems
) -> np.ndarray:
    """The array in the other layout, after a look whether the way back leads back."""
    there, back = layout if to == "from_torch" else layout[::-1]
    order = np.arange(array.size).reshape(array.shape)
    whose = "PyTorch's shape" if to == "from_torch" else "shape"
    try:
        undone = np.array_equal(back(path, there(path, order)), order)
        turned = there(path, array)
    except ValueError as error:  # NumPy's, of a reshape or transpose
        problems.add(f"leaf {path}", f"layout fails for {whose} {array.shape}: {error}")
        return array
    if not undone:
        problems.add(
            f"leaf {path}", f"layout does not undo itself for {whose} {array.shape}"
        )
    return turned


# ---------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------


def check_kind(group: Mapping[str, Any]) -> None:
    adams, sgds = {"betas", "amsgrad"}, {"momentum", "dampening", "nesterov"}
    if not (adams <= set(group) or sgds <= set(group)):
        raise ValueError(
            "the groups must be those of PyTorch's Adam, AdamW or SGD; one has "
            + ", ".join(map(str, group))
        )


def is_sgd(group: Mapping[str, Any]) -> bool:
    return "betas" not in group


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    b1, b2 = group.get("betas", (0.0, 0.0))
    return float(b1), float(b2)


def rate_ratio(group: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """The learning rate of a group over that of the first one."""
    rate, base = float(group["lr"]), float(first["lr"])
    if base == 0 and "initial_lr" in group and "initial_lr" in first:
        rate, base = float(group["initial_lr"]), float(first["initial_lr"])
    if rate == base:
        return 1.0
    if base == 0:
        raise ValueError(
            f"the first group has the learning rate 0, another {rate}: no ratio"
        )
    return rate / base


def to_count(path: str, step: Any, problems: Problems) -> int:
    count = float(to_array(step))
    if not count >= 0 or count % 1:
        problems.add(f"leaf {path}", f"step must be an integer >= 0, got {count}")
        return 0
    return int(count)
