"""Pictures in a folder for each class, with or without splits above the classes."""

import itertools
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from train.data.image_files import (
    Pictures,
    abridge,
    count_images,
    hold_out,
    printable,
)
from train.data.listing import Folder, list_images, look

_FILLING = r"(set|data|images?|imgs?|pictures?|photos?|seg|split)"
_SPLIT = re.compile(
    rf"({_FILLING}[\W_]*)*"
    r"((?P<train>train(ing)?)|(?P<valid>val(id(ation)?)?)|(?P<test>test(ing)?))"
    rf"([\W_]*{_FILLING})*"
)
LAYOUTS = (
    "Expected one folder per class, for two or more classes, in data_dir or its "
    "train/; or Stanford Cars, as cars_train/ and devkit/ or car_ims/ and "
    "cars_annos.mat, in data_dir or its stanford_cars/"
)


def read(data_dir: Path, root: Path, valid_folder: str | None = None) -> Pictures:
    """The pictures below a folder, as yet undecoded.

    Args:
        data_dir: as given, for messages.
        root: data_dir, or the folder in it that holds everything.
        valid_folder: name of the folder of validation images in root; None: it is
            found by its name, and what is called a test set is not one.

    Raises:
        ValueError: the folders are not understood.
    """
    if root != data_dir:
        print(f"{printable(data_dir)}: the pictures are in {printable(root)}")
    found = look(root)
    train = _train_folder(found)
    if train is not None:
        return _read_splits(found, train, valid_folder)
    if valid_folder is not None:
        raise ValueError(
            f"valid_folder={valid_folder!r} needs a folder train/ beside it, and "
            f"{printable(root)} has {_listed(found.folders)}"
        )
    _check_classes(data_dir, found)
    _refuse_splits(found)
    names = found.folders
    return hold_out(tuple(map(printable, names)), list_images(root, names))


def split_role(name: str) -> str | None:
    """ "train", "valid" or "test" if a folder has the name of such a split.

    >>> [split_role(name) for name in ("Training_Set", "val", "seg_test", "testimony")]
    ['train', 'valid', 'test', None]
    """
    match = _SPLIT.fullmatch(name.casefold())
    if match is None:
        return None
    return next(role for role in ("train", "valid", "test") if match[role])


def unwrap(folder: Path) -> Path:
    """The folder that holds everything, up to two levels below `folder`."""
    for _ in range(2):
        found = look(folder)
        if len(found.folders) != 1 or found.images or split_role(found.folders[0]):
            break
        inside = folder / found.folders[0]
        if not look(inside).folders:  # the only class
            break
        folder = inside
    return folder


# ---------------------------------------------------------------------------
# splits
# ---------------------------------------------------------------------------


def _train_folder(found: Folder) -> str | None:
    """The folder of training images. One without folders inside is itself a class."""
    named = [name for name in found.folders if split_role(name) == "train"]
    named = [name for name in named if look(found.path / name).folders]
    if len(named) > 1:
        raise ValueError(
            f"{printable(found.path)} has several folders of training images, "
            f"{_listed(named)}; keep one there"
        )
    return named[0] if named else None


def _read_splits(found: Folder, train: str, valid_folder: str | None) -> Pictures:
    root, valid = found.path, _valid_folder(found, train, valid_folder)
    folder = _inside_split(root / train)
    names = look(folder).folders
    if len(names) < 2:
        raise ValueError(
            f"data_dir: only one folder, {printable(names[0])!r} in "
            f"{printable(folder)}. {LAYOUTS}"
        )
    classes, files = tuple(map(printable, names)), list_images(folder, names)
    if valid is None:
        return hold_out(classes, files)
    valid_path = _inside_split(root / valid, names)
    inside = look(valid_path)
    if inside.images and not inside.folders:
        raise ValueError(
            f"{printable(valid_path)} has {count_images(inside.images)}, but no folder "
            "for each class"
        )
    key = unicodedata.normalize  # macOS writes accents in two characters
    known = {key("NFC", name): name for name in names}
    unknown = [name for name in inside.folders if key("NFC", name) not in known]
    if unknown:
        raise ValueError(
            f"{printable(valid_path)} has classes that {printable(folder)} does not "
            f"have: {abridge([printable(name) for name in unknown])}"
        )
    folders = {known[key("NFC", name)]: name for name in inside.folders}
    valid_files = list_images(valid_path, [folders.get(name) for name in names])
    return Pictures(
        classes, files, valid_files, f"the images of {printable(Path(valid).name)}/"
    )


def _valid_folder(found: Folder, train: str, chosen: str | None) -> str | None:
    """The folder of validation images beside `train`; prints what is not used."""
    root, others = found.path, [name for name in found.folders if name != train]
    if chosen is not None:
        if chosen not in others:
            raise ValueError(
                f"valid_folder must be one of the folders beside {printable(train)}/ "
                f"in {printable(root)}: {_listed(others)}; got {chosen!r}"
            )
        valid = chosen
    else:
        named = [name for name in others if split_role(name) == "valid"]
        named.sort(key=lambda name: (name != "valid", name != "val", name))
        valid = named[0] if named else None
        if not any(map(split_role, others)):
            _refuse_unfamiliar(root, train, others)
    unused = [name for name in others if name != valid]
    tests = [name for name in unused if split_role(name) == "test"]
    if unused:
        hint = ""
        if tests and valid is None:
            hint = f" (to validate on {_listed(tests)}: {_option(tests[0])})"
        print(f"{printable(root)}: not used: {_listed(unused)}{hint}")
    return valid


def _inside_split(folder: Path, classes: Sequence[str] = ()) -> Path:
    """Past one more folder, as in seg_train/seg_train/CLASS or train/images/CLASS."""
    found = look(folder)
    if len(found.folders) != 1 or found.images or found.folders[0] in classes:
        return folder
    inside = folder / found.folders[0]
    return inside if look(inside).folders else folder


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------


def _check_classes(data_dir: Path, found: Folder) -> None:
    if len(found.folders) >= 2:
        return
    what = (
        f"{count_images(found.images)}, but no folder" if found.images else "no folder"
    )
    if found.folders:
        what = f"only one folder, {printable(found.folders[0])!r}"
    raise ValueError(
        f"data_dir={str(data_dir)!r}: {what} in {printable(found.path)}. {LAYOUTS}"
    )


def _refuse_splits(found: Folder) -> None:
    """Folders that would be taken for classes, but are splits or have splits inside."""
    root, names = found.path, found.folders
    inside = {name: look(root / name) for name in names}
    splits = [name for name in names if split_role(name)]
    deep = [n for n in splits if inside[n].folders and not inside[n].images]
    if deep:
        raise ValueError(
            f"{printable(root)}: {_listed(deep)} is understood as a split, but no "
            f"folder beside it as the training images; call that one train/"
        )
    if len(splits) == len(names):
        raise ValueError(
            f"{printable(root)}: {_listed(splits)} are understood as splits, and have "
            "no folder for each class inside"
        )
    parents = [name for name in names if len(inside[name].folders) > 1]
    for a, b in itertools.combinations(parents, 2):
        shared = _shared(inside[a].folders, inside[b].folders)
        if len(shared) < 2:
            continue
        if all(map(split_role, shared)):
            raise ValueError(
                f"{printable(root)}: {_listed([a, b])} are understood as classes with "
                f"splits inside, {_listed(shared)}; put the splits above the classes, "
                f"as {printable(shared[0])}/{printable(a)}/"
            )
        raise ValueError(
            f"{printable(root)}: {_listed([a, b])} both have the folders "
            f"{_listed(shared)}, so they are understood as splits, not as classes. "
            "Call the training images train/ and the others valid/ or test/; or, if "
            "they are classes, give their sub-folders different names"
        )


def _refuse_unfamiliar(root: Path, train: str, others: Sequence[str]) -> None:
    """No folder beside `train` is known as a split, but one has the same classes."""
    classes = look(_inside_split(root / train)).folders
    for name in others:
        shared = _shared(classes, look(root / name).folders)
        if len(shared) > 1:
            raise ValueError(
                f"{printable(root)}: {_listed([name])} has the folders "
                f"{_listed(shared)}, as {printable(train)}/ has, but its name is not "
                "known as that of a split. Call it valid/ or test/, move it away, or "
                f"pass {_option(name)}"
            )


def _option(folder: str) -> str:
    return f"--valid-folder {shlex.quote(printable(folder))}"


def _shared(names: Sequence[str], others: Sequence[str]) -> list[str]:
    folded = {name.casefold() for name in others}
    return [name for name in names if name.casefold() in folded]


def _listed(names: Sequence[str]) -> str:
    return abridge([f"{printable(name)}/" for name in names]) or "no folders"
