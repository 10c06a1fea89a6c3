"""Predictions for files: order, the padded last batch, and what is printed."""

import os
import shutil
import sys

import numpy as np
import pytest
from sample_pictures import make_picture
from shallow_resnet import shallow_resnets, write_model

from train.data.pictures import Files
from train.evals.pictures import Predict, log_probabilities, predict, write_predictions

pytestmark = pytest.mark.usefixtures("lenient")

CLASSES = ("blue, dark", "green", "red")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five pictures of three classes."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = tuple(folder / f"{i}.png" for i in range(5))
    for i, path in enumerate(paths):
        make_picture(40, 40, seed=i).save(path)
    return Files(paths, np.array([0, 1, 2, 0, 1], np.int32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with shallow_resnets():
        yield write_model(
            tmp_path_factory.mktemp("model") / "model.safetensors", CLASSES
        )


def test_log_probabilities(files):
    """In order, and without the padding of the last batch."""
    shapes = []

    def mean_colour(pixels):
        shapes.append(pixels.shape)
        return pixels.mean((1, 2))

    values = log_probabilities(mean_colour, files, 32, 2, workers=0)
    assert shapes == [(2, 32, 32, 3)] * 3
    assert values.shape == (5, 3) and values.dtype == np.float64
    alone = [Files((path,), np.zeros(1, np.int32)) for path in files.paths]
    for value, one in zip(values, alone, strict=True):
        expected = log_probabilities(mean_colour, one, 32, 1, workers=0)
        np.testing.assert_array_equal(value, expected[0])
    views = log_probabilities(mean_colour, files, 32, 2, augment_seed=1, workers=0)
    assert (views != values).any(1).all()


def test_write_predictions(files, tmp_path):
    p = np.array([[0.7, 0.2, 0.1]] * 5)
    folder = files.paths[0].parent.parent
    write_predictions(tmp_path / "a.csv", p, files, CLASSES, folder)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "image,class,prediction,probability,of the class"
    name = files.paths[1].relative_to(folder).as_posix()
    assert lines[2] == f'{name},green,"blue, dark",0.700000,0.200000'
    assert len(lines) == 6 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="names are text")
def test_names_that_are_no_utf8(files, model, tmp_path, capsys):
    """In the table, which is in UTF-8, and on the terminal."""
    path = tmp_path / os.fsdecode(b"caf\xe9\n.png")
    shutil.copy(files.paths[0], path)
    odd = Files((path,), np.zeros(1, np.int32))
    write_predictions(tmp_path / "a.csv", np.ones((1, 3)) / 3, odd, CLASSES, tmp_path)
    lines = (tmp_path / "a.csv").read_text("utf-8").splitlines()
    assert lines[1].startswith("caf\\xe9\\n.png,") and len(lines) == 2
    predict(Predict((path,), model, top=1))
    printed = capsys.readouterr().out
    assert f"\n{tmp_path}/caf\\xe9\\n.png\n" in printed
    printed.encode()


def test_predict_with_augmented_views(files, model, capsys):
    (path, *_) = files.paths
    plain, views = (predict(Predict((path,), model, views=n))[path] for n in (0, 2))
    assert plain.sum() == pytest.approx(1) == views.sum()
    assert (plain != views).any()


def test_unreadable_images_are_named_after_the_others(files, model, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot be read: .*broken.jpg"):
        predict(Predict((broken, files.paths[0]), model))
    assert f"{files.paths[0]}\n" in capsys.readouterr().out


def test_invalid_options(files, model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="images must be at least one"):
        predict(Predict((), model))
    with pytest.raises(ValueError, match="top must be at least 1"):
        predict(Predict(files.paths, model, top=0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model: no model in runs"):
        predict(Predict(files.paths))
