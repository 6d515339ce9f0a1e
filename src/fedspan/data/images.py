"""Images from npz files, folders, file names and encoded bytes: uint8 arrays (H, W, 3) or (H, W)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.data.tables import Table, npz_names, read_npz
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_SPLITS = ("train_", "test_", "unseen_")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def has_split(path: Path, split: str) -> bool:
    """Whether an npz holds arrays of its own for `split`, such as ``test_x``."""
    return any(name.startswith(f"{split}_") for name in npz_names(path))


def npz_table(path: Path, split: str) -> Table:
    """One split of an npz, with its ``class_names`` if it has them.

    A file with arrays named ``train_…`` or ``test_…`` holds splits: those of `split` are its columns,
    without that prefix. In any other file every array is a column. A boolean column ``exclude``, or one whose
    name begins with ``dup_of_``, marks rows that are left out.

    Raises
    ------
    ValueError
        If the file is unreadable, lacks the split, or its arrays differ in length.
    """
    names = npz_names(path)
    splits = sorted({name.split("_", 1)[0] for name in names if name.startswith(_SPLITS)})
    if splits and split not in splits:
        raise FedspanError(f"{path} has no arrays named {split}_…: expected one of its splits, {', '.join(splits)}")
    prefix = f"{split}_" if splits else ""
    arrays = read_npz(path, [name for name in names if name.startswith(prefix) or name == "class_names"])
    classes = arrays.pop("class_names", None)
    columns = {name[len(prefix) :]: array for name, array in arrays.items()}
    lengths = {prefix + name: len(array) if array.ndim else 0 for name, array in columns.items()}
    if len(set(lengths.values())) != 1 or not max(lengths.values(), default=0):
        found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "nothing"
        raise FedspanError(f"{path} holds {found}: expected arrays with one row per image")
    kept = np.ones(next(iter(lengths.values())), dtype=bool)
    for name in [name for name in columns if name == "exclude" or name.startswith("dup_of_")]:
        mark = columns.pop(name)
        if mark.dtype != np.bool_ or mark.ndim != 1:
            raise FedspanError(f"{path}: {prefix}{name} is {mark.dtype} {mark.shape}: expected one boolean per image")
        kept &= ~mark
    label_names = None if classes is None else tuple(str(name) for name in classes.reshape(-1))
    return Table(str(path), {name: array[kept] for name, array in columns.items()}, path.parent, label_names)


def folder_table(path: Path) -> Table:
    """An image folder with one sub-folder per class; names that begin with a dot are ignored.

    Raises
    ------
    ValueError
        If there are no sub-folders, or one holds anything but PNG and JPEG files.
    """
    try:
        classes = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror or error}") from None
    files: list[Path] = []
    for folder in classes:
        if not folder.is_dir():
            raise FedspanError(f"{folder} lies beside the classes of {path}: expected one sub-folder per class")
        for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            if file.suffix.lower() not in _SUFFIXES:
                raise FedspanError(f"{file} is no image: expected {', '.join(_SUFFIXES)} files in a class's folder")
            files.append(file)
    if not files:
        raise FedspanError(f"{path} holds no images: expected one sub-folder of PNG or JPEG files per class")
    images = [decode(str(file), str(file), None) for file in files]
    return Table(str(path), {"image": images, "label": [file.parent.name for file in files]}, path)


def find_column(table: Table, wanted: str, names: Sequence[str], key: str) -> str:
    """`wanted` if the table has it, otherwise the first of the usual `names` for the same thing."""
    for name in (wanted, *names):
        if name in table.columns:
            return name
    usual = " or ".join(dict.fromkeys((wanted, *names)))
    raise FedspanError(f"{table.source} has no {usual} ({key}){nearest(wanted, table.columns)}")


def as_images(values: Sequence[Any] | np.ndarray, source: str, root: Path | None) -> Sequence[Any] | np.ndarray:
    """A column of arrays, file names, encoded bytes or PIL images as uint8 arrays.

    Raises
    ------
    ValueError
        Naming the row, or the array's type and shape, when it is none of these.
    """
    if isinstance(values, np.ndarray) and values.dtype != object and values.dtype.kind not in "US":
        array = values[..., 0] if values.ndim == 4 and values.shape[-1] == 1 else values
        if array.dtype != np.uint8 or not _is_image(array[0] if len(array) else array):
            raise FedspanError(
                f"{source} holds images as {values.dtype} {values.shape}: expected uint8 (N, H, W, 3) or (N, H, W)"
            )
        return array
    return [decode(value, f"row {row} of {source}", root) for row, value in enumerate(values, 1)]


def decode(value: Any, name: str, root: Path | None) -> np.ndarray:
    """One image from an array, a file name (relative to `root`), encoded bytes or a PIL image."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and _is_image(value):
        return value
    if isinstance(value, Mapping):  # how Parquet files of datasets store images
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, str | Path):
            name = f"{name} ({value})" if root is not None else name
            value = Image.open((root or Path()) / value)
        if isinstance(value, Image.Image):
            return np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FedspanError(f"{name} is not a readable image: {error}") from None
    raise FedspanError(f"{name} is a {type(value).__name__}: expected an image, its bytes, or a file name")


def _is_image(array: np.ndarray) -> bool:
    return array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
