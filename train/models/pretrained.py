"""Weights of `train.resnet` from files with torchvision's names, and into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.models.resnet import LAYERS, Bottleneck

NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
NAMES |= {"mean": "running_mean", "var": "running_var"}
# Where training scripts put a network among other things; averaged weights first.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# What DistributedDataParallel, torch.compile and Lightning put before all names.
PREFIXES = ("module.", "_orig_mod.", "model.")
PICKLED = (".pth", ".pth.tar", ".pt", ".bin")


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by name, floating-point ones as float32, and its metadata.

    PyTorch's own files have no metadata. Of a file of a training script only the
    network is taken, with averaged weights where it has such. No code of a file is run.

    Raises:
        ValueError: there is no such file, or it is damaged or something else.
        ImportError: it is one of PyTorch's own, which is not installed.
    """
    if not path.name.endswith((".safetensors", *PICKLED)):
        raise ValueError(
            f"{path}: the name of a file of weights must end in .safetensors or one of "
            f"{', '.join(PICKLED)}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    read_it = _read_safetensors if path.suffix == ".safetensors" else _read_pickled
    tensors, metadata = read_it(path)
    tensors.pop("n_averaged", None)  # PyTorch's count of what an average is of
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    if not tensors:
        raise ValueError(f"{path}: has no tensors")
    return tensors, metadata


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # jax has registered bfloat16 as one of NumPy's dtypes
            tensors = {name: _single(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged, or not a safetensors file: {error}"
        ) from error
    return tensors, metadata


def _read_pickled(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: only PyTorch, which is not installed, reads such a file; a "
            ".safetensors needs no PyTorch"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything at all, when the file is damaged
        raise ValueError(
            f"{path}: damaged, or with more in it than tensors, for which PyTorch "
            f"would have to run the file's code ({type(error).__name__})"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: must hold a dictionary of tensors, a state_dict, and holds a "
            f"{type(content).__name__}"
        )
    others = [key for key, x in content.items() if not isinstance(x, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path}: must hold a dictionary of tensors, a state_dict, and "
            f"{', '.join(map(repr, others))} are none"
        )
    tensors = {}
    for name, x in content.items():  # NumPy has no bfloat16
        x = x.detach()
        tensors[str(name)] = (x.float() if x.is_floating_point() else x).numpy()
    return tensors, {}


def _single(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(over="ignore"):  # `load` refuses infinity
        return x.astype(np.float32)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A .safetensors file, completely or not at all; an old one is replaced."""
    from safetensors.numpy import save

    draft = path.with_suffix(".tmp")
    # It writes memory as it lies there. (Its `save_file` makes files that others of
    # the user's group cannot read.)
    dense = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    draft.write_bytes(save(dense, metadata))
    draft.replace(path)


# ---------------------------------------------------------------------------
# networks
# ---------------------------------------------------------------------------


def load(tensors, params, stats, *, source: str, head: bool) -> tuple[Any, Any]:
    """The body, and the head if wanted, with the values of a file.

    Args:
        tensors: by torchvision's names, from `read`.
        params: {"body": ..., "head": ...}, or their shapes.
        stats: the running statistics of both, likewise.
        source: the file's name, for errors.
        head: also load the head. Otherwise it is returned as it was, and any
            classifier (`fc`) in the file is left out.

    Raises:
        ValueError: it has not exactly this network's tensors, or numbers that are not
            finite. All of them are named.
    """
    parts = ("body", "head") if head else ("body",)
    wanted = {}  # shapes, by torchvision's names and in PyTorch's layout
    for tree in (params, stats):
        for part in parts:
            for path, leaf in nnx.to_flat_state(tree[part]):
                wanted[_name(path)] = tuple(leaf.shape[i] for i in _order(leaf.shape))
    given = {
        name: x
        for name, x in tensors.items()
        if not name.endswith(".num_batches_tracked")
        and (head or not name.startswith("fc."))
    }
    problems = [
        f"missing: {name} {shape}"
        for name, shape in wanted.items()
        if name not in given
    ]
    for name, x in given.items():
        if name not in wanted:
            problems.append(f"unexpected: {name} {x.shape}")
        elif x.shape != wanted[name]:
            problems.append(f"{name} is {x.shape} and must be {wanted[name]}")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"{name} is of {x.dtype}, not floating-point")
        elif not np.isfinite(x).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        shapes = {name: x.shape for name, x in given.items()}
        lines = [f"{source} does not fit this network", *problems]
        raise ValueError("\n  ".join(lines + _hint(shapes, wanted)))

    def loaded(state):
        leaves = []
        for path, leaf in nnx.to_flat_state(state):
            x = given[_name(path)]
            x = x.transpose(np.argsort(_order(x.shape)))
            # a copy: the state may be donated, and the tensors loaded once more
            leaves.append((path, leaf.replace(jnp.array(x, leaf.dtype))))
        return nnx.from_flat_state(leaves)

    new_params, new_stats = (
        tree | {part: loaded(tree[part]) for part in parts} for tree in (params, stats)
    )
    return new_params, new_stats


def tensors_of(params, stats, steps: int) -> dict[str, np.ndarray]:
    """By torchvision's names, and all that its `load_state_dict` asks for.

    Args:
        params: {"body": ..., "head": ...}.
        stats: the running statistics of both.
        steps: that batch norm has seen.
    """
    tensors = {}
    for tree in (params, stats):
        for state in tree.values():
            for path, leaf in nnx.to_flat_state(state):
                x = np.asarray(leaf[...])
                tensors[_name(path)] = x.transpose(_order(x.shape))
                if path[-1] == "mean":
                    name = ".".join(map(str, (*path[:-1], "num_batches_tracked")))
                    tensors[name] = np.array(steps, np.int64)
    return tensors


def _name(path) -> str:
    return ".".join(map(str, (*path[:-1], NAMES[path[-1]])))


def _order(shape) -> tuple[int, ...]:
    """Of the axes: HWIO to OIHW for convolutions, a transpose for linear layers."""
    return (3, 2, 0, 1) if len(shape) == 4 else tuple(range(len(shape)))[::-1]


def _hint(given, wanted) -> list[str]:
    """What the file is, where that is obvious. Takes shapes by name."""
    if "conv1.0.weight" in given:
        return ["The file's network begins with three convolutions, this one with one"]
    file, ours = _architecture(given), _architecture(wanted)
    if file is None:
        return ["The file's names are not those of a ResNet of torchvision"]
    if file != ours:
        return [f"The file is of a {file}, this network is a {ours}"]
    in_blocks = [name for name in wanted if name.startswith("layer")]
    if any(given.get(name, wanted[name]) != wanted[name] for name in in_blocks):
        return ["The file may be of a ResNeXt or a wide ResNet, which are not here"]
    return []


def _architecture(shapes) -> str | None:
    bottleneck = "layer1.0.conv3.weight" in shapes
    counts = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    )
    for name, (block, blocks) in LAYERS.items():
        if (block is Bottleneck, blocks) == (bottleneck, counts):
            if "conv1.weight" in shapes:
                return f"{name} of width {shapes['conv1.weight'][0]}"
    return None
