"""One question to many sites and back: messages out, answers in, each until its deadline, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedspan.federation.exchange import Question
from fedspan.server.registry import SiteRegistry
from fedspan.wire import protocol
from fedspan.wire.transport import Delivery

Reply = tuple[dict[str, Any], list[Tensor]]
"""Head and tensors of an answer."""


class Missing(str):
    """Why nothing came of a question, which speaks of the line and not of the client."""


ABSENT = Missing("is not connected")


@dataclass(slots=True)
class _Costs:
    wire_up: int = 0
    wire_down: int = 0
    round_trips: int = 0
    waited_seconds: float = 0.0
    """From the sending of messages until the last answer that was waited for."""
    slowest_seconds: float = 0.0
    """Of it, how long the busiest site was at work, trip by trip: the rest is the way there and back."""


class Requests:
    """Carries messages to the sites on the roll."""

    def __init__(self, registry: SiteRegistry) -> None:
        self.registry, self.port = registry, registry.port
        self._costs = _Costs()

    def costs(self) -> dict[str, Any]:
        """What was sent and waited for since the last call."""
        costs, self._costs = self._costs, _Costs()
        return asdict(costs)

    def go(
        self, question: Question, messages: Mapping[str, bytes], enough: int | None = None
    ) -> Iterator[tuple[str, Reply | str]]:
        """Send everyone its message; answers as they come, or why there is none. Each client once.

        Parameters
        ----------
        messages
            By client.
        enough
            So many answers are waited for; none: all of them.
        """
        d, wanted = self.registry.config.deployment, len(messages) if enough is None else enough
        began = self.port.now()
        self._costs.round_trips += 1
        self._costs.wire_down += sum(map(len, messages.values()))
        addressed = [(self.registry.members[c].node, content) for c, content in messages.items()]
        tickets = dict(zip(self.port.send(addressed, d.deadline), messages, strict=True))
        got, slowest = 0, 0.0
        while tickets and got < wanted and self.port.now() - began < d.deadline:
            for delivery in self.port.poll():
                client_id = tickets.pop(delivery.ticket, None)
                if client_id is None:
                    continue
                reply = self._read(client_id, question, delivery)
                self.registry.note(client_id, question.round_num, missed=delivery.content is None)
                if not isinstance(reply, str):
                    got += 1
                    slowest = max(slowest, _busy(reply[0]))
                yield client_id, reply
            if tickets and got < wanted:
                self.port.sleep(d.poll)
        self.port.forget(list(tickets))
        self._costs.waited_seconds += self.port.now() - began
        self._costs.slowest_seconds += slowest
        for client_id in tickets.values():
            late = got >= wanted
            if not late:
                self.registry.note(client_id, question.round_num, missed=True)
            reason = "was not waited for" if late else f"did not answer within {d.deadline:g} s"
            yield client_id, Missing(reason)

    def _read(self, client_id: str, question: Question, delivery: Delivery) -> Reply | str:
        """An answer that belongs to what was asked, or what is wrong with it."""
        if delivery.content is None:
            return Missing(delivery.error or "gave no answer")
        self._costs.wire_up += len(delivery.content)
        try:
            header, tensors = protocol.decode(delivery.content)
        except ValueError as error:
            return f"sent {error}"
        if header.get("client_id") != client_id:
            return f"answered as {header.get('client_id')!r}"
        if "problem" in header:
            return str(header["problem"])
        for key, own in (("run", self.registry.run), ("round", question.round_num), ("number", question.number)):
            got = header.get(key)
            if got != own and key == "round" and type(got) is int:
                return f"answered for round {got + 1}: expected {question.round_num + 1}"  # people count from one
            if got != own:
                return f"answered for {key} {got!r}: expected {own!r}"
        return header, tensors


def _busy(header: Mapping[str, Any]) -> float:
    seconds = header.get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0
