"""Reading what a run of train.language_model leaves in its folder, also in progress."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tiny_language_model import (
    TINY,
    build_once,
    change_config,
    same_bits,
    save_state,
    train_tiny,
)

from train.data import text
from train.recipes import language_model as recipe
from train.run import checkpoint, log
from train.run.folder import exclusive
from train.run.trained_language_model import (
    Best,
    describe,
    load,
    read_best,
    save_best,
)

pytestmark = pytest.mark.usefixtures("lenient", "fast_compile")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with a text of its own, which tests only read."""
    return train_tiny(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(run, tmp_path):
    """A copy, which may be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def test_load(run):
    trained = load(run)
    vocabulary = text.wikitext2(run.parent).vocabulary
    assert trained.vocabulary == vocabulary
    settings = json.loads((run / "config.json").read_text())
    for key, value in vars(trained.config).items():
        assert json.loads(json.dumps(value, default=str)) == settings[key]
    recipe.check(trained.config)
    assert trained.data_dir == run.parent
    (end,) = log.read_events(run, "end", 0)
    assert (trained.seed, trained.step, trained.ended) == (0, end["step"], True)
    with checkpoint.open_folder(run / "checkpoints" / "0") as checkpoints:
        programs = build_once(TINY, len(vocabulary), 160)
        like = jax.eval_shape(programs.init, 0)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like
        )
        state = checkpoint.restore(checkpoints, like)
    same_bits(trained.params, state.params)
    net = nnx.merge(trained.graphdef, trained.params)
    assert net.embedding.shape == (len(vocabulary), TINY.embedding)
    assert len(jax.tree.leaves(trained.params)[0].sharding.device_set) == 1


def test_load_takes_the_average_once_it_has_begun(copy):
    trained = load(copy)
    change_config(copy, average_after=5)
    twice = jax.tree.map(lambda p: 2 * p, trained.params)
    for averaged, expected in ((-1, trained.params), (0, trained.params), (3, twice)):
        step = trained.step + 2 + averaged
        save_state(copy, step, trained.params, twice, averaged)
        loaded = load(copy)
        assert loaded.step == step
        same_bits(loaded.params, expected)


def test_load_changes_nothing_and_minds_no_other_process(copy):
    """What a process that trains has not finished to write stays there."""
    steps = copy / "checkpoints" / "0"
    (last,) = steps.iterdir()
    half = steps / f"{int(last.name) + 1}.orbax-checkpoint-tmp"
    shutil.copytree(last, half)
    (copy / "checkpoints" / "1").mkdir()
    (copy / "checkpoints" / "notes.txt").touch()

    def everything():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in (copy, *copy.rglob("*"))
        }

    before = everything()
    with exclusive(copy):
        assert load(copy).step == int(last.name)
    with pytest.raises(ValueError, match="no checkpoint of seed 1, only of 0$"):
        load(copy, 1)
    assert everything() == before


def test_load_of_a_run_in_progress(copy):
    path = copy / "metrics.jsonl"
    log.rewrite_lines(path, [x for x in log.read_lines(path) if x["event"] != "end"])
    trained = load(copy)
    assert not trained.ended
    step = f"step {trained.step:,} of an unfinished run"
    assert describe(copy, trained) == f"{copy}, seed 0, last network, {step}"
    # its last checkpoint is removed while it is read
    load_tree, newer = ocp.load, trained.step + 5

    def too_late(path, like):
        if path.name == str(trained.step):
            params = jax.tree.map(lambda p: p + 1, trained.params)
            for step in (trained.step + 2, newer):
                save_state(copy, step, params)
            assert not path.exists()
        return load_tree(path, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.ocp, "load", too_late)
        loaded = load(copy)
    assert loaded.step == newer
    same_bits(loaded.params, jax.tree.map(lambda p: p + 1, trained.params))


def test_load_the_best_network(copy):
    """By its own file, in the structure of the network, and never half written."""
    last = load(copy)
    assert (last.network, last.epoch, last.unit) == ("last", None, "spaced")
    params = jax.tree.map(lambda p: p + 1, last.params)
    save_best(copy, 0, Best(params, 3, 57, 2.5))
    best = load(copy, network="best")
    same_bits(best.params, params)
    nnx.merge(best.graphdef, best.params)
    assert (best.network, best.epoch, best.step) == ("best", 3, 57)
    assert describe(copy, best) == f"{copy}, seed 0, best network, step 57 (epoch 3)"
    assert not list(copy.glob("*.tmp"))
    kept = read_best(copy, 0, last.params)
    assert kept is not None and kept.valid_loss == 2.5
    assert read_best(copy, 1, last.params) is None
    change_config(copy, width=24)
    with pytest.raises(ValueError, match=r"best-0.npz does not fit .*\['layers'\]"):
        load(copy, network="best")


def test_load_of_several_seeds(copy):
    trained = load(copy)
    save_state(copy, 9, jax.tree.map(lambda p: p + 1, trained.params), seed=12)
    assert load(copy).seed == 0
    other = load(copy, 12)
    assert (other.seed, other.step, other.ended) == (12, 9, False)
    with pytest.raises(ValueError, match=r"of seed 1, only of 0, 12$"):
        load(copy, 1)
    shutil.rmtree(copy / "checkpoints" / "0")
    assert load(copy).seed == 12


def test_load_refuses_what_is_no_run(copy, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        load(tmp_path)
    vocabulary = copy / "vocabulary.json"
    words = json.loads(vocabulary.read_text())["words"]
    log.write_json(vocabulary, {"words": words[::-1]})
    with pytest.raises(ValueError, match="is not the vocabulary of this run"):
        load(copy)
    log.write_json(vocabulary, {"words": words})
    change_config(copy, script="cifar10")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        load(copy)
    change_config(copy, script="language_model", width=24)
    with pytest.raises(
        ValueError, match=r"does not fit the settings of its run.*changed"
    ):
        load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="of seed 0, nor of any other$"):
        load(copy)


def test_the_folder_may_be_relative(run, monkeypatch):
    """As on the command line: runs/NAME."""
    absolute = load(run)
    monkeypatch.chdir(run.parent)
    relative = load(Path(run.name))
    same_bits(relative.params, absolute.params)
