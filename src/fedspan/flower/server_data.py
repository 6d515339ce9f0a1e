"""The settings of a deployment's server where its sites judge the models: it needs no data."""

from __future__ import annotations

from fedspan.config import Config
from fedspan.data.builtin import CLASSES, KINDS, USUAL_METRICS


def with_stated_metrics(config: Config) -> Config:
    """Return settings that name the usual metrics of an embedded task, which a server without data cannot know."""
    usual = USUAL_METRICS.get(config.data.task, ())
    if config.evaluation.where != "clients" or config.data.metrics or not usual:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"metrics": usual})})


def without_data(config: Config) -> Config:
    """Return the server's settings: without rows where the clients judge alone and the settings say what rows mean.

    A server keeps the data that the settings name where it is to judge models itself, and where it would have to learn
    the kind of the data or the names of the classes (`data.kind`, `data.label_names`) from it.
    """
    data = config.data
    kind = KINDS.get(data.task, data.kind)
    names = CLASSES.get(data.task, data.label_names)
    if config.evaluation.where != "clients" or kind is None or not (kind == "instruction" or names):
        return config
    nothing = {"task": "files", "train": (), "test": (), "unseen": (), "unseen_values": (), "subset": None}
    changed = {**nothing, "kind": kind, "label_names": () if kind == "instruction" else names, "validation": 0.0}
    return config.model_copy(update={"data": data.model_copy(update=changed)})
