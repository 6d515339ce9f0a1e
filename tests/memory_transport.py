"""A transport in memory: real sites that answer bytes with bytes, a clock that only `sleep` moves, and mishaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny

from fedspan.config import Config
from fedspan.site.loading import Loaded
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.wire import protocol
from fedspan.wire.transport import Delivery

Answer = Callable[[bytes], bytes]
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "evaluation": {"every": 9, "diagnostics": False, "per_rank": False, "base": False},
    "engine": {"name": "sequential"},  # the cohort agrees to rounding alone
    "deployment": {"wait": 20, "deadline": 30},
}


def remote_config(base: Path, texts: Path, method: str, /, **sections: Any) -> Config:
    """Settings of a federation in memory: `SECTIONS`, `sections` over them, and those of `tiny.config` below."""
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {**SECTIONS, **sections}}
    return tiny.config(base, texts, method, **merged)


@dataclass
class MemoryTransport:
    """Sites in this process; an answer is there after `delay` seconds of the transport's own clock."""

    handlers: dict[str, Answer]
    """By node."""
    delay: float = 0.01
    clock: float = 0.0
    sent: list[tuple[str, str]] = field(default_factory=list)
    """(node, kind) of every message."""
    mishap: Callable[[str, dict[str, Any], bytes], bytes | str | None] | None = None
    """(node, head of the message, the message) -> other bytes to answer, a one-line error, or "" for silence; None:
    the site answers."""
    bound: dict[str, str] | None = None
    """Node -> the client for which it may speak; None: every node may speak for any."""
    _due: list[tuple[float, Delivery]] = field(default_factory=list)
    _count: int = 0

    def nodes(self) -> list[str]:
        return sorted(self.handlers)

    def client_of(self, node: str) -> str | None:
        return None if self.bound is None else self.bound[node]

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float, answer_bytes: int = 0) -> list[str]:
        tickets = []
        for node, content in messages:
            self._count += 1
            ticket = f"t{self._count}"
            tickets.append(ticket)
            head, _ = protocol.decode(content)
            self.sent.append((node, head["kind"]))
            outcome = None if self.mishap is None else self.mishap(node, head, content)
            if outcome == "":
                continue
            if isinstance(outcome, str):
                delivery = Delivery(ticket, node, None, outcome)
            else:
                delivery = Delivery(ticket, node, self.handlers[node](content) if outcome is None else outcome)
            self._due.append((self.clock + self.delay, delivery))
        return tickets

    def poll(self) -> list[Delivery]:
        ready = [d for at, d in self._due if at <= self.clock]
        self._due = [(at, d) for at, d in self._due if at > self.clock]
        return ready

    def forget(self, tickets: Sequence[str]) -> None:
        self._due = [(at, d) for at, d in self._due if d.ticket not in tickets]

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds


def make_sites(
    config: Config, clients: Sequence[str], folder: Path, ranks: Mapping[str, int] | None = None
) -> dict[str, Site]:
    """Return a site for each client; they share one base and one copy of the data in memory."""
    loaded: Loaded | None = None
    sites: dict[str, Site] = {}
    for client in clients:
        settings = SiteSettings(config, client, (ranks or {}).get(client))
        sites[client] = Site(settings, folder / client, loaded)
        loaded = sites[client].loaded
    return sites
