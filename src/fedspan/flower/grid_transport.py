"""`fedspan.wire.transport.Transport` over Flower's Grid."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from fedspan.flower import records
from fedspan.flower.backoff import quicken
from fedspan.support.errors import FedspanError
from fedspan.wire.transport import Delivery

PATIENCE = 60.0
"""Seconds for which a SuperLink that answers with errors is asked again."""
_PAUSE = 0.5
_TRANSIENT = (httpx.HTTPError, ObjectPushError, ObjectPullError, OSError)
_SAID = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer came within the message's lifetime",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the answer came after the message's lifetime",
    ErrorCode.NODE_UNAVAILABLE: "the node is not connected",
    ErrorCode.CLIENT_APP_CRASHED: "the node's ClientApp ended before it answered",
}

T = TypeVar("T")


class GridTransport:
    """Messages through a Grid; a ticket is Flower's id of the message.

    Flower answers for what did not arrive: a message whose lifetime is over, or whose node is gone for a minute,
    comes back from `poll` with the reason.

    Parameters
    ----------
    group
        What Flower's log calls the messages by; one for every run of ours.
    """

    def __init__(self, grid: Grid, group: str) -> None:
        quicken()
        self._grid, self._group = grid, group
        self._waiting: dict[str, str] = {}
        """Ticket -> node."""
        self._unsent: deque[Delivery] = deque()
        self._count = itertools.count()
        self._failing: float | None = None
        """Since when looking for answers has failed."""

    def nodes(self) -> list[str]:
        """The connected SuperNodes, by Flower's ids, sorted."""
        return [str(node) for node in sorted(self._patiently(lambda: list(self._grid.get_node_ids())))]

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float) -> list[str]:
        """Send; a message that Flower does not take comes back from `poll` with an error."""
        if not lifetime > 0:
            raise FedspanError(f"lifetime = {lifetime}: expected more than 0 seconds")
        tickets: list[str] = []
        packed = {content: records.pack(content, lifetime) for _, content in messages}
        # One by one: Flower says of a batch only how many it took. What is the same for all is uploaded once.
        for node, content in messages:
            message = Message(packed[content], int(node), records.MESSAGE_TYPE, ttl=lifetime, group_id=self._group)
            ticket, problem = self._sent(message)
            if problem is None:
                self._waiting[ticket] = node
            else:
                self._unsent.append(Delivery(ticket, node, None, problem))
            tickets.append(ticket)
        return tickets

    def _sent(self, message: Message) -> tuple[str, str | None]:
        """Its ticket, and why it could not be sent."""
        problem = f"Flower did not take a message for the node {message.metadata.dst_node_id}"
        try:
            taken = list(self._patiently(lambda: list(self._grid.push_messages([message]))))
        except _TRANSIENT as error:
            taken, problem = [], f"{problem} ({records.one_line(error)})"
        if taken and taken[0]:
            return taken[0], None
        return f"unsent-{next(self._count)}", problem

    def poll(self) -> list[Delivery]:
        """What has come, each once.

        Raises
        ------
        ConnectionError
            When Flower has answered with nothing but errors for a minute.
        """
        arrived = [self._unsent.popleft() for _ in range(len(self._unsent))]
        if not self._waiting:
            return arrived
        try:
            replies = list(self._grid.pull_messages(list(self._waiting)))
        except _TRANSIENT as error:
            self._failing = self._failing or self.now()
            if self.now() - self._failing > PATIENCE:
                raise ConnectionError(
                    f"the SuperLink cannot be asked for answers ({records.one_line(error)})"
                ) from None
            return arrived
        self._failing = None
        for reply in replies:
            ticket = reply.metadata.reply_to_message_id
            node = self._waiting.pop(ticket, None)
            if node is not None:
                arrived.append(_delivery(ticket, node, reply))
        return arrived

    def forget(self, tickets: Sequence[str]) -> None:
        """Nobody waits for these any more: Flower is not asked about them again, and drops them at their end."""
        dropped = set(tickets)
        for ticket in dropped:
            self._waiting.pop(ticket, None)
        self._unsent = deque(delivery for delivery in self._unsent if delivery.ticket not in dropped)

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, asked again for up to `PATIENCE` seconds while the trouble may pass."""
        end = self.now() + PATIENCE
        while True:
            try:
                return ask()
            except _TRANSIENT as error:
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                if refused or self.now() > end:
                    raise
                self.sleep(_PAUSE)


def _delivery(ticket: str, node: str, reply: Message) -> Delivery:
    if reply.has_error():
        return Delivery(ticket, node, None, _reason(reply.error))
    try:
        return Delivery(ticket, node, records.unpack(reply)[0])
    except ValueError as error:
        return Delivery(ticket, node, None, records.one_line(error))


def _reason(error: Error) -> str:
    if error.code in _SAID:
        return _SAID[error.code]
    return records.one_line(error.reason or f"Flower's error {error.code}")
