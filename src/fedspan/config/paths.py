"""The lookup of relative paths: beside the config that names them, and in the working folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fedspan.config.sections import Config, DataConfig
from fedspan.support.errors import FedspanError
from fedspan.support.paths import exists

_FILES = ("train", "test", "unseen")


def reads_files(data: DataConfig) -> bool:
    """Return whether the names in `data.train` and its like may be those of files."""
    return data.task == "files" or data.task.startswith("glue/")


def located(config: Config, folder: Path | None, overridden: Collection[str], must_exist: bool) -> Config:
    """Return the settings with every relative path of data and of the model as it is reached from the working folder.

    Parameters
    ----------
    folder
        The config's; None where there is no file.
    overridden
        The settings that the command line gives, whose paths begin in the working folder.
    must_exist
        Refuse files of data that are at neither place.

    Raises
    ------
    FedspanError
        Naming the setting, the path, and where it was looked for.
    """
    data, model, paths = config.data, config.model, {}
    if reads_files(data):
        for part in _FILES:
            key = f"data.{part}"
            places = _places(folder, key in overridden)
            required_by = key if must_exist and data.task == "files" else None  # others may be names of splits
            paths[part] = tuple(_located(name, places, required_by) for name in getattr(data, part))
    of_model = {
        key: _located(name, _places(folder, f"model.{key}" in overridden), None)
        for key, name in (("name", model.name), ("adapter", model.adapter))
        if name is not None
    }
    return config.model_copy(update={"data": data.model_copy(update=paths), "model": model.model_copy(update=of_model)})


def _places(folder: Path | None, overridden: bool) -> list[Path]:
    """Return the folders that a relative path may begin in, in the order in which they are tried."""
    here = Path()
    if folder is None or folder == here:
        return [here]
    return [here, folder] if overridden else [folder, here]


def _located(name: str, places: list[Path], required_by: str | None) -> str:
    path = Path(name).expanduser()
    for place in places:
        if exists(place / path):
            # As it was given, where that leads to it.
            return name if place == Path() or Path(name).is_absolute() else str(place / path)
    if required_by is not None:
        looked = "" if path.is_absolute() else f": looked in {' and in '.join(str(p.resolve()) for p in places)}"
        raise FedspanError(f"{required_by}: {name} does not exist{looked}")
    return name
