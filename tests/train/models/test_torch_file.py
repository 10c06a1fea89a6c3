"""PyTorch's older files, written by PyTorch and read without it."""

import numpy as np
import pytest
import torch

from train.models import torch_file


def save(content, path, new=False):
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path


def test_it_reads_what_pytorch_wrote(tmp_path):
    """Strides, offsets, shared storages, scalars, and a module's metadata."""
    x = torch.arange(24.0).reshape(4, 6)
    net = torch.nn.BatchNorm1d(3)
    contents = [
        {"x": x, "view": x[1:3, 2:].T, "count": torch.tensor(7), "empty": x[:0]},
        {"half": x.half(), "double": x.double(), "int": x.int()},
        net.state_dict(),
    ]
    for content in contents:
        path = save(content, tmp_path / "old.pth")
        assert torch_file.is_older_format(path)
        tensors = torch_file.read(path)
        assert list(tensors) == list(content)
        for name, expected in content.items():
            assert tensors[name].dtype == expected.numpy().dtype
            np.testing.assert_array_equal(tensors[name], expected.numpy())


def test_other_formats_are_told_apart(tmp_path):
    (tmp_path / "text.pth").write_bytes(b"hello")
    assert not torch_file.is_older_format(tmp_path / "text.pth")
    assert not torch_file.is_older_format(save({}, tmp_path / "new.pth", new=True))


def test_damaged_files_and_code_are_refused(tmp_path):
    path = save({"x": torch.ones(300)}, tmp_path / "x.pth")
    whole = path.read_bytes()
    for length in (20, 200, len(whole) - 4):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.pth: damaged, or not a state_dict"):
            torch_file.read(path)
    for content, message in (
        (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear"),
        ({"x": torch.ones(2), "epoch": 3}, "damaged, or not a state_dict"),
        ([torch.ones(2)], "damaged, or not a state_dict"),
    ):
        with pytest.raises(ValueError, match=message):
            torch_file.read(save(content, path))
