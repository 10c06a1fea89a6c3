"""What the pictures of a classifier's mistakes show, read from the drawn axes."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from train.plots.confusion import confusion, mistakes, most_confused

CLASSES = ["cat", "dog", "cow"]
LABELS = [0, 0, 0, 0, 1, 1, 1, 2]
TAKEN = [0, 0, 0, 1, 1, 0, 0, 2]
LONG = [f"Chevrolet Silverado {i} Hybrid Extended Crew Cab 2012" for i in range(196)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, savefig = [], Figure.savefig

    def save(figure, path):
        savefig(figure, path)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def boxes(figure, artists):
    """Where they are, in pixels from the left and the bottom."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [artist.get_tightbbox(renderer) for artist in artists]


def inside(figure, box):
    width, height = figure.bbox.max
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def ticks(labels):
    return [label.get_text() for label in labels]


# ---------------------------------------------------------------------------
# which class is taken for which
# ---------------------------------------------------------------------------


def test_most_confused():
    assert most_confused(LABELS, TAKEN, CLASSES) == [
        {"is": "dog", "taken for": "cat", "times": 2, "of": 3},
        {"is": "cat", "taken for": "dog", "times": 1, "of": 4},
    ]
    assert most_confused(TAKEN, LABELS, CLASSES, count=1) == [
        {"is": "cat", "taken for": "dog", "times": 2, "of": 5}
    ]
    assert most_confused(LABELS, LABELS, CLASSES) == []


def test_most_confused_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 7, (2, 500))
    names = list("abcdefg")
    found = most_confused(y, p, names, count=100)
    times = [pair["times"] for pair in found]
    assert times == sorted(times, reverse=True)
    assert len(found) == 7 * 6
    for pair in found:
        a, b = names.index(pair["is"]), names.index(pair["taken for"])
        both = [(i, j) for i, j in zip(y, p, strict=True) if i == a]
        assert a != b
        assert pair["times"] == both.count((a, b))
        assert pair["of"] == len(both)


def test_of_equally_frequent_ones_the_rarer_class_is_first():
    pairs = most_confused([0, 0, 0, 1, 1], [0, 0, 1, 0, 1], CLASSES)
    assert [pair["is"] for pair in pairs] == ["dog", "cat"]


def test_confusion_of_a_few(tmp_path, drawn):
    classes = [*CLASSES, "none $x_1$ of $y$"]
    confusion(LABELS, TAKEN, classes, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
    (figure,) = drawn
    ax, bar = figure.axes
    shares = ax.images[0].get_array()
    expected = [[3 / 4, 1 / 4, 0, 0], [2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0]]
    np.testing.assert_allclose(shares[:3], expected)
    assert shares.mask.tolist() == [[False] * 4] * 3 + [[True] * 4]
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {  # at column and row
        (0, 0): "75.0",
        (1, 0): "25.0",
        (0, 1): "66.7",
        (1, 1): "33.3",
        (2, 2): "100.0",
    }
    assert ax.get_title() == "accuracy 62.50 % (n = 8)"
    assert ticks(ax.get_xticklabels()) == classes
    with_names = [*ax.get_xticklabels(), *ax.get_yticklabels(), figure.texts[0]]
    assert not any(text.get_parse_math() for text in with_names)
    assert ticks(ax.get_yticklabels()) == [
        f"{name} ({n})" for name, n in zip(classes, (4, 3, 1, 0), strict=True)
    ]
    assert "1 class(es) without images" in bar.get_ylabel()
    assert figure.texts[0].get_text().splitlines() == [
        "Most often confused",
        "2 of 3: dog, taken for cat",
        "1 of 4: cat, taken for dog",
        "",
        "Lowest accuracy",
        "33.3 %: dog, 1 of 3",
        "75.0 %: cat, 3 of 4",
    ]


def test_confusion_of_many(tmp_path, drawn):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 196, 2000)
    taken = np.where(rng.random(2000) < 0.5, labels, rng.integers(0, 196, 2000))
    taken[labels == 195] = 3
    confusion(labels, taken, LONG, tmp_path / "a.png")
    (figure,) = drawn
    ax, bar = figure.axes
    shares = ax.images[0].get_array()
    assert shares.shape == (196, 196)
    assert shares[195, 3] == 1
    np.testing.assert_allclose(shares.sum(1), 1)
    assert not ax.texts
    rows = ax.get_yticklabels()
    assert 20 <= len(rows) <= 40
    assert not any(ticks(ax.get_xticklabels()))
    of_195 = (labels == 195).sum()
    panel = figure.texts[0]
    text = " ".join(panel.get_text().split())
    assert f"{of_195} of {of_195}: {LONG[195]}, taken for {LONG[3]}" in text
    assert f"0.0 %: {LONG[195]}, 0 of {of_195}" in text

    edge, of_bar, *names = boxes(figure, [panel, bar, *rows])
    assert inside(figure, edge)
    assert edge.x0 > of_bar.x1
    for above, below in itertools.pairwise(names):
        assert inside(figure, above)
        assert above.y0 >= below.y1


@pytest.mark.parametrize("n", [1, 4, 20, 40, 41])
def test_nothing_lies_outside_or_on_something_else(tmp_path, drawn, n):
    names = [f"WWW{i:02} " * 20 for i in range(n)]
    rng = np.random.default_rng(0)
    labels, taken = rng.integers(0, n, (2, 500))
    confusion(labels, taken, names, tmp_path / "a.png")
    (figure,) = drawn
    ax, bar = figure.axes
    assert len(ax.texts) == (len(set(zip(labels, taken, strict=True))) if n < 21 else 0)
    assert any(ticks(ax.get_xticklabels())) == (n <= 40)
    panel, columns = figure.texts[0], ax.get_xticklabels() if n <= 40 else []
    edge, of_bar, *others = boxes(
        figure, [panel, bar, *columns, *ax.get_yticklabels(), ax.title]
    )
    assert all(inside(figure, box) for box in (edge, *others))
    assert edge.x0 > of_bar.x1
    for left, right in itertools.pairwise(others[: len(columns)]):
        assert left.x1 <= right.x0


def test_confusion_without_mistakes(tmp_path, drawn):
    confusion(LABELS, LABELS, CLASSES, tmp_path / "a.png")
    assert drawn[0].texts[0].get_text() == "No mistakes"


# ---------------------------------------------------------------------------
# the mistakes
# ---------------------------------------------------------------------------

PROBABILITIES = np.array(
    [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.995, 0.005, 0], [0, 0, 1], [0.5, 0.4, 0.1]]
)
TRUE = [0, 0, 1, 0, 1]  # right, then mistakes of probability 0.1, 0.005, 0, 0.4


def image_of(i):
    return np.full((4, 6, 3), i, np.uint8)


def shown(figure):
    """The number in the pixels and the text of each cell."""
    return [
        (int(ax.images[0].get_array()[0, 0, 0]), ax.get_title("left"))
        for ax in figure.axes
        if ax.images
    ]


def test_mistakes(tmp_path, drawn):
    mistakes(PROBABILITIES, TRUE, CLASSES, image_of, tmp_path / "a.png")
    (figure,) = drawn
    found = [(i, text.replace("\N{NO-BREAK SPACE}", " ")) for i, text in shown(figure)]
    assert found == [
        (3, "is cat, < 0.1 %\ntaken for cow, > 99.9 %"),
        (2, "is dog, 0.5 %\ntaken for cat, 99.5 %"),
        (1, "is cat, 10 %\ntaken for cow, 70 %"),
        (4, "is dog, 40 %\ntaken for cat, 50 %"),
    ]
    assert figure.get_suptitle().startswith("4 of 4 mistake(s) (n = 5)")


def test_mistakes_are_those_of_the_highest_cross_entropy(tmp_path, drawn):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60).astype(np.float32)
    y = rng.integers(0, 3, 60)
    mistakes(p, y, CLASSES, image_of, tmp_path / "a.png", count=7)
    wrong = [i for i in range(60) if p[i].argmax() != y[i]]
    wrong.sort(key=lambda i: np.log(p[i, y[i]]))
    assert [i for i, _ in shown(drawn[0])] == wrong[:7]
    assert len(drawn[0].axes) == 10  # two rows, three cells empty
    text = " ".join(drawn[0].get_suptitle().split())
    assert text.startswith(f"7 of {len(wrong)} mistake(s) (n = 60)")


def test_no_mistakes(tmp_path, drawn):
    mistakes(np.eye(3), [0, 1, 2], CLASSES, image_of, tmp_path / "a.png")
    assert not drawn[0].axes
    assert drawn[0].texts[0].get_text() == "no mistakes (n = 3)"


@pytest.mark.parametrize("name", ["Chevrolet Silverado 1500 Hybrid Crew", "W" * 40])
def test_long_names_wrap_and_do_not_overlap(tmp_path, drawn, name):
    names = [f"{name} ${i}_$ Cab 2012" for i in range(3)]
    sizes = [(300, 100), (100, 300), (100, 100)]  # wide, high, square

    def photograph(i):
        return Image.new("L", sizes[i % 3])

    p = np.tile([[0.1, 0.9, 0.0]], (12, 1))
    mistakes(p, np.zeros(12, int), names, photograph, tmp_path / "a.png")
    (figure,) = drawn
    axes = [ax for ax in figure.axes if ax.images]
    titles = [ax._left_title for ax in axes]
    assert not any(title.get_parse_math() for title in titles)
    assert "".join(names[0].split()) in "".join(titles[0].get_text().split())
    texts, pictures = (
        boxes(figure, artists) for artists in (titles, [ax.images[0] for ax in axes])
    )
    everything = [*texts, *pictures, *boxes(figure, [figure._suptitle])]
    assert len(everything) == 25
    for a, b in itertools.combinations(everything, 2):
        assert not a.padded(-1).overlaps(b.padded(-1))
    assert all(inside(figure, box.padded(-1)) for box in everything)


def test_images_of_all_kinds(tmp_path, drawn):
    images = [
        Image.new("RGB", (3000, 1500), (255, 0, 0)),
        Image.new("L", (4, 4), 51),
        np.full((5, 4), 0.2),
        np.full((5, 4, 1), 51, np.uint8),
        np.full((5, 4, 3), 0.2, np.float32),
    ]
    p = np.tile([[0.0, 1.0, 0.0]], (5, 1))
    mistakes(p, [0] * 5, CLASSES, images.__getitem__, tmp_path / "a.png")
    assert images[0].size == (3000, 1500)
    drawn_as = [ax.images[0] for ax in drawn[0].axes]
    assert drawn_as[0].get_array().shape == (250, 500, 3)
    assert drawn_as[0].get_array()[0, 0].tolist() == [255, 0, 0]
    for image in drawn_as[1:]:  # the same grey
        colour = image.to_rgba(image.get_array(), bytes=True)[0, 0]
        assert colour.tolist() == [51, 51, 51, 255]


# ---------------------------------------------------------------------------
# bad input
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "predictions", "match"),
    [
        ([0, 1], [0], "predictions must be as many as labels, 2, got 1"),
        ([[0]], [0], r"labels .* shape \(1, 1\)"),
        ([0.0], [0], "labels .* float64"),
        ([], [], "labels must be a list of one or more"),
        ([0], [[0.1, 0.9, 0]], "predictions .* float64"),
        ([3], [0], "labels must be from 0 to 2.* got 3 to 3"),
        ([0], [-1], "predictions must be from 0 to 2.* got -1 to -1"),
    ],
)
def test_bad_labels(tmp_path, labels, predictions, match):
    with pytest.raises(ValueError, match=match):
        most_confused(labels, predictions, CLASSES)
    with pytest.raises(ValueError, match=match):
        confusion(labels, predictions, CLASSES, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"probabilities": PROBABILITIES[:4]},
            r"probabilities .*\(5, 3\), got \(4, 3\)",
        ),
        ({"probabilities": PROBABILITIES[:, :2]}, r"probabilities .* got \(5, 2\)"),
        ({"probabilities": np.log(PROBABILITIES + 1e-9)}, "probabilities must not be"),
        ({"probabilities": PROBABILITIES / 2}, "sums from 0.5 to 0.5"),
        ({"probabilities": PROBABILITIES * np.nan}, "probabilities"),
        ({"labels": [0, 0, 1, 0, 7]}, "labels must be from 0 to 2.* got 0 to 7"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"image_of": lambda i: np.zeros(3)}, r"image_of .* got \(3,\)"),
        ({"image_of": lambda i: np.full((2, 2, 3), -1.5)}, "image_of .* -1.5 to -1.5"),
    ],
)
def test_bad_mistakes(tmp_path, changes, match):
    good = {
        "probabilities": PROBABILITIES,
        "labels": TRUE,
        "classes": CLASSES,
        "image_of": image_of,
        "path": tmp_path / "a.png",
    }
    with pytest.raises(ValueError, match=match):
        mistakes(**good | changes)
    assert not list(tmp_path.iterdir())


def test_most_confused_count():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        most_confused(LABELS, TAKEN, CLASSES, count=0)
