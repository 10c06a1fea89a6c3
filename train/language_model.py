"""AWD-LSTM and AWD-QRNN on WikiText-2, by the article's recipe: 90 epochs, not 750.

    python -m train.language_model                           # a small LSTM, 2 minutes
    python -m train.language_model qrnn --recipe adamw
    python -m train.language_model lstm --data-dir DIR       # WikiText-2, all of it

Without --data-dir the text is the documentation that comes with Python, the network
small, and an n-gram model is trained beside it. DIR has wiki.{train,valid,test}.tokens,
or the publisher's zip, or {train,valid,test}.txt of your own.

Everything is in runs/NAME: config.json, vocabulary.json, metrics.jsonl, curves.png,
checkpoints/, results.json. Killed at any moment, the same command, without --overwrite,
goes on from the last checkpoint and ends with the same bits.

    python -m train.generate runs/NAME       # text by what was trained
    python -m train.tune_cache runs/NAME     # the neural cache, tuned

Chunks of text have the article's random lengths: a chunk is padded to the next of a few
lengths that are compiled, and what is padded counts nowhere. Many chunks are one call
of one program. Perplexity is that of the whole text as a single stream, every token of
it but the first; the article left out what did not fill 2,000 tokens at the end.

Where this is not the article's code: beta1's bias correction is exact (PyTorch's is not
under a cycle), epsilon is added to the corrected root, and no chunk is longer than the
first. Where it is not Salesforce's: the last network is judged, not the best one.
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path
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
from train.data import text
from train.evals import kneser_ney, neural_cache, perplexity
from train.models import awd
from train.plots import pictures as plots
from train.recipes.optimizer import (
    ADAMS,
    OURS,
    check_optimizer,
    learning_rate_only,
    make_optimizer,
    optimizer_rules,
)
from train.run import checkpoint, devices, record
from train.run.report import spread, summary

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a language model. MODEL, --recipe and --data-dir change other defaults."""

    model: Literal["lstm", "qrnn"] = "lstm"  # also as the first word, without --model
    # the optimizer and what belongs to it; adam-l2 is the article's
    recipe: Literal["adam-l2", "adamw", "amsgrad-l2", "amsgradw", "salesforce"] = (
        "adam-l2"
    )
    data_dir: Path | None = None  # WikiText-2, or text; None: Python's documentation

    embedding: int = 400  # width of the embedding and of the last layer
    width: int = 1150  # of the other layers
    layers: int = 3  # of them all
    # of matrix products; float32 is as the device does it: GPUs round to TF32
    dtype: Literal["float32", "bfloat16"] = "float32"
    cudnn: bool = False  # LSTM layers by cuDNN, on one GPU of NVIDIA's
    words_dropout: float = 0.1  # share of words, dropped everywhere in a batch's input
    input_dropout: float = 0.6  # of the embedded words
    hidden_dropout: float = 0.2  # between layers
    output_dropout: float = 0.4  # after the last layer
    weight_dropout: float = 0.5  # of recurrent kernels; QRNN: of all kernels of layers
    alpha: float = 3.0  # of AR, the mean square of the last layer's output
    beta: float = 1.5  # of TAR, that of its changes from token to token
    ar: Literal["raw", "dropped"] = "raw"  # output for AR; dropped: Salesforce's

    optimizer: str = "adam"  # of adamw_jax, or by its import path: optax.lion
    learning_rate: float = 5e-3  # the highest
    weight_decay: float = 0.0  # decoupled, times the learning rate
    l2: float = 1.2e-6  # added to the gradient
    b2: float = 0.99  # of our Adam, AdamW and AMSGrad; others: optimizer_args
    # more arguments of the optimizer, such as: eps 1e-6
    optimizer_args: dict[str, float] = dataclasses.field(default_factory=dict)
    clip: float = 0.12  # the longest gradient
    schedule: Literal["plateau", "constant"] = "plateau"  # plateau: four phases
    div: float = 10.0  # highest learning rate over the first one
    pct: float = 1 / 12  # share of the epochs of the first and of the last phase
    b1: tuple[float, float] = (0.8, 0.7)  # high and low, of ours; momentum of SGD
    average_after: int | None = None  # NT-ASGD: epochs without a better one; None: none
    epochs: int = 90  # passes over the text
    batch_size: int = 100  # columns of the text
    bptt: int = 70  # the usual length of a chunk, in tokens
    # lengths: the first of an epoch is bptt + 25 and its end left out, or all random
    chunks: Literal["article", "salesforce"] = "article"
    scale_by_length: bool = False  # multiply a step by its chunk's length over bptt
    lengths: int = 6  # to which chunks are padded: as many programs are compiled

    theta: float = neural_cache.THETA  # of the neural cache: how much the nearest count
    lambda_: float = neural_cache.LAMBDA  # the cache's share of a probability
    window: int = neural_cache.WINDOW  # tokens that the cache remembers
    # when the cache is asked: from the second token on, or with a full window
    pointer: Literal["article", "salesforce"] = "article"

    seed: int = 0  # of the first run: weights, dropout, lengths of chunks
    seeds: int = 1  # runs
    save_every: float = 60.0  # seconds between checkpoints
    tensorboard: bool = False  # also write events for TensorBoard
    out: Path = Path("runs")  # where the folder with the results goes
    name: str | None = None  # of that folder; None: of model, recipe and data
    overwrite: bool = False  # remove an earlier run of that name, also an unfinished


# The article says AMSGrad and decoupled decay were tried and gives no hyperparameters.
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
SMALL: dict[str, Any] = {
    **{"embedding": 128, "width": 256, "layers": 2},
    **{"epochs": 24, "batch_size": 20, "bptt": 35, "lengths": 4},
    **{"words_dropout": 0.05, "input_dropout": 0.3, "hidden_dropout": 0.1},
    **{"output_dropout": 0.2, "weight_dropout": 0.25, "alpha": 2.0, "beta": 1.0},
}
ARTICLE = {  # perplexity of validation and test, without cache and with
    ("lstm", "adam-l2"): ((68.7, 65.5), (52.9, 50.9)),
    ("qrnn", "adam-l2"): ((69.6, 66.7), (53.6, 51.7)),
    ("lstm", "salesforce"): ((68.7, 65.6), None),
    ("qrnn", "salesforce"): ((69.3, 66.8), None),
}
WIKITEXT2 = [2_088_628, 217_646, 245_569]  # tokens
ARTICLE_CHUNK = 2000  # tokens; it judged by as many of these as are full
# What may change from a run to its continuation.
FREE = ("data_dir", "seeds", "save_every", "tensorboard", "out", "name", "overwrite")


def defaults(
    model: Any = "lstm", recipe: Any = "adam-l2", small: bool = True
) -> Config:
    """Of a recipe; small: for the embedded text and a CPU."""
    settings = RECIPES[recipe]
    if model == "qrnn":
        settings = settings | QRNN
        if recipe == "salesforce":
            settings |= {"batch_size": 40, "epochs": 500}
        elif settings.get("l2", 1):
            settings |= {"l2": 1e-6}
    if small:
        settings = settings | SMALL
        if model == "qrnn":
            settings |= {"layers": 3, "input_dropout": 0.2, "weight_dropout": 0.05}
        if recipe == "salesforce":
            # in so short a run, averaging has to begin early to begin at all
            settings |= {"epochs": 40, "average_after": 1, "pointer": "article"}
        else:
            settings |= {"learning_rate": 1e-2}
    return Config(model=model, recipe=recipe, **settings)


def check(c: Config) -> None:
    rates = [
        name
        for name in ("words", "input", "hidden", "output", "weight")
        if not 0 <= getattr(c, f"{name}_dropout") < 1
    ]
    if rates:
        name = f"{rates[0]}_dropout"
        raise ValueError(f"{name} must be in [0, 1), got {getattr(c, name)!r}")
    choices = {
        field.name: get_args(field.type)
        for field in dataclasses.fields(c)
        if get_origin(field.type) is Literal
    }
    counts = ("embedding", "width", "layers", "epochs", "lengths", "seeds", "window")
    others = optimizer_rules(c)
    rules = {
        **{
            name: (getattr(c, name) in allowed, f"one of {', '.join(allowed)}")
            for name, allowed in choices.items()
        },
        **{name: (getattr(c, name) >= 1, "at least 1") for name in counts},
        **{
            name: (getattr(c, name) >= 0, "at least 0")
            for name in ("alpha", "beta", "save_every")
        },
        "clip": (c.clip > 0, "above 0"),
        "theta": (0 <= c.theta < np.inf, "at least 0"),
        "lambda_": (0 <= c.lambda_ <= 1, "in [0, 1]"),
        **others,
        "b1": (others["b1"][0] or c.b1 == (0.0, 0.0), others["b1"][1]),
        "cudnn": (
            not c.cudnn
            or (jax.default_backend(), jax.device_count(), c.model, c.dtype)
            == ("gpu", 1, "lstm", "float32"),
            "False, unless LSTMs are trained in float32 on one GPU of NVIDIA's",
        ),
        "average_after": (
            c.average_after is None or c.average_after >= 1,
            "None or at least 1",
        ),
        "batch_size": (
            c.batch_size >= 1 and c.batch_size % jax.device_count() == 0,
            f"a multiple of the {jax.device_count()} devices that it is split over",
        ),
        "seed": (0 <= c.seed <= 2**31 - c.seeds, f"in [0, {2**31 - c.seeds}]"),
        "tensorboard": (
            not c.tensorboard or importlib.util.find_spec("tensorboardX"),
            "False, since tensorboardX is not installed: pip install tensorboardX",
        ),
    }
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")


# ---------------------------------------------------------------------------
# data: columns of text, cut into chunks
# ---------------------------------------------------------------------------


def read(config: Config) -> text.Corpus:
    if config.data_dir is None:
        return text.pydoc_topics()
    return text.wikitext2(config.data_dir)


def padded_lengths(config: Config, rows: int) -> np.ndarray:
    """The lengths to which chunks are padded, so that little is.

    Of all sets of `config.lengths` lengths, the one with the least padding in a hundred
    epochs, found by dynamic programming. It does not depend on the seed of a run.
    """
    tables = [
        text.chunks(rows, config.bptt, 0, epoch, config.chunks) for epoch in range(100)
    ]
    longest = config.bptt + text.FIRST_EXTRA
    drawn = np.bincount(np.concatenate(tables)[:, 1], minlength=longest + 1)
    # cost[a, b]: of padding all lengths in (a, b] to b; endless where a > b
    a, b = np.ogrid[: longest + 1, : longest + 1]
    number, total = np.cumsum(drawn), np.cumsum(drawn * np.arange(longest + 1))
    cost = b * (number[b] - number[a]) - (total[b] - total[a])
    cost = np.where(a <= b, cost, np.inf)
    best, choices = cost[0], []
    for _ in range(min(config.lengths, longest) - 1):
        sums = best[:, None] + cost
        choices.append(sums.argmin(0))
        best = sums.min(0)
    lengths = [longest]
    for choice in reversed(choices):
        lengths.append(choice[lengths[-1]])
    return np.unique([n for n in lengths if n > 0])


# ---------------------------------------------------------------------------
# model and optimizer
# ---------------------------------------------------------------------------


class State(NamedTuple):
    step: jax.Array  # int32 []
    params: Any
    opt: optax.OptState
    hidden: Any  # of the layers, carried from chunk to chunk
    sums: jax.Array  # [3], of the epoch: tokens, their loss, their loss with penalties
    average: Any  # of the parameters; None unless config.average_after
    averaged: jax.Array  # int32 []: over so many steps; -1: not begun


def network(config: Config, words: int, seed) -> awd.AWD:
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


def rates_of(config: Config) -> awd.Rates:
    return awd.Rates(
        config.words_dropout,
        config.input_dropout,
        config.hidden_dropout,
        config.output_dropout,
        config.weight_dropout,
    )


def cycle_of(config: Config, steps_per_epoch: int) -> Phases:
    """Rate, b1 and b2 at every step."""
    b2 = config.b2 if config.optimizer in ADAMS else None
    if config.schedule == "constant":
        b1 = config.b1[0] or (0.0 if config.optimizer in ADAMS else None)
        constant = Phase(
            epochs=config.epochs, learning_rate=config.learning_rate, b1=b1, b2=b2
        )
        cycle = Phases([constant], steps_per_epoch)
    else:
        cycle = one_cycle_plateau(
            config.learning_rate,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            div=config.div,
            pct=config.pct,
            b1=config.b1,
            b2=b2,
        )
    return (
        cycle
        if config.optimizer in OURS
        else learning_rate_only(cycle, steps_per_epoch)
    )


# ---------------------------------------------------------------------------
# step and evaluation
# ---------------------------------------------------------------------------


def loss_of(config: Config, net: awd.AWD, hidden, x, y, length, key):
    """Of a chunk of tokens `x` and their targets `y`, padded beyond `length`.

    Returns:
        The loss with penalties; the loss without, and the new state.
    """
    # Rows of logits that are in memory at once; on a CPU those that its caches hold.
    at_once = 256 if jax.default_backend() == "cpu" else 2048
    masks = awd.draw_masks(key, net, rates_of(config), config.batch_size)
    out = net(x, hidden, masks, length)
    there = jnp.arange(len(x))[:, None] < length
    tokens = jnp.asarray(length * config.batch_size, out.raw.dtype)
    weights = jnp.where(there, 1 / tokens, 0)
    loss = awd.cross_entropy(
        out.dropped,
        net.embedding[...],
        net.bias[...],
        y,
        jnp.broadcast_to(weights, y.shape),
        max(1, at_once // config.batch_size),
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


class Programs(NamedTuple):
    cycle: Phases
    net: awd.AWD  # of shapes
    initial_state: Any  # seed -> state
    train: Any  # state, columns, table of chunks, first, beyond, seed -> state, losses
    read: Any  # params, state, tokens, targets -> perplexity.Segment, state
    glance: Any  # the same in fewer passes, right to four digits or more


def build(config: Config, words: int, rows: int) -> Programs:
    """What is compiled, for columns of so many rows, padded at their end."""
    tables = [text.chunks(rows, config.bptt, 0, i, config.chunks) for i in range(10)]
    cycle = cycle_of(config, round(np.mean([len(table) for table in tables])))
    clip = clip_by_global_norm(config.clip, eps=1e-6)  # as PyTorch's
    tx = optax.chain(clip, make_optimizer(config, cycle))
    net = nnx.eval_shape(lambda: network(config, words, 0))
    graphdef = nnx.graphdef(net)
    check_optimizer(config, tx, nnx.state(net, nnx.Param))
    lengths = padded_lengths(config, rows)

    def initial_state(seed):
        net = network(config, words, seed)
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

    def chunk_loss(params, hidden, columns, start, length, key, padded):
        x = lax.dynamic_slice_in_dim(columns, start, padded)
        y = lax.dynamic_slice_in_dim(columns, start + 1, padded)
        net = nnx.merge(graphdef, params)
        return loss_of(config, net, hidden, x, y, length, key)

    def gradients(padded):
        def branch(*args):
            return jax.value_and_grad(chunk_loss, has_aux=True)(*args, padded)

        return branch

    branches = [gradients(int(padded)) for padded in lengths]

    def train(state, columns, table, first, beyond, seed):
        """The chunks `first` to `beyond` of an epoch's table of starts and lengths."""
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(i, carry):
            state, losses = carry
            start, length = table[i]
            which = jnp.searchsorted(lengths, length)
            (total, (loss, hidden)), grads = lax.switch(
                which,
                branches,
                state.params,
                jax.tree.map(lambda h: jnp.where(i == 0, 0, h), state.hidden),
                columns,
                start,
                length,
                jax.random.fold_in(key, state.step),
            )
            updates, opt = tx.update(grads, state.opt, state.params)
            if config.scale_by_length:
                updates = jax.tree.map(
                    lambda u: u * (length.astype(u.dtype) / config.bptt), updates
                )
            params = apply_updates(state.params, updates)
            average, averaged = state.average, state.averaged
            if config.average_after:
                averaged += (averaged >= 0).astype(jnp.int32)
                share = 1 / jnp.maximum(averaged, 1).astype(jnp.float32)
                average = jax.tree.map(
                    lambda a, p: a + share * (p - a), average, params
                )
            sums = jnp.where(i == 0, 0, state.sums)
            sums += length * jnp.stack([jnp.ones(()), loss, total])
            state = State(state.step + 1, params, opt, hidden, sums, average, averaged)
            return state, losses.at[i].set(loss)

        losses = jnp.zeros(len(table))
        return lax.fori_loop(first, beyond, step, (state, losses))

    return Programs(
        cycle,
        net,
        initial_state,
        train,
        perplexity.reader(graphdef),
        perplexity.reader(graphdef, tolerance=1e-2),
    )


# ---------------------------------------------------------------------------
# loop
# ---------------------------------------------------------------------------

STRETCH = 5.0  # seconds of training between two lines of progress, about


def main(config: Config) -> dict[str, Any]:
    """Trains the seeds that are not done yet; returns what is in results.json."""
    check(config)
    corpus = read(config)
    columns = text.columns(corpus.train, config.batch_size)
    programs = build(config, len(corpus.vocabulary), len(columns))
    folder = record.open_folder(
        config,
        "language_model",
        name_of(config),
        FREE,
        vocabulary=vocabulary_hash(corpus.vocabulary),
        text=text_hash(corpus),
        tokens=[len(split) for split in corpus[:3]],
    )
    with record.alone(folder):
        if not (folder / "vocabulary.json").exists():
            record.write_json(folder / "vocabulary.json", {"words": corpus.vocabulary})
        waiting = [seed for seed in seeds_of(config) if not record.ended(folder, seed)]
        if waiting:
            train_seeds(config, programs, waiting, corpus, columns, folder)
        else:
            print(f"{folder} is finished already; --overwrite begins again.")
        return report(config, programs.cycle, corpus, folder)


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def name_of(config: Config) -> str:
    """Of the folder of a run."""
    data = f"-{config.data_dir.stem}" if config.data_dir else ""
    return config.name or f"{config.model}-{config.recipe}{data}"


def text_hash(corpus: text.Corpus) -> str:
    tokens = np.concatenate(corpus[:3]).tobytes()
    return hashlib.md5(tokens, usedforsecurity=False).hexdigest()


def vocabulary_hash(words: tuple[str, ...]) -> str:
    joined = "\n".join(words).encode()
    return hashlib.md5(joined, usedforsecurity=False).hexdigest()


def places():
    """On every device; and a function to split an axis over all devices."""
    mesh = devices.data_mesh()

    def split(axis: int):
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    return NamedSharding(mesh, PartitionSpec()), split


class Compiled(NamedTuple):
    initial_state: Any
    train: Any
    state: State  # shapes, dtypes and places


def compiled(programs: Programs, columns, table) -> Compiled:
    """The programs, ready to run; batches are split over all devices."""
    everywhere, split = places()
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(programs.initial_state, number)
    where = jax.tree.map(lambda _: everywhere, state)
    where = where._replace(hidden=jax.tree.map(lambda _: split(0), state.hidden))
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        where,
    )
    train = jax.jit(programs.train, donate_argnums=0, out_shardings=(where, everywhere))
    initial_state = jax.jit(programs.initial_state, out_shardings=where)
    return Compiled(
        initial_state.lower(number).compile(),
        train.lower(state, columns, table, number, number, number).compile(),
        state,
    )


def chunks_of(config: Config, rows: int, seed: int, epoch: int):
    """An epoch's starts and lengths, in a table of the same size for every epoch."""
    table = text.chunks(rows, config.bptt, seed, epoch, config.chunks)
    size = rows // text.SHORTEST + 1
    return np.pad(table, ((0, size - len(table)), (0, 0))), len(table)


def train_seeds(config, programs, seeds, corpus, columns, folder):
    log, cycle, rows = folder / "metrics.jsonl", programs.cycle, len(columns)
    words = len(corpus.vocabulary)

    # to the devices; compile
    began = time.perf_counter()
    beyond = config.bptt + text.FIRST_EXTRA + 1  # that a padded chunk may reach
    columns = jax.device_put(np.pad(columns, ((0, beyond), (0, 0))), places()[1](1))
    program = compiled(programs, columns, chunks_of(config, rows, 0, 0)[0])
    start = record.append_start(folder, time.perf_counter() - began)
    parameters = sum(p.size for p in jax.tree.leaves(program.state.params))
    print(
        f"{folder}: {parameters:,} parameters, {len(corpus.train):,} tokens, {words:,} "
        f"words, {cycle.total_steps:,} steps or so, on {start['devices']}, compiled in "
        f"{start['compile_seconds']:.1f} s\n{cycle}",
        flush=True,
    )

    process_began, steps_done = time.perf_counter(), 0
    for run, seed in enumerate(seeds):
        number = np.int32(seed)
        tables = [
            chunks_of(config, rows, seed, epoch) for epoch in range(config.epochs)
        ]
        ends = np.cumsum([steps for _, steps in tables])
        with checkpoint.open_folder(folder / "checkpoints" / str(seed)) as checkpoints:
            state = checkpoint.restore(checkpoints, program.state)
            if state is None:
                state = program.initial_state(number)
            step = int(state.step)
            record.forget(log, seed, step, int(np.searchsorted(ends, step, "right")))
            events = config.tensorboard and record.event_writer(
                folder / "tensorboard" / str(seed), step
            )
            saved, stretch, seconds, tokens = time.perf_counter(), 1, 0.0, 0
            while step < ends[-1]:
                # a stretch of an epoch
                epoch = int(np.searchsorted(ends, step, "right"))
                table, steps = tables[epoch]
                first = step - int(ends[epoch]) + steps
                beyond = min(first + stretch, steps)
                began = time.perf_counter()
                state, losses = program.train(
                    state, columns, table, np.int32(first), np.int32(beyond), number
                )
                losses = np.asarray(losses)[first:beyond]  # waits for the device
                spent = time.perf_counter() - began
                bad = ~(losses < 2 * np.log(words))  # twice that of guessing, or NaN
                if bad.any():
                    at = int(bad.argmax())
                    stop(config, cycle, folder, seed, step + at, float(losses[at]))
                stretch = max(1, round((beyond - first) * STRETCH / spent))
                step, steps_done = step + beyond - first, steps_done + beyond - first
                seconds += spent
                tokens += config.batch_size * int(table[first:beyond, 1].sum())
                line = {"seed": seed, "epoch": epoch + 1, "step": step}
                line |= {"loss": float(losses.mean())} | cycle.at(step - 1)

                # the end of an epoch
                if step == ends[epoch]:
                    sums = np.asarray(state.sums, np.float64)
                    valid_loss = -float(
                        perplexity.log_probs(
                            programs.glance,
                            parameters_of(state),
                            programs.net.initial_state(1),
                            corpus.valid,
                        ).mean()
                    )
                    if not valid_loss < 2 * np.log(words):
                        stop(config, cycle, folder, seed, step - 1, valid_loss)
                    line = {"event": "epoch"} | line
                    line |= {"loss": sums[1] / sums[0], "total": sums[2] / sums[0]}
                    speed = tokens / seconds  # of what was not before a restart
                    whole = config.batch_size * int(table[:, 1].sum())
                    line |= {"valid_loss": valid_loss, "seconds": whole / speed}
                    line |= {"tokens_per_second": speed}
                    state = begin_average(config, state, folder, seed, valid_loss)
                    record.append_line(log, line)
                    if events:
                        for key in ("loss", "total", "valid_loss", *cycle.at(0)):
                            events.add_scalar(key, line[key], step)
                        events.flush()
                if step == ends[-1] or time.perf_counter() - saved > config.save_every:
                    if not np.isfinite(norm := float(optax.tree.norm(state.params))):
                        stop(config, cycle, folder, seed, step - 1, norm)
                    checkpoint.save(checkpoints, step, state)
                    saved = time.perf_counter()
                left = (len(seeds) - run) * int(ends[-1]) - step
                left *= (time.perf_counter() - process_began) / steps_done
                print_progress(config, int(ends[-1]), line, tokens / seconds, left)
                if step == ends[epoch]:
                    seconds, tokens = 0.0, 0
            if events:
                events.close()
            line = {"event": "end", "seed": seed, "step": step}
            for split in ("valid", "test"):
                line[split] = judge(config, programs, state, getattr(corpus, split))
            checkpoints.wait()
            record.append_line(log, line)
        draw(config, cycle, folder)


def parameters_of(state: State):
    """Those to be judged."""
    return state.average if int(state.averaged) > 0 else state.params


def begin_average(config, state: State, folder: Path, seed: int, loss: float) -> State:
    """NT-ASGD: once an epoch is not better than the best but the last few."""
    if config.average_after is None or int(state.averaged) >= 0:
        return state
    losses = [line["valid_loss"] for line in record.lines_of(folder, "epoch", seed)]
    if loss > min(losses[: -config.average_after], default=np.inf):
        return state._replace(averaged=jnp.zeros_like(state.averaged))
    return state


def judge(config: Config, programs: Programs, state: State, tokens) -> dict[str, Any]:
    """Perplexities of a text, without the cache and with it."""
    window = min(config.window, len(tokens) - 1)
    history = neural_cache.empty(window, config.embedding)
    plain, cached = [], []
    for segment in perplexity.segments(
        programs.read, parameters_of(state), programs.net.initial_state(1), tokens
    ):
        looked_up, history = neural_cache.log_probs(
            history, segment.states, segment.targets, config.theta
        )
        plain.append(np.asarray(segment.log_probs, np.float64))
        cached.append(np.asarray(looked_up, np.float64))
    n = len(tokens) - 1
    plain, cached = (np.concatenate(parts)[:n] for parts in (plain, cached))
    used = neural_cache.used(np.arange(n), config.window, config.pointer)
    mixed = neural_cache.mixed(plain, cached, used, config.lambda_)
    mixed = np.asarray(mixed, np.float64)
    whole = n // ARTICLE_CHUNK * ARTICLE_CHUNK

    def of(log_probs):
        return float(np.exp(-log_probs.mean())) if len(log_probs) else None

    return {
        "tokens": n,
        "perplexity": of(plain),
        "with_cache": of(mixed),
        # as the article's code counts; None: the text is shorter
        "tokens_in_full_chunks": whole,
        "perplexity_of_full_chunks": of(plain[:whole]),
        "with_cache_of_full_chunks": of(mixed[:whole]),
    }


def stop(config, cycle, folder, seed, step, loss):
    """Ends a run that diverges, with what there is of it."""
    line = {"event": "diverged", "seed": seed, "step": step, "loss": loss}
    record.append_line(folder / "metrics.jsonl", line)
    draw(config, cycle, folder)
    raise FloatingPointError(
        f"seed {seed} diverged at step {step}, where the learning rate was "
        f"{cycle.at(step)['learning_rate']:.3g}: loss {loss:.3g}. Its last checkpoint, "
        f"if there is one, is kept in {folder / 'checkpoints' / str(seed)}"
    )


# ---------------------------------------------------------------------------
# a trained network
# ---------------------------------------------------------------------------


class Trained(NamedTuple):
    config: Config
    vocabulary: tuple[str, ...]
    text: str | None  # the hash of what it was trained on
    seed: int
    step: int  # of the checkpoint
    ended: bool  # False: the run has yet to go on
    graphdef: Any
    params: Any  # those to be judged


def load(folder: Path, seed: int | None = None) -> Trained:
    """The last checkpoint of a run, which may be in progress. Nothing is written.

    Args:
        folder: of the run, runs/NAME.
        seed: of the run; None: the first that has a checkpoint.

    Raises:
        ValueError: there is no such folder, run or checkpoint, or they do not fit.
    """
    folder = Path(folder)
    settings = record.read_config(folder / "config.json")
    if settings.get("script") != "language_model":
        what = "is not the folder of a run" if folder.exists() else "does not exist"
        raise ValueError(f"folder: {folder} {what}; train.language_model makes one")
    fields = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{key: settings[key] for key in fields if key in settings})
    data_dir = config.data_dir and Path(config.data_dir)
    config = dataclasses.replace(
        config,
        data_dir=data_dir,
        out=Path(config.out),
        b1=tuple(config.b1),
        cudnn=config.cudnn and jax.default_backend() == "gpu",  # the same numbers
    )
    checkpoints = folder / "checkpoints"
    seeds = sorted(
        int(path.name)
        for path in checkpoints.glob("*")
        if path.name.isdecimal() and checkpoint.latest(path)
    )
    seed = min(seeds, default=config.seed) if seed is None else seed
    if seed not in seeds:
        others = f"but of {', '.join(map(str, seeds))}" if seeds else "nor any other"
        raise ValueError(
            f"seed: {folder} has no checkpoint of seed {seed} yet, {others}"
        )
    path = folder / "vocabulary.json"
    words = tuple(json.loads(path.read_text(encoding="utf-8"))["words"])
    if vocabulary_hash(words) != settings["vocabulary"]:
        raise ValueError(f"{path} is not the vocabulary of this run: was it changed?")

    net = nnx.eval_shape(lambda: network(config, len(words), 0))
    graphdef, params = nnx.split(net)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    like: Any = {"step": number, "params": params, "averaged": number}
    like["sums"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    like["average"] = params if config.average_after else None
    ended = record.ended(folder, seed)
    restored = checkpoint.read(checkpoints / str(seed), like)
    state = State(**restored, opt=(), hidden=())
    step, params = int(state.step), parameters_of(state)
    texts = settings.get("text")
    return Trained(config, words, texts, seed, step, ended, graphdef, params)


# ---------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------


def print_progress(config, steps: int, line: dict, speed: float, seconds_left: float):
    b1 = f" b1 {line['b1']:.3f}" if "b1" in line else ""
    valid = ""
    if "valid_loss" in line:
        valid = f" valid {line['valid_loss']:.4f} (perplexity "
        valid += f"{np.exp(line['valid_loss']):.2f})"
    print(
        f"seed {line['seed']} epoch {line['epoch']}/{config.epochs} step "
        f"{line['step']}/{steps} loss {line['loss']:.4f}{valid} "
        f"lr {line['learning_rate']:.2e}{b1} {speed:,.0f} tokens/s "
        f"{datetime.timedelta(seconds=round(seconds_left))} left",
        flush=True,
    )


def draw(config: Config, cycle: Phases, folder: Path) -> None:
    lines = record.read_lines(folder / "metrics.jsonl")
    plots.language_model(lines, cycle, config.epochs, folder / "curves.png")


def report(config: Config, cycle: Phases, corpus, folder: Path) -> dict[str, Any]:
    """Writes results.json and curves.png from the log, and prints the final lines."""
    starts = record.lines_of(folder, "start")
    ends = [record.lines_of(folder, "end", seed) for seed in seeds_of(config)]
    runs = [end for lines in ends for end in lines]
    for run in runs:
        epochs = record.lines_of(folder, "epoch", run["seed"])
        run["train_seconds"] = sum(line["seconds"] for line in epochs)
        run["tokens_per_second"] = float(
            np.mean([line["tokens_per_second"] for line in epochs])
        )
    recipe = defaults(config.model, config.recipe, config.data_dir is None)
    changed = record.changed(config, recipe, (*FREE, "seed"))
    end_of_line = corpus.vocabulary.index(text.EOS)
    results: dict[str, Any] = {
        "model": config.model,
        "recipe": config.recipe,
        "changed": changed,  # what is not as in the recipe
        "tokens": [len(split) for split in corpus[:3]],
        "words": len(corpus.vocabulary),
        "n": len(runs),
        "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
        "compile_seconds": [start["compile_seconds"] for start in starts],
        "devices": " and ".join(sorted({start["devices"] for start in starts})),
        "runs": runs,
    }
    for split in ("valid", "test"):
        tokens = getattr(corpus, split)
        results[split] = {
            "n-gram": kneser_ney.perplexity(
                corpus.train, tokens, len(corpus.vocabulary), end_of_line
            )
        }
        for key in ("perplexity", "with_cache"):
            values = [run[split][key] for run in runs]
            results[split][key] = summary(values)
    if results["tokens"] == WIKITEXT2:
        results["article"] = ARTICLE.get((config.model, config.recipe))
    record.write_json(folder / "results.json", results)
    draw(config, cycle, folder)

    def show(key: str) -> str:
        return " / ".join(spread(results[split][key]) for split in ("valid", "test"))

    other = "".join(f", {key} {value}" for key, value in changed.items())
    ngrams = f"{results['valid']['n-gram']:.2f} / {results['test']['n-gram']:.2f}"
    print(
        f"{config.model}, {config.recipe}{other}: perplexity (validation / test, "
        f"n = {len(runs)}) {show('perplexity')}, with the neural cache "
        f"{show('with_cache')}.\nInterpolated Kneser-Ney 5-grams on the same text: "
        f"{ngrams}.\n{results['train_seconds']:.1f} s of training each on "
        f"{results['devices']}, after {starts[-1]['compile_seconds']:.1f} s of "
        "compilation."
    )
    if results.get("article"):
        numbers = [f"{x[0]} / {x[1]}" for x in results["article"] if x]
        print(f"Published, with the cache behind: {', '.join(numbers)}.")
    print(f"Wrote {folder}.", flush=True)
    return results


def config_of(args: list[str]) -> Config:
    """From the command line, where the model may come first without a --model."""
    import tyro

    if args and args[0] in ("lstm", "qrnn"):
        args = ["--model", *args]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", choices=("lstm", "qrnn"), default="lstm")
    first.add_argument("--recipe", choices=RECIPES, default="adam-l2")
    first.add_argument("--data-dir", "--data_dir")
    known = first.parse_known_args(args)[0]
    small = known.data_dir in (None, "None")
    default = defaults(known.model, known.recipe, small)
    return tyro.cli(Config, args=args, default=default)


if __name__ == "__main__":
    devices.use_compilation_cache()
    main(config_of(sys.argv[1:]))
