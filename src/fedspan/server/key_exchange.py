"""The set-up of secure sums on the server: the clients' keys, the shares of their secrets, and their delivery."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedspan.config import PrivacyConfig
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.running_sum import SumSettings
from fedspan.server.requests import Problem, Reply, Requests
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import protocol
from fedspan.wire.protocol import DAMAGED, MessageTensors

if TYPE_CHECKING:  # these need the extra `secure`
    from fedspan.privacy.aggregator import Aggregator
    from fedspan.privacy.secure_sum import RoundAggregator

T = TypeVar("T")
Heading = Mapping[str, Any]
"""The fields that every message of an exchange has."""


@dataclass(frozen=True, slots=True)
class RunTerms:
    """A run's settings of its secure sums."""

    privacy: PrivacyConfig
    num_rounds: int
    """No keys are exchanged for rounds after the last."""
    least: int
    """Fewest clients in a sum."""
    trusted: Mapping[str, bytes] | None = None
    """Public identity keys by client, with which a badly signed key excludes its sender and nobody else."""

    @property
    def signed_survivors(self) -> bool:
        """Return whether the sites reveal shares only for a list of survivors that enough of them have signed."""
        return self.privacy.server == "malicious"

    def threshold(self, num_clients: int) -> int:
        """Return how many of these clients must stay for a sum to be unmasked."""
        privacy = self.privacy
        point = FixedPoint(privacy.fraction_bits)
        return SumSettings(point, True, privacy.threshold, least=self.least).needed(num_clients)


@dataclass(slots=True)
class KeySetup:
    """The keys and shares of several secure sums, ready for masked vectors."""

    session: str
    aggregator: RoundAggregator
    unused: list[int]
    """Numbers of the sums that have not been taken yet."""
    stale: bool = False
    """A client may have no keys any more: the next round begins with a new set-up.

    Keys are in a site's memory only. A site that failed may have been restarted since: it would drop out of every sum
    that is left, and with several such sites the threshold could not be reached any more."""

    def serves(self, clients: Sequence[Client], num_sums: int) -> bool:
        """Return whether it is good for a round of these clients.

        Fewer clients than were set up will do: the absent ones count as having dropped out.
        """
        ids = {client.client_id for client in clients}
        return not self.stale and ids <= set(self.aggregator.members) and len(self.unused) >= num_sums

    def take(self, num_words: int, terms: bytes) -> tuple[int, Aggregator]:
        """Return the number of the next sum and its server's side."""
        # Used up at once, even if this sum fails later: the same masks on two vectors would reveal their difference.
        index = self.unused.pop(0)
        return index, self.aggregator.sum(index, num_words, terms)


class KeyExchange:
    """One set-up: the clients agree on keys and share their secrets, for all sums of this round and later ones."""

    def __init__(
        self,
        requests: Requests,
        terms: RunTerms,
        question: Question,
        heading: Heading,
        notify: Callable[[str], None],
    ) -> None:
        self.requests, self.terms, self.question, self.notify = requests, terms, question, notify
        self.heading = dict(heading)
        self.problems: dict[str, Problem] = {}
        self.excluded: dict[str, Problem] = {}
        """Clients that dealt false shares."""

    def run(self, clients: Sequence[Client], num_sums: int) -> KeySetup:
        """Take the three round trips. A client that fails in one of them is left out, with its problem recorded.

        Where clients have dealt so many false shares that the others cannot go on, they begin again without those.

        Raises
        ------
        SumFailed
            When too few clients are left.
        """
        from fedspan.privacy.roster import SumFailed  # which needs the extra `secure`

        num_liars = 0
        while True:
            ids = [c.client_id for c in clients if c.client_id not in self.problems.keys() | self.excluded.keys()]
            if len(ids) < self.terms.least:
                raise SumFailed(
                    f"{len(ids)} clients can take part in a secure sum: expected at least {self.terms.least} "
                    f"(privacy.min_clients)"
                )
            try:
                return self._attempt(ids, self.terms.threshold(len(clients) - num_liars), num_sums)
            except SumFailed as error:
                if not error.blamed:
                    raise
                self._exclude(error.blamed)
                num_liars += len(error.blamed)

    def _attempt(self, ids: Sequence[str], threshold: int, num_sums: int) -> KeySetup:
        from fedspan.privacy.secure_sum import RoundAggregator  # which needs the extra `secure`

        # Random, so that sites can tell apart two set-ups of one round, as when the server was restarted in between.
        session = self.heading["session"] = secrets.token_hex(8)
        name = f"{self.heading['run']}/{self.question.round_num}/{session}".encode()
        aggregator = RoundAggregator(name, threshold, num_sums, self.terms.trusted)
        adverts: dict[str, bytes] = {}

        # Each reply is checked as it is read, so that a bad one excludes its sender and does not end the set-up.
        def read_keys(client_id: str, reply: Reply) -> None:
            content = protocol.get_bytes(reply.tensors, reply.header["keys"])
            aggregator.check_advert(client_id, content, adverts)
            adverts[client_id] = content

        def read_shares(client_id: str, reply: Reply) -> dict[str, bytes]:
            sealed = {other: protocol.get_bytes(reply.tensors, i) for other, i in reply.header["shares"].items()}
            aggregator.check_shares(client_id, sealed)
            return sealed

        self._ask({"kind": "advertise", "num_sums": num_sums}, MessageTensors(), ids, read_keys)
        outgoing = MessageTensors()
        # Only clients that advertised keys are asked: nothing can be sealed for one that did not.
        keys = {who: protocol.put_bytes(outgoing, content) for who, content in aggregator.keys(adverts).items()}
        fields = {"kind": "share", "keys": keys, "threshold": threshold}
        sealed = aggregator.route(self._ask(fields, outgoing, sorted(adverts), read_shares))
        self._exclude(aggregator.settle(self._delivered(sealed)))
        return KeySetup(session, aggregator, list(range(num_sums)))

    def _delivered(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, frozenset[str]]:
        """Send every client the shares for it; return the clients whose shares are false, as each says."""
        messages: dict[str, bytes] = {}
        for client_id, shares in sealed.items():
            outgoing = MessageTensors()
            placed = {who: protocol.put_bytes(outgoing, content) for who, content in shares.items()}
            messages[client_id] = self._encoded({"kind": "receive", "shares": placed}, outgoing, client_id)

        def read(client_id: str, reply: Reply) -> frozenset[str]:
            named = reply.header["false"]
            if not isinstance(named, list) or not set(named) <= sealed.keys() - {client_id}:
                raise FedspanError("names shares as false that it was not sent")
            return frozenset(named)

        received = self._exchange(messages, read)
        for client_id, false in received.items():
            for dealer in sorted(false):
                self.notify(f"{client_id} says that the shares that {dealer} dealt it are false: one of them is wrong")
        return received

    def _exclude(self, blamed: Mapping[str, str]) -> None:
        for client_id, fault in blamed.items():
            self.excluded[client_id] = Problem(fault)
            self.notify(f"{client_id} {fault}: it is left out of the secure sums")

    def _ask(
        self,
        fields: Mapping[str, Any],
        outgoing: MessageTensors,
        client_ids: Sequence[str],
        read: Callable[[str, Reply], T],
    ) -> dict[str, T]:
        """Send the clients one message and return what `read` makes of their answers."""
        return self._exchange({c: self._encoded(fields, outgoing, c) for c in client_ids}, read)

    def _encoded(self, fields: Mapping[str, Any], outgoing: MessageTensors, client_id: str) -> bytes:
        counted = self.question.counted.get(client_id, 0)
        return protocol.encode({**self.heading, **fields, "counted": counted}, outgoing)

    def _exchange(self, messages: Mapping[str, bytes], read: Callable[[str, Reply], T]) -> dict[str, T]:
        results: dict[str, T] = {}
        for client_id, result in read_all(self.requests.exchange(self.question, messages), read):
            if isinstance(result, Problem):
                self.problems[client_id] = result
            else:
                results[client_id] = result
        return results


def read_all(
    replies: Iterator[tuple[str, Reply | Problem]], read: Callable[[str, Reply], T]
) -> Iterator[tuple[str, T | Problem]]:
    """Yield what `read` makes of each client's reply, or the problem with it."""
    for client_id, reply in replies:
        if isinstance(reply, Problem):
            yield client_id, reply
            continue
        try:
            result = read(client_id, reply)
        except DAMAGED as error:
            yield client_id, Problem(one_line(error))
        else:
            yield client_id, result
