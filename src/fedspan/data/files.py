"""Files of data by their paths: which reader a path takes, and the clients that files are named after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedspan.config import DataConfig
from fedspan.data.images import folder_table, is_loose, loose_table, npz_table
from fedspan.data.sources import check_encoding
from fedspan.data.tables import READERS, Table, read_table
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError
from fedspan.support.paths import exists


def read_files(names: Sequence[str], split: str, config: DataConfig, *, loose: bool = False) -> Iterator[Table]:
    """Return the tables in the files and folders that ``data.train``, ``data.test`` or ``data.unseen`` lists.

    That all are there is checked at once; each is read when it is asked for, so that the columns of one that nothing
    needs are not in memory beside the next one.

    Parameters
    ----------
    loose
        Take an image by itself, and a folder of images without classes, as rows without labels.

    Raises
    ------
    FedspanError
        If one does not exist, saying where it was looked for; if one is listed twice; and as its reader.
    """
    check_encoding(config.encoding)
    paths = [Path(name).expanduser() for name in names]
    for path in paths:
        if not exists(path):
            where = "" if path.is_absolute() else f": looked in {Path.cwd()}"
            raise FedspanError(f"data.{split}: {path} does not exist{where}")
        if paths.count(path) > 1:
            raise FedspanError(f"data.{split} lists {path} twice: expected each file once")
    return (_read(path, split, config, loose) for path in paths)


def _read(path: Path, split: str, config: DataConfig, loose: bool) -> Table:
    if loose and is_loose(path):
        return loose_table(path, config.image_range)
    if path.is_dir():
        return folder_table(path, config.image_range)
    if path.name.lower().endswith(".npz"):
        report(f"reading {path.name}")
        return npz_table(path, split)
    return read_table(path, config.encoding)


def names_of(files: Sequence[str]) -> tuple[str, ...]:
    """Return a name for each file: its own without its types, or its folder's where files have one name.

    ``charite.csv`` and ``mayo.csv.gz`` are `charite` and `mayo`, and so are ``charite/train.csv`` and
    ``mayo/train.csv``. Names may still be equal where those of the folders are.
    """
    paths = [Path(name).expanduser() for name in files]
    own = [_stem(path.name) for path in paths]
    if len(set(own)) == len(own):
        return tuple(own)
    return tuple(path.absolute().parent.name for path in paths)


def _stem(name: str) -> str:
    stem = name[:-3] if name.lower().endswith(".gz") else name
    for suffix in (*READERS, ".npz"):
        if stem.lower().endswith(suffix):
            return stem[: -len(suffix)]
    return stem
