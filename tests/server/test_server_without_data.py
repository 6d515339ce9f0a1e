"""A server that has a base and a configuration, and no rows: the bits and figures of one that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from memory_transport import MemoryTransport, make_sites
from remote import IDS, Federation
from run_folders import state_of
from test_client_evaluation import judged, summary_of

from fedspan.config import Config
from fedspan.runs.execution import run, serve
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.support.errors import FedspanError

NOWHERE = {"train": (), "test": ()}
LABELS = {"classification": {"label_names": ("x", "y", "z")}, "instruction": {}}


def bare(config: Config, **data: Any) -> Config:
    """The server's settings: the sites' without their files."""
    changed = {**NOWHERE, **data}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def serve_without_data(config: Config, server: Config, folder: Path) -> list[dict[str, Any]]:
    sites = make_sites(config, IDS, folder / "sites")
    transport = MemoryTransport({f"node-{k}": site.answer for k, site in enumerate(sites.values())})
    return serve(server, folder / "run", lambda event: None, transport).history


@pytest.mark.parametrize(
    ("base", "kind", "masked"),
    [("bert", "classification", False), ("bert", "classification", True), ("llama", "instruction", False)],
)
def test_it_comes_to_the_bits_of_one_process_with_the_data(
    bases: dict[str, Path], texts: Path, tmp_path: Path, base: str, kind: str, masked: bool
) -> None:
    data: dict[str, Any] = {"kind": kind, **LABELS[kind]}
    if kind == "instruction":
        texts = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.questions())
        data["metrics"] = ["exact_match"]
    privacy = {"secure_sums": True} if masked else {}
    config = judged(bases[base], texts, "ffa_lora", data=data, privacy=privacy, federation={"participation": 1.0})
    run(config, tmp_path / "here")
    serve_without_data(config, bare(config), tmp_path)
    tiny.same(state_of(tmp_path / "run"), state_of(tmp_path / "here"))
    mine, theirs = (summary_of(folder) for folder in (tmp_path / "here", tmp_path / "run"))
    assert json.dumps(mine["client_evaluation"]) == json.dumps(theirs["client_evaluation"])
    assert (theirs["federated"], theirs["base"]) == (mine["federated"], mine["base"])
    assert theirs["data"]["rows"] == {}
    assert theirs["labels"] == mine["labels"]
    assert (tmp_path / "run" / "adapter").exists()


def test_a_site_with_other_labels_is_refused_by_name(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Names in another order, under which every id means another class; the others go on."""
    config = judged(bases["bert"], texts, "flexlora", data={"kind": "classification", **LABELS["classification"]})
    fed = Federation(config, tmp_path)
    fed.config = bare(config)
    other = config.model_copy(update={"data": config.data.model_copy(update={"label_names": ("z", "y", "x")})})
    stranger = Site(SiteSettings(other, "client-2"), tmp_path / "sites" / "stranger")
    fed.transport.handlers["node-2"] = stranger.answer
    fed.serve()
    left = [line for line in fed.lines if line.startswith("client-2 is left out")]
    assert len(left) == 1
    assert "label names" in left[0]
    assert summary_of(tmp_path / "run")["client_evaluation"]["clients"] == 3


def test_a_label_that_the_settings_do_not_name_is_refused_at_the_site(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = judged(bases["bert"], texts, "flexlora", data={"label_names": ("x", "y", "w")})
    with pytest.raises(FedspanError, match=r"has the label 'z': expected those of data.label_names, 'w', 'x', 'y'"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "where", "said"),
    [
        ({}, "server", "a server without data judges nothing"),
        ({"kind": None}, "clients", "data.kind is not set"),
        ({"label_names": ()}, "clients", "data.label_names is empty"),
        ({"label_names": ("x", "x")}, "clients", "two or more different names"),
    ],
)
def test_settings_that_say_too_little_are_refused(
    bases: dict[str, Path], texts: Path, tmp_path: Path, changed: dict[str, Any], where: str, said: str
) -> None:
    config = judged(bases["bert"], texts, "flexlora", data={"kind": "classification", **LABELS["classification"]})
    given = bare(config, **changed)
    given = given.model_copy(update={"evaluation": given.evaluation.model_copy(update={"where": where})})
    sites = make_sites(config, IDS[:1], tmp_path / "sites")
    transport = MemoryTransport({"node-0": sites[IDS[0]].answer})
    with pytest.raises(FedspanError, match=said):
        serve(given, tmp_path / "run", lambda event: None, transport)
