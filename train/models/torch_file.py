"""Reads the older of PyTorch's two file formats without PyTorch.

The extra `pretrained` has its weights in such a file, and PyTorch is a large package to
read one file with.
"""

import collections
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):  # the arguments of PyTorch's function for it
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries and tensors; runs no code of the file or of other packages."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in DTYPES:
            return np.dtype(DTYPES[name])
        raise pickle.UnpicklingError(f"holds {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(key, dtype)


def is_older_format(path: Path) -> bool:
    """Whether the file starts as `torch.save` did before PyTorch 1.6."""
    with path.open("rb") as file:
        return file.read(15) == pickle.dumps(MAGIC, 2)[:15]


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state_dict by name.

    Raises:
        ValueError: the file is damaged, or has something else than a state_dict.
    """
    try:
        with path.open("rb") as file:
            magic, *_, content, keys = (_Unpickler(file).load() for _ in range(5))
            if magic != MAGIC:
                raise ValueError("of another format")
            dtypes = {x.storage.key: x.storage.dtype for x in content.values()}
            storages = {}
            for key in keys:
                (size,) = np.fromfile(file, "<i8", 1)
                storages[key] = np.fromfile(file, dtypes[key], size)
                if len(storages[key]) != size:
                    raise ValueError("it ends too early")
        return {name: _array(x, storages[x.storage.key]) for name, x in content.items()}
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(
            f"{path}: damaged, or not a state_dict of torch.save: {error}"
        ) from error


def _array(x: _Tensor, storage: np.ndarray) -> np.ndarray:
    size = x.storage.dtype.itemsize
    strides = [size * n for n in x.strides]
    return np.ndarray(x.shape, x.storage.dtype, storage, size * x.offset, strides)
