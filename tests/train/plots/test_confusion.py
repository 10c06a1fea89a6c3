"""The contents of the plots of a classifier's errors, read from the axes."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tiers import matrix

from train.plots.confusion import most_confused, plot_confusion, plot_mistakes

CLASSES = ["cat", "dog", "cow"]
LABELS = [0, 0, 0, 0, 1, 1, 1, 2]
PREDICTIONS = [0, 0, 0, 1, 1, 0, 0, 2]
LONG = [f"Chevrolet Silverado {i} Hybrid Extended Crew Cab 2012" for i in range(196)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, savefig = [], Figure.savefig

    def save(figure, path, **options):
        savefig(figure, path, **options)
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
# confusions
# ---------------------------------------------------------------------------


def test_most_confused():
    assert most_confused(LABELS, PREDICTIONS, CLASSES) == [
        {"is": "dog", "taken for": "cat", "times": 2, "of": 3},
        {"is": "cat", "taken for": "dog", "times": 1, "of": 4},
    ]
    assert most_confused(PREDICTIONS, LABELS, CLASSES, count=1) == [
        {"is": "cat", "taken for": "dog", "times": 2, "of": 5}
    ]
    assert most_confused(LABELS, LABELS, CLASSES) == []


def test_most_confused_equals_a_loop():
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


def test_on_ties_the_rarer_class_is_first():
    pairs = most_confused([0, 0, 0, 1, 1], [0, 0, 1, 0, 1], CLASSES)
    assert [pair["is"] for pair in pairs] == ["dog", "cat"]


def cell_texts(ax):
    """By column and row; empty ones left out."""
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    return {cell: text for cell, text in cells.items() if text}


def test_confusion_of_a_few(tmp_path, drawn):
    classes = [*CLASSES, "none $x_1$ of $y$"]
    plot_confusion(LABELS, PREDICTIONS, classes, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
    (figure,) = drawn
    ax, panel = figure.axes
    shares = ax.images[0].get_array()
    expected = [[3 / 4, 1 / 4, 0, 0], [2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0], [0] * 4]
    np.testing.assert_allclose(shares, 100 * np.array(expected))
    assert cell_texts(ax) == {
        (0, 0): "75.0",
        (1, 0): "25.0",
        (0, 1): "66.7",
        (1, 1): "33.3",
        (2, 2): "100.0",
    }
    assert ax.get_title() == "accuracy 62.50 % (n = 8)"
    assert ticks(ax.get_xticklabels()) == classes
    with_names = [*ax.get_xticklabels(), *ax.get_yticklabels(), *panel.texts]
    assert not any(text.get_parse_math() for text in with_names)
    assert ticks(ax.get_yticklabels()) == [
        f"{name} ({n})" for name, n in zip(classes, (4, 3, 1, 0), strict=True)
    ]
    assert panel.texts[0].get_text().splitlines() == [
        "Most often confused",
        "2 of 3: dog, taken for cat",
        "1 of 4: cat, taken for dog",
        "",
        "Lowest accuracy",
        "33.3 %: dog, 1 of 3",
        "75.0 %: cat, 3 of 4",
    ]


def test_confusion_of_many(tmp_path, drawn):
    """The classes that are confused most often, either way."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 196, 2000)
    predictions = labels.copy()
    predictions[labels == 195] = 3
    for label in range(0, 170, 10):  # the next most frequent: 17 pairs of classes
        predictions[np.flatnonzero(labels == label)[: 2 + label // 40]] = label + 1
    plot_confusion(labels, predictions, LONG, tmp_path / "a.png")
    (figure,) = drawn
    ax, panel = figure.axes
    rows = [int(text.split()[2]) for text in ticks(ax.get_yticklabels())]
    columns = [int(text.split()[2]) for text in ticks(ax.get_xticklabels())]
    counts = np.zeros((196, 196), int)
    np.add.at(counts, (labels, predictions), 1)
    assert rows == columns == sorted(rows) and len(rows) == 20
    assert {3, 195, 160, 161} <= set(rows) and not {0, 1} & set(rows)
    shares = 100 * counts[np.ix_(rows, rows)] / counts[rows].sum(1)[:, None]
    np.testing.assert_allclose(ax.images[0].get_array(), shares)
    assert ax.get_title().endswith("(n = 2000); 20 of 196 classes")
    of_195 = (labels == 195).sum()
    text = " ".join(panel.texts[0].get_text().split())
    assert f"{of_195} of {of_195}: {LONG[195]}, taken for {LONG[3]}" in text
    assert f"0.0 %: {LONG[195]}, 0 of {of_195}" in text


@pytest.mark.parametrize("n", matrix([1, 4, 20, 41], quick=[41]))
def test_nothing_overlaps(tmp_path, drawn, n):
    names = [f"WWW{i:02} " * 20 for i in range(n)]
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, n, (2, 500))
    plot_confusion(labels, predictions, names, tmp_path / "a.png")
    (figure,) = drawn
    ax, panel = figure.axes
    if n <= 20:
        cells = len(set(zip(labels, predictions, strict=True)))
        assert len(cell_texts(ax)) == cells
    columns, rows = ax.get_xticklabels(), ax.get_yticklabels()
    assert len(columns) == len(rows) == min(n, 20)
    left, matrix, *columns = boxes(figure, [*panel.texts, ax, *columns])
    assert left.x0 > matrix.x1  # the panel is right of the matrix
    for one, other in itertools.pairwise(columns):
        assert one.x1 <= other.x0
    for above, below in itertools.pairwise(boxes(figure, rows)):
        assert above.y0 >= below.y1


def test_confusion_without_mistakes(tmp_path, drawn):
    plot_confusion(LABELS, LABELS, CLASSES, tmp_path / "a.png")
    assert drawn[0].axes[1].texts[0].get_text() == "No mistakes"


# ---------------------------------------------------------------------------
# the mistakes
# ---------------------------------------------------------------------------

PROBABILITIES = np.array(
    [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.995, 0.005, 0], [0, 0, 1], [0.5, 0.4, 0.1]]
)
TRUE = [0, 0, 1, 0, 1]  # right, then mistakes of probability 0.1, 0.005, 0, 0.4


def load_image(i):
    return np.full((4, 6, 3), i, np.uint8)


def shown(figure):
    """The number in the pixels and the text of each cell."""
    return [
        (int(ax.images[0].get_array()[0, 0, 0]), ax.get_title("left"))
        for ax in figure.axes
        if ax.images
    ]


def test_mistakes(tmp_path, drawn):
    plot_mistakes(PROBABILITIES, TRUE, CLASSES, load_image, tmp_path / "a.png")
    (figure,) = drawn
    found = [(i, text.replace("\N{NO-BREAK SPACE}", " ")) for i, text in shown(figure)]
    assert found == [
        (3, "is cat, < 0.1 %\ntaken for cow, > 99.9 %"),
        (2, "is dog, 0.5 %\ntaken for cat, 99.5 %"),
        (1, "is cat, 10 %\ntaken for cow, 70 %"),
        (4, "is dog, 40 %\ntaken for cat, 50 %"),
    ]
    assert figure.get_suptitle().startswith("4 of 4 mistakes (n = 5)")


def test_mistakes_are_those_of_the_highest_cross_entropy(tmp_path, drawn):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60).astype(np.float32)
    y = rng.integers(0, 3, 60)
    plot_mistakes(p, y, CLASSES, load_image, tmp_path / "a.png", count=7)
    wrong = [i for i in range(60) if p[i].argmax() != y[i]]
    wrong.sort(key=lambda i: np.log(p[i, y[i]]))
    assert [i for i, _ in shown(drawn[0])] == wrong[:7]
    assert len(drawn[0].axes) == 10  # two rows, three cells empty
    text = " ".join(drawn[0].get_suptitle().split())
    assert text.startswith(f"7 of {len(wrong)} mistakes (n = 60)")


def test_no_mistakes(tmp_path, drawn):
    plot_mistakes(np.eye(3), [0, 1, 2], CLASSES, load_image, tmp_path / "a.png")
    assert not drawn[0].axes
    assert drawn[0].texts[0].get_text() == "no mistakes (n = 3)"


@pytest.mark.parametrize("name", ["Chevrolet Silverado 1500 Hybrid Crew", "W" * 40])
def test_long_names_wrap_and_do_not_overlap(tmp_path, drawn, name):
    names = [f"{name} ${i}_$ Cab 2012" for i in range(3)]
    sizes = [(300, 100), (100, 300), (100, 100)]  # wide, high, square

    def photograph(i):
        return Image.new("L", sizes[i % 3])

    p = np.tile([[0.1, 0.9, 0.0]], (12, 1))
    plot_mistakes(p, np.zeros(12, int), names, photograph, tmp_path / "a.png")
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
    plot_mistakes(p, [0] * 5, CLASSES, images.__getitem__, tmp_path / "a.png")
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
        ([0, 1], [0], "predictions must have the length of labels, 2, got 1"),
        ([[0]], [0], r"labels .* shape \(1, 1\)"),
        ([0.0], [0], "labels .* float64"),
        ([], [], "labels must be a list of one or more"),
        ([0], [[0.1, 0.9, 0]], "predictions .* float64"),
        ([3], [0], r"labels must be in \[0, 2\], got 3 to 3"),
        ([0], [-1], r"predictions must be in \[0, 2\], got -1 to -1"),
    ],
)
def test_bad_labels(tmp_path, labels, predictions, match):
    with pytest.raises(ValueError, match=match):
        most_confused(labels, predictions, CLASSES)
    with pytest.raises(ValueError, match=match):
        plot_confusion(labels, predictions, CLASSES, tmp_path / "a.png")
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
        ({"labels": [0, 0, 1, 0, 7]}, r"labels must be in \[0, 2\], got 0 to 7"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"load_image": lambda i: np.zeros(3)}, r"load_image .* got \(3,\)"),
        (
            {"load_image": lambda i: np.full((2, 2, 3), -1.5)},
            "load_image .* -1.5 to -1.5",
        ),
    ],
)
def test_bad_mistakes(tmp_path, changes, match):
    good = {
        "probabilities": PROBABILITIES,
        "labels": TRUE,
        "classes": CLASSES,
        "load_image": load_image,
        "path": tmp_path / "a.png",
    }
    with pytest.raises(ValueError, match=match):
        plot_mistakes(**good | changes)
    assert not list(tmp_path.iterdir())


def test_most_confused_count():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        most_confused(LABELS, PREDICTIONS, CLASSES, count=0)
