"""What carries messages between a server and its sites: a few functions, so that any transport can be put behind them.

A message is bytes. What is in it, and whether it can be trusted, is `fedspan.wire.protocol`'s concern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Delivery:
    """What came of one message that was sent."""

    ticket: str
    """As `send` returned it."""
    node: str
    content: bytes | None
    """The answer; none where there will be none."""
    error: str | None = None
    """Why there is no answer, in one line."""


class Port(Protocol):
    """The server's side of a transport."""

    def nodes(self) -> list[str]:
        """The sites that can be reached now, by the transport's own names."""

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float) -> list[str]:
        """Send each node its message, and return a ticket for each, in their order.

        Parameters
        ----------
        messages
            (node, content).
        lifetime
            Seconds after which neither the message nor an answer to it is wanted any more.
        """

    def poll(self) -> list[Delivery]:
        """What has come since the last call, each once; returns at once."""

    def forget(self, tickets: Sequence[str]) -> None:
        """Nobody waits for these any more; a late answer is dropped."""

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
