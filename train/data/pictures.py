"""Pictures from folders: which there are, how they are cropped, batches of them.

The article's Stanford Cars, or any folder with a sub-folder for each class. The
augmentation is the article's, by Pillow instead of OpenCV: all between its stages is
uint8, and what is smaller than the target is enlarged with plain bilinear weights. The
order, the random numbers and the threads are Grain's.
"""

import collections
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image, ImageOps

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, of pixels in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
}
EVERY_FIFTH = "every fifth image of each class, in order of file names"

MAX_ZOOM = 1.05  # of the shortest side
MAX_DEGREES = 10.0
MAX_LIGHTING = 0.05  # of the brightness, of pixels in [0, 1], and of the contrast
ZOOM_SHARE = TURN_SHARE = 0.75  # of the pictures
FLIP_SHARE = 0.5

PIECE = 16  # images that a thread reads at once, or fewer, a divisor of the batch


class Files(NamedTuple):
    paths: tuple[Path, ...]
    labels: np.ndarray  # (n,) int32


class Pictures(NamedTuple):
    classes: tuple[str, ...]
    train: Files
    valid: Files
    split: str  # by what rule the validation images were held out


# ---------------------------------------------------------------------------
# which pictures there are
# ---------------------------------------------------------------------------


def read(data_dir: Path | str) -> Pictures:
    """The pictures of a folder; each has been decoded once, so that none is damaged.

    Where validation images are not apart, a fifth of the training images is held out.

    Args:
        data_dir: one of
            - Stanford Cars, or the folder above `stanford_cars`: `cars_train` and
              `devkit` (also `cars_test` and `cars_test_annos_withlabels.mat`), or
              `car_ims` and `cars_annos.mat`;
            - `train/CLASS/*`, perhaps with `valid/CLASS/*`, or else `val` or `test`;
            - `CLASS/*`.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder")
    for place in (data_dir, data_dir / "stanford_cars"):
        if (place / "cars_train").is_dir():
            pictures = _cars_by_folder(place)
            break
        if (place / "car_ims").is_dir():
            pictures = _cars_by_flag(place)
            break
    else:
        pictures = _class_folders(data_dir)
    _check(data_dir, pictures)
    return pictures


def _cars_by_folder(place: Path) -> Pictures:
    """The publisher's later layout. The labels of its test images came separately."""
    devkit, name = place / "devkit", "cars_test_annos_withlabels.mat"
    classes = _class_names(devkit / "cars_meta.mat")
    train, _ = _annotated(
        devkit / "cars_train_annos.mat", place / "cars_train", "fname", classes
    )
    for path in (place / name, devkit / name):
        if path.is_file() and (place / "cars_test").is_dir():
            valid, _ = _annotated(path, place / "cars_test", "fname", classes)
            return Pictures(classes, train, valid, "the publisher's test images")
    return Pictures(classes, *_without_every_fifth(train), EVERY_FIFTH)


def _cars_by_flag(place: Path) -> Pictures:
    """The publisher's first layout, the article's."""
    path = place / "cars_annos.mat"
    classes = _class_names(path)
    files, records = _annotated(path, place, "relative_im_path", classes)
    test = _field(path, records, "test").astype(bool)
    train, valid = _chosen(files, ~test), _chosen(files, test)
    return Pictures(classes, train, valid, "the publisher's test images")


def _class_folders(data_dir: Path) -> Pictures:
    apart = []
    root = data_dir / "train"
    if root.is_dir() and _sub_folders(root):
        places = (data_dir / name for name in ("valid", "val", "test"))
        apart = [place for place in places if place.is_dir()]
    else:
        root = data_dir
    classes = _sub_folders(root)
    if len(classes) < 2:
        found = f"only one folder, {classes[0]!r}" if classes else "no folder"
        raise ValueError(
            f"data_dir={str(data_dir)!r}: {found} in {root}. Looked for a folder for "
            "each of two classes or more, in train/ or here, or for Stanford Cars: "
            "cars_train/ and devkit/, or car_ims/ and cars_annos.mat, here or in "
            "stanford_cars/"
        )
    train = _listed(root, classes)
    if not apart:
        return Pictures(classes, *_without_every_fifth(train), EVERY_FIFTH)
    unknown = [name for name in _sub_folders(apart[0]) if name not in classes]
    if unknown:
        raise ValueError(f"{apart[0]} has classes that {root} has not: {_few(unknown)}")
    valid = _listed(apart[0], classes)
    return Pictures(classes, train, valid, f"the images of {apart[0].name}/")


def _sub_folders(root: Path) -> tuple[str, ...]:
    names = (path.name for path in root.iterdir() if path.is_dir())
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _listed(root: Path, classes: tuple[str, ...]) -> Files:
    """The images of each class, in order of file names, hidden ones left out."""
    paths, labels, empty, left_out = [], [], [], collections.Counter()
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue  # of a class, validation images may be missing
        images = []
        for folder, folders, files in os.walk(root / name):
            folders[:] = [f for f in folders if not f.startswith(".")]
            seen = [Path(folder, f) for f in files if not f.startswith(".")]
            images += [path for path in seen if path.suffix.lower() in SUFFIXES]
            suffixes = [path.suffix for path in seen]
            left_out.update(x for x in suffixes if x.lower() not in SUFFIXES)
        paths += sorted(images, key=Path.as_posix)
        labels += [label] * len(images)
        if not images:
            empty.append(name)
    if empty:
        raise ValueError(
            f"{root}: no image ({' '.join(sorted(SUFFIXES))}) in the class folders: "
            f"{_few(empty)}"
        )
    if left_out:
        counts = (
            f"{n} of {suffix or 'none'}" for suffix, n in sorted(left_out.items())
        )
        print(f"{root}: left out, files with other suffixes: {', '.join(counts)}")
    return Files(tuple(paths), np.array(labels, np.int32))


def _loaded(path: Path, variable: str) -> Any:
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(f"{path} is missing, one of Stanford Cars' files")
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True)[variable])
    except Exception as error:  # damaged files bring out many kinds
        raise ValueError(
            f"{path} is damaged, or holds no {variable!r}: {error}"
        ) from error


def _field(path: Path, records, name: str) -> np.ndarray:
    if name not in (records.dtype.names or ()):
        raise ValueError(f"{path}: its annotations have no {name!r}")
    return records[name]


def _class_names(path: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in _loaded(path, "class_names"))


def _annotated(path: Path, root: Path, field: str, classes: tuple[str, ...]):
    """The files that a .mat file lists, and its records."""
    records = _loaded(path, "annotations")
    paths = tuple(root / str(name) for name in _field(path, records, field))
    labels = _field(path, records, "class").astype(np.int32)  # from 1 on
    wrong = np.flatnonzero((labels < 1) | (labels > len(classes)))
    if len(wrong):
        labelled = [f"{labels[i]} of {paths[i].name}" for i in wrong]
        raise ValueError(
            f"{path}: labels must be in [1, {len(classes)}], got {_few(labelled)}"
        )
    missing = [image.name for image in paths if not image.is_file()]
    if missing:
        raise ValueError(f"{root}: images named by {path} are missing: {_few(missing)}")
    return Files(paths, labels - 1), records


def _chosen(files: Files, mask: np.ndarray) -> Files:
    paths = tuple(files.paths[i] for i in np.flatnonzero(mask))
    return Files(paths, files.labels[mask])


def _without_every_fifth(files: Files) -> tuple[Files, Files]:
    held_out = np.zeros(len(files.paths), bool)
    for label in np.unique(files.labels):
        images = np.flatnonzero(files.labels == label)
        images = sorted(images, key=lambda i: files.paths[i].as_posix())
        held_out[images[4::5]] = True
    return _chosen(files, ~held_out), _chosen(files, held_out)


def _check(data_dir: Path, pictures: Pictures) -> None:
    place = f"data_dir={str(data_dir)!r}"
    classes, train, valid, _ = pictures
    if len(classes) < 2:
        raise ValueError(f"{place} has only one class: {_few(classes)}")
    counts = np.bincount(train.labels, minlength=len(classes))
    without = [classes[i] for i in np.flatnonzero(counts == 0)]
    if without:
        raise ValueError(f"{place}: classes without a training image: {_few(without)}")
    if not valid.paths:
        held_out = pictures.split == EVERY_FIFTH
        why = "no class has five, to hold one out" if held_out else pictures.split
        raise ValueError(f"{place} has no validation images: {why}")
    with ThreadPoolExecutor(8) as pool:
        flaws = [flaw for flaw in pool.map(_flaw, train.paths + valid.paths) if flaw]
    if flaws:
        raise ValueError(f"{place} has images that cannot be read: {_few(flaws)}")


def _flaw(path: Path) -> str | None:
    try:
        open_image(path, least=1)
    except ValueError as error:
        return str(error)


def _few(names) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ---------------------------------------------------------------------------
# one picture
# ---------------------------------------------------------------------------


def open_image(path: Path, least: int = 0) -> Image.Image:
    """The (first) picture of a file, upright, in RGB, on white where transparent.

    Of 16 bits a pixel, all count: 12-bit pictures in such files come out dark.

    Args:
        path: the file.
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as
            long as its shortest side has that many pixels; 0: at its own size.
    """
    try:
        with Image.open(path) as image:
            _check_mode(image)
            if least:
                image.draft(None, (least, least))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # damaged files bring out many kinds
        raise ValueError(_says(path, error)) from error


def _says(path: Path, error: Exception) -> str:
    text = str(error) or type(error).__name__
    return f"{path}: {text.replace(repr(str(path)), '').rstrip(': ')}"  # not again


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, where no number is known to be white")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # `convert` would clip
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def train_view(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """The article's augmentation -> (size, size, 3) uint8.

    Always draws nine numbers in [0, 1), in this order: zoom or not, zoom, rotation or
    not, angle, brightness, contrast, flip or not, row and column of the crop. A small
    first, third or seventh number says yes.
    """
    zooms, zoom, turns, angle, light, contrast, flips, row, column = rng.random(9)
    zoom = 1 + (MAX_ZOOM - 1) * zoom if zooms < ZOOM_SHARE else 1
    image = _scaled(image, int(size * zoom))
    cut_off = 0.0
    if turns < TURN_SHARE:
        image = _rotated(image, MAX_DEGREES * (2 * angle - 1))
        cut_off = 0.5  # Pillow drops the fractions of the levels: so much on average
    brightness = 255 * MAX_LIGHTING * (2 * light - 1) + cut_off
    image = _lit(image, brightness, MAX_LIGHTING * (2 * contrast - 1))
    if flips < FLIP_SHARE:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = image.size
    row, column = int(row * (height - size)), int(column * (width - size))
    return _cropped(image, row, column, size)


def plain_view(image: Image.Image, size: int) -> np.ndarray:
    """The middle of the picture, its shortest side `size` -> (size, size, 3) uint8."""
    image = _scaled(image, size)
    width, height = image.size
    return _cropped(image, (height - size + 1) // 2, (width - size + 1) // 2, size)


def _scaled(image: Image.Image, shortest: int) -> Image.Image:
    ratio = shortest / min(image.size)
    width, height = (max(math.floor(n * ratio), shortest) for n in image.size)
    way = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BILINEAR
    return image.resize((width, height), way)


def _rotated(image: Image.Image, degrees: float) -> Image.Image:
    """Counter-clockwise about OpenCV's centre; beyond an edge lies a mirror image.

    An output pixel that is (dx, dy) from the centre, at most half of the size, is the
    input's at (cos dx - sin dy, sin dx + cos dy). This is at most sin times half of the
    other side beyond the edge.
    """
    width, height = image.size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    left = math.ceil(abs(sin) * (height // 2)) + 1  # one for the bilinear weights
    top = math.ceil(abs(sin) * (width // 2)) + 1
    x, y = width // 2 + 0.5, height // 2 + 0.5  # Pillow's: a pixel's middle is at .5
    matrix = (
        *(cos, -sin, x - cos * x + sin * y + left),
        *(sin, cos, y - sin * x - cos * y + top),
    )
    return _with_mirror_images(image, left, top).transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _with_mirror_images(image: Image.Image, left: int, top: int) -> Image.Image:
    """With so many more pixels on either side: the edge's first, then the next, ..."""
    width, height = image.size
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    upside_down = Image.Transpose.FLIP_TOP_BOTTOM
    rows = (
        (image, flipped),
        (image.transpose(upside_down), flipped.transpose(upside_down)),
    )
    canvas = Image.new("RGB", (width + 2 * left, height + 2 * top))
    across, down = math.ceil(left / width), math.ceil(top / height)
    for i in range(-down, down + 1):
        for j in range(-across, across + 1):
            canvas.paste(rows[i % 2][j % 2], (left + j * width, top + i * height))
    return canvas


def _lit(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    counts = np.reshape(image.histogram(), (3, 256)).sum(0)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum()
    factor = 1 + contrast if contrast >= 0 else 1 / (1 - contrast)
    lit = np.clip((levels - mean) * factor + mean + brightness, 0, 255)
    return image.point(np.rint(lit).astype(int).tolist() * 3)


def _cropped(image: Image.Image, row: int, column: int, size: int) -> np.ndarray:
    return np.asarray(image.crop((column, row, column + size, row + size)))


def normalise(x):
    """uint8 pixels to what the network sees, in the step."""
    return (x.astype(np.float32) / np.float32(255) - MEAN) / STD


# ---------------------------------------------------------------------------
# batches
# ---------------------------------------------------------------------------


def train_batches(
    files: Files,
    size: int,
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    first_step: int = 0,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Training views in a new order each epoch, whose last batch may be short.

    Args:
        files: the pictures.
        size: of a view, in pixels.
        batch_size: pictures of a batch.
        seed: what all the random numbers are made of.
        epochs: how often every picture is shown.
        first_step: batches to leave out, at no cost, when a run is resumed.
        workers: threads that read; None: as many as cores, 0: none. The batches are
            the same whatever their number.

    Returns:
        {"image": (n, size, size, 3) uint8, "label": (n,) int32}. Its `close()` stops
        the threads early.
    """

    workers = _check_batches(files, size, batch_size, seed, workers)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    pictures = grain.MapDataset.range(len(files.paths)).seed(seed).shuffle()
    pictures = pictures.random_map(functools.partial(_train_example, files, size))
    steps = -(-len(files.paths) // batch_size)
    if not 0 <= first_step <= epochs * steps:
        raise ValueError(
            f"first_step must be in [0, {epochs * steps}], got {first_step}"
        )
    return _batches(pictures, batch_size, epochs, first_step, workers)


def eval_batches(
    files: Files,
    size: int,
    batch_size: int,
    *,
    augment_seed: int | None = None,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, in order: its plain view, or with a seed a training view.

    The last batch may be short. For the rest see `train_batches`.
    """

    workers = _check_batches(files, size, batch_size, augment_seed, workers)
    pictures = grain.MapDataset.range(len(files.paths))
    if augment_seed is None:
        pictures = pictures.map(functools.partial(_plain_example, files, size))
    else:
        pictures = pictures.seed(augment_seed).random_map(
            functools.partial(_train_example, files, size)
        )
    return _batches(pictures, batch_size, 1, 0, workers)


def _train_example(files: Files, size: int, i: int, rng) -> dict[str, Any]:
    image = open_image(files.paths[i], least=int(size * MAX_ZOOM))
    return {"image": train_view(image, rng, size), "label": files.labels[i]}


def _plain_example(files: Files, size: int, i: int) -> dict[str, Any]:
    image = open_image(files.paths[i], least=size)
    return {"image": plain_view(image, size), "label": files.labels[i]}


def _check_batches(files: Files, size, batch_size, seed, workers: int | None) -> int:
    """The number of threads."""
    if not files.paths:
        raise ValueError("files must have at least one picture, got none")
    for name, value in (("size", size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if workers is None:
        linux = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    return workers


def _batches(
    pictures, batch_size: int, epochs: int, first_step: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Read by threads, not processes: Pillow lets them run side by side.

    Grain gives each thread a piece of a batch, so that many share in even the first.
    """
    size = max(n for n in range(1, PIECE + 1) if batch_size % n == 0)
    pieces = pictures.batch(size, drop_remainder=False)
    steps, each = -(-len(pictures) // batch_size), batch_size // size
    epoch, step = divmod(first_step, steps)
    first = epoch * len(pieces) + step * each
    options = grain.ReadOptions(
        num_threads=workers, prefetch_buffer_size=max(2 * workers, 2 * each)
    )
    iterator = iter(pieces.repeat(epochs)[first:].to_iter_dataset(options))
    try:
        for step in range(first_step, epochs * steps):
            at = step % steps * each  # the last batch of an epoch may be short
            parts = [next(iterator) for _ in range(min(each, len(pieces) - at))]
            yield {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    finally:
        iterator.close()
