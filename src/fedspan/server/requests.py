"""One question to many sites: messages out, answers in, each until its deadline, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedspan.federation.exchange import Question
from fedspan.server.registry import SiteRegistry
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import protocol, refusals, schema
from fedspan.wire.precision import Kind
from fedspan.wire.transport import AT_ONCE, Delivery


@dataclass(frozen=True, slots=True)
class Reply:
    """The head and tensors of an answer to the question that was asked."""

    header: schema.SiteAnswer
    tensors: list[Tensor]
    content: bytes
    """The message as it came, from which it can be read again."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason why there is no usable answer from a client."""

    reason: str
    absent: bool = False
    """No answer came at all.

    That says something about the connection and nothing about the client, whereas a wrong answer may be an attack:
    robust filters count wrong answers among the clients that they must be prepared for, and not missing ones."""

    def __post_init__(self) -> None:
        # Here, where every word about a site passes: a reason may quote what the site sent.
        object.__setattr__(self, "reason", one_line(self.reason, _MAX_REASON))


_MAX_REASON = 400
"""Characters of the reason against an answer."""
NOT_CONNECTED = Problem("is not connected", absent=True)


@dataclass(slots=True)
class _Costs:
    wire_up: int = 0
    wire_down: int = 0
    payload_down: int = 0
    """The tensors of the messages that carry a broadcast."""
    round_trips: int = 0
    waited_seconds: float = 0.0
    """From the sending of messages until the last answer that was waited for."""
    slowest_seconds: float = 0.0
    """The part of it during which the busiest site was at work, summed over round trips. The rest is transfer."""


class MadeWhenSent(Mapping[str, bytes]):
    """Messages by receiver, each made when it is looked up, so that those of all receivers are never held at once."""

    def __init__(self, receivers: Sequence[str], make: Callable[[str], bytes]) -> None:
        self._receivers, self._make = receivers, make

    def __getitem__(self, receiver: str) -> bytes:
        return self._make(receiver)

    def __iter__(self) -> Iterator[str]:
        return iter(self._receivers)

    def __len__(self) -> int:
        return len(self._receivers)


class Requests:
    """Sends messages to the registered sites and returns their answers.

    Parameters
    ----------
    kind
        The type in which the matrices of an update travel.
    """

    def __init__(self, registry: SiteRegistry, kind: Kind = "float32") -> None:
        self.registry, self.transport, self._kind = registry, registry.transport, kind
        self._costs = _Costs()

    def costs(self) -> dict[str, Any]:
        """Return the bytes sent and the time waited since the last call."""
        costs, self._costs = self._costs, _Costs()
        return asdict(costs)

    def count_payload(self, num_bytes: int) -> None:
        """Count the tensors of a message."""
        self._costs.payload_down += num_bytes

    def exchange(
        self,
        question: Question,
        messages: Mapping[str, bytes],
        enough: int | None = None,
        again: Callable[[str], bytes] | None = None,
        answer_bytes: Callable[[str], int] = lambda client_id: 0,
        deadline: float | None = None,
    ) -> Iterator[tuple[str, Reply | Problem]]:
        """Send every client its message, and yield the answers as they come: each client once, with a reply or not.

        One answer is in memory at a time, or `AT_ONCE` bytes of them, where the caller lets go of each before it takes
        the next.

        Parameters
        ----------
        messages
            By client. Each is looked up once, when it is sent: they need not all be in memory at a time.
        enough
            The number of answers to wait for; None: all of them.
        again
            Returns the message with all of its tensors, for a client that lacks some of those that were named by their
            digests. It is asked once more in the same exchange, and no second time.
        answer_bytes
            Returns about the bytes of a client's answer, once its message was looked up.
        deadline
            Seconds to wait for the answers; None: `deployment.deadline`.
        """
        limit = self.registry.deployment.deadline if deadline is None else deadline
        wanted, began = len(messages) if enough is None else enough, self.transport.now()
        tickets = self._send(messages, limit, answer_bytes)
        replied, slowest, repeated = set[str](), 0.0, set[str]()
        try:
            for client_id, reply in self._arriving(question, tickets, began + limit, lambda: len(replied) >= wanted):
                if isinstance(reply, Reply) and "lacks" in reply.header:
                    if again is not None and client_id not in repeated:
                        repeated.add(client_id)
                        tickets |= self._send({client_id: again(client_id)}, limit, answer_bytes)
                        continue
                    reply = Problem("says that it lacks tensors that it was sent")
                if isinstance(reply, Reply):
                    replied.add(client_id)
                    slowest = max(slowest, reply.header.get("seconds", 0.0))
                yield client_id, reply
                del reply  # it is not held while the next one comes
        finally:  # also where whoever asks has had enough
            self.transport.forget(list(tickets))
        self._costs.waited_seconds += self.transport.now() - began
        self._costs.slowest_seconds += slowest
        yield from self._unanswered(question, list(tickets.values()), len(replied) >= wanted, limit)

    def _arriving(
        self, question: Question, tickets: dict[str, str], until: float, had_enough: Callable[[], bool]
    ) -> Iterator[tuple[str, Reply | Problem]]:
        """Yield what comes for these tickets until then, and take out each ticket that was answered."""
        deployment = self.registry.deployment
        while tickets and not had_enough() and self.transport.now() < until:
            deliveries = self.transport.poll()
            if not deliveries:
                self.transport.sleep(deployment.poll)
            deliveries.reverse()
            while deliveries:
                delivery = deliveries.pop()
                client_id = tickets.pop(delivery.ticket, None)
                if client_id is not None:
                    self.registry.record(client_id, question.round_num, missed=delivery.content is None)
                    arrived = client_id, self._read(client_id, question, delivery)
                    del delivery
                    yield arrived
                    del arrived

    def _send(
        self, messages: Mapping[str, bytes], lifetime: float, answer_bytes: Callable[[str], int]
    ) -> dict[str, str]:
        """Send the messages; return the client of every ticket."""
        self._costs.round_trips += 1
        tickets: dict[str, str] = {}
        waiting: dict[str, bytes] = {}
        for client_id in messages:
            waiting[client_id] = messages[client_id]
            if sum(map(len, waiting.values())) >= AT_ONCE:
                tickets |= self._sent(waiting, lifetime, answer_bytes)
                waiting = {}
        return tickets | self._sent(waiting, lifetime, answer_bytes)

    def _sent(
        self, messages: Mapping[str, bytes], lifetime: float, answer_bytes: Callable[[str], int]
    ) -> dict[str, str]:
        if not messages:
            return {}
        self._costs.wire_down += sum(map(len, messages.values()))
        addressed = [(self.registry.node_of(c), content) for c, content in messages.items()]
        largest = max(map(answer_bytes, messages))
        return dict(zip(self.transport.send(addressed, lifetime, largest), messages, strict=True))

    def _unanswered(
        self, question: Question, client_ids: list[str], had_enough: bool, deadline: float
    ) -> Iterator[tuple[str, Reply | Problem]]:
        """Yield the problem of every client that was still at work when the wait ended."""
        for client_id in client_ids:
            # A client that others merely overtook has missed nothing, and is not on its way into quarantine.
            if not had_enough:
                self.registry.record(client_id, question.round_num, missed=True)
            reason = "was not waited for" if had_enough else f"did not answer within {deadline:g} s"
            yield client_id, Problem(reason, absent=True)

    def _read(self, client_id: str, question: Question, delivery: Delivery) -> Reply | Problem:
        """Return an answer that belongs to the question, or the problem with it."""
        if delivery.content is None:
            return Problem(delivery.error or "gave no answer", absent=True)
        self._costs.wire_up += len(delivery.content)
        return self.read(question, client_id, delivery.content)

    def read(self, question: Question, client_id: str, content: bytes) -> Reply | Problem:
        """Return the answer to a question in a message that came, or the problem with it."""
        try:
            head, tensors = protocol.decode(content, [self._kind])
            header = schema.answer(head)
        except FedspanError as error:
            return Problem(f"sent {error}")
        if "code" in header:
            return self._refusal(client_id, header)
        if header["client_id"] != client_id:
            return Problem(f"answered as {header['client_id']!r}")
        mismatch = self._mismatch(question, header)
        return Reply(header, tensors, content) if mismatch is None else Problem(mismatch)

    def _refusal(self, client_id: str, head: schema.Refusal) -> Problem:
        """Return the reason that a site gives for not answering; one that cannot read its settings has no name."""
        if head["client_id"] not in (None, client_id):
            return Problem(f"refused as {head['client_id']!r}")
        return Problem(refusals.line(head["code"], head["incident"]))

    def _mismatch(self, question: Question, header: schema.SiteAnswer) -> str | None:
        """Return the reason why an answer belongs to another question, or None.

        A delayed answer of an earlier round has valid shapes and finite values, so no later check would notice it.
        """
        expected = {"run": self.registry.run, "round": question.round_num, "number": question.number}
        for key, value in expected.items():
            other: Any = header.get(key)
            if other != value and key == "round":
                return f"answered for round {other + 1}: expected {question.round_num + 1}"  # people count from one
            if other != value:
                return f"answered for {key} {other!r}: expected {value!r}"
        return None
