"""Model files: against PyTorch, the newest one, and files of another kind."""

import json
import os

import numpy as np
import pytest
import torch
from shallow_resnet import shallow_resnets, write_model

from train.models import classifier, pretrained
from train.references.resnet import ResNet as TorchResNet

pytestmark = pytest.mark.usefixtures("lenient")

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    with shallow_resnets():
        yield


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "run").mkdir()
    return write_model(tmp_path / "run" / "model-0.safetensors", CLASSES)


def test_the_file_gives_pytorch_the_same_predictions(model_file):
    """With the normalisation in the file's metadata."""
    tensors, metadata = pretrained.read(model_file)
    theirs = TorchResNet("resnet18", 4, classes=3)
    theirs.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()})
    theirs.eval()
    x = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    mean, std = (np.array(json.loads(metadata[k]), np.float32) for k in ("mean", "std"))
    pixels = torch.tensor(((x / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    expected = torch.log_softmax(theirs(pixels), 1).detach().numpy()
    model = classifier.load_model(model_file)
    assert (model.classes, model.size) == (CLASSES, 32)
    np.testing.assert_allclose(model.log_probs(x), expected, rtol=1e-4, atol=1e-4)
    assert tensors["bn1.num_batches_tracked"] == 12


def test_newest_model(model_file):
    out = model_file.parent.parent
    newest = out / "newest" / "model-3.safetensors"
    newest.parent.mkdir()
    newest.write_bytes(model_file.read_bytes())
    os.utime(newest, (2e9, 2e9))
    assert classifier.newest_model(out) == newest
    with pytest.raises(ValueError, match="model: no model in"):
        classifier.newest_model(newest)


def test_a_file_of_another_kind(tmp_path):
    torch.save(TorchResNet("resnet18", 4).state_dict(), tmp_path / "body.pth")
    with pytest.raises(ValueError, match="was not written by train.cars"):
        classifier.load_model(tmp_path / "body.pth")
