"""train.language_model on a tiny text: runs, restarts, refusals, the command line."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from runs import final_state, untimed
from tiny_language_model import (
    AVERAGED,
    EPOCHS,
    STEPS,
    TINY,
    WORDS,
    build_once,
    close,
    metrics,
    same_bits,
    share_programs,
    train_tiny,
    write_text,
)

import adamw_jax as aj
from train import language_model
from train.data import chunks, text
from train.evals import kneser_ney, perplexity
from train.recipes import language_model as recipe
from train.run import checkpoint, folder, log, trained_language_model

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

SIMPLE = {"layers": 1, "lengths": 1}  # quick to compile


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
    share_programs(monkeypatch)


def start(config=TINY, **changes):
    return language_model.main(dataclasses.replace(config, **changes))


@pytest.fixture
def run(tmp_path, data_dir):
    return functools.partial(start, out=tmp_path, data_dir=data_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The folder of a finished run of two seeds, which tests only read."""
    out = shutil.copytree(data_dir, tmp_path_factory.mktemp("finished") / "text")
    return train_tiny(out, seeds=2)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, which may be changed: the `run` of the same test resumes it."""
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------


def test_results(finished, data_dir):
    results = json.loads((finished / "results.json").read_text())
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "vocabulary.json", "metrics.jsonl", "curves.png"),
        *("checkpoints", "results.json", "best-0.npz", "best-1.npz"),
    }
    assert results["n"] == 2 and results["words"] == WORDS + 3
    assert results["changed"]["epochs"] == EPOCHS and "seeds" not in results["changed"]
    assert "NaN" not in (finished / "results.json").read_text()
    corpus = text.wikitext2(data_dir)
    words = json.loads((finished / "vocabulary.json").read_text())["words"]
    assert tuple(words) == corpus.vocabulary
    assert results["tokens"] == [len(split) for split in corpus[:3]] == [641, 121, 77]
    assert "article" not in results  # that is of another text
    for split in ("valid", "test"):
        values = results[split]["perplexity"]
        assert values["runs"] == [end[split]["perplexity"] for end in results["runs"]]
        assert values["mean"] == pytest.approx(statistics.mean(values["runs"]))
        assert values["std"] == pytest.approx(statistics.stdev(values["runs"]))
        tokens = getattr(corpus, split)
        assert results[split]["n-gram"] == kneser_ney.perplexity(
            corpus.train, tokens, WORDS + 3, words.index("<eos>")
        )
        end = results["runs"][0][split]
        assert end["tokens"] == len(tokens) - 1
        assert end["tokens_in_full_chunks"] == 0  # it is shorter than one
        assert end["perplexity_of_full_chunks"] is None
        assert end["with_cache"] != end["perplexity"]
    assert results["valid"]["perplexity"]["mean"] < 0.8 * WORDS  # a guess has 23
    config = json.loads((finished / "config.json").read_text())
    assert config["script"] == "language_model" and "jax" in config["versions"]
    assert imread(finished / "curves.png").std() > 0.05


def test_the_log(finished):
    results = json.loads((finished / "results.json").read_text())
    lines = metrics(finished)
    assert [line["event"] for line in lines] == (
        ["start"] + (["epoch"] * EPOCHS + ["end"]) * 2
    )
    first, last, end = lines[1], lines[EPOCHS], lines[EPOCHS + 1]
    assert (first["step"], last["step"], last["epoch"]) == (STEPS, EPOCHS * STEPS, 8)
    assert last["loss"] < first["loss"] < np.log(WORDS + 3) + 0.2
    assert last["valid_loss"] < first["valid_loss"] and last["total"] > last["loss"]
    assert np.exp(last["valid_loss"]) == pytest.approx(end["valid"]["perplexity"])
    seconds = [x["seconds"] for x in lines if x["event"] == "epoch"]
    assert results["train_seconds"] == pytest.approx(sum(seconds) / 2)
    covered = 4 * chunks.chunk_table(160, 8, 0, EPOCHS - 1)[:, 1].sum()
    assert last["tokens_per_second"] == pytest.approx(covered / last["seconds"])
    schedule = recipe.make_schedule(TINY, STEPS)
    assert last["learning_rate"] == schedule.at(EPOCHS * STEPS - 1)["learning_rate"]


def test_what_is_printed_and_the_same_command_again(run, tmp_path, capsys):
    results = run(seeds=2)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    out = capsys.readouterr().out
    assert out.count("valid ") >= 2 * EPOCHS and "tokens/s" in out and "left" in out
    assert f"epochs {EPOCHS}" in out and "Kneser-Ney" in out
    assert f"{results['test']['perplexity']['mean']:.2f} ±" in out
    assert "Published" not in out  # that is of another text

    # the same command again trains nothing and says the same
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run(seeds=2) == results
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "is already finished" in capsys.readouterr().out

    # with more seeds it goes on; fewer are of those that were asked for
    more = run(seeds=3)
    assert more["n"] == 3
    for split in ("valid", "test"):
        now, then = (x[split]["perplexity"]["runs"] for x in (more, results))
        assert now[:2] == then and now[2] not in then
    assert run()["n"] == 1


def test_the_trained_network_is_evaluated(run, tmp_path, data_dir):
    """From the checkpoint: the text by a plain loop, and the cache word by word."""
    results = run(theta=0.5, lambda_=0.2, window=9)
    state = final_state(tmp_path / "run")
    programs = build_once(TINY, WORDS + 3, 160)
    like = jax.eval_shape(programs.init, 0)
    leaves = jax.tree.leaves(state["params"])
    params = jax.tree.unflatten(jax.tree.structure(like.params), leaves)
    net = nnx.merge(nnx.graphdef(programs.net), params)
    tokens = text.wikitext2(data_dir).test
    raw = net(tokens[:-1, None], net.initial_state(1)).raw
    p = np.asarray(jax.nn.softmax(net.logits(raw)), np.float64)[:, 0]
    h, targets = np.asarray(raw, np.float64)[:, 0], tokens[1:]
    plain = p[np.arange(len(targets)), targets]
    mixed = plain.copy()
    for i in range(1, len(targets)):
        window = slice(max(0, i - 9), i)
        share = np.exp(0.5 * h[window] @ h[i])
        cache = share[targets[window] == targets[i]].sum() / share.sum()
        mixed[i] = 0.8 * plain[i] + 0.2 * cache
    found = results["runs"][0]["test"]
    assert found["perplexity"] == pytest.approx(np.exp(-np.log(plain).mean()), 1e-5)
    assert found["with_cache"] == pytest.approx(np.exp(-np.log(mixed).mean()), 1e-5)


@pytest.mark.slow
def test_two_runs_of_a_seed_are_bit_identical_and_two_seeds_differ(
    run, finished, tmp_path
):
    run(seeds=2)
    again = tmp_path / "run"
    assert untimed(finished) == untimed(again)
    same_bits(final_state(finished), final_state(again))
    lines = [x for x in untimed(finished) if x["event"] == "epoch"]
    losses = {line["seed"]: line["loss"] for line in lines}
    assert losses[0] != losses[1]
    # weights, lengths and masks of the second seed do not depend on the first
    run(seed=1, name="second")
    same_bits(final_state(finished, 1), final_state(tmp_path / "second", 1))


def test_every_epoch_has_its_chunks_and_starts_from_empty_states(finished, data_dir):
    """The command trains what calls of the program by epochs do."""
    columns = chunks.columns(text.wikitext2(data_dir).train, 4)
    programs = recipe.build(TINY, WORDS + 3, len(columns))
    padded = np.pad(columns, ((0, 34), (0, 0)))
    padded = jax.device_put(padded, recipe.shardings()[1](1))
    plan = chunks.plan(160, 8, 1, EPOCHS)
    program = recipe.compile_programs(programs, padded, plan.tables[0])
    number, steps, zero = map(np.int32, (1, STEPS, 0))
    state, lines = program.init(number), [x for x in metrics(finished) if x.get("seed")]
    for epoch in range(EPOCHS):
        table = chunks.chunk_table(160, 8, 1, epoch)
        table = np.pad(table, ((0, 33 - len(table)), (0, 0)))
        state, _ = program.train(state, padded, table, zero, steps, number)
        loss = state.sums[1] / state.sums[0]
        assert lines[epoch]["loss"] == pytest.approx(float(loss), rel=1e-5)
    saved = final_state(finished, 1)
    close(saved["params"], nnx.to_pure_dict(state.params), 1e-4)


@pytest.mark.slow
def test_averaging_in_the_command(run, tmp_path, data_dir):
    """The validation loss gets worse, so that it starts; the average is evaluated."""
    config = dataclasses.replace(TINY, **AVERAGED)
    results = run(config)
    state = final_state(tmp_path / "run")
    lines = [x for x in metrics(tmp_path / "run") if x["event"] == "epoch"]
    losses = [line["valid_loss"] for line in lines]
    steps = np.diff([0, *(line["step"] for line in lines)])
    start = next(
        i
        for i, x in enumerate(losses)
        if x > min(losses[: max(0, i - 1)], default=np.inf)
    )
    assert start < len(losses) - 1
    assert int(state["averaged"]) == steps[start + 1 :].sum()
    programs = build_once(config, WORDS + 3, 160)
    like = jax.eval_shape(programs.init, 0)
    valid = text.wikitext2(data_dir).valid
    structure = jax.tree.structure(like.params)
    average, params = (
        jax.tree.unflatten(structure, jax.tree.leaves(state[key]))
        for key in ("average", "params")
    )
    by_average, by_params = (
        np.exp(
            -perplexity.log_probs(
                programs.read, which, programs.net.initial_state(1), valid
            ).mean()
        )
        for which in (average, params)
    )
    evaluated = results["runs"][0]["valid"]["perplexity"]
    assert evaluated == pytest.approx(by_average, rel=1e-5)
    assert evaluated != pytest.approx(by_params, rel=1e-3)
    assert np.exp(losses[-1]) == pytest.approx(by_average, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_learns_as_much(run, finished):
    results = json.loads((finished / "results.json").read_text())
    wide, narrow = (
        runs[0]["valid"]["perplexity"]
        for runs in (results["runs"], run(dtype="bfloat16", lengths=1)["runs"])
    )
    assert narrow == pytest.approx(wide, rel=0.02) and narrow != wide


def test_a_folder_is_never_overwritten_without_being_asked(run, copied, tmp_path):
    before = (copied / "metrics.jsonl").read_bytes()
    message = r"learning_rate = 0.02, now 0.1; epochs = 8, now 2"
    with pytest.raises(ValueError, match=message):
        run(epochs=2, learning_rate=0.1)
    other = write_text(tmp_path / "other", words=12)
    with pytest.raises(ValueError, match="vocabulary = '[0-9a-f]+', now '[0-9a-f]+'"):
        run(data_dir=other)
    moved = write_text(tmp_path / "moved")  # the same text in another place
    assert run(data_dir=moved)["n"] == 1
    (moved / "valid.txt").write_text("w1 w2 w3\n")
    with pytest.raises(ValueError, match=r"tokens = \[641, 121, 77\], now \[641, 4,"):
        run(data_dir=moved)
    moved = write_text(tmp_path / "moved")
    lines = (moved / "valid.txt").read_text().splitlines(True)
    (moved / "valid.txt").write_text("".join(reversed(lines)))  # the same words
    with pytest.raises(ValueError, match="text = .* Choose another --name"):
        run(data_dir=moved)
    assert (copied / "metrics.jsonl").read_bytes() == before
    with folder.exclusive(copied):
        with pytest.raises(ValueError, match="another process is using"):
            run(seeds=2)
    run(overwrite=True)
    assert len(metrics(copied)) == 1 + EPOCHS + 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    message = "not the folder of a run of train.language_model"
    with pytest.raises(ValueError, match=message):
        run(name="mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_the_name_of_the_folder(data_dir):
    """Runs of the same recipe on two texts do not meet."""
    config = language_model.defaults("qrnn", "adamw")
    assert language_model.run_name(config) == "qrnn-adamw"
    config = dataclasses.replace(config, data_dir=data_dir)
    assert language_model.run_name(config) == f"qrnn-adamw-{data_dir.stem}"


@pytest.mark.slow
def test_a_qrnn(run, tmp_path, data_dir):
    config = dataclasses.replace(TINY, model="qrnn", recipe="adamw", **SIMPLE)
    results = run(config, optimizer="adamw", l2=0.0, name=None)
    assert [path.name for path in tmp_path.iterdir()] == [f"qrnn-adamw-{data_dir.stem}"]
    assert (results["model"], results["recipe"]) == ("qrnn", "adamw")


def test_other_devices_are_mentioned(run, copied, capsys):
    lines = metrics(copied)
    lines[0]["devices"] = "1 x abacus"
    log.rewrite_lines(copied / "metrics.jsonl", lines)
    results = run(seeds=3)
    assert "Warning: this run started with other devices" in capsys.readouterr().out
    assert results["devices"] == "1 x abacus and 2 x cpu"


@pytest.mark.slow
def test_divergence_stops_the_run_and_keeps_what_there_is(run, tmp_path):
    changes = {"optimizer": "sgd", "learning_rate": 1e6, "div": 1.0} | SIMPLE
    message = r"seed 0 diverged at step \d+: loss .*, learning rate 1e\+06"
    for _ in range(2):  # and so it does again
        with pytest.raises(FloatingPointError, match=message):
            run(**changes)
        lines = metrics(tmp_path / "run")
        assert lines[-1]["event"] == "diverged" and lines[-1]["step"] < STEPS
        assert not lines[-1]["loss"] < 2 * np.log(WORDS + 3)
    assert imread(tmp_path / "run" / "curves.png").std() > 0.01
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_divergence_in_the_last_step_of_an_epoch(run, tmp_path, monkeypatch):
    """Its loss is that before its update; the validation loss tells."""
    compile_programs = recipe.compile_programs

    def compile_badly(*args):
        program = compile_programs(*args)

        def train(state, *args):
            state, losses = program.train(state, *args)
            bad = np.nan if int(state.step) == EPOCHS * STEPS else 1.0
            params = jax.tree.map(lambda p: p * np.float32(bad), state.params)
            return state._replace(params=params), losses

        return program._replace(train=train)

    monkeypatch.setattr(recipe, "compile_programs", compile_badly)
    with pytest.raises(FloatingPointError, match="seed 0 diverged"):
        run()
    assert [x["event"] for x in metrics(tmp_path / "run")][-1] == "diverged"


@pytest.mark.slow
def test_after_a_divergence_it_resumes_from_the_last_checkpoint(
    run, finished, tmp_path, monkeypatch
):
    """Every program is as it was: what is made up is a loss."""
    compile_programs = recipe.compile_programs

    def compile_badly(*args):
        program = compile_programs(*args)

        def train(state, columns, table, first, stop, number):
            epoch = int(state.step) // STEPS
            state, losses = program.train(state, columns, table, first, stop, number)
            bad = epoch == 1 and int(stop) == 8
            return state, losses.at[7].set(np.nan) if bad else losses

        return program._replace(train=train)

    with monkeypatch.context() as patch:
        patch.setattr(language_model, "SEGMENT_SECONDS", 1e-9)
        patch.setattr(recipe, "compile_programs", compile_badly)
        with pytest.raises(FloatingPointError, match=f"step {STEPS + 7}:"):
            run(save_every=0.0)
    folder = tmp_path / "run"
    with checkpoint.open_folder(folder / "checkpoints" / "0") as checkpoints:
        assert checkpoints.latest.step == STEPS + 7
    assert [line["event"] for line in metrics(folder)] == ["start", "epoch", "diverged"]
    run()
    assert "diverged" not in [line["event"] for line in metrics(folder)]
    first_seed = [x for x in untimed(finished) if x["seed"] == 0]
    assert untimed(folder) == first_seed
    same_bits(final_state(folder), final_state(finished))


@pytest.mark.slow
def test_any_optax_optimizer(run, tmp_path):
    results = run(
        optimizer="optax.lion",
        learning_rate=1e-3,
        l2=0.0,
        optimizer_args={"b2": 0.98},
        **SIMPLE,
    )
    assert results["changed"]["optimizer"] == "optax.lion"
    assert "mu" in str(jax.tree.structure(final_state(tmp_path / "run")["opt"]))


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboardX")
    run(tensorboard=True)
    (events,) = (tmp_path / "run" / "tensorboard" / "0").iterdir()
    for key in (b"valid_loss", b"learning_rate", b"b1"):
        assert key in events.read_bytes()


# ---------------------------------------------------------------------------
# one text of one's own, and the best network
# ---------------------------------------------------------------------------


def write_notes(path):
    """Of the sizes of the other text. What is held out follows other rules, so that
    the longer a network learns, the worse it does there."""
    rng, words = np.random.default_rng(1), []
    for part, size in enumerate((560, 140)):
        chances = np.random.default_rng(part).dirichlet(np.full(WORDS, 0.05), WORDS)
        word = 0
        for _ in range(size):
            word = rng.choice(WORDS, p=0.9 * chances[word] + 0.1 / WORDS)
            words.append(f"w{word}")
    lines = (" ".join(words[i : i + 7]) for i in range(0, len(words), 7))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """The folder of a run on a file, and what it printed."""
    out = tmp_path_factory.mktemp("own")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        folder = train_tiny(out, data_dir=write_notes(out / "notes.txt"))
    return folder, printed.getvalue()


def test_a_text_in_one_file(overfitted):
    folder, printed = overfitted
    notes = folder.parent / "notes.txt"
    first, second, *_ = printed.splitlines()
    assert first == (
        f"{notes}, split in order, at the ends of lines: 640, 80, 80 words to train, "
        "validate and test."
    )
    assert second.startswith(
        "640 words to train: small settings (or --large), 2 layers"
    )
    results = json.loads((folder / "results.json").read_text())
    assert (results["size"], results["unit"]) == ("small", "words")
    assert results["changed"]["epochs"] == EPOCHS and "unit" not in results["changed"]
    assert json.loads((folder / "vocabulary.json").read_text())["unit"] == "words"
    for split in ("valid", "test"):
        assert results[split]["unknown"] == 0.0
    assert "Unknown words, <unk>: 0.0% / 0.0%." in printed


def test_the_best_network_is_kept_and_evaluated(overfitted):
    folder, printed = overfitted
    lines = [line for line in metrics(folder) if line["event"] == "epoch"]
    losses = [line["valid_loss"] for line in lines]
    index = int(np.argmin(losses))
    assert index < EPOCHS - 1
    best = trained_language_model.load(folder, network="best")
    last = trained_language_model.load(folder)
    assert (best.epoch, best.step) == (index + 1, lines[index]["step"])
    assert (last.epoch, last.step) == (None, EPOCHS * STEPS)
    corpus = text.load(folder.parent / "notes.txt")
    (end,) = [line for line in metrics(folder) if line["event"] == "end"]
    read = perplexity.reader(best.graphdef)
    for network, found in ((best, end["best"]), (last, end)):
        net = nnx.merge(network.graphdef, network.params)
        for split in ("valid", "test"):
            tokens = getattr(corpus, split)
            raw = net(tokens[:-1, None], net.initial_state(1)).raw
            logs = jax.nn.log_softmax(net.logits(raw))[:, 0]
            plain = np.asarray(logs, np.float64)[np.arange(len(raw)), tokens[1:]]
            expected = np.exp(-plain.mean())
            assert found[split]["perplexity"] == pytest.approx(expected, rel=1e-5)
        start = net.initial_state(1)
        loss = -perplexity.log_probs(read, network.params, start, corpus.valid).mean()
        at = index if network is best else -1
        assert losses[at] == pytest.approx(loss, rel=1e-4)
    assert {key: end["best"][key] for key in ("epoch", "step", "valid_loss")} == {
        key: lines[index][key] for key in ("epoch", "step", "valid_loss")
    }
    assert (
        f"Seed 0: best at epoch {index + 1} of {EPOCHS}, then it overfits (validation "
        f"perplexity {np.exp(losses[index]):.2f}, "
        f"{end['valid']['perplexity']:.2f} at the end). The best network is in "
        f"best-0.npz: test perplexity {end['best']['test']['perplexity']:.2f}"
    ) in printed


def test_an_interrupted_run_keeps_the_same_best_network(
    overfitted, tmp_path, monkeypatch
):
    """Stopped when the best one has been written, but not the line of its epoch."""
    whole, _ = overfitted
    (end,) = [line for line in metrics(whole) if line["event"] == "end"]
    append_line = log.append_line

    def append(path, line):
        if line["event"] == "epoch" and line["epoch"] == end["best"]["epoch"]:
            raise Killed
        append_line(path, line)

    settings = {"out": tmp_path, "data_dir": whole.parent / "notes.txt"}
    with monkeypatch.context() as patch:
        patch.setattr(log, "append_line", append)
        with pytest.raises(Killed):
            start(**settings)
    stopped = tmp_path / "run"
    assert (stopped / "best-0.npz").exists()
    start(**settings)
    assert untimed(stopped) == untimed(whole)
    one, other = (np.load(folder / "best-0.npz") for folder in (stopped, whole))
    same_bits(dict(one), dict(other))


def test_a_run_that_kept_no_best_network_goes_on(copied, run, capsys):
    """Of an earlier version: nothing to evaluate, and nothing to load."""
    for path in copied.glob("best-*.npz"):
        path.unlink()
    assert trained_language_model.load(copied, network="best").network == "last"
    lines = [x for x in metrics(copied) if x["event"] != "end" or x["seed"] == 0]
    log.rewrite_lines(copied / "metrics.jsonl", lines)
    run(seeds=2)
    ends = [line for line in metrics(copied) if line["event"] == "end"]
    assert set(ends[1]["best"]) == {"epoch", "step", "valid_loss"}


# ---------------------------------------------------------------------------
# what it refuses
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam.*got 'lion'"),
        ({"optimizer": "optax.lyon"}, "cannot import 'optax.lyon'"),
        ({"optimizer": "optax.lion"}, "l2 must be 0 with optax.lion.*1.2e-06"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 with adam.*0.1"),
        ({"optimizer": "adamw"}, "l2 must be 0 with adamw.*1.2e-06"),
        ({"optimizer_args": {"bee": 1.0}}, "optimizer_args.*bee"),
        ({"optimizer": "optax.lbfgs", "l2": 0.0}, "not a gradient"),
        ({"optimizer": "math.pow", "l2": 0.0}, "optimizer.*math.pow"),
        ({"words_dropout": 1.0}, r"words_dropout must be in \[0, 1\), got 1.0"),
        ({"input_dropout": -0.1}, "input_dropout must be.*got -0.1"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be.*got 1.5"),
        ({"output_dropout": math.nan}, "output_dropout must be.*got nan"),
        ({"weight_dropout": 1.0}, "weight_dropout must be.*got 1.0"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lengths": 0}, "lengths must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"theta": -1.0}, "theta must be at least 0 and finite, got -1.0"),
        ({"theta": math.inf}, "theta must be.*got inf"),
        ({"lambda_": 1.1}, r"lambda_ must be in \[0, 1\], got 1.1"),
        ({"average_after": 0}, "average_after must be None or at least 1, got 0"),
        ({"seed": 2**31 - 1, "seeds": 2}, "seed must be in"),
        ({"batch_size": 3}, "batch_size must be a multiple of the 2 devices.*got 3"),
        ({"batch_size": 0}, "batch_size must be a multiple.*got 0"),
        ({"batch_size": 322}, r"batch_size must be in \[1, 320\].*641 tokens, got 322"),
        ({"bptt": 4}, "bptt must be at least 5, got 4"),
        ({"cudnn": True}, "cudnn must be False, except for"),
        ({"bptt": 81}, "rows must be at least 162 for bptt=81.*got 160: a smaller b"),
        ({"learning_rate": -1.0}, "learning_rate must be.*got -1.0"),
        ({"pct": 0.5}, "pct must be.*got 0.5"),
        ({"div": 0.0}, "div must be.*got 0.0"),
        ({"b1": (1.0, 0.5)}, r"b1.* must be.*got 1.0"),
        ({"l2": -1.0}, "l2 must be.*got -1.0"),
        ({"chunks": "chunky"}, "chunks must be one of article, salesforce, got"),
        ({"data_dir": Path("nowhere")}, "'nowhere' does not exist"),
        ({"unit": "letters"}, "unit must be None or one of words, .*got 'letters'"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_made(
    run, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gru"}, "model must be.*got 'gru'"),
        ({"recipe": "adam"}, "recipe must be.*got 'adam'"),
        ({"dtype": "float16"}, "dtype must be.*got 'float16'"),
        ({"ar": "wet"}, "ar must be.*got 'wet'"),
        ({"schedule": "cosine"}, "schedule must be.*got 'cosine'"),
        ({"pointer": "grave"}, "pointer must be.*got 'grave'"),
        ({"optimizer": "optax.lion", "l2": 0.0, "b2": 0.5}, "b2 must be left at its"),
        ({"optimizer": "optax.lion", "l2": 0.0, "b1": (0.9, 0.8)}, "b1 must be left"),
        ({"optimizer": "sgd", "b2": 0.5}, "b2 must be left at its"),
        ({"optimizer": "optax.constant_schedule", "l2": 0.0}, "not a gradient"),
        ({"optimizer": "math.pi", "l2": 0.0}, "optimizer.*math.pi"),
        ({"optimizer": "..lion", "l2": 0.0}, "cannot import '..lion'"),
    ],
)
def test_what_the_command_line_would_refuse_is_refused_in_code(
    run, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("valid.txt", None, "has no valid.txt"),
        ("test.txt", b" \n\n", "test.txt is empty"),
        ("train.txt", b"w1 w2\n\xff", "line 2 is not"),
    ],
)
def test_bad_text_is_refused_before_a_folder_is_made(
    run, tmp_path, name, content, message
):
    folder = write_text(tmp_path / "text")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(data_dir=folder, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_shortest_text(run, tmp_path):
    """A word and the end of its line to judge by: one token to predict."""
    folder = write_text(tmp_path / "text")
    (folder / "valid.txt").write_text("w1\n")
    (folder / "test.txt").write_text("w1 unheard-of\n")
    results = run(data_dir=folder)
    assert results["runs"][0]["valid"]["tokens"] == 1
    assert results["runs"][0]["valid"]["with_cache"] == pytest.approx(
        results["runs"][0]["valid"]["perplexity"]
    )
    assert results["runs"][0]["test"]["tokens"] == 2


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "model", "name", "tokens"),
    [
        ([], "lstm", "adam-l2", None),
        (["qrnn"], "qrnn", "adam-l2", None),
        (["--model", "qrnn"], "qrnn", "adam-l2", None),
        (["--recipe", "adamw", "--data-dir", "x"], "lstm", "adamw", 641),
        (["--data-dir=x", "--small"], "lstm", "adam-l2", 641),
        (["qrnn", "--data-dir=x", "--recipe=salesforce"], "qrnn", "salesforce", 10**6),
        (["--data_dir", "x"], "lstm", "adam-l2", 10**6),
        (["--data_dir", "x", "--small"], "lstm", "adam-l2", 10**6),
        (["--data_dir", "x", "--large"], "lstm", "adam-l2", 641),
        (["--size", "large"], "lstm", "adam-l2", None),
    ],
)
def test_model_recipe_and_text_change_the_other_defaults(
    args, model, name, tokens, data_dir, monkeypatch
):
    """From a million training tokens on, the article's settings."""
    corpus = text.load(data_dir)
    larger = corpus._replace(train=np.zeros(tokens or 0, np.int32))
    monkeypatch.setattr(text, "load", lambda *_: larger)
    config = language_model.parse_args(args)
    small = (tokens or 0) < 10**6
    if "--small" in args or "large" in str(args):
        small = "--small" in args
    expected = language_model.defaults(model, name, small, tokens)
    place = Path("x") if tokens else None
    assert config == dataclasses.replace(expected, data_dir=place)
    assert config.size == ("small" if small else "large")
    given = ["--epochs", "7", "--b1", "0.9", "0.6", "--optimizer-args", "eps", "1e-6"]
    more = {"epochs": 7, "b1": (0.9, 0.6), "optimizer_args": {"eps": 1e-6}}
    assert language_model.parse_args([*args, *given]) == dataclasses.replace(
        config, **more
    )


def test_the_command_line_reads_the_text(tmp_path):
    """As the run does, by words or characters; not for --large or --help."""
    path = tmp_path / "notes.txt"
    path.write_text("word " * 50_000)
    arguments = ["--data-dir", str(path), "--min-count", "3"]
    config = language_model.parse_args(arguments)
    assert config == dataclasses.replace(
        language_model.defaults(tokens=40_001), data_dir=path, min_count=3
    )
    assert (config.batch_size, config.chunks) == (20, "article")
    config = language_model.parse_args([*arguments, "--unit", "characters"])
    assert (config.batch_size, config.unit) == (20, "characters")
    path.write_text("word " * 40_000)
    config = language_model.parse_args(arguments)
    assert (config.batch_size, config.chunks) == (8, "salesforce")
    path.write_bytes(b"\0")
    with pytest.raises(ValueError, match="byte 0 is NUL"):
        language_model.parse_args(arguments)
    assert language_model.parse_args([*arguments, "--large"]).width == 1150
    with pytest.raises(SystemExit) as stop:
        language_model.parse_args([*arguments, "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("args", [["gru"], ["--recipe", "sgd"], ["--bppt", "7"]])
def test_what_the_command_line_refuses(args, capsys):
    with pytest.raises(SystemExit):
        language_model.parse_args(args)
    assert args[-1] in capsys.readouterr().err or "bppt" in args[0]


# ---------------------------------------------------------------------------
# killed runs
# ---------------------------------------------------------------------------

MOMENTS = (  # in this order, each on what the one before has left
    "before the checkpoint",
    "in the line",
    "in the checkpoint",
    "after the line",
    "before the end",
)


def kill_at(moment, kill, patch):
    """Calls `kill` at a moment of training.

    A step is a call of the program, and each is saved: also in the middle of an epoch.
    """
    append_line, save, saved = log.append_line, checkpoint.save, 0

    def append(path, line):
        point = moment, line["event"], line.get("epoch")
        if point == ("in the line", "epoch", 2):
            with path.open("a") as file:
                file.write(json.dumps(line)[:40])
            kill()
        if point == ("before the end", "end", None):
            kill()
        append_line(path, line)
        if point == ("after the line", "epoch", 4):
            kill()

    def save_and_kill(checkpoints, step, state):
        nonlocal saved
        saved += 1
        if moment == "before the checkpoint" and saved == 8:
            kill()
        save(checkpoints, step, state)
        if moment == "in the checkpoint" and saved == 30:
            folder = Path(checkpoints.directory)
            while not any("tmp" in path.name for path in folder.iterdir()):
                assert not (folder / str(step)).exists(), "too late"
            kill()

    patch(language_model, "SEGMENT_SECONDS", 1e-9)
    patch(log, "append_line", append)
    patch(checkpoint, "save", save_and_kill)


def check_killed(killed, whole):
    assert untimed(killed) == untimed(whole)
    same_bits(final_state(killed), final_state(whole))
    assert final_state(killed)["averaged"] > 0
    one, other = (dict(np.load(path / "best-0.npz")) for path in (killed, whole))
    same_bits(one, other)
    starts = [line for line in metrics(killed) if line["event"] == "start"]
    assert len(starts) == len(MOMENTS) + 1
    results, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (killed, whole)
    )
    for key in ("valid", "test", "words", "tokens"):
        assert results[key] == expected[key]


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, and while an average is being taken.

    As if killed, in this process: a checkpoint that is half written is made up.
    """
    config = dataclasses.replace(TINY, **AVERAGED)
    run(config)  # the whole run, in segments of its own
    killed = tmp_path / "killed"

    def kill():
        raise Killed

    for moment in MOMENTS:
        with monkeypatch.context() as patch:
            kill_at(moment, kill, patch.setattr)
            with pytest.raises(Killed):
                run(config, name="killed", save_every=0.0)
        assert not (killed / "results.json").exists()
        if moment == "in the checkpoint":
            steps = killed / "checkpoints" / "0"
            last = max(steps.iterdir(), key=lambda path: int(path.name))
            half = last.with_name(f"{int(last.name) + 1}.orbax-checkpoint-tmp")
            shutil.copytree(last, half)
    capsys.readouterr()
    run(config, name="killed", save_every=0.0)
    assert "tokens/s" not in capsys.readouterr().out  # the last step was saved already
    check_killed(killed, tmp_path / "run")


def child(data_dir, out, moment):
    """The command in a process of its own, which kills itself at a moment."""
    jax.config.update("jax_num_cpu_devices", 2)
    kill_at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
    config = dataclasses.replace(TINY, **AVERAGED, save_every=0.0)
    language_model.main(
        dataclasses.replace(config, data_dir=Path(data_dir), out=Path(out))
    )


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(run, tmp_path, data_dir, cache):
    """With kill -9. In the middle of an epoch, and while an average is being taken."""

    def start_child(moment):
        args = str(data_dir), str(tmp_path / "killed"), moment
        code = f"import test_language_model as t; t.child(*{args!r})"
        here = Path(__file__).parent
        paths = [str(here), str(here.parent), str(here.parents[1])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        killed = -signal.SIGKILL if moment else 0
        assert done.returncode == killed, done.stdout + done.stderr
        return done.stdout

    # the whole run in this process, in segments of its own
    run(dataclasses.replace(TINY, **AVERAGED))
    killed = tmp_path / "killed" / "run"
    for moment in MOMENTS:
        start_child(moment)
        assert not (killed / "results.json").exists()
    out = start_child(None)
    assert "tokens/s" not in out  # the last step was saved already
    check_killed(killed, tmp_path / "run")


def test_hyperparameters_are_in_the_restored_state(copied):
    programs = build_once(TINY, WORDS + 3, 160)
    like = jax.jit(programs.init)(0)
    with checkpoint.open_folder(copied / "checkpoints" / "0") as checkpoints:
        state = checkpoint.restore(checkpoints, like)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert set(aj.current_hyperparams(state.opt)) >= {"learning_rate", "b1", "b2"}
