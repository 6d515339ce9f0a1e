"""A trained model to be applied to new data: the outcome of a finished run, or a PEFT adapter from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedspan.adapters import peft_folder
from fedspan.adapters.peft_folder import LABELS_NAME
from fedspan.client.executors import WorkContext
from fedspan.client.setup import Prepared, device_of, notes_of, prepare, work_context
from fedspan.config import Config
from fedspan.config import load as load_config
from fedspan.data.metrics import check_metric, default_metrics, register_own
from fedspan.data.new_rows import KnownLabels, NewRows, read_new_rows
from fedspan.data.own_metrics import is_own
from fedspan.data.rows import Corpus, Kind
from fedspan.federation import requirements
from fedspan.methods.messages import Broadcast, Recipe, Request
from fedspan.models.base_facts import read_facts
from fedspan.models.federated_model import Trains
from fedspan.runs import checkpoint
from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.paths import lacks

_KINDS: dict[str, Kind] = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "instruction",
    "SEQ_2_SEQ_LM": "instruction",
}
"""PEFT's task types; an adapter of an image model has none."""
_MAY_SET = ("data.", "evaluation.", "model.name=", "device=", "engine.device_map=", "threads=")


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained model, before its base is loaded."""

    config: Config
    kind: Kind | None
    """None: as the columns of the data say."""
    labels: KnownLabels
    metrics: tuple[str, ...]
    """Those that its run evaluated, without any of the user's own; empty for an adapter."""
    trains: Trains = "adapter"
    max_rank: int = 1
    broadcast: Broadcast | None = None
    """The final model of a run; None: the base begins with it (`model.adapter`)."""
    base: str | None = None
    """Digest of the run's base."""
    notes: tuple[str, ...] = ()

    def read(self, files: Sequence[str], *, unlabelled: bool) -> NewRows:
        """Return the rows of these files."""
        return read_new_rows(files, self.config.data, self.kind, self.labels, unlabelled=unlabelled)

    def chosen_metrics(self, kind: Kind) -> tuple[str, ...]:
        """Return the metrics that the settings name; where they name none, those of the run or the usual ones.

        A function of the user's own counts only where these settings name it, never because a folder does.
        """
        given, size = self.config.data.metrics, self.labels.num_labels
        register_own(given, kind)
        for name in given:
            check_metric(name, kind, size)
        return tuple(dict.fromkeys(given or self.metrics or default_metrics(kind, size)))

    def context(self, rows: NewRows, metrics: tuple[str, ...]) -> tuple[WorkContext, Broadcast, tuple[str, ...]]:
        """Return the base in memory beside these rows (as `test`), the model to load into it, and notes on both.

        Raises
        ------
        FedspanError
            When the base cannot be read, is not the run's, or does not fit the rows.
        """
        config = self.config
        torch.set_num_threads(config.threads)
        prepared, context = self._loaded(rows.corpus(self.labels, metrics))
        if self.base is not None and context.model.digest() != self.base:
            # A head without names was kept or drawn anew by what the training data had, which the base's digest tells.
            prepared, context = self._loaded(rows.corpus(self.labels, metrics, ids_in_data=False))
        model = context.model
        if self.base is not None and model.digest() != self.base:
            raise FedspanError(
                f"model.name = {config.model.name!r} has other weights than the base of the run: expected that base"
            )
        broadcast = self.broadcast or Broadcast(model.adapter(), model.dense(), Recipe())
        return context, broadcast, (*self.notes, *notes_of(prepared, model))

    def _loaded(self, corpus: Corpus) -> tuple[Prepared, WorkContext]:
        config, device = self.config, device_of(self.config.device)
        prepared = prepare(config.model.name, config.data, corpus, stand_ins=("train",))
        return prepared, work_context(
            config, prepared, trains=self.trains, max_rank=self.max_rank, device=device, training=False
        )


def find_trained(where: Path, settings: Sequence[str] = (), base: str | None = None) -> Trained:
    """Return the trained model in a run folder or in a PEFT adapter folder.

    Parameters
    ----------
    settings
        `KEY=VALUE` of settings on data, evaluation, base and device that replace the run's.
    base
        The base of an adapter, where its own name does not lead to it.

    Raises
    ------
    FedspanError
        When it is neither, is unfinished or damaged, or holds a model for each client.
    """
    for item in settings:
        if not item.strip().startswith(_MAY_SET):
            raise FedspanError(
                f"--set {item!r}: expected a setting of data, evaluation, model.name, device, "
                "engine.device_map or threads"
            )
    if (where / "config.toml").is_file():
        return _of_run(where, [*settings, *([f"model.name={json.dumps(base)}"] if base else [])])
    if (where / peft_folder.CONFIG_NAME).is_file():
        return _of_adapter(where, settings, base)
    raise FedspanError(
        f"{lacks(where, 'run (config.toml) and no PEFT adapter')}: expected the folder of a finished run or of a PEFT "
        f"adapter{enclosing_run(where)}"
    )


def _of_run(where: Path, settings: Sequence[str]) -> Trained:
    config = load_config(where / "config.toml", settings)
    if not any(item.strip().startswith(("data.metric", "evaluation.metric")) for item in settings):
        # Those of the run are in its summary, and a run from elsewhere must not have modules imported.
        config = config.model_copy(update={"data": config.data.model_copy(update={"metrics": ()})})
    summary, labels = _json(where / "summary.json"), _labels(where / LABELS_NAME)
    if summary is None:
        raise FedspanError(f"{where} is not finished (no summary.json): expected a finished run, or `fedspan resume`")
    method = requirements.chosen(config)
    try:
        if method.info.personalised:
            own = where / "adapters" / str(summary["clients"][0]["client_id"])
            raise FedspanError(
                f"each client of {where} has a model of its own: expected one client's adapter, such as {own}"
            )
        kind, names = summary["data"]["kind"], summary["data"]["label_names"]
        # Where the clients judge, there are figures of the server's state only if it has test rows too.
        figures = summary["metrics"].get("server") or (summary.get("client_evaluation") or {}).get("figures") or {}
        shown = [name for name in (summary["metric"], *figures) if name != "loss"]
    except (KeyError, IndexError, TypeError):
        raise FedspanError(
            f"{where / 'summary.json'} is damaged, or of another version of fedspan: expected the summary that this "
            "version writes, as `fedspan resume` does"
        ) from None
    saved = checkpoint.read(where / "checkpoint" / "federation.safetensors")
    broadcast = method.broadcast(saved.state, Request(None))
    left_out = sorted({name for name in shown if is_own(name)})
    notes = [f"{name} is left out: give data.metrics={name} to have its module imported" for name in left_out]
    return Trained(
        config,
        kind,
        KnownLabels(labels.num_labels, None if names is None else tuple(names)),
        tuple(dict.fromkeys(name for name in shown if not is_own(name))),
        method.info.trains,
        max((f.rank for f in broadcast.adapter.values()), default=1),
        broadcast,
        saved.identity["base"],
        tuple(notes),
    )


def _of_adapter(where: Path, settings: Sequence[str], base: str | None) -> Trained:
    adapter = peft_folder.load(where)
    base = base or adapter.base_model
    if not base:
        raise FedspanError(f"{where} names no base: expected --base NAME")
    kind = _KINDS.get(str(adapter.config.get("task_type")))
    labels = _labels(where / LABELS_NAME)
    if not labels.num_labels and kind != "instruction" and adapter.dense:
        labels = _labels_of_head(base, adapter.dense)
    # PEFT lists the head among the modules that it saves; a run trains it anyway.
    saved = [name for name in adapter.config.get("modules_to_save") or () if kind == "instruction"]
    own = {"model.name": base, "model.adapter": str(where.absolute()), "adapter.modules_to_save": saved}
    config = load_config(None, [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *settings])
    return Trained(config, kind or config.data.kind, labels, ())


def _labels_of_head(base: str, dense: Any) -> KnownLabels:
    """Return the labels of an adapter without a file of labels: as many as its head has, named as the base's are."""
    rows = min((value.shape[0] for value in dense.values() if value.ndim == 2), default=0)
    facts = read_facts(base)
    return KnownLabels(rows, facts.label_names if facts.num_labels == rows else None)


def _labels(path: Path) -> KnownLabels:
    content = _json(path)
    if content is None:
        return KnownLabels(0, None)
    try:
        count = int(content["num_labels"])
        names = tuple(str(content["id2label"][str(i)]) for i in range(count))
    except (KeyError, TypeError, ValueError) as error:
        raise FedspanError(
            f"{path} is damaged ({one_line(error, 100)}): expected labels as a run writes them"
        ) from None
    made_up = count == 1 or names == tuple(f"LABEL_{i}" for i in range(count))
    return KnownLabels(count, None if made_up else names)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FedspanError(f"{path} is damaged ({one_line(error, 200)}): expected JSON") from None
    if not isinstance(content, dict):
        raise FedspanError(f"{path} is damaged: expected a JSON object")
    return content
