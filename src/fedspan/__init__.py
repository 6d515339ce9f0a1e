"""Federated fine-tuning of transformers with server rules that are mathematically right.

    import fedspan

    config = fedspan.load_config(overrides=["federation.rounds=6", "method.name=flora"])
    result = fedspan.run(config)
    print(result.summary["base"], result.summary["local"], result.summary["federated"], result.adapter)

Importing the package imports no tensor library: every name below is looked up when it is first used. The
algebra (`fedspan.lowrank`, `fedspan.subspace`) and the methods (`fedspan.methods`) need torch and nothing of
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedspan.config import Config as Config
    from fedspan.config import load as load_config
    from fedspan.engine import Event as Event
    from fedspan.lowrank import LowRank as LowRank
    from fedspan.merge import MergeReport as MergeReport
    from fedspan.merge import merge as merge
    from fedspan.methods import METHODS as METHODS
    from fedspan.methods import create as create_method
    from fedspan.methods.base import Method as Method
    from fedspan.methods.base import aggregate as aggregate
    from fedspan.run import Result as Result
    from fedspan.run import resume as resume
    from fedspan.run import run as run

__all__ = [
    "METHODS",
    "Config",
    "Event",
    "LowRank",
    "MergeReport",
    "Method",
    "Result",
    "aggregate",
    "create_method",
    "load_config",
    "merge",
    "resume",
    "run",
]

_HOME: Mapping[str, tuple[str, str]] = {
    "METHODS": ("fedspan.methods", "METHODS"),
    "Config": ("fedspan.config", "Config"),
    "Event": ("fedspan.engine", "Event"),
    "LowRank": ("fedspan.lowrank", "LowRank"),
    "MergeReport": ("fedspan.merge", "MergeReport"),
    "Method": ("fedspan.methods.base", "Method"),
    "Result": ("fedspan.run", "Result"),
    "aggregate": ("fedspan.methods.base", "aggregate"),
    "create_method": ("fedspan.methods", "create"),
    "load_config": ("fedspan.config", "load"),
    "merge": ("fedspan.merge", "merge"),
    "resume": ("fedspan.run", "resume"),
    "run": ("fedspan.run", "run"),
}


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fedspan")
    if name not in _HOME:
        raise AttributeError(f"module 'fedspan' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """This package, where `fedspan.run` and `fedspan.merge` stay the functions.

    The import system sets a package's attribute to every submodule it has loaded, which would hide the
    functions behind the files of the same name. `from fedspan.run import …` reaches what else is in them.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
