"""Sums over a federation whose sites are in regions: each region answers with the sum of its own sites.

A region's server (`fedspan.regions`) is one node to this one. It is asked once for all of its clients, passes the
messages on to them, and answers with the words of their sum and the names of those in it. Words are integers mod 2^64,
so that the sum of the regions' sums has the bits of one sum over all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, BroadcastFor, Question
from fedspan.methods.messages import Broadcast
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout
from fedspan.server.broadcast_messages import MessageForm
from fedspan.server.requests import MadeWhenSent, Problem, Reply, Requests
from fedspan.server.sums import check_weights, known_weights, words_of
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol
from fedspan.wire.protocol import DAMAGED, MessageTensors

GREETING = 20.0
"""Longest wait of a region's server for sites that introduce themselves, in seconds, before it asks them."""
_TRIPS = 14
"""Messages to a site, one after the other, of which a region makes one answer: keys, shares, their delivery, the
vectors, the signatures and the unmasking, all of it once more without a site that was proved to lie, and that proof.
Each may take `deployment.deadline`."""
_TRIPS_IN_THE_OPEN = 2


@dataclass(slots=True)
class RelayedMessages:
    """The messages of one exchange for the sites of regions, with every tensor in them.

    Clients of one rank that lack the same patches are sent the very same bytes.
    """

    requests: Requests
    form: MessageForm
    broadcast_for: BroadcastFor
    _made: dict[tuple[int, int, int], tuple[Broadcast, bytes]] = field(default_factory=dict)
    """By identity, with the broadcast, whose identity is its own as long as it is held."""

    def of(self, client: Client) -> bytes:
        """Return the message for a client."""
        sent, seen = self.broadcast_for(client), self.form.question.seen.get(client.client_id, 0)
        key = (id(sent), client.rank, seen)
        if key not in self._made:
            self._made[key] = (sent, self._message(client, sent, seen))
        return self._made[key][1]

    def _message(self, client: Client, sent: Broadcast, seen: int) -> bytes:
        outgoing, form = MessageTensors(), self.form
        head = {
            **form.heading,
            **form.fields,
            "counted": 0,
            "broadcast": protocol.put_broadcast(outgoing, sent, form.derived(client.rank), form.kind),
            "patch": protocol.put_patch(outgoing, sent, seen, form.question.version),
            "held": [],
            "store": [],
        }
        self.requests.count_payload(outgoing.payload())
        return protocol.encode(head, outgoing)


@dataclass(slots=True)
class RegionalTotal:
    """The sum over all regions whose answers are right."""

    total: Words
    problems: dict[str, Problem] = field(default_factory=dict)
    """Client -> the reason why it is not in the sum."""
    shares: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Client in the sum -> its seconds at work, and the bytes of its optimizer."""

    def answers(self, clients: Sequence[Client], num_words: int) -> dict[str, Answer]:
        """Return the answers of the clients in the sum."""
        return {
            c.client_id: Answer(
                c, None, train_loss=float("nan"), seconds=seconds, bytes_up=8 * num_words, optimizer_bytes=num_bytes
            )
            for c in clients
            if c.client_id in self.shares
            for seconds, num_bytes in [self.shares[c.client_id]]
        }


@dataclass(frozen=True, slots=True)
class RegionalQuestion:
    """A question to the servers of regions: one sum over these clients."""

    question: Question
    heading: Mapping[str, Any]
    clients: Sequence[Client]
    message: Callable[[Client], bytes]
    """A client's message without the fields of the sum."""
    layout: SumLayout
    rank: int
    """The largest of the clients, whose layout it is."""
    weights: Mapping[str, float] | None = None
    """Client -> what it must count for; None: as the settings say."""

    def relayed(self, clients: Sequence[Client], known: Mapping[str, float]) -> bytes:
        """Return the message to one region, of which these are the clients.

        Parameters
        ----------
        known
            What each client counts for, where that is known: a site that came back with other rows, of which the
            region's server has not known the old ones, would otherwise make the whole region's sum a wrong one.
        """
        outgoing, places = MessageTensors(), dict[int, int]()
        described: dict[str, tuple[int, int]] = {}
        contents: list[bytes] = []
        for client in clients:
            content = self.message(client)
            if id(content) not in places:  # `contents` holds it, so that its id stays its own
                places[id(content)] = len(contents)
                contents.append(content)
            described[client.client_id] = (places[id(content)], self.question.counted.get(client.client_id, 0))
        head = {
            **self.heading,
            "kind": "relay",
            "messages": [protocol.put_bytes(outgoing, content) for content in contents],
            "clients": described,
            "weights": {c.client_id: known[c.client_id] for c in clients if c.client_id in known},
            "largest": self.rank,
            "layout": {"dense": self.layout.dense, "modules": self.layout.modules},
            "room": len(self.clients),
        }
        return protocol.encode(head, outgoing)


class RegionalSums:
    """Asks the servers of regions for the sums of their sites."""

    def __init__(self, requests: Requests, config: Config) -> None:
        self._requests, self._config = requests, config
        self._regions = config.deployment.regions
        self._point = FixedPoint(config.privacy.fraction_bits)

    def collect(self, asked: RegionalQuestion) -> RegionalTotal:
        """Return the sum of the regions' answers; a region whose answer is wrong is left out with all its clients."""
        clients, num_words = asked.clients, asked.layout.num_words
        found = RegionalTotal(np.zeros(num_words, dtype=np.uint64))
        known = known_weights(self._config, clients) if asked.weights is None else asked.weights
        by_region = {
            region: [c for c in clients if c.client_id in members] for region, members in self._regions.items()
        }
        messages = MadeWhenSent(
            [region for region, group in by_region.items() if group],
            lambda region: asked.relayed(by_region[region], known),
        )
        trips = _TRIPS if self._config.privacy.secure_sums else _TRIPS_IN_THE_OPEN
        deadline = GREETING + trips * self._config.deployment.deadline
        replies = self._requests.exchange(
            asked.question, messages, deadline=deadline, answer_bytes=lambda region: 8 * num_words
        )
        for region, reply in replies:
            ids = [c.client_id for c in by_region[region]]
            added = reply if isinstance(reply, Problem) else self._add(found, ids, reply, known, len(clients))
            if added is not None:
                self._requests.registry.notify(f"the region {region} is left out: {added.reason}")
                for who in ids:
                    found.problems[who] = Problem(f"its region {region}: {added.reason}", added.absent)
        return found

    def _add(
        self, found: RegionalTotal, ids: Sequence[str], reply: Reply, known: Mapping[str, float], room: int
    ) -> Problem | None:
        """Add one region's sum, or return the problem with it; nothing has changed then."""
        try:
            answers, problems = self._read_names(ids, reply)
            words = self._read_words(answers, reply, len(found.total), known, room) if answers else None
        except DAMAGED as error:
            return Problem(f"sent a sum that cannot be used ({error})")
        if words is not None:
            found.total += words
        found.shares |= answers
        found.problems |= problems
        for who in ids:
            self._requests.registry.record(who, reply.header["round"], missed=who in problems and problems[who].absent)
        return None

    @staticmethod
    def _read_names(ids: Sequence[str], reply: Reply) -> tuple[dict[str, tuple[float, int]], dict[str, Problem]]:
        """Return the clients in a region's sum, and the problems of the others; each that was asked is one of them."""
        relayed = reply.header.get("relayed")
        if relayed is None:
            raise FedspanError("it does not say who is in it")
        answers = dict(relayed["answers"])
        problems = {who: Problem(reason, absent) for who, (reason, absent) in relayed["problems"].items()}
        both = sorted(answers.keys() & problems.keys())
        if both or answers.keys() | problems.keys() != set(ids):
            odd = both or sorted((answers.keys() | problems.keys()) ^ set(ids))
            raise FedspanError(f"it names {', '.join(odd[:3])}: expected each of its clients that were asked, once")
        return answers, problems

    def _read_words(
        self, answers: Mapping[str, object], reply: Reply, num_words: int, known: Mapping[str, float], room: int
    ) -> Words:
        """Return a region's sum, after the checks that do not depend on what the clients learnt."""
        words = words_of(reply, num_words)
        numbers = self._point.decode(words)
        # Each of its clients leaves room for all: beyond that the sum of the regions could wrap.
        limit = len(answers) * self._point.limit(room)
        if not bool((numbers.abs() <= limit * (1 + 2**-50)).all()):
            raise FedspanError(f"a number of it is beyond {limit:.6g}: the sum could wrap")
        weight = sum(known[who] for who in answers) if answers.keys() <= known.keys() else None
        check_weights(numbers, len(answers), weight)
        return words
