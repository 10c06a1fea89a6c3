"""Moments in eight bits at the border: those of bitsandbytes, and ours.

bitsandbytes stores a moment as codes, indices into a table of 256 values, with the
largest magnitude of each block of consecutive elements. A state dict of its Adam is
decoded into the one that PyTorch's AdamW would have, and back.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import find_states
from ..wrappers.eight_bit import (
    Blocks,
    QuantizedMomentsState,
    decode_moments,
    encode_like,
)

# From bitsandbytes' numbers of the moments to PyTorch's names.
_NAMES = {"1": "exp_avg", "2": "exp_avg_sq"}
# Where its newer versions put the tensors that FSDP must not gather.
_WRAPPED = "__bnb_optimizer_quant_state__"
_FIELDS = ("state", "qmap", "absmax", "max", "new_max")
_KNOWN = {"step", *(field + number for field in _FIELDS for number in _NAMES)}
_BLOCK_SIZES = (256, 2048)  # newer versions (0.44.1, 0.50.2), older ones (0.41.3)

# Options of its groups that only AdEMAMix uses.
_ADEMAMIX_OPTIONS = ("alpha", "t_alpha", "t_beta3")
_TORCH_OPTIONS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


def is_bitsandbytes(entry: Any) -> bool:
    """Whether the state of a parameter is one of bitsandbytes."""
    return isinstance(entry, Mapping) and ("state1" in entry or _WRAPPED in entry)


def decode_bitsandbytes(state_dict: Any) -> Any:
    """Makes PyTorch's state dict of one of bitsandbytes' Adam; others are returned.

    Raises ValueError, with all parameters that are not Adam's.
    """
    states = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    states = states if isinstance(states, Mapping) else {}
    if not any(map(is_bitsandbytes, states.values())):
        return state_dict
    problems: list[str] = []
    groups = [_decode_group(group, problems) for group in state_dict["param_groups"]]
    decoded = {number: _decode(states[number], number, problems) for number in states}
    if problems:
        lines = "\n  ".join(["bitsandbytes' optimizer state does not fit:", *problems])
        raise ValueError(lines)
    return {**state_dict, "state": decoded, "param_groups": groups}


def _decode_group(group: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    used = [name for name in _ADEMAMIX_OPTIONS if group.get(name)]
    if used or len(group.get("betas", ())) > 2:
        problems.append(
            f"group of {list(group['params'])}: {', '.join(used) or 'a third beta'} is "
            "AdEMAMix's; only Adam and AdamW are converted"
        )
    new = {name: group[name] for name in group if name not in _ADEMAMIX_OPTIONS}
    return new | _TORCH_OPTIONS  # the decay of its Adam is decoupled too


def _decode(entry: Any, number: Any, problems: list[str]) -> Any:
    """The state of one parameter, as PyTorch's AdamW has it."""
    entry = {**entry, **entry.get(_WRAPPED, {})}
    entry.pop(_WRAPPED, None)
    if not entry:
        return {}
    try:
        _check_entry(entry)
        return {"step": entry["step"]} | {
            name: _decode_moment(entry, i) for i, name in _NAMES.items()
        }
    except ValueError as error:
        problems.append(f"parameter {number}: {error}")
        return {}


def _check_entry(entry: Mapping[str, Any]) -> None:
    if "unorm_vec" in entry:
        raise ValueError(
            "unorm_vec is LAMB's or LARS's; only Adam's state is converted"
        )
    if "gnorm_vec" in entry:
        raise ValueError(
            "gnorm_vec is of percentile_clipping, which has no counterpart here: "
            "delete it to continue without"
        )
    if unknown := [name for name in entry if name not in _KNOWN]:
        raise ValueError(f"{', '.join(unknown)} is not in the state of its Adam")
    if "state1" not in entry or "state2" not in entry or "step" not in entry:
        raise ValueError(
            f"Adam has step, state1 and state2, but the state has {', '.join(entry)} "
            "(of SGD, Lion, RMSprop or Adagrad, whose states look the same)"
        )


def _decode_moment(entry: Mapping[str, Any], number: str) -> np.ndarray:
    codes = _to_numpy(entry["state" + number])
    if not codes.flags.c_contiguous:
        raise ValueError(
            f"state{number} is not contiguous (channels_last), and bitsandbytes' "
            "versions differ in the order of its elements"
        )
    if codes.dtype == np.float32:  # of few elements, or of 32 bits
        return codes
    if codes.dtype != np.uint8:
        raise ValueError(f"state{number} must be uint8 or float32, got {codes.dtype}")
    by_block = f"max{number}" not in entry  # which is there with block_wise=False
    names = f"qmap{number}", f"absmax{number}" if by_block else f"max{number}"
    if missing := [name for name in names if name not in entry]:
        raise ValueError(f"state{number} needs {' and '.join(missing)}")
    table, scale = (_to_numpy(entry[name]) for name in names)
    if table.shape != (256,):
        raise ValueError(f"qmap{number} must have 256 values, got {table.shape}")
    if by_block:
        sizes = [n for n in _BLOCK_SIZES if math.ceil(codes.size / n) == scale.size]
        if scale.ndim != 1 or not sizes:
            raise ValueError(
                f"absmax{number} must have one value for each {_BLOCK_SIZES[0]} or "
                f"{_BLOCK_SIZES[1]} of the {codes.size} elements, got {scale.shape}"
            )
        scale = np.repeat(scale, sizes[0])[: codes.size]
    return (table[codes.ravel()] * scale).astype(np.float32).reshape(codes.shape)


def encode_bitsandbytes(
    state_dict: Mapping[str, Any], *, min_8bit_size: int = 4096
) -> dict[str, Any]:
    """Makes the state dict of bitsandbytes' AdamW8bit of one of PyTorch's AdamW.

    The moments are rounded to the nearest of bitsandbytes' codes, in blocks of 256
    (bitsandbytes 0.44.1 and later). Positive second moments never become zero.
    :func:`from_torch_state_dict` and :func:`optimizer_from_torch_state_dict` read
    bitsandbytes' state dicts as they are.

    Args:
        state_dict: `to_torch_state_dict(...)` with the groups of PyTorch's AdamW, or of
            its Adam without weight decay; or the state dict of such an optimizer.
        min_8bit_size: parameters with fewer elements keep float32 moments. Must be that
            of bitsandbytes' optimizer.

    Returns:
        A dict that `AdamW8bit(...).load_state_dict` accepts (needs PyTorch).

    Raises:
        ValueError: the optimizer is another one: the message names the group's option
            or the parameter's moment that bitsandbytes' Adam does not have.

    Example:
        >>> import torch
        >>> weights = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = torch.optim.AdamW([weights])
        >>> weights.sum().backward()
        >>> optimizer.step()
        >>> entry = encode_bitsandbytes(optimizer.state_dict())["state"][0]
        >>> print(entry["state1"].dtype, entry["absmax1"].shape, entry["step"])
        torch.uint8 torch.Size([16]) 1
    """
    groups = [_encode_group(group) for group in state_dict["param_groups"]]
    states = {
        number: _encode(entry, number, min_8bit_size)
        for number, entry in state_dict["state"].items()
    }
    return {"state": states, "param_groups": groups}


def _encode_group(group: Mapping[str, Any]) -> dict[str, Any]:
    allowed = {
        "amsgrad": not group.get("amsgrad"),
        "maximize": not group.get("maximize"),
        "weight_decay": not group.get("weight_decay")
        or group.get("decoupled_weight_decay", True),
        "betas": len(group.get("betas", ())) == 2,
    }
    for name, is_allowed in allowed.items():
        if not is_allowed:
            raise ValueError(
                "state_dict must be that of AdamW, the only Adam of bitsandbytes, got "
                f"a group with {name}={group.get(name)!r}"
            )
    dropped = {*_TORCH_OPTIONS, "foreach", "fused", "capturable", "differentiable"}
    new = {name: value for name, value in group.items() if name not in dropped}
    return new | {"alpha": 0.0, "t_alpha": None, "t_beta3": None}


def _encode(entry: Mapping[str, Any], number: Any, min_8bit_size: int) -> dict:
    import torch

    if not entry:  # no gradient yet
        return {}
    if set(entry) - {"step"} != set(_NAMES.values()):
        raise ValueError(
            f"parameter {number} must have exp_avg and exp_avg_sq, got "
            f"{', '.join(entry)}"
        )
    new: dict[str, Any] = {"step": int(_to_numpy(entry["step"]))}
    for i, name in _NAMES.items():
        x = _to_numpy(entry[name]).astype(np.float32)
        arrays = {"state": x} if x.size < min_8bit_size else _encode_moment(x, i == "1")
        for field, array in arrays.items():
            new[field + i] = torch.from_numpy(np.array(array, order="C"))
    return new


def _encode_moment(x: np.ndarray, signed: bool) -> dict[str, np.ndarray]:
    table, size = _dynamic_map(signed), _BLOCK_SIZES[0]
    blocks = np.pad(x.ravel(), (0, -x.size % size)).reshape(-1, size)
    scale = np.abs(blocks).max(1)
    y = blocks / np.where(scale > 0, scale, 1)[:, None]
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, y)
    if not signed:
        codes = np.maximum(codes, blocks > 0)
    codes = codes.astype(np.uint8).ravel()[: x.size].reshape(x.shape)
    return {"state": codes, "qmap": table, "absmax": scale}


def _dynamic_map(signed: bool) -> np.ndarray:
    """The values of bitsandbytes' codes: a decade has half as many as the next one."""
    values = [np.array([0.0, 1.0])]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values)).astype(np.float32)


def _to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


# ---------------------------------------------------------------------------
# our own states
# ---------------------------------------------------------------------------


def decode_blocks(state: Any) -> Any:
    """Replaces each state of `quantize_moments` by that of its inner optimizer."""
    if not find_states(state, QuantizedMomentsState):
        return state

    def decode(x):
        is_quantized = isinstance(x, QuantizedMomentsState)
        return decode_moments(x.inner_state) if is_quantized else x

    return jax.tree.map(decode, state, is_leaf=_is_quantized)


def encode_blocks(state: Any, like: Any, step: int) -> Any:
    """The inverse of `decode_blocks`, rounded to nearest; `step` updates are done."""

    def encode(old, new):
        if not isinstance(old, QuantizedMomentsState):
            return new
        inner_state = jax.tree.map(
            _quantize_like,
            old.inner_state,
            new,
            is_leaf=lambda x: isinstance(x, Blocks),
        )
        count = jax.tree.map(lambda x: jnp.asarray(step, x.dtype), old.count)
        return old._replace(inner_state=inner_state, count=count)

    return jax.tree.map(encode, like, state, is_leaf=_is_quantized)


def _quantize_like(old: Any, new: Any) -> Any:
    if not isinstance(old, Blocks):
        return new
    leaves, structure = jax.tree.flatten(old)  # with the Variables of nnx.Optimizer
    arrays = encode_like(Blocks(*leaves), new)
    placed = [
        jax.device_put(x, y.sharding) if getattr(y, "committed", False) else x
        for x, y in zip(arrays, leaves, strict=True)
    ]
    return structure.unflatten(placed)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedMomentsState)
