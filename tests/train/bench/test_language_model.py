"""The benchmark of language models, on tiny networks."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from train.bench import language_model
from train.bench.language_model import make_settings, token_flops
from train.data import chunks
from train.references import awd as torch_awd

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

TINY = language_model.Config(
    words=50, embedding=6, width=8, layers=2, batch_size=4, bptt=30, steps=2, turns=2,
    matmul=64, name="b", torch_compile=False,
)  # fmt: skip


# ---------------------------------------------------------------------------
# arithmetic
# ---------------------------------------------------------------------------


def test_flops_of_a_token():
    """By hand: each weight of a kernel once, and the embedding as decoder."""
    article = language_model.Config()
    macs = sum(4 * n * (m + n) for m, n in ((400, 1150), (1150, 1150), (1150, 400)))
    macs += 400 * 33_279
    flops = token_flops(make_settings(article), article.words)
    assert flops == pytest.approx(2 * macs, rel=2e-3)  # and activations
    assert flops > 2 * macs
    assert 3 * flops == pytest.approx(201e6, rel=3e-3)

    qrnn = make_settings(dataclasses.replace(article, model="qrnn"))
    macs = 3 * (2 * 400 * 1550 + 2 * 1550 * 1550 + 1550 * 400) + 400 * 1471
    assert token_flops(qrnn, 1471) == pytest.approx(2 * macs, rel=3e-3)


# ---------------------------------------------------------------------------
# results
# ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "macs"),
    [
        ("lstm", 4 * 8 * (6 + 8) + 4 * 6 * (8 + 6) + 50 * 6),
        ("qrnn", 3 * (2 * 6 * 8 + 8 * 6) + 50 * 6),
    ],
)
def test_a_bench(tmp_path, model, macs):
    config = dataclasses.replace(TINY, model=model, out=tmp_path)
    results = language_model.main(config)
    eager = "PyTorch, eager" + ", a loop over time" * (model == "qrnn")
    names = ["JAX, many steps a call", "JAX, one step a call", eager]
    assert list(results["rows"]) == names and not results["failed"]
    for row in results["rows"].values():
        assert 1 < row["flops"] / (3 * 120 * 2 * macs) < 1.3  # and activations
        assert row["tokens_per_second"] * row["median_ms"] == pytest.approx(120e3)
    assert list(results["rows"][names[0]]["over"]) == names[1:]
    page = (tmp_path / "b" / "bench.md").read_text()
    assert page.startswith(f"AWD-{model.upper()}, 2 layers, widths 6 and 8, 50 words, ")


# ---------------------------------------------------------------------------
# what is timed
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("bptt", [30, 31, 70])
def test_no_chunk_is_padded(bptt):
    settings = make_settings(dataclasses.replace(TINY, bptt=bptt))
    lengths = chunks.padded_lengths(
        100 * bptt, settings.bptt, settings.lengths, settings.chunks
    )
    assert len(lengths) == 2 and lengths[-1] == bptt


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_all_steps_are_run(steps_per_call):
    """All chunks in their order; the state goes on from turn to turn."""
    done = []

    def train(state, columns, table, first, stop, seed):
        done.extend((state, int(i)) for i in range(first, stop))
        return state + 1, np.zeros(3)

    compiled = SimpleNamespace(init=lambda seed: 0, train=train)
    config = dataclasses.replace(TINY, steps=3)
    program = language_model.jax_program(
        config, steps_per_call, compiled, None, None, work=1.0
    )
    program.run()
    program.run()
    calls = 3 // steps_per_call
    expected = [(i // steps_per_call, i % 3) for i in range(6)]
    assert done == expected and done[-1][0] == 2 * calls - 1
    assert program.calls == 3


def test_pytorch_runs_the_same_chunks(monkeypatch):
    config = dataclasses.replace(TINY, steps=3)
    tokens = np.arange(91)[:, None].repeat(4, 1) % 50
    seen = []

    def train_step(net, optimizer, *, tokens, targets, state, **options):
        seen.append((tokens.numpy(), targets.numpy(), state, options))
        return None, f"state {len(seen)}"

    monkeypatch.setattr(torch_awd, "train_step", train_step)
    settings = make_settings(config)
    language_model.torch_program(config, settings, False, tokens, work=1.0).run()
    np.testing.assert_array_equal(np.concatenate([x for x, *_ in seen]), tokens[:-1])
    np.testing.assert_array_equal(np.concatenate([y for _, y, *_ in seen]), tokens[1:])
    assert [state for _, _, state, _ in seen[1:]] == ["state 1", "state 2"]
    options = seen[0][3]
    assert options["rates"] == (0.1, 0.6, 0.2, 0.4, 0.5)  # the article's
    assert [options[name] for name in ("alpha", "beta", "clip")] == [3, 1.5, 0.12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 0}, "turns must be at least 1, got 0"),
        ({"words": 1}, "words must be at least 2, got 1"),
        ({"bptt": 29}, "bptt must be at least 30, got 29"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be a multiple of the 2 devices"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        language_model.main(dataclasses.replace(TINY, out=tmp_path, **changes))
    assert not list(tmp_path.iterdir())
