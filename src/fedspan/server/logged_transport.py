"""A transport that writes every message into the server's log of events before it is sent or used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.events.chain import digest_of
from fedspan.events.log import EventLog
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.envelope import opened, sealed
from fedspan.wire.names import is_name
from fedspan.wire.particulars import particulars
from fedspan.wire.transport import Delivery, Transport

_MAX_REASON = 300
_GREETING = "greeting"


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message that waits for its answer."""

    node: str
    number: int
    """Of its entry in the log."""
    run: str | None


class LoggedTransport:
    """Another transport's messages, with an entry for each message, each answer and each answer that did not come.

    Messages of a run travel in an envelope with the head of this log, and answers come in one with the head of the
    site's: each side's log then testifies to the other's.

    Parameters
    ----------
    notify
        Called with a line for people when a site's log has lost lines.
    """

    def __init__(self, transport: Transport, log: EventLog, notify: Callable[[str], None]) -> None:
        self._transport, self._log, self._notify = transport, log, notify
        self._waiting: dict[str, _Sent] = {}
        """By ticket."""
        self._names: dict[str, str] = {}
        """Node -> the client for which it may speak; where nodes have no keys, the one that it says it is."""

    def nodes(self) -> list[str]:
        """Return the sites that can be reached now."""
        return self._transport.nodes()

    def client_of(self, node: str) -> str | None:
        """Return the client id for which a node may speak."""
        return self._transport.client_of(node)

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float, answer_bytes: int = 0) -> list[str]:
        """Write down the messages, send them, and return their tickets."""
        described: dict[int, dict[str, Any]] = {}
        events = []
        for node, content in messages:
            # By identity: sites that are asked for the same thing are sent the very same bytes.
            if id(content) not in described:
                described[id(content)] = self._described(content)
            events.append({"event": "sent", "to": self._name(node), "node": node, **described[id(content)]})
        entries = self._log.append(*events)
        tickets = self._transport.send(self._sealed(messages, described), lifetime, answer_bytes)
        for ticket, (node, _), entry in zip(tickets, messages, entries, strict=True):
            self._waiting[ticket] = _Sent(node, entry["number"], entry.get("run"))
        return tickets

    def _sealed(
        self, messages: Sequence[tuple[str, bytes]], described: Mapping[int, Mapping[str, Any]]
    ) -> list[tuple[str, bytes]]:
        head = self._log.head
        assert head is not None  # the messages themselves are in it
        envelopes: dict[int, bytes] = {}
        for _, content in messages:
            key = id(content)
            if key not in envelopes:
                # A greeting without one is understood by other versions, which then say that they are others.
                bare = described[key]["kind"] == _GREETING
                envelopes[key] = content if bare else sealed(content, head)
        return [(node, envelopes[id(content)]) for node, content in messages]

    def poll(self) -> list[Delivery]:
        """Return the outcomes known since the last call, after writing them down."""
        deliveries, events = self._transport.poll(), []
        for place in range(len(deliveries)):
            # In its place in the list, so that the message with its envelope is let go of.
            sent = self._waiting.pop(deliveries[place].ticket, None)
            deliveries[place], event = self._received(deliveries[place], sent)
            events.append(event)
        for entry in self._log.append(*events) if events else ():
            if "rolled_back" in entry:
                self._notify(
                    f"the log of {entry['from'] or entry['node']} ends at line {entry['peer'][0]}, and it has shown "
                    f"line {entry['rolled_back']} before: lines of it were cut"
                )
        return deliveries

    def _received(self, delivery: Delivery, sent: _Sent | None) -> tuple[Delivery, dict[str, Any]]:
        node = delivery.node
        question = {} if sent is None else {"question": sent.number}
        if delivery.content is None:
            reason = one_line(delivery.error or "no answer", _MAX_REASON)
            return delivery, {
                "event": "unanswered",
                "from": self._name(node),
                "node": node,
                **question,
                "reason": reason,
            }
        peer, content = opened(delivery.content)
        event = self._described(content)
        claimed = event.pop("client_id", None)
        if self._name(node) is None and is_name(claimed):
            self._names[node] = claimed
        if sent is not None and sent.run is not None:
            event["run"] = sent.run  # of the question, whatever the answer says
        event = {"event": "received", "from": self._name(node), "node": node, **question, **event}
        if peer is not None:
            event["peer"] = peer.listed()
        return Delivery(delivery.ticket, node, content, delivery.error), event

    def forget(self, tickets: Sequence[str]) -> None:
        """Stop waiting for these, and write that down."""
        self._transport.forget(tickets)
        given_up: Iterable[_Sent] = filter(None, (self._waiting.pop(ticket, None) for ticket in tickets))
        reason = "not waited for any longer"
        events = [
            {"event": "unanswered", "from": self._name(s.node), "node": s.node, "question": s.number, "reason": reason}
            for s in given_up
        ]
        if events:
            self._log.append(*events)

    def now(self) -> float:
        """Return the seconds of the transport's clock."""
        return self._transport.now()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._transport.sleep(seconds)

    @staticmethod
    def _described(content: bytes) -> dict[str, Any]:
        return {**particulars(content), "digest": digest_of(content), "size": len(content)}

    def _name(self, node: str) -> str | None:
        if node not in self._names:
            try:
                client = self._transport.client_of(node)
            except FedspanError:
                client = None  # the registry refuses it, in a line that is in the log too
            if client is None:
                return None
            self._names[node] = client
        return self._names[node]
