"""A question to a region: what each of its sites is asked, and the sum that the region answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedspan.federation.exchange import Question
from fedspan.methods.folds import Exchange
from fedspan.methods.messages import Template
from fedspan.privacy.sum_layout import SumLayout
from fedspan.server.key_exchange import Heading
from fedspan.server.sums import SumCollector
from fedspan.support.errors import FedspanError
from fedspan.wire import framing, protocol, schema
from fedspan.wire.protocol import MessageTensors

_HEADING = ("run", "round", "number", "place", "keep", "terms", "base", "rank", "num_clients")
_RELAYED = ("ask", "evaluate")


@dataclass(frozen=True, slots=True)
class RelayedQuestion:
    """One question of the server above, after every part of it was checked against the others."""

    question: Question
    """Without modules and exchange, which a region does not know."""
    heading: Heading
    """The fields that every message of the exchange has."""
    layout: SumLayout
    largest: int
    """The largest rank of the clients that are asked in all regions."""
    room: int
    """Number of clients that are asked in all regions."""
    weights: Mapping[str, float]
    """The weights of those clients that the server above knows: with another one they are not in the sum."""
    contents: Sequence[bytes]
    """The messages for sites, as they came: without `counted` and the sum."""
    messages: Mapping[str, bytes]
    """The same by client."""

    @classmethod
    def read(cls, message: Mapping[str, Any], tensors: Sequence[Tensor]) -> RelayedQuestion:
        """Read a message of kind `relay`.

        Raises
        ------
        FedspanError
            When it names a message that is not there, or one that is of another kind, round, run or base than it says.
        """
        heading = {key: message[key] for key in _HEADING}
        contents = [protocol.get_bytes(tensors, index) for index in message["messages"]]
        for content in contents:
            _check(content, heading)
        messages: dict[str, bytes] = {}
        for client_id, (number, _) in message["clients"].items():
            if number >= len(contents):
                raise FedspanError(f"message {number} for {client_id}: expected one of {len(contents)}")
            messages[client_id] = contents[number]
        template = Template({}, message["rank"], num_clients=message["num_clients"])
        place, num_places = message["place"]
        counted = {client_id: count for client_id, (_, count) in message["clients"].items()}
        question = Question(
            template,
            message["round"],
            message["number"],
            Exchange(),
            (place, num_places),
            message["keep"],
            counted,
        )
        layout, weights = _layout(message["layout"]), message["weights"]
        return cls(question, heading, layout, message["largest"], message["room"], weights, contents, messages)

    @property
    def run(self) -> str:
        """Return the name of the run."""
        return str(self.heading["run"])

    def content(self, client_id: str, collector: SumCollector) -> bytes:
        """Return the message for one site, with what it needs to know of the sum in its region."""
        fields = {"rank": self.largest, **collector.message_fields(client_id, MessageTensors())}
        counted = self.question.counted.get(client_id, 0)
        return framing.amended(self.messages[client_id], {"counted": counted, "sum": fields})


def _check(content: bytes, heading: Heading) -> None:
    """Check that a message for sites asks for a part of a sum, of the same exchange as the message that it came in."""
    kind, inner = schema.question(protocol.decode(content)[0])
    if kind not in _RELAYED or "sum" in inner:
        raise FedspanError(f"a message of kind {kind!r} to pass on: expected {' or '.join(_RELAYED)}, without its sum")
    for key in _HEADING:
        if inner[key] != heading[key]:
            raise FedspanError(f"a message to pass on with {key} {inner[key]!r}: expected {heading[key]!r}")


def _layout(described: Mapping[str, Any]) -> SumLayout:
    modules = {
        name: {part: tuple(shape) for part, shape in parts.items()} for name, parts in described["modules"].items()
    }
    return SumLayout({name: tuple(shape) for name, shape in described["dense"].items()}, modules)
