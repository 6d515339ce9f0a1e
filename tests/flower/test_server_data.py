"""The settings of a deployment's server: without data where its sites judge the models and the settings say enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspan.config import Config, load
from fedspan.data.load import load as load_data
from fedspan.data.load import load_no_rows
from fedspan.flower import deployment
from fedspan.flower.server_data import with_stated_metrics, without_data
from fedspan.wire import agreement

JUDGED = "evaluation.where=clients"


def settings(*overrides: str) -> Config:
    return with_stated_metrics(load(None, overrides))


@pytest.mark.parametrize("task", ["builtin:tasks", "builtin:digits"])
def test_a_server_of_an_embedded_task_knows_what_its_sites_know(task: str) -> None:
    """The same labels, metrics and terms, from settings that name no rows."""
    config = settings(f"data.task={task}", JUDGED)
    server = without_data(config)
    assert (server.data.task, server.data.train, server.data.test) == ("files", (), ())
    bare, whole = load_no_rows(server.data), load_data(config.data, 0)
    assert (bare.kind, bare.num_labels, bare.label_names) == (whole.kind, whole.num_labels, whole.label_names)
    assert bare.metrics == whole.metrics
    assert bare.describe()["rows"] == {}
    assert agreement.difference(agreement.terms(server), agreement.terms(config)) is None


@pytest.mark.parametrize(
    ("overrides", "bare"),
    [
        ((JUDGED, "data.kind=instruction"), True),
        ((JUDGED, "data.kind=classification", 'data.label_names=["a", "b"]'), True),
        ((JUDGED, "data.kind=classification"), False),
        ((JUDGED,), False),
        (("data.kind=instruction",), False),
        (("evaluation.where=both", "data.kind=instruction"), False),
    ],
)
def test_a_server_keeps_the_data_that_it_needs(overrides: tuple[str, ...], bare: bool) -> None:
    config = settings("data.task=files", 'data.train=["notes.jsonl"]', *overrides)
    assert (without_data(config).data.train == ()) is bare


def test_only_the_sites_folders_name_the_data(tmp_path: Path) -> None:
    config = settings(JUDGED, "federation.num_clients=2", "federation.ranks=4", "data.client_holdout=0.2")
    deployment.write(tmp_path / "fed", deployment.plan(["a", "b"]), config)
    server, site = (load(tmp_path / "fed" / place / "config.toml") for place in ("server", "sites/a"))
    assert (server.data.task, server.data.kind) == ("files", "instruction")
    assert site.data.task == "builtin:tasks"
    assert server.data.metrics == site.data.metrics == ("exact_match", "rouge_l")
