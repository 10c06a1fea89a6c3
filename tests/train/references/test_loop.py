"""The PyTorch loop trains the same runs and the same networks."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from comparison_runs import TINY, build, train_two
from flax import nnx

import adamw_jax
from train.data import batches, digits
from train.models.small import CNN
from train.recipes import compare as recipe
from train.references import loop

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")


@pytest.mark.parametrize(
    "names",
    [
        ("sgd", "amsgradw"),
        pytest.param(tuple(recipe.OPTIMIZERS), marks=pytest.mark.slow),
    ],
)
def test_it_trains_the_same_runs(names, monkeypatch):
    optimizers = {name: recipe.OPTIMIZERS[name] for name in names}
    monkeypatch.setattr(recipe, "OPTIMIZERS", optimizers)
    for kind in ("adam", "adamw", "amsgrad"):
        as_torch = functools.partial(getattr(adamw_jax, kind), bias_correction="torch")
        monkeypatch.setattr(recipe, kind, as_torch)
    splits = digits.load_digits(400)
    config = dataclasses.replace(TINY, train_size=400, batch_size=50)
    x, test_x = (batches.normalise(part.x) for part in (splits.train, splits.test))
    program = build(config)
    for name in names:
        run, results = train_two(
            program, config, name, splits, [0.05, 0.05], [0.1, 0.1]
        )
        sample = loop.time_run(
            name, run, recipe.make_schedule(config), x, test_x, splits.test.y
        )
        assert sample["seconds"] > 0
        assert sample["accuracy"] == pytest.approx(results[0, -1, 0], abs=0.3)


def test_it_has_the_same_convolutional_network():
    net = CNN(4, rngs=nnx.Rngs(0))
    _, params, _ = nnx.split(net, nnx.Param, nnx.BatchStat)
    twin = loop.make_network(jax.tree.map(np.asarray, params))
    x = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(x)).numpy()
    ours = nnx.jit(nnx.view(net, use_running_average=False))(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
