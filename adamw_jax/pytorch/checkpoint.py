"""Files of PyTorch's training scripts, and which part of one is asked for."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def load_torch_checkpoint(path: str | os.PathLike) -> Any:
    """Reads a file that `torch.save` wrote, without running code from it.

    As `torch.load(path, map_location="cpu", weights_only=True)`. Beyond tensors and
    plain Python, the file may hold an `argparse.Namespace` and NumPy's numbers and
    arrays, which the training scripts of torchvision and timm, among others, store
    beside the network.

    Args:
        path: the file, with any suffix: .pt, .pth, .pth.tar, .tar, .ckpt or .bin. A
            .safetensors file is read by `safetensors.numpy.load_file`.

    Returns:
        What was saved: a state dict, or a dict of several and of counts and options.

    Raises:
        ValueError: the file holds objects of other classes, which are named, or is
            damaged, or `torch.save` did not write it.

    Example:
        >>> import numpy as np, tempfile, torch
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"model": torch.ones(2), "loss": np.float64(0.5)}, file.name)
        ...     checkpoint = load_torch_checkpoint(file.name)
        >>> sorted(checkpoint)
        ['loss', 'model']
    """
    import torch

    def load():
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)

    if Path(path).is_dir():
        raise ValueError(
            f"{path}: is a folder; one of torch.distributed.checkpoint becomes a file "
            "by its format_utils.dcp_to_torch_save"
        )
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if str(path).endswith(".safetensors"):
        raise ValueError(f"{path}: use safetensors.numpy.load_file for this format")
    try:
        try:
            return load()
        except Exception as error:
            if "import" not in str(error) or "DTensor" not in str(error):
                raise
        import torch.distributed.tensor  # with it PyTorch allows DTensors

        return load()
    except Exception as error:  # damaged files raise many kinds
        if others := _other_classes(path):
            raise ValueError(
                f"{path}: holds {', '.join(others)}, whose code would have to run; if "
                "you trust its origin, load it with torch.load(path, "
                "weights_only=False) and save its state dicts alone"
            ) from error
        raise ValueError(
            f"{path}: damaged, or not written by torch.save ({type(error).__name__})"
        ) from error


def _safe_globals() -> list[Any]:
    """Classes and functions that an unpickler may call, under all of their names."""
    core = np._core.multiarray
    named = [
        (getattr(core, name), f"{module}.multiarray.{name}")
        for module in ("numpy.core", "numpy._core")  # NumPy 1 and 2
        for name in ("scalar", "_reconstruct")
    ]
    dtypes = [type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDSU"]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *named]


def _other_classes(path: str | os.PathLike) -> list[str]:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        with safe_globals(_safe_globals()):
            return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of torch.save
        return []


# ---------------------------------------------------------------------------
# what was given, and what is asked for
# ---------------------------------------------------------------------------


def check_network_state_dict(state_dict: Any) -> None:
    """Raises, in one sentence, unless this is a dict from name to array."""
    if _is_network(state_dict):
        return
    raise ValueError(
        "state_dict must be a dict from name to tensor, got "
        + _describe(state_dict, _is_network, "net.state_dict()")
    )


def as_optimizer_state_dict(state_dict: Any) -> Mapping[str, Any]:
    """The dict with `state` and `param_groups`; raises, in one sentence, otherwise.

    Undoes `flatten_optimizer_state_dict` of torch.distributed.checkpoint.
    """
    if _is_optimizer(state_dict):
        if tensors := [
            type(x).__name__
            for group in state_dict["param_groups"]
            if isinstance(group, Mapping)
            for x in group.get("params", ())
            if _is_array(x)
        ]:
            raise ValueError(
                "param_groups must be optimizer.state_dict()['param_groups'], in which "
                f"parameters are numbers, got a {tensors[0]} in a group"
            )
        return state_dict
    if _is_flat(state_dict):
        return _unflatten(state_dict)
    raise ValueError(
        "state_dict must be a dict with state and param_groups, got "
        + _describe(state_dict, _is_optimizer, "optimizer.state_dict()")
    )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_network(x: Any) -> bool:
    """Modules of libraries store what they like under `_extra_state`."""
    if not isinstance(x, Mapping) or not any(map(_is_array, x.values())):
        return False
    return all(
        isinstance(name, str)
        and (_is_array(value) or name.rpartition(".")[2] == "_extra_state")
        for name, value in x.items()
    )


def _is_optimizer(x: Any) -> bool:
    return (
        isinstance(x, Mapping)
        and isinstance(x.get("param_groups"), list | tuple)
        and isinstance(x.get("state"), Mapping)
    )


def _is_flat(x: Any) -> bool:
    starts = ("state.", "param_groups.")
    return (
        isinstance(x, Mapping)
        and any(str(key).startswith(starts[1]) for key in x)
        and all(str(key).startswith(starts) for key in x)
    )


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with equal options, which is all that is known, form a group."""
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        name, _, option = rest.rpartition(".")
        table = state if part == "state" else options
        table.setdefault(name, {})[option] = value
    groups: list[dict[str, Any]] = []
    for name, own in options.items():
        for group in groups:
            if {key: x for key, x in group.items() if key != "params"} == own:
                group["params"].append(name)
                break
        else:
            groups.append(own | {"params": [name]})
    return {"state": state, "param_groups": groups}


def _describe(x: Any, is_wanted: Callable[[Any], bool], wanted: str) -> str:
    """What x is, and which part of it, or what else, is wanted."""
    if x is None:
        return f"None: pass {wanted}"
    if hasattr(x, "named_parameters"):
        return f"the network itself ({_kind(x)}): pass {wanted}"
    if hasattr(x, "param_groups"):
        return f"the optimizer itself ({_kind(x)}): pass {wanted}"
    if isinstance(x, str | os.PathLike):
        return f"the path {x}: pass what load_torch_checkpoint reads from it"
    if isinstance(x, Mapping | list | tuple):
        if parts := _places([part for part in _parts(x) if is_wanted(part[1])]):
            is_dict = isinstance(x, Mapping)
            whole = f"a whole checkpoint ({_keys(x)})" if is_dict else f"a {_kind(x)}"
            return f"{whole}: pass its {' or '.join(parts[:4])}"
    if isinstance(x, Mapping):
        return _describe_dict(x, wanted)
    if isinstance(x, Iterator):
        return f"a {_kind(x)}, as net.named_parameters() is: pass {wanted}"
    if isinstance(x, list | tuple):
        if x and all(isinstance(y, tuple) and len(y) == 2 for y in x):
            return f"pairs, as net.named_parameters() has: pass {wanted}"
        kinds = " or ".join(sorted({_kind(y) for y in x}))
        return f"a {_kind(x)} of {len(x)} {kinds}: pass {wanted}"
    return f"an object of class {_kind(x)}: pass {wanted}"


def _describe_dict(x: Mapping, wanted: str) -> str:
    if not x:
        return f"an empty dict: pass {wanted}"
    if _is_network(x):
        return f"a network's state dict ({_keys(x)}): pass {wanted}"
    if _is_optimizer(x) or _is_flat(x):
        return f"an optimizer's state dict ({_keys(x)}): pass {wanted}"
    if any(isinstance(part, Mapping) and "hypers" in part for part in (x, *x.values())):
        return (
            "the state of fastai's own Optimizer, which does not store its groups: make"
            " a dict as PyTorch's of it (exp_avg is its grad_avg, exp_avg_sq its "
            "sqr_avg)"
        )
    others = {key: value for key, value in x.items() if not _is_array(value)}
    if 2 * len(others) <= len(x):
        others = {key: f"of class {_kind(value)}" for key, value in others.items()}
        others |= {key: "no name" for key in x if not isinstance(key, str)}
        listed = [f"{key!r} is {what}" for key, what in list(others.items())[:6]]
        return f"a dict in which {', '.join(listed)}: delete what is no tensor"
    return f"a dict of other things ({_keys(x)}): pass {wanted}"


def _kind(x: Any) -> str:
    return type(x).__name__


def _keys(x: Any) -> str:
    more = ", ..." if len(x) > 6 else ""
    return ", ".join(map(str, list(x)[:6])) + more


def _places(parts: list[tuple[str, Any]]) -> list[str]:
    """The keys of the large ones; a few tensors may be a best score or a center."""
    largest = max((len(part) for _, part in parts), default=0)
    return [place for place, part in parts if 2 * len(part) >= largest]


def _parts(x: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The state dicts in a checkpoint, each with the keys that lead to it."""
    if place and (_is_optimizer(x) or _is_flat(x) or _is_network(x)):
        yield place, x
    elif depth and isinstance(x, Mapping | list | tuple):
        items = x.items() if isinstance(x, Mapping) else enumerate(x)
        for key, value in items:
            yield from _parts(value, f"{place}[{key!r}]", depth - 1)
