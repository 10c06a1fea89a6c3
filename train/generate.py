"""Text by a network that train.language_model has trained.

    python -m train.generate runs/lstm-adam-l2
    python -m train.generate runs/NAME --prompt "The tower" --temperature 0.8

Each word is drawn from the network's prediction after all words before it. A
temperature below 1 favours likely words, 0 takes the likeliest, and top-k draws from
the k likeliest. The same command generates the same text. The network is that with the
lowest validation loss, or the last one with --network last. It also works during
training. Characters are drawn where the network has been trained on characters.
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

from train.data import own_text, text
from train.recipes.check import check_options
from train.run import devices, trained_language_model
from train.run.command import run_command

# ---------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints text by a trained network."""

    folder: Path  # of a run of train.language_model: runs/NAME
    prompt: str = ""  # to continue; empty: starts a new line

    tokens: int = 200  # to draw, including ends of lines
    temperature: float = 1.0  # 0: always the likeliest
    top_k: int | None = 40  # draw from the k likeliest; None: from all
    samples: int = 1  # texts
    seed: int = 0  # of the draws
    run_seed: int | None = None  # of the network; None: the first with a checkpoint
    network: trained_language_model.Network = "best"  # on the validation text, or last
    allow_unknown: bool = False  # also draw <unk>


def check(c: Config) -> None:
    rules = {
        "tokens": (c.tokens >= 1, "at least 1"),
        "temperature": (0 <= c.temperature < np.inf, "at least 0 and finite"),
        "top_k": (c.top_k is None or c.top_k >= 1, "None or at least 1"),
        "samples": (
            c.samples == 1 or c.samples > 1 and c.temperature > 0,
            "at least 1, and 1 with temperature 0, which makes them all the same",
        ),
        "seed": (0 <= c.seed < 2**31, f"in [0, {2**31})"),
    }
    check_options(c, rules)


def parse_args(args: list[str]) -> Config:
    import tyro

    return tyro.cli(Config, args=args, config=(tyro.conf.PositionalRequiredArgs,))


# ---------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("graphdef", "tokens", "samples", "top_k"))
def sample(
    graphdef, params, prompt, key, temperature, banned, *, tokens, samples, top_k=None
):
    """Continues a prompt, in one program. All samples share one reading of it.

    Args:
        graphdef: of the network.
        params: of the network.
        prompt: (at least 1,) int32.
        key: for the draws.
        temperature: at least 0.
        banned: (words,) bool, words that are never drawn.
        tokens: to draw.
        samples: in parallel.
        top_k: draw from the k likeliest words that are not banned; None: from all.

    Returns:
        (samples, tokens) int32.
    """
    net = nnx.merge(graphdef, params)

    def draw(raw, key):
        logits = jnp.where(banned, -jnp.inf, net.logits(raw))
        logits -= logits.max(-1, keepdims=True)  # the best is 0 at any temperature
        if top_k is not None:
            best = lax.top_k(logits, min(top_k, len(banned)))[1]
            rows = jnp.arange(samples)[:, None]
            kept = jnp.zeros(logits.shape, bool).at[rows, best].set(True)
            logits = jnp.where(kept, logits, -jnp.inf)
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
# texts
# ---------------------------------------------------------------------------


def main(config: Config) -> list[str]:
    """Prints the texts and returns them."""
    check(config)
    trained = trained_language_model.load(
        config.folder, config.run_seed, config.network
    )
    vocabulary = trained.vocabulary
    print(trained_language_model.describe(config.folder, trained))
    prompt = split_prompt(config.prompt, trained)
    if unknown := text.unknown_words(prompt, vocabulary):
        print(f"Not in the vocabulary, read as {text.UNKNOWN}: {', '.join(unknown)}")
    banned = {text.PAD} if config.allow_unknown else {text.PAD, text.UNKNOWN}
    devices.print_compiling("sampling")
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
        text.detokenise([*prompt, *(vocabulary[i] for i in row)], trained.unit)
        for row in np.asarray(drawn)
    ]
    for i, each in enumerate(texts):
        title = f" {i + 1} of {len(texts)} " if len(texts) > 1 else ""
        print(f"{title:-^88}\n{wrap(each)}")
    return texts


def split_prompt(prompt: str, trained: trained_language_model.Trained) -> list[str]:
    """Tokens, split as in the text of the run."""
    if trained.data_dir is None:
        return text.words(prompt)
    return own_text.split_tokens(prompt + "\n", trained.unit)[:-1]


def wrap(lines: str) -> str:
    """Lines of at most 88 columns, unless a word is longer."""
    return "\n".join(
        textwrap.fill(line, 88, break_long_words=False, break_on_hyphens=False)
        for line in lines.splitlines()
    )


if __name__ == "__main__":
    devices.use_compilation_cache()
    run_command(main, parse_args)
