"""Text by a network that train.language_model has trained.

    python -m train.generate runs/lstm-adam-l2
    python -m train.generate runs/NAME --prompt "The tower" --temperature 0.8

A word is drawn from what the network expects after all the words before it, and so on.
A temperature below 1 makes likely words likelier, 0 takes the likeliest, and top-k
draws from no more than so many. The same command gives the same text. A run in progress
can be asked, too: its last checkpoint is read.
"""

import dataclasses
import functools
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from train import language_model
from train.data import text
from train.run import devices

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints text by a trained network."""

    folder: Path  # of a run of train.language_model: runs/NAME
    prompt: str = ""  # to be continued; empty: a new line begins

    tokens: int = 200  # to be drawn, ends of lines among them
    temperature: float = 1.0  # 0: always the likeliest
    top_k: int | None = 40  # to draw from the likeliest; None: from all
    samples: int = 1  # texts
    seed: int = 0  # of what is drawn
    run_seed: int | None = None  # of the network; None: the first with a checkpoint
    allow_unknown: bool = False  # also draw <unk>


def check(c: Config) -> None:
    rules = {
        "tokens": (c.tokens >= 1, "at least 1"),
        "temperature": (0 <= c.temperature < np.inf, "at least 0 and finite"),
        "top_k": (c.top_k is None or c.top_k >= 1, "None or at least 1"),
        "samples": (
            c.samples == 1 or c.samples > 1 and c.temperature > 0,
            "at least 1, and 1 at a temperature of 0, where all are the same",
        ),
        "seed": (0 <= c.seed < 2**31, f"in [0, {2**31})"),
    }
    for option, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{option} must be {allowed}, got {getattr(c, option)!r}")


# ---------------------------------------------------------------------------
# prompt
# ---------------------------------------------------------------------------


def words_of(prompt: str, trained: language_model.Trained) -> list[str]:
    """Cut as the text was that the network has read."""
    if trained.config.data_dir is None:
        return text.words(prompt)
    return prompt.replace("\n", f" {text.EOS} ").split()


# ---------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("graphdef", "tokens", "samples", "top_k"))
def sample(
    graphdef, params, prompt, key, temperature, never, *, tokens, samples, top_k=None
):
    """Continues a prompt in one program: it is read once, for all the samples.

    Args:
        graphdef: of the network.
        params: of the network.
        prompt: (at least 1,) int32.
        key: of what is drawn.
        temperature: at least 0.
        never: (words,) booleans, not to be drawn.
        tokens: to be drawn.
        samples: side by side.
        top_k: to draw from the likeliest alone, those `never` drawn not counted.

    Returns:
        (samples, tokens) int32.
    """
    net = nnx.merge(graphdef, params)

    def draw(raw, key):
        logits = jnp.where(never, -jnp.inf, net.logits(raw))
        logits -= logits.max(-1, keepdims=True)  # the best is 0 at any temperature
        if top_k is not None:
            best = lax.top_k(logits, min(top_k, len(never)))[1]
            rows = jnp.arange(samples)[:, None]
            there = jnp.zeros(logits.shape, bool).at[rows, best].set(True)
            logits = jnp.where(there, logits, -jnp.inf)
        scaled = logits / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
        drawn = jax.random.categorical(key, scaled)
        return jnp.where(temperature > 0, drawn, logits.argmax(-1))

    def step(carry, key):
        raw, state = carry
        drawn = draw(raw, key)
        out = net(drawn[None], state)
        return (out.raw[0], out.state), drawn

    out = net(prompt[:, None], net.initial_state(1))
    carry = jax.tree.map(lambda x: jnp.repeat(x, samples, 0), (out.raw[-1], out.state))
    return lax.scan(step, carry, jax.random.split(key, tokens))[1].T


# ---------------------------------------------------------------------------
# the texts
# ---------------------------------------------------------------------------


def main(config: Config) -> list[str]:
    """Prints the texts and returns them."""
    check(config)
    trained = language_model.load(config.folder, config.run_seed)
    vocabulary = trained.vocabulary
    of = f"{config.folder}, seed {trained.seed}, step {trained.step:,}"
    print(of if trained.ended else f"{of} of an unfinished run")
    prompt = words_of(config.prompt, trained)
    if unknown := text.unknown(prompt, vocabulary):
        print(f"Not in its vocabulary, read as {text.UNKNOWN}: {', '.join(unknown)}")
    banned = {text.PAD} if config.allow_unknown else {text.PAD, text.UNKNOWN}
    drawn = sample(
        trained.graphdef,
        trained.params,
        text.encode([text.EOS, *prompt], vocabulary),
        jax.random.key(config.seed),
        np.float32(config.temperature),
        np.isin(vocabulary, list(banned)),
        tokens=config.tokens,
        samples=config.samples,
        top_k=config.top_k,
    )
    texts = [
        text.detokenised([*prompt, *(vocabulary[i] for i in row)])
        for row in np.asarray(drawn)
    ]
    for i, each in enumerate(texts):
        title = f" {i + 1} of {len(texts)} " if len(texts) > 1 else ""
        print(f"{title:-^88}\n{wrapped(each)}")
    return texts


def wrapped(lines: str) -> str:
    """At most 88 columns, where words are not longer."""
    return "\n".join(
        textwrap.fill(line, 88, break_long_words=False, break_on_hyphens=False)
        for line in lines.splitlines()
    )


if __name__ == "__main__":
    import tyro

    devices.use_compilation_cache()
    main(tyro.cli(Config, config=(tyro.conf.PositionalRequiredArgs,)))
