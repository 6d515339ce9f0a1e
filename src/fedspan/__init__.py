"""Federated fine-tuning of transformers with server rules that are mathematically right.

    import fedspan

    config = fedspan.load_config(overrides=["federation.rounds=6", "method.name=flora"])
    result = fedspan.run(config)
    print(result.summary["base"], result.summary["local"], result.summary["federated"], result.adapter)

Importing the package imports no tensor library: every name below is looked up when it is first used. The
algebra (`fedspan.algebra`) and the methods (`fedspan.methods`) need torch and nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedspan.algebra.lowrank import LowRank as LowRank
    from fedspan.config import Config as Config
    from fedspan.config import load as load_config
    from fedspan.merging.merge_report import MergeReport as MergeReport
    from fedspan.merging.one_shot import merge as merge
    from fedspan.merging.server import RoundReport as RoundReport
    from fedspan.merging.server import Server as Server
    from fedspan.methods import METHODS as METHODS
    from fedspan.methods import create as create_method
    from fedspan.methods.base import Method as Method
    from fedspan.methods.base import ServerState as ServerState
    from fedspan.methods.base import aggregate as aggregate
    from fedspan.methods.messages import Broadcast as Broadcast
    from fedspan.methods.messages import Factors as Factors
    from fedspan.methods.messages import Request as Request
    from fedspan.methods.messages import Template as Template
    from fedspan.methods.messages import Update as Update
    from fedspan.methods.messages import Vector as Vector
    from fedspan.runs.events import Event as Event
    from fedspan.runs.execution import Result as Result
    from fedspan.runs.execution import resume as resume
    from fedspan.runs.execution import run as run

__all__ = [
    "METHODS",
    "Broadcast",
    "Config",
    "Event",
    "Factors",
    "LowRank",
    "MergeReport",
    "Method",
    "Request",
    "Result",
    "RoundReport",
    "Server",
    "ServerState",
    "Template",
    "Update",
    "Vector",
    "aggregate",
    "create_method",
    "load_config",
    "merge",
    "resume",
    "run",
]

_HOME: Mapping[str, tuple[str, str]] = {
    "Vector": ("fedspan.methods.messages", "Vector"),
    "Update": ("fedspan.methods.messages", "Update"),
    "Template": ("fedspan.methods.messages", "Template"),
    "ServerState": ("fedspan.methods.base", "ServerState"),
    "Server": ("fedspan.merging.server", "Server"),
    "RoundReport": ("fedspan.merging.server", "RoundReport"),
    "Request": ("fedspan.methods.messages", "Request"),
    "Factors": ("fedspan.methods.messages", "Factors"),
    "Broadcast": ("fedspan.methods.messages", "Broadcast"),
    "METHODS": ("fedspan.methods", "METHODS"),
    "Config": ("fedspan.config", "Config"),
    "Event": ("fedspan.runs.events", "Event"),
    "LowRank": ("fedspan.algebra.lowrank", "LowRank"),
    "MergeReport": ("fedspan.merging.merge_report", "MergeReport"),
    "Method": ("fedspan.methods.base", "Method"),
    "Result": ("fedspan.runs.execution", "Result"),
    "aggregate": ("fedspan.methods.base", "aggregate"),
    "create_method": ("fedspan.methods", "create"),
    "load_config": ("fedspan.config", "load"),
    "merge": ("fedspan.merging.one_shot", "merge"),
    "resume": ("fedspan.runs.execution", "resume"),
    "run": ("fedspan.runs.execution", "run"),
}


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name == "__version__":
        from fedspan.support.versions import installed_version

        return installed_version("fedspan")
    if name not in _HOME:
        raise AttributeError(f"module 'fedspan' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
