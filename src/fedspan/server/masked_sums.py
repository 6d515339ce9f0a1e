"""The messages of secure sums on the server: keys and shares before the masked vectors, unmasking after them.

A secure sum takes four round trips: the clients' keys, the shares of their secrets, their masked vectors, and the
unmasking. Keys and shares do not depend on the vectors, so they are exchanged for several rounds at once, fresh ones
for every sum: each of the rounds that follow takes two round trips less.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedspan.config import PrivacyConfig
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.running_sum import SumSettings
from fedspan.server.requests import Problem, Reply, Requests
from fedspan.support.errors import one_line
from fedspan.wire import protocol
from fedspan.wire.protocol import DAMAGED, MessageTensors

if TYPE_CHECKING:  # these need the extra `secure`
    from fedspan.privacy.aggregator import Aggregator
    from fedspan.privacy.secure_sum import RoundAggregator

T = TypeVar("T")
Heading = Mapping[str, Any]
"""The fields that every message of an exchange has."""


@dataclass(slots=True)
class KeySetup:
    """The keys and shares of several secure sums, ready for masked vectors."""

    session: str
    aggregator: RoundAggregator
    shares: dict[str, dict[str, bytes]]
    """Recipient -> sender -> sealed share; of the recipients that have not been sent theirs yet."""
    clients: frozenset[str]
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
        return not self.stale and ids <= self.clients and len(self.unused) >= num_sums


class MaskedSums:
    """Secure sums over the rounds of a run, with the key set-up that several of them share.

    Parameters
    ----------
    num_rounds
        Of the run: no keys are exchanged for rounds after its end.
    notify
        Called with a line for people when a client does not help to unmask a sum.
    """

    def __init__(
        self, requests: Requests, privacy: PrivacyConfig, num_rounds: int, notify: Callable[[str], None]
    ) -> None:
        self._requests, self._privacy, self._num_rounds, self._notify = requests, privacy, num_rounds, notify
        self._setup: KeySetup | None = None

    def begin(self, question: Question, heading: Heading, clients: Sequence[Client], num_words: int) -> MaskedSum:
        """Begin the sum of an exchange, after setting up keys where this round has none.

        Parameters
        ----------
        clients
            The clients that can be reached.

        Raises
        ------
        FedspanError
            When too few clients are left after the set-up.
        """
        place, num_exchanges = question.place
        problems: dict[str, Problem] = {}
        # Only a round's first exchange may change the set-up: all sums of a round are over the same roster.
        if self._setup is None or (place == 0 and not self._setup.serves(clients, num_exchanges)):
            ahead = min(self._privacy.rounds_ahead, self._num_rounds - question.round_num)
            exchange = _KeyExchange(self._requests, self._sum(), question, heading)
            self._setup, problems = exchange.run(clients, ahead * num_exchanges), exchange.problems
        return MaskedSum(self._requests, question, heading, self._setup, num_words, problems, self._notify)

    def _sum(self) -> SumSettings:
        return SumSettings(FixedPoint(self._privacy.fraction_bits), True, self._privacy.threshold)


class _KeyExchange:
    """One set-up: the clients agree on keys and share their secrets, for all sums of this round and later ones."""

    def __init__(self, requests: Requests, how: SumSettings, question: Question, heading: Heading) -> None:
        self.requests, self.how, self.question = requests, how, question
        # Random, so that sites can tell apart two set-ups of one round, as when the server was restarted in between.
        self.session = secrets.token_hex(8)
        self.heading = {**heading, "session": self.session}
        self.problems: dict[str, Problem] = {}

    def run(self, clients: Sequence[Client], num_sums: int) -> KeySetup:
        """Take both round trips. A client that fails in one of them is left out, with its problem recorded."""
        from fedspan.privacy.secure_sum import RoundAggregator  # which needs the extra `secure`

        threshold = self.how.needed(len(clients))
        name = f"{self.heading['run']}/{self.question.round_num}/{self.session}".encode()
        aggregator = RoundAggregator(name, threshold, num_sums)

        # Each reply is checked as it is read, so that a bad one excludes its sender and does not end the set-up.
        def read_keys(client_id: str, reply: Reply) -> bytes:
            content = protocol.get_bytes(reply.tensors, reply.header["keys"])
            aggregator.check_advert(client_id, content)
            return content

        def read_shares(client_id: str, reply: Reply) -> dict[str, bytes]:
            sealed = {other: protocol.get_bytes(reply.tensors, i) for other, i in reply.header["shares"].items()}
            aggregator.check_shares(client_id, sealed)
            return sealed

        ids = [client.client_id for client in clients]
        adverts = self._ask({"kind": "advertise", "num_sums": num_sums}, MessageTensors(), ids, read_keys)
        outgoing = MessageTensors()
        # Only clients that advertised keys are asked: nothing can be sealed for one that did not.
        keys = {who: protocol.put_bytes(outgoing, content) for who, content in aggregator.keys(adverts).items()}
        fields = {"kind": "share", "keys": keys, "threshold": threshold}
        shares = aggregator.route(self._ask(fields, outgoing, sorted(adverts), read_shares))
        return KeySetup(self.session, aggregator, shares, frozenset(shares), list(range(num_sums)))

    def _ask(
        self,
        fields: Mapping[str, Any],
        outgoing: MessageTensors,
        client_ids: Sequence[str],
        read: Callable[[str, Reply], T],
    ) -> dict[str, T]:
        """Send the clients one message and return what `read` makes of their answers."""
        head, counted = {**self.heading, **fields}, self.question.counted
        messages = {c: protocol.encode({**head, "counted": counted.get(c, 0)}, outgoing) for c in client_ids}
        results: dict[str, T] = {}
        for client_id, result in _read_all(self.requests.exchange(self.question, messages), read):
            if isinstance(result, Problem):
                self.problems[client_id] = result
            else:
                results[client_id] = result
        return results


class MaskedSum:
    """One secure sum: it sees masked vectors only, and learns their sum and nothing else.

    Parameters
    ----------
    setup
        The keys and shares; one of its sums is used up.
    problems
        The clients that failed in the set-up.
    """

    def __init__(
        self,
        requests: Requests,
        question: Question,
        heading: Heading,
        setup: KeySetup,
        num_words: int,
        problems: Mapping[str, Problem],
        notify: Callable[[str], None],
    ) -> None:
        self._requests, self._question, self._heading, self._notify = requests, question, heading, notify
        # Used up at once, even if this sum fails later: the same masks on two vectors would reveal their difference.
        self._setup, self._index = setup, setup.unused.pop(0)
        self._aggregator: Aggregator = setup.aggregator.sum(self._index, num_words)
        self.problems: dict[str, Problem] = {}
        for client_id, problem in problems.items():
            self.leave_out(client_id, problem)

    def message_fields(self, client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
        """Return the number and session of the sum, and the others' shares where the client has not been sent them."""
        fields: dict[str, Any] = {"index": self._index, "session": self._setup.session}
        # Once, together with the first vector after the set-up: shares on their own would take one more round trip.
        shares = self._setup.shares.pop(client_id, None)
        if shares is not None:
            fields["shares"] = {who: protocol.put_bytes(outgoing, content) for who, content in shares.items()}
        return fields

    def add(self, client_id: str, words: Words) -> None:
        """Add one client's masked vector.

        Raises
        ------
        FedspanError
            When the client has no part in the masks, or its vector the wrong length.
        """
        self._aggregator.add(client_id, words)

    def leave_out(self, client_id: str, problem: Problem) -> None:
        """Record that a client's vector is not in the sum, and that the client may have lost its keys."""
        self.problems[client_id] = problem
        self._setup.stale = True

    def total(self) -> Words:
        """Unmask the sum of the vectors that came, with the help of the clients that sent them.

        Raises
        ------
        SumFailed
            When fewer clients than the threshold sent a vector, or helped.
        """
        # The survivors are named once, and no vector is added from here on. Were another choice of clients ever
        # unmasked, the difference of the two sums would be the vectors of the clients in which they differ. The sites
        # do not rely on this: each refuses a second choice (`SiteStorage.allow_unmasking`).
        survivors = self._aggregator.survivors()
        fields = {"kind": "unmask", "session": self._setup.session, "index": self._index, "survivors": survivors}
        content = protocol.encode({**self._heading, **fields}, MessageTensors())
        answers: dict[str, bytes] = {}
        replies = self._requests.exchange(self._question, dict.fromkeys(survivors, content))
        for client_id, answer in _read_all(replies, self._read_unmasking):
            if isinstance(answer, Problem):
                # Its vector stays in the sum, as long as enough others help.
                self._setup.stale = True
                self._notify(f"{client_id} does not help to unmask the sum: {answer.reason}")
            else:
                answers[client_id] = answer
        return self._aggregator.total(answers)

    def _read_unmasking(self, client_id: str, reply: Reply) -> bytes:
        shares = protocol.get_bytes(reply.tensors, reply.header["unmask"])
        self._aggregator.check_answer(client_id, shares)
        return shares


def _read_all(
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
