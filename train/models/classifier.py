"""A classifier of pictures: body and head, its model files, and its predictions."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import lax
from PIL import Image

from train.data import augment
from train.evals.classify import mean_of_views
from train.models import efficientnet, pretrained, resnet
from train.models.efficientnet import EfficientNetLite0
from train.models.resnet import Head, ResNet

EFFICIENTNET = "efficientnet_lite0"
ARCHITECTURES = (*resnet.LAYERS, EFFICIENTNET)

# ---------------------------------------------------------------------------
# the network
# ---------------------------------------------------------------------------


class Network(NamedTuple):
    body: Any  # graphdefs
    head: Any
    init: Any  # key -> params, stats; both {"body": ..., "head": ...}
    mean: np.ndarray  # of pixels in [0, 1], float32 [3]
    std: np.ndarray

    def logits(self, params, stats, pixels, *, frozen=False, train=False, key=None):
        """Returns logits and the new running statistics.

        Args:
            params: of body and head.
            stats: running statistics of both.
            pixels: (n, size, size, 3) uint8.
            frozen: evaluate the body with its running statistics, without gradients.
            train: whether batch norm and dropout are in training mode.
            key: for dropout, and for the blocks that EfficientNet drops.
        """
        body = nnx.merge(self.body, params["body"], stats["body"], copy=True)
        head = nnx.merge(self.head, params["head"], stats["head"], copy=True)
        # the head's dropout splits the key into what fold_in makes of 0 and 1
        body_key = None if key is None else jax.random.fold_in(key, 2)
        x = augment.normalise(pixels, self.mean, self.std)
        maps = body(x, train=train and not frozen, key=body_key)
        logits = head(lax.stop_gradient(maps) if frozen else maps, train=train, key=key)
        new_stats = {
            "body": nnx.state(body, nnx.BatchStat),
            "head": nnx.state(head, nnx.BatchStat),
        }
        return logits, new_stats


def make_network(architecture: str, width: int, dtype: Any, classes: int) -> Network:
    def modules(key):
        body_key, head_key = jax.random.split(key)
        rngs, name = nnx.Rngs(body_key), "fc"
        if architecture == EFFICIENTNET:
            body, name = EfficientNetLite0(width, dtype=dtype, rngs=rngs), "_fc"
        else:
            body = ResNet(architecture, width, dtype=dtype, rngs=rngs)
        return body, Head(body.features, classes, name=name, rngs=nnx.Rngs(head_key))

    def init(key):
        params, stats = {}, {}
        for name, module in zip(("body", "head"), modules(key), strict=True):
            _, params[name], stats[name] = nnx.split(module, nnx.Param, nnx.BatchStat)
        return params, stats

    body, head = nnx.eval_shape(lambda: modules(jax.random.key(0)))
    graphs = nnx.graphdef(body), nnx.graphdef(head)
    return Network(*graphs, init, *normalisation(architecture))


def normalisation(architecture: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that the pretrained body expects, per channel."""
    if architecture == EFFICIENTNET:
        return efficientnet.MEAN, efficientnet.STD
    return augment.MEAN, augment.STD


# ---------------------------------------------------------------------------
# model files
# ---------------------------------------------------------------------------


class Model(NamedTuple):
    classes: tuple[str, ...]
    size: int  # side of the images
    log_probs: Any  # (n, size, size, 3) uint8 -> (n, classes)


def save_model(
    path: Path,
    params: Any,
    stats: Any,
    *,
    architecture: str,
    width: int,
    size: int,
    classes: tuple[str, ...],
    steps: int,
) -> None:
    """Writes a .safetensors file with the names of torchvision, or the publisher's."""
    mean, std = normalisation(architecture)
    metadata = {
        "format": "pt",
        "architecture": architecture,
        "width": str(width),
        "size": str(size),
        "classes": json.dumps(classes),
        "mean": json.dumps(mean.tolist()),  # of pixels in [0, 1]
        "std": json.dumps(std.tolist()),
    }
    pretrained.write(path, pretrained.to_tensors(params, stats, steps), metadata)


def load_model(path: Path) -> Model:
    """Reads a file of `save_model`.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    tensors, metadata = pretrained.read(path)
    try:
        classes = tuple(json.loads(metadata["classes"]))
        architecture, width = metadata["architecture"], int(metadata["width"])
        size = int(metadata["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {path} was not written by train.cars: its metadata lack {error}"
        ) from error
    network = make_network(architecture, width, "float32", len(classes))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params, stats = pretrained.load(tensors, *shapes, source=str(path), head=True)

    @jax.jit
    def log_probs(params, stats, pixels):
        return jax.nn.log_softmax(network.logits(params, stats, pixels)[0])

    return Model(classes, size, functools.partial(log_probs, params, stats))


def newest_model(out: Path) -> Path:
    """The model of the run in `out` that was written last."""
    paths = sorted(out.glob("*/model-*.safetensors"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise ValueError(
            f"model: no model in {out}; train one with train.cars, or pass --model FILE"
        )
    return paths[-1]


def class_probabilities(
    model: Model, image: Image.Image, views: int = 0, seed: int = 0
) -> np.ndarray:
    """(classes,) float64: the mean over the plain view and augmented ones."""
    rng = np.random.default_rng(seed)
    pixels = [augment.plain_view(image, model.size)]
    pixels += [augment.train_view(image, rng, model.size) for _ in range(views)]
    log_probs = np.asarray(model.log_probs(np.stack(pixels)), np.float64)
    return np.exp(mean_of_views(list(log_probs)))
