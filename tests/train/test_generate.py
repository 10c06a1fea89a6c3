"""train.generate on tiny networks: what is sampled, and the command."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_language_model import save_state, train_tiny

from train import generate
from train.data import text
from train.models import awd
from train.run import trained_language_model

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

WORDS = [f"w{i}" for i in range(20)]


def lines(seed, count):
    """Of words in ascending order, so that something can be learned."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(WORDS) - 5, count)
    return "".join(f"{' '.join(WORDS[i : i + 5])} .\n" for i in starts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with a text of its own, which tests only read."""
    folder = tmp_path_factory.mktemp("runs")
    for i, (name, count) in enumerate({"train": 200, "valid": 30, "test": 40}.items()):
        (folder / f"{name}.txt").write_text(lines(i, count))
    return train_tiny(
        folder, embedding=16, width=16, layers=1, epochs=20, bptt=10, lengths=1,
        learning_rate=0.05, words_dropout=0.1, input_dropout=0.1, hidden_dropout=0.2,
        output_dropout=0.1, weight_dropout=0.1, alpha=3.0, beta=1.5,
    )  # fmt: skip


@pytest.fixture
def copy(run, tmp_path):
    """A copy, which may be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def untrained(kind="lstm", words=12, seed=5, scale=6, bias=()):
    """A network of large weights, so that it has preferences that change."""
    net = awd.AWD(words, 16, 16, 2, kind=kind, rngs=nnx.Rngs(seed))
    for p in jax.tree.leaves(
        nnx.state(net), is_leaf=lambda x: isinstance(x, nnx.Param)
    ):
        p[...] = scale * p[...]
    for word, value in bias:
        net.bias[...] = net.bias[...].at[word].set(value)
    return net


def draw(net, prompt, *, tokens=20, samples=1, temperature=1.0, banned=(0,), **more):
    graphdef, params = nnx.split(net)
    mask = np.isin(np.arange(len(net.bias[...])), banned)
    return np.asarray(
        generate.sample(
            graphdef,
            params,
            np.array(prompt, np.int32),
            jax.random.key(more.pop("seed", 0)),
            np.float32(temperature),
            mask,
            tokens=tokens,
            samples=samples,
            **more,
        )
    )


@jax.jit
def _logits(net, tokens, length):
    out = net(tokens[:, None], net.initial_state(1))
    return net.logits(out.raw)[length - 1, 0]


def logits_after(net, tokens):
    """Of the word after these, float64; the network reads them all again."""
    padded = np.pad(np.array(tokens, np.int32), (0, 30 - len(tokens)))
    return np.asarray(_logits(net, padded, len(tokens)), np.float64)


def softmax(logits, temperature, allowed):
    p = np.where(allowed, np.exp((logits - logits.max()) / temperature), 0)
    return p / p.sum()


# ---------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lstm", pytest.param("qrnn", marks=pytest.mark.slow)])
def test_greedy_is_a_loop_over_the_likeliest_words(kind):
    net, prompt = untrained(kind), [3, 1, 4, 1, 5]
    expected = list(prompt)
    for _ in range(20):
        expected.append(int(logits_after(net, expected)[1:].argmax()) + 1)  # not <pad>
    drawn = draw(net, prompt, temperature=0)
    np.testing.assert_array_equal(drawn, [expected[5:]])
    assert len({*expected[5:]}) > 2
    # so do the best alone, and a temperature next to 0
    for more in ({"top_k": 1}, {"temperature": 1e-30}, {"temperature": 1e-44}):
        np.testing.assert_array_equal(draw(net, prompt, **more), drawn)


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, None), (0.7, 4)]
)
def test_frequencies_are_those_of_the_softmax(temperature, top_k):
    """Of pairs of words, so that the state of a sample is its own."""
    net, prompt, n = untrained(seed=2, scale=10), [2, 7], 100_000
    banned = (0, 3)
    drawn = draw(
        net, prompt, tokens=2, samples=n, temperature=temperature, banned=banned,
        top_k=top_k,
    )  # fmt: skip

    def chances(tokens):
        logits = logits_after(net, tokens)
        allowed = ~np.isin(np.arange(12), banned)
        if top_k:
            allowed &= logits >= np.sort(logits[allowed])[-top_k]
        return softmax(logits, temperature, allowed)

    first = chances(prompt)
    joint = np.stack([first[i] * chances([*prompt, i]) for i in range(12)])
    counts = np.zeros((12, 12))
    np.add.at(counts, tuple(drawn.T), 1)
    assert counts[joint == 0].sum() == 0
    often = n * joint > 5
    expected = n * joint[often]
    chi2, freedom = ((counts[often] - expected) ** 2 / expected).sum(), often.sum() - 1
    assert freedom > 8
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    rest = n * joint[~often].sum()
    assert abs(counts[~often].sum() - rest) < 5 + 4 * np.sqrt(rest)


def test_what_is_not_to_be_drawn_is_not():
    net = untrained(bias=[(0, 50.0), (1, 50.0)])  # all but certain
    for more in ({}, {"temperature": 0}, {"top_k": 3}):
        drawn = draw(net, [2], tokens=200, banned=(0, 1), **more)
        assert not np.isin(drawn, (0, 1)).any()
        assert (draw(net, [2], tokens=200, banned=(0,), **more) == 1).any()


def test_at_a_high_temperature_all_are_drawn_alike():
    drawn = draw(untrained(), [2], tokens=100, samples=110, temperature=1e30)
    counts = np.bincount(drawn.ravel(), minlength=12)[1:]
    np.testing.assert_allclose(counts, 1000, atol=150)


def test_a_seed_makes_the_text_and_samples_differ():
    net = untrained()
    one, again, other = (draw(net, [2], samples=4, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert len({tuple(row) for row in one}) == 4
    top = draw(net, [2], samples=4, top_k=100)  # more than there are
    np.testing.assert_array_equal(top, one)


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


def test_the_texts(run, capsys):
    config = generate.Config(run, prompt="w3 xyz w4", tokens=100, samples=3, top_k=None)
    texts = generate.main(config)
    printed = capsys.readouterr().out
    assert len(texts) == 3 and len({*texts}) == 3
    for each in texts:
        assert each.startswith("w3 xyz w4")  # as it was asked, though it was <unk>
        words = each.replace(".", " .").replace("\n", " \n ").split(" ")
        assert {*words} <= {*WORDS, ".", "\n", "", "xyz"}
        assert len([w for w in words if w]) == 103
    head, *_ = printed.splitlines()
    best = trained_language_model.load(run, network="best")
    assert best.network == "best" and best.epoch
    assert head == trained_language_model.describe(run, best)
    assert "read as <unk>: xyz\n" in printed
    assert " 2 of 3 -" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 88
    for each in texts:
        assert "".join(each.split()) in "".join(printed.split())
    assert generate.main(config) == texts


def test_what_was_learned(run):
    """A line begins after <eos>; the likeliest words are in their order."""
    (drawn,) = generate.main(generate.Config(run, tokens=60, temperature=0))
    (more,) = generate.main(
        generate.Config(run, prompt="w1 w2 w3 w4 w5 .\nw7 w8", tokens=40, temperature=0)
    )
    assert more.startswith("w1 w2 w3 w4 w5.\nw7 w8 w9 w10 ")
    for line in [*drawn.splitlines()[:-1], *more.splitlines()[:-1]]:
        numbers = [int(word[1:]) for word in line.removesuffix(".").split()]
        assert len(numbers) > 3
        assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]


def test_unknown_words_on_request(copy):
    """<unk> made all but certain."""
    trained = trained_language_model.load(copy)
    params = trained.params
    unknown = trained.vocabulary.index(text.UNKNOWN)
    params["bias"][...] = params["bias"][...].at[unknown].set(50.0)
    pad = trained.vocabulary.index(text.PAD)
    params["bias"][...] = params["bias"][...].at[pad].set(60.0)
    save_state(copy, step=trained.step + 1, params=params)
    for allow in (False, True):
        config = generate.Config(copy, tokens=30, allow_unknown=allow, network="last")
        (drawn,) = generate.main(config)
        assert (drawn.split() == ["<unk>"] * 30) == allow
        assert ("<unk>" in drawn) == allow
        assert "<pad>" not in drawn


def test_prompts_are_cut_as_the_text_was(run):
    trained = trained_language_model.load(run)
    prompt = "The tower's Height,\nis 12"
    files = ["The", "tower's", "Height,", "<eos>", "is", "12"]
    assert generate.split_prompt(prompt, trained) == files
    words = trained._replace(unit="words")
    marks = ["The", "tower's", "Height", ",", "<eos>", "is", "12"]
    assert generate.split_prompt(prompt, words) == marks
    characters = trained._replace(unit="characters")
    assert generate.split_prompt("a b\nc", characters) == [*"a b", "<eos>", "c"]
    for unit in ("words", "spaced", "characters"):
        assert generate.split_prompt("", trained._replace(unit=unit)) == []
    assert generate.split_prompt("a\n", trained) == ["a", "<eos>"]
    embedded = trained._replace(data_dir=None)
    own = ["the", "tower's", "height", ",", "is", "12"]
    assert generate.split_prompt(prompt, embedded) == own


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"samples": 0},
        {"samples": 2, "temperature": 0.0},
        {"seed": -1},
    ],
)
def test_what_is_refused(run, change):
    option, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"^{option} must be .* got {value}$"):
        generate.main(generate.Config(run, **change))


LINE = ["--prompt", "w3 w4", "--tokens", "4", "--top-k", "None", "--temperature=0"]


def test_the_command_line(run):
    config = generate.parse_args([str(run), *LINE])
    expected = {"prompt": "w3 w4", "tokens": 4, "top_k": None, "temperature": 0.0}
    assert config == generate.Config(run, **expected)
    (drawn,) = generate.main(config)
    assert drawn.startswith("w3 w4 w5 w6")
    with pytest.raises(SystemExit):
        generate.parse_args([])


@pytest.mark.slow
def test_the_command_in_a_process(run, cache):
    done = subprocess.run(
        [sys.executable, "-m", "train.generate", str(run), *LINE],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    (expected,) = generate.main(generate.parse_args([str(run), *LINE]))
    assert done.stdout.splitlines()[-1] == expected.splitlines()[-1]
