"""The interface between a server and whatever carries its messages to the sites and back.

A message is bytes. Its content, and whether it can be trusted, is the concern of `fedspan.wire.protocol`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

AT_ONCE = 2**26
"""Bytes of messages that are in memory together: beyond it, each one goes out, or comes in, before the next."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """The outcome of one message that was sent."""

    ticket: str
    """As `Transport.send` returned it."""
    node: str
    content: bytes | None
    """The answer; None where there will be none."""
    error: str | None = None
    """The reason why there is no answer, in one line."""


class Transport(Protocol):
    """The server's side of a transport. Everything that takes time goes through it, so that tests can own the clock."""

    def nodes(self) -> list[str]:
        """Return the sites that can be reached now, by the transport's own names."""

    def client_of(self, node: str) -> str | None:
        """Return the client id for which a node may speak; None where the transport cannot tell nodes apart.

        Raises
        ------
        FedspanError
            For a node that may speak for no client.
        """

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float, answer_bytes: int = 0) -> list[str]:
        """Send each node its message, and return a ticket for each, in the same order.

        Parameters
        ----------
        messages
            (node, content).
        lifetime
            Seconds after which neither the message nor an answer to it is wanted any more.
        answer_bytes
            Bytes of the largest answer, about: `poll` fetches large ones one at a time.
        """

    def poll(self) -> list[Delivery]:
        """Return outcomes known since the last call, each once, without waiting; the list is the caller's.

        It may be a part of them, so that answers of no more than `AT_ONCE` bytes, or a single one, are in memory at a
        time; where it is empty, none is known now.
        """

    def forget(self, tickets: Sequence[str]) -> None:
        """Stop waiting for these; a late answer is dropped."""

    def now(self) -> float:
        """Return the seconds of a clock that only goes forward."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
