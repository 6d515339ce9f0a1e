"""A server and four sites in memory, without identities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from memory_transport import MemoryTransport, make_sites, remote_config
from run_folders import NAMES, Stop, state_of

from fedspan.config import Config
from fedspan.methods import METHODS
from fedspan.runs.events import Event
from fedspan.runs.execution import serve
from fedspan.site.site import Site
from fedspan.wire import protocol

REMOTE = [name for name in NAMES if not METHODS[name]().info.pooled and not METHODS[name]().info.alone]
SUMS = [name for name in REMOTE if METHODS[name]().secure_sum]
IDS = [f"client-{k}" for k in range(4)]


def settings(base: Path, texts: Path, name: str = "flexlora", /, **sections: Any) -> Config:
    """Four clients, three of them in each of three rounds, one after the other."""
    federation = {"rounds": 3, "participation": 0.75, **sections.pop("federation", {})}
    return remote_config(base, texts, name, federation=federation, **sections)


class Federation:
    """Sites in memory, and a server's folder."""

    trusted: Mapping[str, bytes] | None = None
    """The sites' public keys that the server knows."""
    sites: dict[str, Site]

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.sites = make_sites(config, IDS, folder / "sites")
        self.transport = MemoryTransport({f"node-{k}": site.answer for k, site in enumerate(self.sites.values())})
        self.lines: list[str] = []

    def serve(self, on_event: Callable[[Event], None] | None = None) -> list[dict[str, Any]]:
        """Run the server and return the records of the rounds."""

        def listen(event: Event) -> None:
            if event.kind == "site":
                self.lines.append(event.data["line"])
            if on_event is not None:
                on_event(event)

        return serve(self.config, self.folder / "run", listen, self.transport, self.trusted).history

    def state(self) -> dict[str, torch.Tensor]:
        return state_of(self.folder / "run")

    def restart(self, client_id: str) -> None:
        """Replace a site by a new one on the same disk, as if its process had been restarted."""
        old = self.sites[client_id]
        fresh = Site(old.settings, old.folder, old.loaded)
        self.sites[client_id] = fresh
        self.transport.handlers[f"node-{IDS.index(client_id)}"] = fresh.answer


def spoiled(change: Callable[[dict[str, Any], list[torch.Tensor]], None]) -> Callable[[bytes], bytes]:
    """Return a function that changes the head or tensors of a message."""

    def spoil(content: bytes) -> bytes:
        head, tensors = protocol.decode(content)
        change(head, tensors)
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor)
        return protocol.encode({k: v for k, v in head.items() if k not in ("schema", "parts")}, outgoing)

    return spoil


def stop_in_round_2(event: Event) -> None:
    if event.kind == "client" and event.data["round_num"] == 2:
        raise Stop
