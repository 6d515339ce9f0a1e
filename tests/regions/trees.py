"""A federation in regions in this process, and the same sites with one server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory_transport import SECTIONS, MemoryTransport, make_sites, remote_config
from run_folders import state_of

from fedspan.config import Config
from fedspan.regions.regional_server import RegionalServer
from fedspan.runs.events import Event
from fedspan.runs.execution import serve

REGIONS = {"north": ("client-0", "client-2"), "south": ("client-1", "client-3")}
QUIET = SECTIONS["evaluation"]
OPEN, SECURE = {"fixed_point": True}, {"secure_sums": True}


def settings(base: Path, texts: Path, name: str, /, regions: Any = REGIONS, **sections: Any) -> Config:
    """Four clients, all of them in each of two rounds."""
    given = {"rounds": 2, "participation": 1.0, **sections.pop("federation", {})}
    deployment = {"regions": regions, **sections.pop("deployment", {})}
    return remote_config(base, texts, name, federation=given, deployment=deployment, **sections)


class Tree:
    """Sites in memory, the servers of their regions, and the folder of the server above."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        ids = [f"client-{k}" for k in range(config.federation.num_clients)]
        self.sites = make_sites(config, ids, folder / "sites")
        self.below: dict[str, MemoryTransport] = {}
        self.said: list[str] = []
        """By the regions' servers."""
        self.lines: list[str] = []
        """Of the server above, about its regions and their sites."""
        self.regions = {name: self._region(name) for name in config.deployment.regions}
        self.transport = MemoryTransport({f"node-{name}": each.answer for name, each in self.regions.items()})

    def _region(self, name: str) -> RegionalServer:
        nodes = {who: self.sites[who].answer for who in self.config.deployment.regions[name]}
        self.below[name] = MemoryTransport(nodes)
        return RegionalServer(name, self.config, self.below[name], self.folder / name, self.said.append)

    def serve(self) -> list[dict[str, Any]]:
        """Run the server above and return the records of the rounds."""

        def listen(event: Event) -> None:
            if event.kind == "site":
                self.lines.append(event.data["line"])

        return serve(self.config, self.folder / "run", listen, self.transport).history

    def state(self) -> dict[str, torch.Tensor]:
        return state_of(self.folder / "run")


def flat(
    config: Config, folder: Path, silent: Callable[[str, int], bool] = lambda client, round_num: False
) -> list[dict[str, Any]]:
    """The rounds of one server with the same sites, in fixed point; some are silent in some rounds."""
    deployment = config.deployment.model_copy(update={"regions": {}})
    privacy = config.privacy.model_copy(update={"fixed_point": True, "secure_sums": False})
    config = config.model_copy(update={"deployment": deployment, "privacy": privacy})
    ids = [f"client-{k}" for k in range(config.federation.num_clients)]
    transport = MemoryTransport({who: site.answer for who, site in make_sites(config, ids, folder / "sites").items()})

    def mishap(node: str, head: dict[str, Any], content: bytes) -> str | None:
        return "gone" if head["kind"] == "ask" and silent(node, head["round"]) else None

    transport.mishap = mishap
    return serve(config, folder / "run", lambda event: None, transport).history
