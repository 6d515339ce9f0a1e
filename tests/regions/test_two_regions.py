"""Regions over the message port: the bits of one server, in the open and under masks, in training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run_folders import state_of
from trees import OPEN, SECURE, Tree, flat, settings

pytest.importorskip("cryptography")
FEDERATIONS: dict[str, dict[str, Any]] = {"fedit": {}, "glora_sums": {"ranks": (2, 8, 4, 3)}}


@pytest.fixture(scope="module")
def by_one_server(
    bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    states = {}
    for name, federation in FEDERATIONS.items():
        folder = tmp_path_factory.mktemp(name)
        flat(settings(bases["bert"], texts, name, federation=federation), folder)
        states[name] = state_of(folder / "run")
    return states


@pytest.mark.parametrize("privacy", [OPEN, SECURE], ids=["open", "secure"])
@pytest.mark.parametrize("name", list(FEDERATIONS))
def test_two_regions_come_to_the_bits_of_one_server(
    bases: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    by_one_server: dict[str, dict[str, torch.Tensor]],
    name: str,
    privacy: dict[str, Any],
) -> None:
    """One message to a region for all of its sites, of mixed ranks too, and one answer with their sum."""
    tree = Tree(settings(bases["bert"], texts, name, federation=FEDERATIONS[name], privacy=privacy), tmp_path)
    history = tree.serve()
    assert [(record["num_clients"], record["rejected"]) for record in history] == [(4, {})] * 2
    assert {node for node, _ in tree.transport.sent} == {"node-north", "node-south"}
    exchanges = 2 * (2 if name == "glora_sums" else 1)
    assert [kind for _, kind in tree.transport.sent].count("relay") == 2 * exchanges
    tiny.same(tree.state(), by_one_server[name])


def test_regions_judge_models_to_the_figures_of_one_server(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"client_holdout": 0.3, "metrics": ["accuracy"]},
        "evaluation": {"where": "clients", "every": 1},
        "federation": {"rounds": 1},
    }
    config = settings(bases["bert"], texts, "fedit", privacy=SECURE, **changes)
    tree = Tree(config, tmp_path)
    there, here = tree.serve(), flat(config, tmp_path / "flat")
    assert there[0]["client_evaluation"]["clients"] == 4
    own, others = (json.dumps(record[0]["client_evaluation"]) for record in (there, here))
    assert own == others
