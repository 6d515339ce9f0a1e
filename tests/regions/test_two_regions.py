"""Two regions of two sites each, over the message port: the bits of one server, and regions that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites

from fedspan.config import Config
from fedspan.regions.regional_server import RegionalServer
from fedspan.runs import checkpoint
from fedspan.runs.events import Event
from fedspan.runs.execution import serve

IDS = [f"client-{k}" for k in range(4)]
REGIONS = {"north": ("client-0", "client-2"), "south": ("client-1", "client-3")}
OPEN, SECURE = {"fixed_point": True}, {"secure_sums": True}


def settings(base: Path, texts: Path, name: str, /, regions: Any = REGIONS, **sections: Any) -> Config:
    """Four clients, all of them in each of two rounds."""
    return tiny.config(
        base,
        texts,
        name,
        federation={"rounds": 2, "participation": 1.0, **sections.pop("federation", {})},
        evaluation={
            "every": 9,
            "diagnostics": False,
            "per_rank": False,
            "base": False,
            **sections.pop("evaluation", {}),
        },
        engine={"name": "sequential"},
        deployment={"wait": 20, "deadline": 30, "regions": regions, **sections.pop("deployment", {})},
        **sections,
    )


class Tree:
    """Sites in memory, the servers of their regions, and the folder of the server above."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.sites = make_sites(config, IDS, folder / "sites")
        self.below: dict[str, MemoryTransport] = {}
        self.said: list[str] = []
        self.lines: list[str] = []
        self.regions = {region: self.region(region) for region in config.deployment.regions}
        self.transport = MemoryTransport({f"node-{region}": each.answer for region, each in self.regions.items()})

    def region(self, name: str) -> RegionalServer:
        """Start a region's server on its folder."""
        nodes = {f"{name}-{who}": self.sites[who].answer for who in self.config.deployment.regions[name]}
        self.below[name] = MemoryTransport(nodes)
        return RegionalServer(name, self.config, self.below[name], self.folder / name, self.said.append)

    def serve(self) -> list[dict[str, Any]]:
        def listen(event: Event) -> None:
            if event.kind == "site":
                self.lines.append(event.data["line"])

        return serve(self.config, self.folder / "run", listen, self.transport).history

    def state(self) -> dict[str, torch.Tensor]:
        return state_of(self.folder / "run")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return tiny.state_tensors(checkpoint.read(folder / "checkpoint" / "federation.safetensors").state)


def flat(config: Config, folder: Path, silent: Callable[[str, int], bool] | None = None) -> dict[str, torch.Tensor]:
    """The state of one server with the same sites; some are silent in some rounds."""
    deployment = config.deployment.model_copy(update={"regions": {}})
    config = config.model_copy(update={"deployment": deployment})
    sites = make_sites(config, IDS, folder / "sites")
    transport = MemoryTransport({who: site.answer for who, site in sites.items()})
    if silent is not None:
        transport.mishap = lambda node, head, content: (
            "gone" if head["kind"] == "ask" and silent(node, head["round"]) else None
        )
    serve(config, folder / "run", lambda event: None, transport)
    return state_of(folder / "run")


@pytest.mark.parametrize("privacy", [OPEN, SECURE], ids=["open", "secure"])
@pytest.mark.parametrize("name", ["fedit", "glora_sums"])
def test_two_regions_come_to_the_bits_of_one_server(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str, privacy: dict[str, Any]
) -> None:
    config = settings(bases["bert"], texts, name, privacy=privacy)
    tree = Tree(config, tmp_path)
    history = tree.serve()
    assert [record["num_clients"] for record in history] == [4, 4]
    assert all(not record["rejected"] for record in history)
    assert {node for node, _ in tree.transport.sent} == {"node-north", "node-south"}
    tiny.same(tree.state(), flat(config, tmp_path / "flat"))
