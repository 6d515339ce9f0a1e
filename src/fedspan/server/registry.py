"""Who the sites of a federation are: they say hello, are compared with the server, and are written down."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.methods.base import Method
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes
from fedspan.wire import agreement, protocol
from fedspan.wire.transport import Delivery, Port

_NONE = np.zeros(0, dtype=np.int64)
_AGAIN = 2.0
"""Seconds after which a node that could not say hello is asked once more."""
_HELLO = 60.0
"""Seconds that one round of hellos is waited for: who is still reading its base is asked again."""


@dataclass(frozen=True, slots=True)
class Member:
    """What is known of one site."""

    node: str
    client: Client
    shapes: Mapping[str, Sequence[int]]
    base: str


@dataclass(slots=True)
class _Silence:
    missed: int = 0
    """Answers in a row that did not come."""
    until: int = 0
    """The round before which it is not asked."""


class SiteRegistry:
    """The sites that take part, and those that are left out for a while.

    Parameters
    ----------
    path
        Where they are written down, so that a resumed run asks the same clients.
    tell
        Called with a line for people whenever something happened to a site.
    """

    def __init__(self, port: Port, config: Config, method: Method, path: Path, notify: Callable[[str], None]) -> None:
        self.port, self.config, self.method, self.notify = port, config, method, notify
        self.terms = agreement.terms(config)
        self.members: dict[str, Member] = {}
        self.run = ""
        """The run's own name, which every message tells."""
        self.base = ""
        """Digest of the untouched base."""
        self._greeted: dict[str, float] = {}
        """Node -> when it was last asked who it is."""
        self._refused: dict[str, str] = {}
        """Node -> why it is not a member."""
        self._path = path
        self._kept: list[Client] = []
        self._silence: dict[str, _Silence] = {}

    def gather(self) -> list[Client]:
        """Wait for the federation's sites; who they are, in the order of their ids.

        Raises
        ------
        ValueError
            When too few came in `deployment.wait` seconds.
        """
        f, wait = self.config.federation, self.config.deployment.wait
        expected = self._enrolled()
        wanted = len(expected) if expected else f.num_clients
        began = self.port.now()
        self.notify(f"waiting for {wanted} sites, at most {wait:g} s")
        while len(self.members) < wanted and self.port.now() - began < wait:
            self.greet()
            self.port.sleep(self.config.deployment.poll)
        fewest = max(f.min_clients, f.min_success)
        if len(self.members) < fewest:
            reasons = "".join(f"; {reason}" for reason in list(self._refused.values())[:3])
            raise FedspanError(
                f"{len(self.members)} of {wanted} sites came within deployment.wait = {wait:g} s: expected at least "
                f"{fewest}{reasons}"
            )
        if expected:
            return expected
        return [self.members[name].client for name in sorted(self.members)]

    def agree(self, base: str, shapes: Mapping[str, Sequence[int]], clients: Sequence[Client]) -> list[Client]:
        """The clients whose base is the server's own; the others are told why and not asked."""
        self.base = base
        kept: list[Client] = []
        for client in clients:
            member = self.members.get(client.client_id)
            problem = None if member is None else self._disagreement(member, shapes)
            if problem is None:
                kept.append(client)
            else:
                self.members.pop(client.client_id)
                self.notify(f"{client.client_id} is left out: {problem}")
                self._refused[client.client_id] = f"{client.client_id}: {problem}"
        if len(kept) < max(1, self.config.federation.min_success):
            raise FedspanError(f"{len(kept)} sites agree with the server: {'; '.join(self._refused.values())}")
        self._kept = kept
        return kept

    def _disagreement(self, member: Member, shapes: Mapping[str, Sequence[int]]) -> str | None:
        for name in sorted(shapes.keys() | member.shapes.keys()):
            own, other = shapes.get(name), member.shapes.get(name)
            if own is None or other is None or list(own) != list(other):
                return f"its model holds {name} as {other}, the server's as {None if own is None else list(own)}"
        if member.base != self.base:
            return "its base weights are not the server's, to the bit: expected the same files and types"
        return None

    def _enrolled(self) -> list[Client]:
        """The clients of an earlier start of this run."""
        if not self._path.exists():
            return []
        header = json.loads(self._path.read_text(encoding="utf-8"))
        self.run = header["run"]
        return [Client(c["client_id"], c["rank"], _NONE, _NONE, c["num_examples"]) for c in header["clients"]]

    def enrol(self) -> None:
        """Write down who takes part, where that has not been done by an earlier start of this run."""
        if self.run:
            return
        self.run = secrets.token_hex(8)
        listed = [{"client_id": c.client_id, "rank": c.rank, "num_examples": c.num_examples} for c in self._kept]
        write_bytes(self._path, json.dumps({"run": self.run, "clients": listed}, indent=2).encode())

    def greet(self) -> None:
        """Ask the nodes that are not known yet who they are."""
        now = self.port.now()
        known = {member.node for member in self.members.values()}
        new = [n for n in self.port.nodes() if n not in known and now - self._greeted.get(n, -math.inf) >= _AGAIN]
        if not new:
            return
        content = protocol.encode({"kind": "hello"}, protocol.Parcel())
        tickets = dict(zip(self.port.send([(n, content) for n in new], self.config.deployment.wait), new, strict=True))
        began = self.port.now()
        # One that is still reading its base answers when it has; the others must not wait for it much longer.
        while tickets and self.port.now() - began < min(_HELLO, self.config.deployment.wait):
            for delivery in self.port.poll():
                node = tickets.pop(delivery.ticket, None)
                if node is not None:
                    self._greeted[node] = self.port.now()
                    self._welcome(node, delivery)
            self.port.sleep(self.config.deployment.poll)
        self.port.forget(list(tickets))
        for node in tickets.values():
            self._greeted[node] = self.port.now()
            self._refused[node] = f"node {node} does not answer"

    def _welcome(self, node: str, delivery: Delivery) -> None:
        """Take in whoever said hello, unless something is wrong with it."""
        try:
            if delivery.content is None:
                raise FedspanError(delivery.error or "no answer")
            header, _ = protocol.decode(delivery.content)
            if "problem" in header:
                raise FedspanError(header["problem"])
            client_id, rank, count = header["client_id"], header["rank"], header["num_examples"]
            if not isinstance(client_id, str) or type(rank) is not int or rank < 1:
                raise FedspanError(f"a site says client_id {client_id!r} and rank {rank!r}")
            if count is not None and (type(count) is not int or count < 1):
                raise FedspanError(f"{client_id} says that it has {count!r} examples")
            differs = agreement.difference(self.terms, header["terms"])
            if differs is not None:
                raise FedspanError(f"{client_id}: {differs}")
            if not self.method.info.hetero_rank and any(m.client.rank != rank for m in self.members.values()):
                raise FedspanError(f"{client_id} has rank {rank}: {self.method.info.name} needs one rank for all")
            shapes, base = dict(header["shapes"]), str(header["base"])
        except (ValueError, KeyError, TypeError) as error:
            reason = f"node {node}: {' '.join(str(error).split())}"
            if self._refused.get(node) != reason:  # it is asked again and again, and told of once
                self.notify(f"a node is not taken in: {reason}")
            self._refused[node] = reason
            return
        held = self.members.get(client_id)
        if held is not None and held.node in self.port.nodes():
            self._refused[node] = f"node {node}: {client_id} is here already, as another node"
            self.notify(self._refused[node])
            return
        self._refused.pop(node, None)
        client = Client(client_id, rank, _NONE, _NONE, 1 if count is None else count)
        if held is not None and (rank, client.num_examples) != (held.client.rank, held.client.num_examples):
            self._refused[node] = f"node {node}: {client_id} came back with another rank or other data"
            return
        self.members[client_id] = Member(node, client, shapes, base)
        self.notify(f"{client_id} is here, rank {rank}")

    def away(self, round_num: int) -> set[str]:
        """The clients that are not asked in this round."""
        return {name for name, silence in self._silence.items() if silence.until > round_num}

    def note(self, client_id: str, round_num: int, missed: bool) -> None:
        """Whether an answer came; after too many that did not, the client is left out for a while."""
        silence, d = self._silence.setdefault(client_id, _Silence()), self.config.deployment
        silence.missed = silence.missed + 1 if missed else 0
        if silence.missed >= d.patience:
            silence.missed, silence.until = 0, round_num + 1 + d.quarantine
            self.notify(f"{client_id} has been silent {d.patience} times: left out for {d.quarantine} rounds")

    def here(self, clients: Sequence[Client]) -> list[Client]:
        """Those of the clients that can be reached now."""
        nodes = set(self.port.nodes())
        return [c for c in clients if (m := self.members.get(c.client_id)) is not None and m.node in nodes]
