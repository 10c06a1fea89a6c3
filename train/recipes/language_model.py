"""The article's language models: settings, network, optimizer, one training step.

Where this differs from the article's code: beta1's bias correction is exact (PyTorch's
is not when beta1 cycles), epsilon is added to the corrected root, and no chunk is
longer than the first.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from adamw_jax import (
    Phase,
    Phases,
    apply_updates,
    clip_by_global_norm,
    one_cycle_plateau,
)
from train.data import chunks
from train.evals import neural_cache, perplexity
from train.models import awd
from train.recipes.check import check_options
from train.recipes.optimizer import (
    ADAMS,
    adapt_schedule,
    check_optimizer,
    make_optimizer,
    optimizer_rules,
)
from train.recipes.text_size import small_settings
from train.run import devices

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The hyperparameters of a model and its training."""

    model: Literal["lstm", "qrnn"] = "lstm"  # also as the first word, without --model
    # the optimizer and its hyperparameters; adam-l2 is the article's
    recipe: Literal["adam-l2", "adamw", "amsgrad-l2", "amsgradw", "salesforce"] = (
        "adam-l2"
    )

    embedding: int = 400  # width of the embedding and of the last layer
    width: int = 1150  # of the other layers
    layers: int = 3  # in total
    # of matrix products; float32 at the device's precision: GPUs round to TF32
    dtype: Literal["float32", "bfloat16"] = "float32"
    cudnn: bool = False  # run LSTM layers with cuDNN, on one NVIDIA GPU
    words_dropout: float = 0.1  # share of the vocabulary dropped from a batch's input
    input_dropout: float = 0.6  # of the embedded words
    hidden_dropout: float = 0.2  # between layers
    output_dropout: float = 0.4  # after the last layer
    weight_dropout: float = 0.5  # of recurrent kernels; QRNN: of all layer kernels
    alpha: float = 3.0  # factor of AR, the mean square of the last layer's output
    beta: float = 1.5  # factor of TAR, the mean square of its change per token
    ar: Literal["raw", "dropped"] = "raw"  # output for AR; dropped: Salesforce's

    optimizer: str = "adam"  # from adamw_jax, or an import path: optax.lion
    learning_rate: float = 5e-3  # the highest
    weight_decay: float = 0.0  # decoupled, times the learning rate
    l2: float = 1.2e-6  # added to the gradient
    b2: float = 0.99  # of our Adam, AdamW and AMSGrad; others: optimizer_args
    # further arguments of the optimizer, such as: eps 1e-6
    optimizer_args: dict[str, float] = dataclasses.field(default_factory=dict)
    clip: float = 0.12  # maximum global norm of the gradient
    schedule: Literal["plateau", "constant"] = "plateau"  # plateau: four phases
    div: float = 10.0  # highest learning rate over the first one
    pct: float = 1 / 12  # share of the epochs in the first and in the last phase
    b1: tuple[float, float] = (0.8, 0.7)  # high and low, of ours; momentum of SGD
    average_after: int | None = None  # NT-ASGD: epochs without a new best; None: off
    epochs: int = 90  # passes over the text
    batch_size: int = 100  # columns of the text
    bptt: int = 70  # usual length of a chunk, in tokens
    # article: an epoch's first chunk has bptt + 25 tokens and its end is left out;
    # salesforce: all lengths are random
    chunks: Literal["article", "salesforce"] = "article"
    scale_by_length: bool = False  # multiply a step by its chunk's length over bptt
    lengths: int = 6  # to which chunks are padded; each compiles one program

    theta: float = neural_cache.THETA  # how sharply the cache prefers near states
    lambda_: float = neural_cache.LAMBDA  # the cache's share of a probability
    window: int = neural_cache.WINDOW  # tokens in the cache
    # where the cache is used: from the second token on, or once its window is full
    pointer: Literal["article", "salesforce"] = "article"


# The article tried AMSGrad and decoupled decay, but gives no hyperparameters for them.
RECIPES: dict[str, dict[str, Any]] = {
    "adam-l2": {},
    "adamw": {"optimizer": "adamw", "l2": 0.0, "weight_decay": 0.03},
    "amsgrad-l2": {"optimizer": "amsgrad"},
    "amsgradw": {"optimizer": "amsgrad", "l2": 0.0, "weight_decay": 0.03},
    "salesforce": {
        **{"optimizer": "sgd", "learning_rate": 30.0, "b1": (0.0, 0.0), "clip": 0.25},
        **{"schedule": "constant", "average_after": 5, "scale_by_length": True},
        **{"chunks": "salesforce", "ar": "dropped", "alpha": 2.0, "beta": 1.0},
        **{"input_dropout": 0.65, "batch_size": 80, "epochs": 750},
        **{"l2": 1.2e-6, "pointer": "salesforce"},
    },
}
QRNN: dict[str, Any] = {
    **{"width": 1550, "layers": 4, "input_dropout": 0.4, "weight_dropout": 0.1},
    **{"alpha": 2.0, "beta": 1.0},
}
PUBLISHED = {  # validation and test perplexity, without the cache and with it
    ("lstm", "adam-l2"): ((68.7, 65.5), (52.9, 50.9)),
    ("qrnn", "adam-l2"): ((69.6, 66.7), (53.6, 51.7)),
    ("lstm", "salesforce"): ((68.7, 65.6), None),
    ("qrnn", "salesforce"): ((69.3, 66.8), None),
}
WIKITEXT2_TOKENS = [2_088_628, 217_646, 245_569]  # train, validation, test


def defaults(
    model: Any = "lstm",
    recipe: Any = "adam-l2",
    small: bool = True,
    tokens: int | None = None,
) -> Config:
    """The settings of a recipe.

    Args:
        model: lstm or qrnn.
        recipe: one of `RECIPES`.
        small: for a small text, on a CPU. False: the article's.
        tokens: to train on, of a small text; None: as Python's documentation has.
    """
    settings = RECIPES[recipe]
    if model == "qrnn":
        settings = settings | QRNN
        if recipe == "salesforce":
            settings |= {"batch_size": 40, "epochs": 500}
        elif settings.get("l2", 1):
            settings |= {"l2": 1e-6}
    if small:
        settings = settings | small_settings(tokens, model, recipe)
    return Config(model=model, recipe=recipe, **settings)


def check(c: Config) -> None:
    """Raises a ValueError for the first setting that is out of its range."""
    choices = {
        field.name: get_args(field.type)
        for field in dataclasses.fields(Config)
        if get_origin(field.type) is Literal
    }
    rates = [f"{name}_dropout" for name in ("words", "input", "hidden", "output")]
    counts = ("embedding", "width", "layers", "epochs", "lengths", "window")
    others = optimizer_rules(c)
    rules = {
        **{
            name: (0 <= getattr(c, name) < 1, "in [0, 1)")
            for name in (*rates, "weight_dropout")
        },
        **{
            name: (getattr(c, name) in allowed, f"one of {', '.join(allowed)}")
            for name, allowed in choices.items()
        },
        **{name: (getattr(c, name) >= 1, "at least 1") for name in counts},
        **{name: (getattr(c, name) >= 0, "at least 0") for name in ("alpha", "beta")},
        "clip": (c.clip > 0, "above 0"),
        "theta": (0 <= c.theta < np.inf, "at least 0 and finite"),
        "lambda_": (0 <= c.lambda_ <= 1, "in [0, 1]"),
        **others,
        "b1": (others["b1"][0] or c.b1 == (0.0, 0.0), others["b1"][1]),
        "cudnn": (
            not c.cudnn
            or (jax.default_backend(), jax.device_count(), c.model, c.dtype)
            == ("gpu", 1, "lstm", "float32"),
            "False, except for a float32 LSTM on a single NVIDIA GPU",
        ),
        "average_after": (
            c.average_after is None or c.average_after >= 1,
            "None or at least 1",
        ),
        "batch_size": (
            c.batch_size >= 1 and c.batch_size % jax.device_count() == 0,
            f"a multiple of the {jax.device_count()} devices",
        ),
    }
    check_options(c, rules)


# ---------------------------------------------------------------------------
# network and schedule
# ---------------------------------------------------------------------------


def make_network(config: Config, words: int, seed) -> awd.AWD:
    return awd.AWD(
        words,
        config.embedding,
        config.width,
        config.layers,
        kind=config.model,
        cudnn=config.cudnn,
        dtype=None if config.dtype == "float32" else jnp.dtype(config.dtype),
        rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 0)),
    )


def dropout_rates(config: Config) -> awd.Rates:
    return awd.Rates(
        config.words_dropout,
        config.input_dropout,
        config.hidden_dropout,
        config.output_dropout,
        config.weight_dropout,
    )


def make_schedule(config: Config, steps_per_epoch: int) -> Phases:
    """Learning rate, b1 and b2 at every step."""
    b2 = config.b2 if config.optimizer in ADAMS else None
    if config.schedule == "constant":
        b1 = config.b1[0] or (0.0 if config.optimizer in ADAMS else None)
        constant = Phase(
            epochs=config.epochs, learning_rate=config.learning_rate, b1=b1, b2=b2
        )
        schedule = Phases([constant], steps_per_epoch)
    else:
        schedule = one_cycle_plateau(
            config.learning_rate,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            div=config.div,
            pct=config.pct,
            b1=config.b1,
            b2=b2,
        )
    return adapt_schedule(config, schedule)


# ---------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------


def loss_fn(config: Config, net: awd.AWD, hidden, x, y, length, key):
    """The loss of a chunk: tokens `x` and targets `y`, padded beyond `length`.

    Returns:
        The loss with penalties; (the loss without them, the next hidden state).
    """
    # Rows of logits that are in memory at once; on a CPU, what its caches hold.
    logit_rows = 256 if jax.default_backend() == "cpu" else 2048
    masks = awd.draw_masks(key, net, dropout_rates(config), config.batch_size)
    out = net(x, hidden, masks, length)
    valid = jnp.arange(len(x))[:, None] < length
    tokens = jnp.asarray(length * config.batch_size, out.raw.dtype)
    weights = jnp.where(valid, 1 / tokens, 0)
    loss = awd.cross_entropy(
        out.dropped,
        net.embedding[...],
        net.bias[...],
        y,
        jnp.broadcast_to(weights, y.shape),
        max(1, logit_rows // config.batch_size),
        net.dtype,
    )
    penalties = awd.activation_penalties(
        out.raw,
        length,
        config.alpha,
        config.beta,
        None if config.ar == "raw" else out.dropped,
    )
    return loss + penalties, (loss, out.state)


# ---------------------------------------------------------------------------
# averaging: NT-ASGD
# ---------------------------------------------------------------------------


class State(NamedTuple):
    step: jax.Array  # int32 []
    params: Any
    opt: optax.OptState
    hidden: Any  # of the layers, carried from chunk to chunk
    sums: jax.Array  # [3], of the epoch: tokens, their loss, their loss with penalties
    average: Any  # of the parameters; None unless config.average_after
    averaged: jax.Array  # int32 []: steps in the average; -1: not started


def start_averaging(config: Config, state: State, losses: list[float]) -> State:
    """Starts the average once the validation loss stops improving.

    Args:
        config: with `average_after`, the epochs without a new best.
        state: at the end of an epoch.
        losses: validation losses of all epochs so far, the last one's included.
    """
    if config.average_after is None or int(state.averaged) >= 0:
        return state
    *earlier, last = losses
    if last > min(earlier[: -config.average_after], default=np.inf):
        return state._replace(averaged=jnp.zeros_like(state.averaged))
    return state


def update_average(config: Config, state: State, params) -> tuple[Any, jax.Array]:
    """The running mean of the parameters and the number of steps in it."""
    if not config.average_after:
        return state.average, state.averaged
    averaged = state.averaged + (state.averaged >= 0).astype(jnp.int32)
    share = 1 / jnp.maximum(averaged, 1).astype(jnp.float32)
    average = jax.tree.map(lambda a, p: a + share * (p - a), state.average, params)
    return average, averaged


def evaluation_params(state: State):
    """The average, once it has started."""
    return state.average if int(state.averaged) > 0 else state.params


# ---------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------


class Programs(NamedTuple):
    schedule: Phases
    net: awd.AWD  # with shapes in place of arrays
    init: Any  # seed -> state
    train: Any  # state, columns, chunk table, first, stop, seed -> state, losses
    read: Any  # params, state, tokens, targets -> perplexity.Segment, state
    quick_read: Any  # the same in fewer passes, right to four digits or more


def build(config: Config, words: int, rows: int) -> Programs:
    """The functions to compile, for padded columns of `rows` rows."""
    steps = [
        len(chunks.chunk_table(rows, config.bptt, 0, epoch, config.chunks))
        for epoch in range(10)
    ]
    schedule = make_schedule(config, round(np.mean(steps)))
    clip = clip_by_global_norm(config.clip, eps=1e-6)  # as PyTorch's
    tx = optax.chain(clip, make_optimizer(config, schedule))
    net = nnx.eval_shape(lambda: make_network(config, words, 0))
    graphdef = nnx.graphdef(net)
    check_optimizer(config, tx, nnx.state(net, nnx.Param))

    def init(seed):
        net = make_network(config, words, seed)
        params = nnx.state(net, nnx.Param)
        return State(
            jnp.int32(0),
            params,
            tx.init(params),
            net.initial_state(config.batch_size),
            jnp.zeros(3),
            jax.tree.map(jnp.zeros_like, params) if config.average_after else None,
            jnp.int32(-1),
        )

    return Programs(
        schedule,
        net,
        init,
        make_train(config, graphdef, tx, rows),
        perplexity.reader(graphdef),
        perplexity.reader(graphdef, tolerance=1e-2),
    )


def make_train(config: Config, graphdef, tx: optax.GradientTransformation, rows: int):
    """The function that trains on a segment of an epoch, in one call."""
    gradients = make_gradients(config, graphdef, rows)

    def train(state, columns, table, first, stop, seed):
        """Trains on the chunks `first` to `stop` of an epoch's table."""
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(i, carry):
            state, losses = carry
            start, length = table[i]
            hidden = jax.tree.map(lambda h: jnp.where(i == 0, 0, h), state.hidden)
            step_key = jax.random.fold_in(key, state.step)
            (total, (loss, hidden)), grads = gradients(
                state.params, hidden, columns, start, length, step_key
            )
            updates, opt = tx.update(grads, state.opt, state.params)
            if config.scale_by_length:
                updates = jax.tree.map(
                    lambda u: u * (length.astype(u.dtype) / config.bptt), updates
                )
            params = apply_updates(state.params, updates)
            average, averaged = update_average(config, state, params)
            sums = jnp.where(i == 0, 0, state.sums)
            sums += length * jnp.stack([jnp.ones(()), loss, total])
            state = State(state.step + 1, params, opt, hidden, sums, average, averaged)
            return state, losses.at[i].set(loss)

        losses = jnp.zeros(len(table))
        return lax.fori_loop(first, stop, step, (state, losses))

    return train


def make_gradients(config: Config, graphdef, rows: int):
    """Loss and gradients of a chunk, padded to the next of the compiled lengths."""
    lengths = chunks.padded_lengths(rows, config.bptt, config.lengths, config.chunks)

    def chunk_loss(params, hidden, columns, start, length, key, padded):
        x = lax.dynamic_slice_in_dim(columns, start, padded)
        y = lax.dynamic_slice_in_dim(columns, start + 1, padded)
        net = nnx.merge(graphdef, params)
        return loss_fn(config, net, hidden, x, y, length, key)

    def branch(padded):
        def gradients(*args):
            return jax.value_and_grad(chunk_loss, has_aux=True)(*args, padded)

        return gradients

    branches = [branch(int(padded)) for padded in lengths]

    def gradients(params, hidden, columns, start, length, key):
        which = jnp.searchsorted(lengths, length)
        return lax.switch(which, branches, params, hidden, columns, start, length, key)

    return gradients


# ---------------------------------------------------------------------------
# compiled programs
# ---------------------------------------------------------------------------


class Compiled(NamedTuple):
    init: Any
    train: Any
    state: State  # shapes, dtypes and shardings


def shardings():
    """Replicated over all devices; and a function that splits an axis over them."""
    mesh = devices.data_mesh()

    def split(axis: int):
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    return NamedSharding(mesh, PartitionSpec()), split


def compile_programs(programs: Programs, columns, table) -> Compiled:
    """The programs, ready to run; batches are split over all devices."""
    replicated, split = shardings()
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(programs.init, number)
    where = jax.tree.map(lambda _: replicated, state)
    where = where._replace(hidden=jax.tree.map(lambda _: split(0), state.hidden))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        where,
    )
    train = jax.jit(programs.train, donate_argnums=0, out_shardings=(where, replicated))
    init = jax.jit(programs.init, out_shardings=where)
    return Compiled(
        init.lower(number).compile(),
        train.lower(state, columns, table, number, number, number).compile(),
        state,
    )
