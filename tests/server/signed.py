"""A federation in memory whose sites sign their keys for secure sums, for tests of servers and sites that lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_transport import MemoryTransport, remote_config
from remote import IDS, Federation

from fedspan.config import Config
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.wire import protocol

Change = Callable[[dict[str, Any], list[torch.Tensor]], None]


def settings(base: Path, texts: Path, /, method: str = "ffa_lora", **sections: Any) -> Config:
    """Four clients, all of them in every round, under secure sums."""
    federation = {"rounds": 1, "participation": 1.0, **sections.pop("federation", {})}
    privacy = {"secure_sums": True, **sections.pop("privacy", {})}
    return remote_config(base, texts, method, federation=federation, privacy=privacy, **sections)


def changed(content: bytes, change: Change) -> bytes:
    """Return a message with another head or other tensors."""
    head, tensors = protocol.decode(content)
    change(head, tensors)
    outgoing = protocol.MessageTensors()
    for tensor in tensors:
        outgoing.put(tensor)
    return protocol.encode(head, outgoing)


class Signed(Federation):
    """Four sites with identities, or without them, and a server that knows the identities, or does not."""

    def __init__(self, config: Config, folder: Path, signed: bool = True, known: bool = True) -> None:
        self.config, self.folder = config, folder
        self.keys = {name: Ed25519PrivateKey.generate() for name in IDS}
        public = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}
        self.public = public if signed else None
        self.trusted = self.public if known else None
        self.sites = {}
        self.said: list[str] = []
        """The lines of all sites' own logs."""
        for name in IDS:
            identity = self.keys[name].private_bytes_raw() if signed else None
            loaded = next(iter(self.sites.values())).loaded if self.sites else None
            site = SiteSettings(config, name, identity=identity, trusted=self.public)
            self.sites[name] = Site(site, folder / "sites" / name, loaded, self.said.append)
        self.transport = MemoryTransport({f"node-{k}": site.answer for k, site in enumerate(self.sites.values())})
        self.lines: list[str] = []

    def restart(self, client_id: str) -> None:
        """Replace a site by a new one on the same disk, as if its process had been restarted."""
        old = self.sites[client_id]
        self.sites[client_id] = Site(old.settings, old.folder, old.loaded, self.said.append)
        self.transport.handlers[f"node-{IDS.index(client_id)}"] = self.sites[client_id].answer

    def ask_falsely(self, client_id: str, kinds: tuple[str, ...], change: Change, back: Change | None = None) -> None:
        """Have the server send this site changed messages, and read its answers after changing them back."""
        node = f"node-{IDS.index(client_id)}"
        answer = self.transport.handlers[node]

        def lied_to(content: bytes) -> bytes:
            if protocol.decode(content)[0]["kind"] not in kinds:
                return answer(content)
            reply = answer(changed(content, change))
            return reply if back is None else changed(reply, back)

        self.transport.handlers[node] = lied_to


def without(config: Config, folder: Path, client_id: str) -> dict[str, torch.Tensor]:
    """Return the state of a run in fixed point, without masks, in which one client never answers."""
    open_sums = config.privacy.model_copy(update={"secure_sums": False, "fixed_point": True, "server": "curious"})
    fed = Signed(config.model_copy(update={"privacy": open_sums}), folder)
    node = f"node-{IDS.index(client_id)}"
    fed.transport.mishap = lambda to, head, content: "gone" if to == node and head["kind"] == "ask" else None
    fed.serve()
    return fed.state()
