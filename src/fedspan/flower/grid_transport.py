"""`fedspan.wire.transport.Transport` over Flower's Grid."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from fedspan.flower import records
from fedspan.flower.arriving import Answer, answers_at
from fedspan.flower.backoff import shorten_pull_backoff
from fedspan.flower.node_clients import NodeClients
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.refusals import unpacked
from fedspan.wire.transport import AT_ONCE, Delivery

PATIENCE = 60.0
"""Seconds for which calls to a SuperLink that answers with errors are repeated."""
_PAUSE = 0.5
_MAX_REASON = 300
"""Characters of a reason that a site, or Flower, gives."""
_log = logging.getLogger("fedspan.flower")
_TRANSIENT = (httpx.HTTPError, ObjectPushError, ObjectPullError, OSError)
_REASONS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer came within the message's lifetime",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the answer came after the message's lifetime",
    ErrorCode.NODE_UNAVAILABLE: "the node is not connected",
    ErrorCode.CLIENT_APP_CRASHED: "the node's ClientApp ended before it answered",
}

_MOST_PULLS = 32
"""Calls to the SuperLink in one poll."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Awaited:
    """The answer to a message that was sent."""

    node: str
    answer_bytes: int
    """Its size, about."""


class GridTransport:
    """Messages through a Grid; a ticket is Flower's message id.

    Flower itself replies for messages that did not arrive: one whose lifetime is over, or whose node has been gone for
    a minute, comes back from `poll` with the reason.

    Parameters
    ----------
    group
        Group name of the messages in Flower's log, one for each of our runs.
    clients
        The client ids of the nodes' keys; None: nodes have no keys, as in a simulation.
    """

    def __init__(self, grid: Grid, group: str, clients: NodeClients | None = None) -> None:
        shorten_pull_backoff()
        self._grid, self._group, self._clients = grid, group, clients
        self._answers = answers_at(grid)
        self._waiting: dict[str, _Awaited] = {}
        """By ticket, in the order in which they are asked for."""
        self._unsent: deque[Delivery] = deque()
        self._count = itertools.count()
        self._failing_since: float | None = None
        """Time of the first of the latest polls that all failed."""

    def nodes(self) -> list[str]:
        """Return Flower's ids of the connected SuperNodes, sorted."""
        return [str(node) for node in sorted(self._retry(lambda: list(self._grid.get_node_ids())))]

    def client_of(self, node: str) -> str | None:
        """Return the client id to which the key of a node belongs; None where nodes have no keys.

        Raises
        ------
        FedspanError
            When the key belongs to no client, or the node is gone.
        """
        if self._clients is None:
            return None
        keys = {str(info.node_id): info.public_key for info in self._retry(lambda: list(self._grid.get_nodes()))}
        if node not in keys:
            raise FedspanError("the node is not connected any more")
        return self._clients.client_of(keys[node])

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float, answer_bytes: int = 0) -> list[str]:
        """Send messages and return their tickets; one that Flower rejects comes back from `poll` with an error."""
        if not lifetime > 0:
            raise ValueError(f"lifetime = {lifetime}: expected more than 0 seconds")
        tickets: list[str] = []
        packed = {content: records.pack(content, lifetime) for _, content in messages}
        # One by one, since of a batch Flower reports only the number accepted. Equal contents are uploaded once.
        for node, content in messages:
            message = Message(packed[content], int(node), records.MESSAGE_TYPE, ttl=lifetime, group_id=self._group)
            ticket, problem = self._send_one(message)
            if problem is None:
                self._waiting[ticket] = _Awaited(node, answer_bytes)
            else:
                self._unsent.append(Delivery(ticket, node, None, problem))
            tickets.append(ticket)
        return tickets

    def _send_one(self, message: Message) -> tuple[str, str | None]:
        """Return the message's ticket, and the reason if it could not be sent."""
        problem = f"Flower did not accept a message for the node {message.metadata.dst_node_id}"
        try:
            accepted = self._retry(lambda: list(self._grid.push_messages([message])))
        except _TRANSIENT as error:
            accepted, problem = [], f"{problem} ({one_line(error)})"
        if accepted and accepted[0]:
            return accepted[0], None
        return f"unsent-{next(self._count)}", problem

    def poll(self) -> list[Delivery]:
        """Return deliveries since the last poll, each once: none where none is there, or as many as memory is for.

        Flower hands over an answer with everything that it was asked for in the same call. Small answers are therefore
        asked for together, and large ones one by one.

        Raises
        ------
        ConnectionError
            When Flower has answered with nothing but errors for a minute.
        """
        if self._unsent:
            return [self._unsent.popleft() for _ in range(len(self._unsent))]
        for tickets in itertools.islice(self._batches(), _MOST_PULLS):
            arrived = self._pulled(tickets)
            if arrived:
                return arrived
            if self._answers.is_under_way(tickets):
                break
            for ticket in tickets:  # the others' turn is next
                self._waiting[ticket] = self._waiting.pop(ticket)
            if arrived is None:
                break
        return []

    def _batches(self) -> list[list[str]]:
        """Return the tickets that answers are waited for in groups whose answers may be in memory together."""
        batches: list[list[str]] = []
        room = 0
        for ticket, awaited in self._waiting.items():
            room -= awaited.answer_bytes
            if room < 0 or not batches:
                batches.append([])
                room = AT_ONCE - awaited.answer_bytes
            batches[-1].append(ticket)
        return batches

    def _pulled(self, tickets: Sequence[str]) -> list[Delivery] | None:
        """Return the deliveries for these tickets; None where the call failed."""
        try:
            replies = self._answers.pull(tickets)
        except _TRANSIENT as error:
            self._failing_since = self._failing_since or self.now()
            if self.now() - self._failing_since > PATIENCE:
                raise ConnectionError(f"the SuperLink gives no answers ({one_line(error)})") from None
            return None
        except Exception as error:
            # A reply that Flower itself cannot put together. Anyone may have written it: it counts as silence.
            _log.warning("a reply cannot be read: %s", one_line(error, _MAX_REASON))
            return None
        self._failing_since = None
        return self._delivered(replies)

    def _delivered(self, replies: list[Answer]) -> list[Delivery]:
        """Return the answers that are waited for, and let go of each message once it is read."""
        arrived: list[Delivery] = []
        replies.reverse()
        while replies:
            ticket, reply = replies.pop()
            awaited = self._waiting.pop(ticket, None)
            if awaited is not None:
                arrived.append(_delivery(ticket, awaited.node, reply))
        return arrived

    def forget(self, tickets: Sequence[str]) -> None:
        """Stop waiting for these messages; Flower drops them when their lifetime is over."""
        forgotten = set(tickets)
        for ticket in forgotten:
            self._waiting.pop(ticket, None)
        self._answers.forget(tickets)
        self._unsent = deque(delivery for delivery in self._unsent if delivery.ticket not in forgotten)

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def _retry(self, call: Callable[[], T]) -> T:
        """Return the result of `call`, repeated for up to `PATIENCE` seconds while its errors are transient."""
        end = self.now() + PATIENCE
        while True:
            try:
                return call()
            except _TRANSIENT as error:
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                if refused or self.now() > end:
                    raise
                self.sleep(_PAUSE)


def _delivery(ticket: str, node: str, reply: Message | str) -> Delivery:
    if isinstance(reply, str):
        return Delivery(ticket, node, None, reply)
    if reply.has_error():
        return Delivery(ticket, node, None, _reason(reply.error))
    try:
        return Delivery(ticket, node, records.unpack(reply)[0])
    except Exception as error:  # of Flower's records too, whose content is the site's
        return Delivery(ticket, node, None, one_line(error, _MAX_REASON))


def _reason(error: Error) -> str:
    if error.code in _REASONS:
        return _REASONS[error.code]
    reason = one_line(error.reason or f"Flower's error {error.code}", _MAX_REASON)
    return unpacked(error.reason or "") or reason
