"""A transport in memory: real sites that answer bytes with bytes, a clock that only sleeping moves, and mishaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspan.config import Config
from fedspan.site.loading import Loaded
from fedspan.site.settings import Settings
from fedspan.site.site import Site
from fedspan.wire import protocol
from fedspan.wire.transport import Delivery

Answer = Callable[[bytes], bytes]


@dataclass
class MemoryTransport:
    """Nodes by name; an answer is there after `delay` seconds of its own clock."""

    nodes_here: dict[str, Answer]
    delay: float = 0.01
    clock: float = 0.0
    sent: list[tuple[str, str]] = field(default_factory=list)
    """(node, kind) of every message."""
    mishap: Callable[[str, dict[str, Any], bytes], bytes | str | None] | None = None
    """(node, head of the message, the message) -> other bytes to answer, a one-line error, or "" for silence; none:
    nothing happens."""
    _due: list[tuple[float, Delivery]] = field(default_factory=list)
    _count: int = 0

    def nodes(self) -> list[str]:
        return sorted(self.nodes_here)

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float) -> list[str]:
        tickets = []
        for node, content in messages:
            self._count += 1
            ticket = f"t{self._count}"
            tickets.append(ticket)
            head, _ = protocol.decode(content)
            self.sent.append((node, head["kind"]))
            told = None if self.mishap is None else self.mishap(node, head, content)
            if told == "":
                continue
            if isinstance(told, str):
                delivery = Delivery(ticket, node, None, told)
            else:
                delivery = Delivery(ticket, node, self.nodes_here[node](content) if told is None else told)
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
    """A site for each client; they share one base and one copy of the data in memory."""
    loaded: Loaded | None = None
    found: dict[str, Site] = {}
    for client in clients:
        given = Settings(config, client, (ranks or {}).get(client))
        found[client] = Site(given, folder / client, loaded)
        loaded = found[client].loaded
    return found
