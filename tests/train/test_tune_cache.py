"""train.tune_cache on a tiny run: grid, evaluation, files, errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from tiny_language_model import change_config, train_tiny

from train import tune_cache
from train.data import text
from train.evals import neural_cache, perplexity
from train.run import log
from train.run.trained_language_model import load

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")

WORDS = [f"w{i}" for i in range(20)]
GRID = {
    "windows": (5, 20, 60),
    "thetas": (0.0, 0.3, 1.0, 4.0),
    "lambdas": (0.05, 0.2, 0.4, 0.6),
}


def lines(seed, count):
    """Of a word that is repeated, so that looking it up is worth much."""
    rng = np.random.default_rng(seed)
    chosen = (rng.choice(WORDS, 3)[rng.integers(0, 3, 9)] for _ in range(count))
    return "".join(f"{' '.join(line)}\n" for line in chosen)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("runs")
    for i, (name, count) in enumerate({"train": 64, "valid": 40, "test": 50}.items()):
        (folder / f"{name}.txt").write_text(lines(i, count))
    return train_tiny(folder, theta=0.5, lambda_=0.1, window=30)


@pytest.fixture
def copy(run, tmp_path):
    """A copy, which may be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def evaluated(folder, split, window, theta, lambda_):
    """As training evaluates, a segment at a time."""
    trained = load(folder)
    net = nnx.merge(trained.graphdef, trained.params)
    tokens = getattr(text.wikitext2(trained.data_dir), split)
    return perplexity.evaluate(
        perplexity.segments(
            perplexity.reader(trained.graphdef),
            trained.params,
            net.initial_state(1),
            tokens,
        ),
        len(tokens) - 1,
        theta=theta,
        lambda_=lambda_,
        window=window,
        convention=trained.config.pointer,
    )


# ---------------------------------------------------------------------------
# the job
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_job(copy, capsys):
    results = tune_cache.main(tune_cache.Config(copy, **GRID))
    printed = capsys.readouterr().out

    # the best of the grid
    grid = np.array(results["perplexities"])
    assert grid.shape == (3, 4, 4)
    best = [
        values[i]
        for values, i in zip(
            GRID.values(), np.unravel_index(grid.argmin(), grid.shape), strict=True
        )
    ]
    assert [*results["tuned"].values()] == best
    assert results["valid"]["tuned"] == pytest.approx(grid.min(), rel=1e-6)
    assert results["valid"]["tuned"] < 0.9 * results["valid"]["no cache"]
    assert results["valid"]["tuned"] < results["valid"]["the run's"]

    # as training evaluates, with these values and with its own
    (end,) = log.read_events(copy, "end", 0)
    assert results["the run's"] == {"window": 30, "theta": 0.5, "lambda_": 0.1}
    for split in ("valid", "test"):
        tuned, expected = results[split], evaluated(copy, split, *best)
        assert tuned["tuned"] == pytest.approx(expected["with_cache"], rel=2e-6)
        for values in (end[split], evaluated(copy, split, 30, 0.5, 0.1)):
            assert tuned["no cache"] == pytest.approx(values["perplexity"], rel=2e-6)
            assert tuned["the run's"] == pytest.approx(values["with_cache"], rel=2e-6)

    # any other cell as well
    i, j, k = 0, 3, 0
    triple = [values[n] for values, n in zip(GRID.values(), (i, j, k), strict=True)]
    expected = evaluated(copy, "valid", *triple)["with_cache"]
    assert grid[i, j, k] == pytest.approx(expected, rel=2e-6)

    # files
    content = json.loads((copy / "cache-0.json").read_text())
    assert content == json.loads(json.dumps(results, default=str))
    assert content["seed"] == 0 and content["ended"] and "versions" in content
    assert content["step"] == end["step"]
    picture = imread(copy / "cache-0.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1
    assert not list(copy.glob("*.tmp"))

    # what is printed
    assert f"{copy}, seed 0, last network, step {end['step']:,}\n" in printed
    assert content["network"] == "last"
    rows = [line.split() for line in printed.splitlines()]
    both = [f"{results[split]['tuned']:.2f}" for split in ("valid", "test")]
    assert ["tuned", *(f"{value:.4g}" for value in best), *both] in rows
    both = [f"{results[split]['no cache']:.2f}" for split in ("valid", "test")]
    assert ["no", "cache", *both] in rows


@pytest.mark.slow
def test_the_pointer_is_that_of_the_run(copy):
    """Salesforce's is used only where there are as many pairs as in the window."""
    article = tune_cache.main(tune_cache.Config(copy, **GRID))
    change_config(copy, pointer="salesforce")
    theirs = tune_cache.main(tune_cache.Config(copy, **GRID))
    one, other = (np.array(x["perplexities"]) for x in (article, theirs))
    assert np.abs(one - other).max() > 0.01
    best = theirs["tuned"].values()
    for split in ("valid", "test"):
        expected = evaluated(copy, split, *best)["with_cache"]
        assert theirs[split]["tuned"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_the_edge_of_the_grid_is_told(copy, capsys):
    low = {"windows": (20,), "thetas": (0.5,), "lambdas": (0.001, 0.002)}
    results = tune_cache.main(tune_cache.Config(copy, **low))
    assert results["edges"] == ["lambdas 0.002"]
    printed = capsys.readouterr().out
    assert "On the edge of the grid: lambdas 0.002. There may be better." in printed
    one = {"windows": (20,), "thetas": (1.0,), "lambdas": (0.2,)}
    results = tune_cache.main(tune_cache.Config(copy, **one, overwrite=True))
    assert results["edges"] == []
    assert "edge of the grid" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "n", "expected"),
    [
        ((20, 1.0, 0.2), 100, []),
        ((60, 1.0, 0.6), 100, ["windows 60", "lambdas 0.6"]),
        ((60, 1.0, 0.2), 60, []),  # there are no more words
        ((5, 0.0, 0.05), 100, ["windows 5", "lambdas 0.05"]),  # nothing below theta 0
        ((20, 4.0, 0.2), 100, ["thetas 4"]),
    ],
)
def test_edges(tmp_path, best, n, expected):
    tuned = neural_cache.Tuned(np.zeros(()), *best)
    config = tune_cache.Config(tmp_path, **GRID)
    assert tune_cache.find_edges(config, tuned, n) == expected


def test_the_grid_has_the_best_of_small_and_large_networks(tmp_path):
    """Inside: the article's, and about what is best for the embedded text."""
    config = tune_cache.Config(tmp_path)
    tune_cache.check(config)
    for best in ((3785, 0.662, 0.1279), (500, 1.5, 0.3)):
        grid = config.windows, config.thetas, config.lambdas
        for value, values in zip(best, grid, strict=True):
            assert value in values[1:-1]


def test_segments_are_put_together(run, monkeypatch):
    """A text of many segments is the same stream."""
    trained = load(run)
    tokens = text.wikitext2(trained.data_dir).valid
    whole = tune_cache.predict(perplexity.reader(trained.graphdef), trained, tokens)
    monkeypatch.setattr(perplexity, "ROWS", 2)
    monkeypatch.setattr(perplexity, "BLOCK", 2)
    pieces = tune_cache.predict(perplexity.reader(trained.graphdef), trained, tokens)
    np.testing.assert_array_equal(whole.targets, tokens[1:])
    np.testing.assert_array_equal(pieces.targets, tokens[1:])
    assert whole.states.shape == (len(tokens) - 1, 8)
    np.testing.assert_allclose(pieces.states, whole.states, atol=2e-5)
    np.testing.assert_allclose(pieces.log_probs, whole.log_probs, atol=2e-5)


# ---------------------------------------------------------------------------
# what is there already, and what is refused
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_of_another_grid_is_lost(copy):
    config = tune_cache.Config(copy, **GRID)
    before = tune_cache.main(config)
    assert tune_cache.main(config)["perplexities"] == before["perplexities"]
    file = copy / "cache-0.json"
    content = file.read_text()
    other = dataclasses.replace(config, thetas=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"cache-0.json has other thetas; pass --ov"):
        tune_cache.main(other)
    assert file.read_text() == content
    tune_cache.main(dataclasses.replace(other, overwrite=True))
    assert json.loads(file.read_text())["thetas"] == [0.5, 1.0]
    file.write_text("my notes")
    with pytest.raises(ValueError, match="has other script, step"):
        tune_cache.main(config)
    assert file.read_text() == "my notes"


def test_data_that_has_moved(copy, tmp_path):
    folder = load(copy).data_dir
    change_config(copy, data_dir=str(tmp_path / "gone"))
    small = {"windows": (20,), "thetas": (1.0,), "lambdas": (0.2,)}
    config = tune_cache.Config(copy, **small)
    with pytest.raises(ValueError, match=r"no longer in .*gone: .* --data-dir"):
        tune_cache.main(config)
    found = tune_cache.main(dataclasses.replace(config, data_dir=folder))
    expected = log.read_events(copy, "end", 0)[0]["test"]["perplexity"]
    assert found["test"]["no cache"] == pytest.approx(expected, rel=2e-6)


def test_data_of_another_vocabulary(copy, tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("some other words\n" * 9)
    config = tune_cache.Config(copy, data_dir=tmp_path)
    match = (
        r"^data_dir: the vocabulary of .* \(6 words\) is not that of .* \(23 words\)"
    )
    with pytest.raises(ValueError, match=match):
        tune_cache.main(config)


def test_data_of_a_run_of_the_embedded_text(copy, tmp_path, monkeypatch):
    corpus = text.wikitext2(load(copy).data_dir)
    change_config(copy, data_dir=None)
    with pytest.raises(ValueError, match="data_dir must be None for"):
        tune_cache.main(tune_cache.Config(copy, data_dir=tmp_path))
    trained = load(copy)
    monkeypatch.setattr(text, "pydoc_topics", lambda: corpus)
    assert tune_cache.load_text(tune_cache.Config(copy), trained) is corpus
    other = corpus._replace(vocabulary=corpus.vocabulary[::-1])
    monkeypatch.setattr(text, "pydoc_topics", lambda: other)
    with pytest.raises(ValueError, match="vocabulary of this Python's documentation"):
        tune_cache.load_text(tune_cache.Config(copy), trained)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": ()},
        {"windows": (0, 5)},
        {"thetas": (-0.1,)},
        {"thetas": (1.0, float("inf"))},
        {"thetas": (float("nan"),)},
        {"lambdas": (0.5, 1.0)},
        {"lambdas": (0.3, 0.2)},
        {"lambdas": (0.2, 0.2)},
    ],
)
def test_grids_that_are_refused(run, change):
    (option,) = change
    with pytest.raises(
        ValueError, match=f"^{option} must be one or more increasing numbers"
    ):
        tune_cache.main(tune_cache.Config(run, **change))


def test_no_such_run(run, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        tune_cache.main(tune_cache.Config(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint of seed 3, only of 0"):
        tune_cache.main(tune_cache.Config(run, seed=3))


LINE = ["--windows", "5", "20", "--thetas", "0.5", "1", "--lambdas", "0.2"]


def test_the_command_line(run):
    config = tune_cache.parse_args([str(run), *LINE])
    grid = {"windows": (5, 20), "thetas": (0.5, 1.0), "lambdas": (0.2,)}
    assert config == tune_cache.Config(run, **grid)
    with pytest.raises(SystemExit):
        tune_cache.parse_args([])


@pytest.mark.slow
def test_the_command_in_a_process(copy, cache):
    done = subprocess.run(
        [sys.executable, "-m", "train.tune_cache", str(copy), *LINE],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    content = json.loads((copy / "cache-0.json").read_text())
    assert content["windows"] == [5, 20] and content["thetas"] == [0.5, 1.0]
    assert content["lambdas"] == [0.2]
    assert f"{content['test']['tuned']:.2f}\n" in done.stdout


def test_other_texts_of_the_same_words_are_refused(run, tmp_path):
    data_dir = shutil.copytree(run.parent, tmp_path / "text")
    valid, test = (data_dir / f"{name}.txt" for name in ("valid", "test"))
    valid.write_text(test.read_text())
    with pytest.raises(ValueError, match="but other texts: were they changed"):
        tune_cache.main(tune_cache.Config(run, data_dir=data_dir))
