"""Federated fine-tuning of transformers with aggregation rules whose exactness is stated and tested.

    import fedspan

    result = fedspan.run({"federation": {"rounds": 6}, "method": {"name": "flora"}})
    print(result.summary["base"], result.summary["local"], result.summary["federated"], result.adapter)

Importing the package imports no tensor library: every name below is looked up when it is first used. The
algebra (`fedspan.algebra`) and the methods (`fedspan.methods`) need torch but not transformers.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from fedspan.algebra.lowrank import LowRank as LowRank
    from fedspan.api import check as check
    from fedspan.api import compare as compare
    from fedspan.api import resume as resume
    from fedspan.api import run as run
    from fedspan.api import run_many as run_many
    from fedspan.auditing.canaries import plant as plant_canaries
    from fedspan.auditing.dossier import Dossier as Dossier
    from fedspan.auditing.dossier import audit as audit
    from fedspan.comparison.runner import Comparison as Comparison
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
    from fedspan.runs.application import Evaluation as Evaluation
    from fedspan.runs.application import Predicted as Predicted
    from fedspan.runs.application import evaluate as evaluate
    from fedspan.runs.application import predict_rows as predict
    from fedspan.runs.check import RunCheck as RunCheck
    from fedspan.runs.events import Event as Event
    from fedspan.runs.execution import Result as Result
    from fedspan.runs.summary import Summary as Summary
    from fedspan.support.errors import FedspanError as FedspanError

    __version__: str

__all__ = [
    "METHODS",
    "Broadcast",
    "Comparison",
    "Config",
    "Dossier",
    "Evaluation",
    "Event",
    "Factors",
    "FedspanError",
    "LowRank",
    "MergeReport",
    "Method",
    "Predicted",
    "Request",
    "Result",
    "RoundReport",
    "RunCheck",
    "Server",
    "ServerState",
    "Summary",
    "Template",
    "Update",
    "Vector",
    "aggregate",
    "audit",
    "check",
    "compare",
    "create_method",
    "evaluate",
    "load_config",
    "merge",
    "plant_canaries",
    "predict",
    "resume",
    "run",
    "run_many",
]

_HOME = {
    "METHODS": ("fedspan.methods", "METHODS"),
    "Broadcast": ("fedspan.methods.messages", "Broadcast"),
    "Comparison": ("fedspan.comparison.runner", "Comparison"),
    "Config": ("fedspan.config", "Config"),
    "Dossier": ("fedspan.auditing.dossier", "Dossier"),
    "Evaluation": ("fedspan.runs.application", "Evaluation"),
    "Event": ("fedspan.runs.events", "Event"),
    "Factors": ("fedspan.methods.messages", "Factors"),
    "FedspanError": ("fedspan.support.errors", "FedspanError"),
    "LowRank": ("fedspan.algebra.lowrank", "LowRank"),
    "MergeReport": ("fedspan.merging.merge_report", "MergeReport"),
    "Method": ("fedspan.methods.base", "Method"),
    "Predicted": ("fedspan.runs.application", "Predicted"),
    "Request": ("fedspan.methods.messages", "Request"),
    "Result": ("fedspan.runs.execution", "Result"),
    "RoundReport": ("fedspan.merging.server", "RoundReport"),
    "RunCheck": ("fedspan.runs.check", "RunCheck"),
    "Server": ("fedspan.merging.server", "Server"),
    "ServerState": ("fedspan.methods.base", "ServerState"),
    "Summary": ("fedspan.runs.summary", "Summary"),
    "Template": ("fedspan.methods.messages", "Template"),
    "Update": ("fedspan.methods.messages", "Update"),
    "Vector": ("fedspan.methods.messages", "Vector"),
    "aggregate": ("fedspan.methods.base", "aggregate"),
    "audit": ("fedspan.auditing.dossier", "audit"),
    "check": ("fedspan.api", "check"),
    "compare": ("fedspan.api", "compare"),
    "evaluate": ("fedspan.runs.application", "evaluate"),
    "plant_canaries": ("fedspan.auditing.canaries", "plant"),
    "predict": ("fedspan.runs.application", "predict_rows"),
    "create_method": ("fedspan.methods", "create"),
    "load_config": ("fedspan.config", "load"),
    "merge": ("fedspan.merging.one_shot", "merge"),
    "resume": ("fedspan.api", "resume"),
    "run": ("fedspan.api", "run"),
    "run_many": ("fedspan.api", "run_many"),
}
"""Public name -> the module that defines it, and its name there."""


def __getattr__(name: str) -> object:
    """Return a public name, importing it now."""
    if name == "__version__":
        from fedspan.support.versions import installed_version

        return installed_version("fedspan")
    if name not in _HOME:
        raise AttributeError(f"module 'fedspan' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(_importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    # Only what is public: neither submodules that happen to be loaded, nor this file's own imports.
    return sorted([*__all__, "__version__"])
