"""A federation in regions in this process, and the same sites with one server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from memory_transport import MemoryTransport, make_sites

from fedspan.config import Config
from fedspan.regions.regional_server import RegionalServer
from fedspan.runs import checkpoint
from fedspan.runs.events import Event
from fedspan.runs.execution import serve

REGIONS = {"north": ("client-0", "client-2"), "south": ("client-1", "client-3")}
QUIET = {"every": 9, "diagnostics": False, "per_rank": False, "base": False}
OPEN, SECURE = {"fixed_point": True}, {"secure_sums": True}


def settings(base: Path, texts: Path, name: str, /, regions: Any = REGIONS, **sections: Any) -> Config:
    """Four clients, all of them in each of two rounds."""
    given = {"rounds": 2, "participation": 1.0, **sections.pop("federation", {})}
    return tiny.config(
        base,
        texts,
        name,
        federation=given,
        evaluation={
            "every": 9,
            "diagnostics": False,
            "per_rank": False,
            "base": False,
            **sections.pop("evaluation", {}),
        },
        engine={"name": "sequential"},
        deployment={"wait": 20, "deadline": 30, "regions": regions},
        **sections,
    )


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


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return tiny.state_tensors(checkpoint.read(folder / "checkpoint" / "federation.safetensors").state)


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
