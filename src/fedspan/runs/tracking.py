"""Experiment trackers, which get the figures of every round through accelerate's interface to them.

A tracker is a convenience: it changes no result, and one that fails is left out with one line, for its service may be
down in the middle of a week's run. Figures and settings go to it, but no paths of data and no names of clients: it may
be a service elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedspan.config import Config
from fedspan.runs.events import Event, OnEvent
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import write_bytes

_FEDERATION = "federation"
_PRIVATE = ("data.train", "data.test", "data.unseen", "model.name", "model.adapter", "tracking.folder")
"""Settings that are paths, and say where patients' data lies."""
_KEPT = "tracking.json"
"""File of the run folder with the names that services gave to the run, for when it is resumed."""
_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_DISTRIBUTIONS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "comet_ml": ("comet-ml",),
}
"""Tracker -> the distributions of which one has to be installed; of any other its own name."""


def check_trackers(config: Config) -> None:
    """Refuse trackers that are not installed, before any training.

    Raises
    ------
    FedspanError
        Naming the tracker and the command that installs it.
    """
    for name in config.tracking.trackers:
        wanted = _DISTRIBUTIONS.get(name, (name,))
        if not any(map(_is_installed, wanted)):
            raise FedspanError(f"tracking.with names {name!r}, which is not installed: pip install {wanted[0]}")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def tracked(config: Config, out: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield a listener that hands the events on, and the figures of the federation's rounds to the trackers.

    Parameters
    ----------
    out
        The run folder, whose name is the run's in the trackers.
    """
    if not config.tracking.trackers:
        yield on_event
        return
    tracking = _Tracking(config, out, on_event)
    try:
        yield tracking
    finally:
        tracking.finish()


@dataclass(slots=True)
class _Tracking:
    """All trackers of one run."""

    config: Config
    out: Path
    on_event: OnEvent
    _open: dict[str, Any] = field(default_factory=dict)
    """Tracker's name -> accelerate's object, of those that still work."""

    def __call__(self, event: Event) -> None:
        """Take note of an event, after everybody else."""
        self.on_event(event)
        if event.kind == "start":
            for name in self.config.tracking.trackers:
                self._try(name, partial(self._start, name))
        elif event.kind == "round" and event.data["phase"] == _FEDERATION:
            record = event.data["record"]
            self._log(figures(record), record["round_num"])
        elif event.kind == "end":
            self._log(results(event.data["summary"]), event.data["summary"]["totals"]["rounds"])

    def finish(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, dict(values), step=step))

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            if name == "mlflow":
                self._place_mlflow()
            work()
        except Exception as error:  # of any library, none of which may end a run
            self._open.pop(name, None)
            self.on_event(Event("note", {"line": f"the tracker {name} is left out: {without_secrets(error)}"}))

    def _start(self, name: str) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if not PartialState._shared_state:  # it chooses a device, and must not choose ours
            PartialState(cpu=True)
        kept = _read_kept(self.out)
        self._folder().mkdir(parents=True, exist_ok=True)
        tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name, kept.get(name)))
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":
            _keep(self.out, kept | {name: tracker.tracker.info.run_id})
        elif name == "wandb":
            _keep(self.out, kept | {name: tracker.tracker.id})
        if name not in kept:
            self._settings(name, tracker)

    def _settings(self, name: str, tracker: Any) -> None:
        """Hand the settings over, once in the life of a run."""
        values = public_settings(self.config)
        if name == "tensorboard":
            # Its hyperparameters would be a second run beside this one.
            tracker.log({"settings": "".join(f"    {key} = {value}\n" for key, value in values.items())}, step=0)
        else:
            tracker.store_init_configuration(values)

    def _arguments(self, name: str, kept: str | None) -> dict[str, Any]:
        """Return what accelerate's class of a tracker takes: each has other words for project, group and run."""
        tracking, run = self.config.tracking, self._name
        project, place = tracking.project, self._folder()
        group = {} if tracking.group is None else {"group": tracking.group}
        again = {} if kept is None else {"id": kept, "resume": "allow"}
        arguments: Mapping[str, Mapping[str, Any]] = {
            "tensorboard": {"run_name": place.name, "logging_dir": str(place.parent)},
            "mlflow": {"experiment_name": project, "run_name": run, "run_id": kept, "tags": group or None},
            "wandb": {"run_name": project, "name": run, "dir": str(place), **group, **again},
            "trackio": {"run_name": project, "name": run, "resume": "allow", **group},
            "comet_ml": {"run_name": project},
            "aim": {"run_name": run, "logging_dir": str(place), "experiment": project},
            "clearml": {"run_name": project, "task_name": run, "tags": list(group.values())},
            "swanlab": {"run_name": project, "experiment_name": run, "logdir": str(place)},
            "dvclive": {"run_name": run, "dir": str(place), "resume": True},
        }
        return dict(arguments[name])

    @property
    def _name(self) -> str:
        return self.config.tracking.name or self.out.name

    def _folder(self) -> Path:
        """Return the folder of this run's files: in the run folder, or by project and group in one of several runs."""
        tracking = self.config.tracking
        if tracking.folder is None:
            return self.out / "tracking"
        return Path(tracking.folder, tracking.project, tracking.group or "", self._name)

    def _place_mlflow(self) -> None:
        """Keep MLflow's records in the folder of this run, or of several, unless a server is named elsewhere.

        The place is the process's, and other runs of it may have set theirs since.
        """
        import mlflow

        if os.environ.get("MLFLOW_TRACKING_URI"):
            return
        shared = self.config.tracking.folder
        folder = (Path(shared) if shared is not None else self.out / "tracking") / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve()}/mlflow.db")


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a round under the names that trackers group by: loss, evaluation, bytes, seconds."""
    found = {
        "train/loss": record.get("train_loss"),
        "clients/answered": record.get("num_clients"),
        "clients/rejected": len(record.get("rejected") or {}),
        "traffic/bytes_up": record.get("bytes_up"),
        "traffic/bytes_down": record.get("bytes_down"),
        "seconds/server": record.get("server_seconds"),
        "seconds/clients": record.get("client_seconds"),
        "seconds/waiting": record.get("train_wall_seconds"),
        "privacy/epsilon": record.get("epsilon"),
        **{f"eval/{name}": value for name, value in (record.get("eval") or {}).items()},
    }
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the headline figures of a finished run."""
    found = {f"final/{whose}": summary.get(whose) for whose in ("base", "local", "federated", "server", "unseen")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def public_settings(config: Config) -> dict[str, str | int | float | bool]:
    """Return the settings by their keys, without those that are paths."""
    found: dict[str, str | int | float | bool] = {}
    for section, value in config.model_dump(mode="json").items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for name, setting in inner:
            key = f"{section}.{name}" if name else section
            if key not in _PRIVATE:
                found[key] = setting if isinstance(setting, str | int | float | bool) else json.dumps(setting)
    found["model.name"] = re.split(r"[/\\]", config.model.name.rstrip("/\\"))[-1]
    return found


def without_secrets(error: object) -> str:
    """Return an error's text in one line, without keys of the environment and without names in addresses."""
    text = _USER_IN_URL.sub("***@", f"{type(error).__name__}: {error}")
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET.search(name):
            text = text.replace(value, "***")
    return one_line(text, 200)


def _read_kept(out: Path) -> dict[str, str]:
    try:
        kept = json.loads((out / _KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in kept.items()} if isinstance(kept, dict) else {}


def _keep(out: Path, names: Mapping[str, str]) -> None:
    write_bytes(out / _KEPT, (json.dumps(names) + "\n").encode())
