"""ResNets of four blocks, and the model files of such networks, for fast tests."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import classifier, resnet
from train.references import resnet as torch_resnet

BLOCKS = (1, 1, 1, 1)  # one at each resolution


@contextlib.contextmanager
def shallow_resnets():
    """Shortens ResNet-18 and ResNet-50, in PyTorch too; XLA optimizes little."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("resnet18", "resnet50"):
            for layers in (resnet.LAYERS, torch_resnet.LAYERS):
                block, _ = layers[name]
                patch.setitem(layers, name, (block, BLOCKS))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def write_model(path: Path, classes: tuple[str, ...]) -> Path:
    """Writes a model with random weights and statistics, after 12 steps."""
    network = classifier.make_network("resnet18", 4, "float32", len(classes))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), shapes
    )
    options = {"architecture": "resnet18", "width": 4, "size": 32}
    classifier.save_model(path, params, stats, classes=classes, steps=12, **options)
    return path
