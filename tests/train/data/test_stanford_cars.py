"""Both layouts of Stanford Cars, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from picture_folders import names, write
from scipy.io import savemat

from train.data import loader, pictures


def save_mat(path, classes=None, **fields):
    content = {}
    if classes:
        content["class_names"] = np.array([classes], object)
    if fields:
        rows = list(zip(*fields.values(), strict=True))
        content["annotations"] = np.array([rows], [(name, "O") for name in fields])
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def make_cars(root, labels, test_labels=()):
    """The later layout; the order of file names differs from that of the labels."""
    save_mat(root / "devkit" / "cars_meta.mat", ["Volvo V40", "Audi A4", "Fiat 500"])
    for part, all_labels in (("train", labels), ("test", test_labels)):
        files = [f"{i + 1:05}.jpg" for i in range(len(all_labels))]
        for name in files:
            write(root / f"cars_{part}" / name)
        mat = {"train": "devkit/cars_train_annos", "test": "cars_test_annos_withlabels"}
        if files:
            save_mat(
                root / f"{mat[part]}.mat",
                bbox_x1=[5] * len(files),
                **{"class": all_labels, "fname": files},
            )


LABELS = [1, 3, 2, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("below", ["", "stanford_cars"])
def test_cars_without_test_labels(tmp_path, below):
    make_cars(tmp_path / below, LABELS)
    found = pictures.read(tmp_path)
    assert found.classes == ("Volvo V40", "Audi A4", "Fiat 500")
    assert found.split == pictures.EVERY_FIFTH
    assert names(found.valid) == ["cars_train/00008.jpg"]
    assert found.train.labels.tolist() == [0, 2, 1, 0, 0, 0, 2, 0]
    assert found.train.paths[-1] == tmp_path / below / "cars_train" / "00009.jpg"


def test_cars_in_a_folder_above(tmp_path):
    make_cars(tmp_path / "archive" / "cars", LABELS)
    assert len(pictures.read(tmp_path).train.paths) == 8
    with pytest.raises(ValueError, match="valid_folder must be None for Stanford Cars"):
        pictures.read(tmp_path, "cars_test")


@pytest.mark.parametrize("labels_in", ["", "devkit"])
def test_cars_with_test_labels(tmp_path, labels_in):
    make_cars(tmp_path, LABELS, [2, 2])
    name = "cars_test_annos_withlabels.mat"
    (tmp_path / name).rename(tmp_path / labels_in / name)
    found = pictures.read(tmp_path)
    assert found.split == "the publisher's test images"
    assert len(found.train.paths) == 9
    assert names(found.valid) == ["cars_test/00001.jpg", "cars_test/00002.jpg"]
    assert found.valid.labels.tolist() == [1, 1]
    assert found.valid.labels.dtype == np.int32


def make_cars_by_flag(root, labels, test):
    files = [f"car_ims/{i + 1:06}.jpg" for i in range(len(labels))]
    for name in files:
        write(root / name)
    fields = {"relative_im_path": files, "class": labels, "test": test}
    save_mat(root / "cars_annos.mat", ["Volvo V40", "Audi A4"], **fields)


def test_cars_in_the_layout_of_the_article(tmp_path):
    make_cars_by_flag(tmp_path / "stanford_cars", [2, 1, 2, 1], [0, 1, 1, 0])
    found = pictures.read(tmp_path)
    assert found.classes == ("Volvo V40", "Audi A4")
    assert names(found.train) == ["car_ims/000001.jpg", "car_ims/000004.jpg"]
    assert found.train.labels.tolist() == [1, 0]
    assert names(found.valid) == ["car_ims/000002.jpg", "car_ims/000003.jpg"]
    assert found.valid.labels.tolist() == [0, 1]
    assert found.split == "the publisher's test images"


def test_unusable_cars(tmp_path):
    def assert_refused(message):
        with pytest.raises(ValueError, match=message):
            pictures.read(tmp_path)

    (tmp_path / "cars_train").mkdir()
    assert_refused("cars_meta.mat, a part of Stanford Cars, is missing")
    make_cars(tmp_path, [1, 4, 0])
    assert_refused(r"labels must be in \[1, 3\], got 4 for 00002.jpg, 0 for 00003.jpg$")
    make_cars(tmp_path, [1, 1, 2, 1, 1, 1])
    assert_refused("classes without training images: Fiat 500$")
    make_cars(tmp_path, LABELS)
    (tmp_path / "cars_train" / "00002.jpg").unlink()
    assert_refused("images listed in .*annos.mat are missing: 00002.jpg$")
    path = tmp_path / "devkit" / "cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused("cars_train_annos.mat is damaged or has no variable 'annotations'")
    save_mat(path, **{"class": [1, 1]})
    assert_refused("cars_train_annos.mat: the annotations have no field 'fname'")
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    make_cars_by_flag(tmp_path / "other", [1, 2], [0, 0])
    with pytest.raises(ValueError, match="no validation images: the publisher's test"):
        pictures.read(tmp_path / "other")


def test_cars_of_one_class(tmp_path):
    make_cars(tmp_path, [1] * 5)
    save_mat(tmp_path / "devkit" / "cars_meta.mat", ["Volvo V40"])
    with pytest.raises(ValueError, match="only one class: Volvo V40"):
        pictures.read(tmp_path)


@pytest.mark.skipif("ADAMW_JAX_DATA" not in os.environ, reason="no ADAMW_JAX_DATA")
def test_cars_themselves():
    data_dir = Path(os.environ["ADAMW_JAX_DATA"])
    if not (data_dir / "stanford_cars").is_dir():
        pytest.skip("no stanford_cars in ADAMW_JAX_DATA")
    found = pictures.read(data_dir)
    assert len(found.classes) == 196
    assert found.classes[13] == "Audi TTS Coupe 2012"  # of 00001.jpg, as published
    both = sorted(found.train.paths + found.valid.paths)
    assert len(set(both)) == 8144
    counts = np.bincount(np.r_[found.train.labels, found.valid.labels])
    assert len(found.valid.paths) == (counts // 5).sum()
    assert np.bincount(found.valid.labels).tolist() == (counts // 5).tolist()
    label = dict(zip(found.train.paths, found.train.labels, strict=True))
    assert label[data_dir / "stanford_cars" / "cars_train" / "00001.jpg"] == 13
    batch = next(loader.eval_batches(found.valid, 64, 32))
    assert batch["image"].shape == (32, 64, 64, 3)
    np.testing.assert_array_equal(batch["label"], found.valid.labels[:32])
