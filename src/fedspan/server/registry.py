"""The sites of a federation: they introduce themselves, are compared with the server, and are written down."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.config import DeploymentConfig, FederationConfig
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.methods.base import Method
from fedspan.server.greeting import Arrivals, Greeting
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import write_bytes
from fedspan.wire import agreement, protocol, refusals
from fedspan.wire.names import check_name
from fedspan.wire.transport import Delivery, Transport

_NO_ROWS = np.zeros(0, dtype=np.int64)
_GREET_AGAIN = 2.0
"""Seconds after which a node that could not introduce itself is asked once more."""
_MAX_GREETING = 60.0
"""Seconds to wait for the answers to one set of greetings."""
_MAX_LINE = 500
"""Characters of a line about a site."""


@dataclass(frozen=True, slots=True)
class Member:
    """One site that takes part."""

    node: str
    """The transport's name for it, which may change when the site reconnects."""
    client: Client
    shapes: Mapping[str, Sequence[int]]
    """Of its adapted modules and trained weights, by name."""
    base: str
    """Digest of its untouched base."""
    labels: str
    """Digest of what the labels of its data mean."""
    holds: Sequence[str] = ()
    """Digests of tensors that it keeps."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """The settings that it shares with the server, and its libraries."""


@dataclass(slots=True)
class _Silence:
    missed: int = 0
    """Answers in a row that did not come."""
    until: int = 0
    """The first round in which it is asked again."""


class SiteRegistry:
    """The sites that take part, and those that are left out for a while.

    Parameters
    ----------
    terms
        The settings that a site must share with the server.
    path
        The file that lists the sites, so that a resumed run asks the same clients.
    notify
        Called with a line for people whenever something happens to a site.
    """

    def __init__(
        self,
        transport: Transport,
        federation: FederationConfig,
        deployment: DeploymentConfig,
        terms: Mapping[str, Any],
        method: Method,
        path: Path,
        notify: Callable[[str], None],
    ) -> None:
        self.transport, self.federation, self.deployment = transport, federation, deployment
        self.terms, self.method = terms, method
        # Every line may quote a site.
        self.notify: Callable[[str], None] = lambda line: notify(one_line(line, _MAX_LINE))
        self._max_rank = requirements.largest_rank(federation)
        # From the settings: if the first site to come gave the rank of all, it could keep the others out.
        ranks = requirements.ranks(federation, terms["seed"])
        self._one_rank = None if method.info.hetero_rank else max(ranks)
        self.members: dict[str, Member] = {}
        self.run = ""
        """The run's own name, which is in every message."""
        self.base = ""
        """Digest of the server's untouched base."""
        self._greeted: dict[str, float] = {}
        """Node -> time of the last answer to a greeting, or of giving up on it."""
        self._refused: dict[str, str] = {}
        """Node or client -> the reason why it is not a member."""
        self._path = path
        self._kept: list[Client] = []
        self._known: Mapping[str, Client] = {}
        """The clients of an earlier start of this run; empty where this is the first."""
        self._silence: dict[str, _Silence] = {}
        self._regions: dict[str, str] = {}
        """Region -> the node of its server."""

    def node_of(self, name: str) -> str:
        """Return the transport's name for a client's node, or for that of a region's server."""
        return self._regions[name] if name in self._regions else self.members[name].node

    def gather(self) -> list[Client]:
        """Wait for the federation's sites and return their clients, in the order of their ids.

        Raises
        ------
        FedspanError
            When too few came in `deployment.wait` seconds.
        """
        wait, enrolled = self.deployment.wait, self._enrolled()
        self._known = {client.client_id: client for client in enrolled}
        wanted = len(enrolled) if enrolled else self.federation.num_clients
        began = self.transport.now()
        self.notify(f"waiting for {wanted} sites, at most {wait:g} s")
        while len(self.members) < wanted and self.transport.now() - began < wait:
            self.greet()
            self.transport.sleep(self.deployment.poll)
        fewest = max(self.federation.min_clients, self.federation.min_success)
        if len(self.members) < fewest:
            reasons = "".join(f"; {reason}" for reason in list(self._refused.values())[:3])
            raise FedspanError(
                f"{len(self.members)} of {wanted} sites came within deployment.wait = {wait:g} s: expected at least "
                f"{fewest}{reasons}"
            )
        # A resumed run keeps its enrolled clients, even those that have not come back: with other clients to draw
        # from, its later rounds would draw differently from the uninterrupted run.
        return enrolled or [self.members[name].client for name in sorted(self.members)]

    def agree(
        self, base: str, labels: str, shapes: Mapping[str, Sequence[int]], clients: Sequence[Client]
    ) -> list[Client]:
        """Return the clients whose base and labels are the server's; the others are reported, and not asked any more.

        Raises
        ------
        FedspanError
            When fewer clients agree than `federation.min_success`.
        """
        self.base = base
        kept: list[Client] = []
        for client in clients:
            member = self.members.get(client.client_id)
            problem = None if member is None else self._problem(member, labels, shapes)
            if problem is None:
                kept.append(client)
            else:
                self.members.pop(client.client_id)
                self.notify(f"{client.client_id} is left out: {problem}")
                self._refused[client.client_id] = f"{client.client_id}: {problem}"
        fewest = max(1, self.federation.min_success)
        if len(kept) < fewest:
            raise FedspanError(
                f"{len(kept)} sites agree with the server: expected at least {fewest}; "
                f"{'; '.join(self._refused.values())}"
            )
        self._kept = kept
        return kept

    def _problem(self, member: Member, labels: str, shapes: Mapping[str, Sequence[int]]) -> str | None:
        if member.labels != labels:
            # First, since another number of labels is another shape of the head too.
            return (
                "the labels of its data are not the server's: expected the same label names, or numbers, in one order"
            )
        for name in sorted(shapes.keys() | member.shapes.keys()):
            own, other = shapes.get(name), member.shapes.get(name)
            if own is None or other is None or list(own) != list(other):
                theirs = None if other is None else list(other)
                return f"its model holds {name} as {theirs}, the server's as {None if own is None else list(own)}"
        if member.base != self.base:
            return "its base weights differ from the server's (digest mismatch): expected the same files and types"
        return None

    def _enrolled(self) -> list[Client]:
        """Return the clients of an earlier start of this run, and take over its name; none where this is the first."""
        if not self._path.exists():
            return []
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            clients = [
                Client(check_name(c["client_id"], "client_id"), int(c["rank"]), _NO_ROWS, _NO_ROWS, c["num_examples"])
                for c in content["clients"]
            ]
            self.run = check_name(content["run"], "run")
        except (ValueError, KeyError, TypeError) as error:
            raise FedspanError(f"{self._path} is damaged ({type(error).__name__}: {error})") from None
        return clients

    def enrol(self) -> None:
        """Write down the clients that take part, unless an earlier start of this run has done so."""
        if self.run:
            return
        self.run = secrets.token_hex(8)
        listed = [{"client_id": c.client_id, "rank": c.rank, "num_examples": c.num_examples} for c in self._kept]
        write_bytes(self._path, json.dumps({"run": self.run, "clients": listed}, indent=2).encode())

    def greet(self) -> None:
        """Ask the nodes that are not known yet to introduce themselves.

        A node may be unable to answer yet, while it reads its base or its worker is being restarted, and a site that
        reconnects may have a new node name. Greetings are therefore repeated until the node is a member, and a refusal
        is not final.
        """
        nodes = self._nodes_to_greet()
        if not nodes:
            return
        for node, delivery in self._introductions(nodes):
            self._greeted[node] = self.transport.now()
            if delivery is None:
                self._refused[node] = f"node {node} does not answer"
            else:
                self._welcome(node, delivery)

    def _nodes_to_greet(self) -> list[str]:
        now = self.transport.now()
        known = {member.node for member in self.members.values()} - self._incomplete()
        return [
            node
            for node in self.transport.nodes()
            if node not in known and now - self._greeted.get(node, -math.inf) >= _GREET_AGAIN
        ]

    def _incomplete(self) -> set[str]:
        """Return the nodes of regions of which some clients have not come: they are greeted again."""
        regions = self.deployment.regions
        return {
            node
            for region, node in self._regions.items()
            if any(who not in self.members or self.members[who].node != node for who in regions[region])
        }

    def _introductions(self, nodes: Sequence[str]) -> Iterator[tuple[str, Delivery | None]]:
        """Greet the nodes and yield their answers as they come; None for a node that does not answer in time."""
        wait = self.deployment.wait
        content = protocol.encode({"kind": "hello"}, protocol.MessageTensors())
        tickets = dict(zip(self.transport.send([(node, content) for node in nodes], wait), nodes, strict=True))
        began = self.transport.now()
        # The others must not wait much longer for one that is still reading its base: it is asked again.
        while tickets and self.transport.now() - began < min(_MAX_GREETING, wait):
            for delivery in self.transport.poll():
                node = tickets.pop(delivery.ticket, None)
                if node is not None:
                    yield node, delivery
            self.transport.sleep(self.deployment.poll)
        self.transport.forget(list(tickets))
        yield from ((node, None) for node in tickets.values())

    def _welcome(self, node: str, delivery: Delivery) -> None:
        """Make the site behind a node, or every site of a region, a member, unless there is a problem with it."""
        try:
            arrived = Arrivals.read(delivery, self._max_rank)
            if arrived.region is None:
                self._check_speaker(node, arrived.greetings[0].client_id)
            else:
                self._check_region(node, arrived.region)
        except FedspanError as error:
            self._refuse(node, one_line(error, _MAX_LINE))
            return
        if arrived.region is not None:
            self._regions[arrived.region] = node
            self._refused.pop(node, None)
        for greeting in arrived.greetings:
            self._take_in(node, greeting, arrived.region)

    def _take_in(self, node: str, greeting: Greeting, region: str | None) -> None:
        key = node if region is None else f"{node} {greeting.client_id}"
        try:
            if region is not None:
                self._check_in_region(region, greeting.client_id)
                if self._is_known(node, greeting):
                    return
            self._compare(node, greeting)
        except FedspanError as error:
            self._refuse(node, one_line(error, _MAX_LINE), key)
            return
        client = Client(greeting.client_id, greeting.rank, _NO_ROWS, _NO_ROWS, greeting.num_examples)
        self._refused.pop(key, None)
        self.members[greeting.client_id] = Member(
            node, client, greeting.shapes, greeting.base, greeting.labels, greeting.holds, greeting.terms
        )
        through = "" if region is None else f", in the region {region}"
        self.notify(f"{greeting.client_id} is here, rank {greeting.rank}{through}")
        if others := agreement.library_differences(self.terms, greeting.terms):
            self.notify(f"{greeting.client_id} has other libraries: {others}; results may differ in the last bits")

    def _check_speaker(self, node: str, client_id: str) -> None:
        """Check that the node may speak for the client: otherwise any site could keep another one out.

        Raises
        ------
        FedspanError
            When it may not.
        """
        own = self.transport.client_of(node)
        if own not in (None, client_id):
            raise FedspanError(f"says that it is {client_id!r}: its key is that of {own}, expected this name")
        if client_id in {who for clients in self.deployment.regions.values() for who in clients}:
            raise FedspanError(f"{client_id} is a site of a region: expected it through the server of its region")

    def _check_region(self, node: str, region: str) -> None:
        """Check that a node may speak for a region, which is another one than that of the same name.

        Raises
        ------
        FedspanError
            When it may not.
        """
        regions = self.deployment.regions
        if region not in regions:
            expected = f"one of {', '.join(sorted(regions))}" if regions else "a site, since there are none"
            raise FedspanError(f"is the server of a region {region!r}: expected {expected} (deployment.regions)")
        self._check_speaker(node, region)
        other = self._regions.get(region)
        if other not in (None, node) and other in self.transport.nodes():
            raise FedspanError(f"the region {region} is here already, as another node")

    def _check_in_region(self, region: str, client_id: str) -> None:
        own = next((name for name, clients in self.deployment.regions.items() if client_id in clients), None)
        if own != region:
            where = "no region has it" if own is None else f"it is a site of {own}"
            raise FedspanError(f"{region} says that {client_id} is one of its sites: {where} (deployment.regions)")

    def _is_known(self, node: str, greeting: Greeting) -> bool:
        """Return whether a region introduces a site again that is a member already, and has not changed."""
        member = self.members.get(greeting.client_id)
        return (
            member is not None
            and member.node == node
            and (member.client.rank, member.client.num_examples) == (greeting.rank, greeting.num_examples)
            and (member.base, member.labels) == (greeting.base, greeting.labels)
        )

    def _compare(self, node: str, greeting: Greeting) -> None:
        """Compare a site with the server and with the members.

        Raises
        ------
        FedspanError
            When it cannot take part.
        """
        client_id, rank = greeting.client_id, greeting.rank
        difference = agreement.difference(self.terms, greeting.terms)
        if difference is not None:
            raise FedspanError(f"{client_id}: {difference}")
        others = agreement.library_differences(self.terms, greeting.terms)
        if others is not None and self.deployment.same_libraries:
            raise FedspanError(f"{client_id} has other libraries: {others}; deployment.same_libraries forbids it")
        member = self.members.get(client_id)
        if member is not None and member.node != node and member.node in self.transport.nodes():
            raise FedspanError(f"{client_id} is here already, as another node")
        if self._known and client_id not in self._known:
            raise FedspanError(f"{client_id} is not among the sites that this run was started with")
        # Its weight in averages and the shape of its payloads were fixed when it was first taken in.
        before = self._known.get(client_id) if member is None else member.client
        if before is not None and (rank, greeting.num_examples) != (before.rank, before.num_examples):
            raise FedspanError(f"{client_id} came back with another rank or other data")
        if self._one_rank not in (None, rank):
            needed = f"{self.method.info.name} needs one rank for all, expected {self._one_rank} (federation.ranks)"
            raise FedspanError(f"{client_id} has rank {rank}: {needed}")

    def _refuse(self, node: str, reason: str, key: str | None = None) -> None:
        """Report a node, or one site of a region, that is not taken in.

        Parameters
        ----------
        key
            Of the reason among those that are known; by default the node.
        """
        key = node if key is None else key
        line = f"node {node}{self._owner(node)}: {reason}"
        # It is asked again and again, but people need the line only once; each answer has an incident of its own.
        if refusals.without_incident(self._refused.get(key, "")) != refusals.without_incident(line):
            self.notify(f"a node is not taken in: {line}")
        self._refused[key] = line

    def _owner(self, node: str) -> str:
        """Return in brackets the client for which a node may speak; nothing where that is not known."""
        try:
            client_id = self.transport.client_of(node)
        except FedspanError:
            return ""
        return "" if client_id is None else f" ({client_id})"

    def quarantined(self, round_num: int) -> set[str]:
        """Return the clients that are not asked in this round because they were silent before."""
        away = {name for name, silence in self._silence.items() if silence.until > round_num}
        return away | {who for name in away for who in self.deployment.regions.get(name, ())}

    def record(self, client_id: str, round_num: int, missed: bool) -> None:
        """Record whether an answer came; after too many missing ones in a row the client is left out for a while."""
        silence, patience = self._silence.setdefault(client_id, _Silence()), self.deployment.patience
        silence.missed = silence.missed + 1 if missed else 0
        if silence.missed >= patience:
            silence.missed, silence.until = 0, round_num + 1 + self.deployment.quarantine
            self.notify(
                f"{client_id} has been silent {patience} times: left out for {self.deployment.quarantine} rounds"
            )

    def reachable(self, clients: Sequence[Client]) -> list[Client]:
        """Return those of the clients that can be reached now."""
        nodes = set(self.transport.nodes())
        return [c for c in clients if (m := self.members.get(c.client_id)) is not None and m.node in nodes]
