"""Images from npz files, folders, file names and encoded bytes: uint8 arrays (H, W, 3) or (H, W).

The pixels are in `fedspan.data.pixels`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.data.pixels import Range, as_uint8, from_picture, is_image
from fedspan.data.sources import check_regular
from fedspan.data.tables import Table, npz_names, read_npz
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_SPLITS = ("train_", "test_", "unseen_")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_SAY_EVERY = 256


def is_image_file(name: str) -> bool:
    """Return whether a name is that of a file with an image."""
    return name.lower().endswith(_SUFFIXES)


def has_split(path: Path, split: str) -> bool:
    """Return whether an npz holds arrays of its own for `split`, such as ``test_x``."""
    return any(name.startswith(f"{split}_") for name in npz_names(path))


def npz_table(path: Path, split: str) -> Table:
    """Read one split of an npz, with its ``class_names`` if it has them.

    A file with arrays named ``train_…`` or ``test_…`` holds splits: those of `split` are its columns,
    without that prefix. In any other file every array is a column. A boolean column ``exclude``, or one whose
    name begins with ``dup_of_``, marks rows that are left out.

    Raises
    ------
    FedspanError
        If the file is unreadable, lacks the split, or its arrays differ in length.
    """
    names = npz_names(path)
    prefix = _prefix(names, split, path)
    arrays = read_npz(path, [name for name in names if name.startswith(prefix) or name == "class_names"])
    classes = arrays.pop("class_names", None)
    columns = {name[len(prefix) :]: array for name, array in arrays.items()}
    _check_lengths(columns, prefix, path)
    kept = _kept(columns, prefix, path)
    label_names = None if classes is None else tuple(str(name) for name in classes.reshape(-1))
    return Table(str(path), {name: array[kept] for name, array in columns.items()}, path.parent, label_names)


def _prefix(names: Sequence[str], split: str, path: Path) -> str:
    """Return the beginning of the names of a split's arrays: none where the file holds no splits."""
    splits = sorted({name.split("_", 1)[0] for name in names if name.startswith(_SPLITS)})
    if splits and split not in splits:
        raise FedspanError(f"{path} has no arrays named {split}_…: expected one of its splits, {', '.join(splits)}")
    return f"{split}_" if splits else ""


def _check_lengths(columns: Mapping[str, np.ndarray], prefix: str, path: Path) -> None:
    lengths = {prefix + name: len(array) if array.ndim else 0 for name, array in columns.items()}
    if len(set(lengths.values())) != 1 or not max(lengths.values(), default=0):
        contents = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "nothing"
        raise FedspanError(f"{path} holds {contents}: expected arrays with one row per image")


def _kept(columns: dict[str, np.ndarray], prefix: str, path: Path) -> np.ndarray:
    """Return which rows no column marks as left out; the columns that mark rows are taken away."""
    kept = np.ones(len(next(iter(columns.values()))), dtype=bool)
    for name in [name for name in columns if name == "exclude" or name.startswith("dup_of_")]:
        mark = columns.pop(name)
        if mark.dtype != np.bool_ or mark.ndim != 1:
            raise FedspanError(f"{path}: {prefix}{name} is {mark.dtype} {mark.shape}: expected one boolean per image")
        kept &= ~mark
    return kept


def folder_table(path: Path, limits: Range = None) -> Table:
    """Read an image folder with one sub-folder per class; names that begin with a dot are ignored.

    Parameters
    ----------
    limits
        As of `as_images`.

    Raises
    ------
    FedspanError
        If there are no sub-folders, or one holds anything but images.
    """
    files = [file for folder in _entries(path) for file in _images_of_class(folder, path)]
    if not files:
        raise FedspanError(f"{path} holds no images: expected one sub-folder of PNG or JPEG files per class")
    images = _decoded(files, path, limits)
    return Table(str(path), {"image": images, "label": [file.parent.name for file in files]}, path)


def loose_table(path: Path, limits: Range = None) -> Table:
    """Read one image, or a folder of images without classes, as rows without labels; the column `file` names each.

    Parameters
    ----------
    limits
        As of `as_images`.

    Raises
    ------
    FedspanError
        If the folder holds anything but images, or none.
    """
    files = _only_images(path, _entries(path)) if path.is_dir() else [path]
    if not files:
        raise FedspanError(f"{path} holds no images: expected {', '.join(_SUFFIXES)} files")
    return Table(str(path), {"image": _decoded(files, path, limits), "file": [file.name for file in files]}, path)


def is_loose(path: Path) -> bool:
    """Return whether a path is one image, or a folder that begins with a file where classes would be folders."""
    if path.is_dir():
        entries = _entries(path)
        return bool(entries) and not entries[0].is_dir()
    return path.suffix.lower() in _SUFFIXES


def _decoded(files: Sequence[Path], path: Path, limits: Range) -> list[np.ndarray]:
    report(f"reading {path.name}", 0, len(files))
    images = []
    for done, file in enumerate(files, 1):
        images.append(decode(str(file), str(file), None, limits))
        if done % _SAY_EVERY == 0:
            report(f"reading {path.name}", done, len(files))
    return images


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise FedspanError(f"cannot read {folder}: {error.strerror or error}") from None


def _images_of_class(folder: Path, path: Path) -> list[Path]:
    if not folder.is_dir():
        raise FedspanError(
            f"{folder} lies beside the classes of {path}: expected one sub-folder per class; "
            "tables are listed one by one"
        )
    return _only_images(folder, _entries(folder))


def _only_images(folder: Path, files: list[Path]) -> list[Path]:
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            raise FedspanError(f"{file} is not an image: expected {', '.join(_SUFFIXES)} files alone in {folder}")
    return files


def find_column(table: Table, wanted: str, names: Sequence[str], key: str) -> str:
    """Return `wanted` if the table has it, otherwise the first of the usual `names` for the same thing."""
    for name in (wanted, *names):
        if name in table.columns:
            return name
    usual = " or ".join(dict.fromkeys((wanted, *names)))
    raise FedspanError(f"{table.source} has no {usual} ({key}){nearest(wanted, table.columns)}")


def as_images(
    values: Sequence[Any] | np.ndarray, source: str, root: Path | None, limits: Range = None
) -> Sequence[Any] | np.ndarray:
    """Return a column of arrays, file names, encoded bytes or PIL images as uint8 arrays.

    Parameters
    ----------
    limits
        The values that become black and white in images of more than 8 bits (``data.image_range``); None: the smallest
        and the largest value of each image.

    Raises
    ------
    FedspanError
        Naming the row, or the array's type and shape, when it is none of these.
    """
    if isinstance(values, np.ndarray) and values.dtype != object and values.dtype.kind not in "US":
        return as_uint8(values, source, limits)
    return [decode(value, f"row {row} of {source}", root, limits) for row, value in enumerate(values, 1)]


def decode(value: Any, name: str, root: Path | None, limits: Range = None) -> np.ndarray:
    """Return one image as an array, from an array, a file name (relative to `root`), encoded bytes or a PIL image.

    Parameters
    ----------
    name
        Its name in messages.
    limits
        As of `as_images`.

    Raises
    ------
    FedspanError
        When it is none of these, or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and is_image(value):
        return value
    if isinstance(value, Mapping):  # how Parquet files of datasets store images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path) and root is not None:
        name = f"{name} ({value})"
    try:
        picture = _opened(value, root, name)
        if picture is not None:
            return from_picture(picture, name, limits)
    except FedspanError:
        raise
    # PIL reads the pixels as late as here, and each of its formats raises errors of its own.
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FedspanError(f"{name} is not a readable image: {error}") from None
    raise FedspanError(f"{name} is a {type(value).__name__}: expected an image, its bytes, or a file name")


def _opened(value: Any, root: Path | None, name: str) -> Any:
    """Return the PIL image in a file or in bytes, or the value if it is one; None for anything else."""
    from PIL import Image

    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str | Path):
        path = (root or Path()) / value
        if path.exists():  # otherwise PIL says that it is missing
            check_regular(path, name)
        return Image.open(path)
    return value if isinstance(value, Image.Image) else None
