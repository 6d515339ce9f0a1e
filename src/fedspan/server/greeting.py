"""A site's introduction, read from bytes that anyone may have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.support.errors import FedspanError
from fedspan.wire import protocol
from fedspan.wire.transport import Delivery


@dataclass(frozen=True, slots=True)
class Greeting:
    """The answer of one site to a greeting, with every field of the right type."""

    client_id: str
    rank: int
    num_examples: int
    """1 where a site does not reveal it, which is where only sums may be known."""
    terms: Mapping[str, Any]
    """The settings that it must share with the server."""
    shapes: Mapping[str, Sequence[int]]
    """Of its adapted modules and trained weights, by name."""
    base: str
    """Digest of its untouched base."""

    @classmethod
    def read(cls, delivery: Delivery) -> Greeting:
        """Read what came back from a node.

        Raises
        ------
        FedspanError
            When no answer came, the site reports a problem, or a field is missing or wrong.
        """
        if delivery.content is None:
            raise FedspanError(delivery.error or "no answer")
        header, _ = protocol.decode(delivery.content)
        if "problem" in header:
            raise FedspanError(str(header["problem"]))
        missing = sorted({"client_id", "rank", "num_examples", "terms", "shapes", "base"} - header.keys())
        if missing:
            raise FedspanError(f"a site's introduction lacks {missing[0]}")
        client_id, rank, count = header["client_id"], header["rank"], header["num_examples"]
        if not isinstance(client_id, str) or type(rank) is not int or rank < 1:
            raise FedspanError(f"a site says client_id {client_id!r} and rank {rank!r}: expected a name and a count")
        if count is not None and (type(count) is not int or count < 1):
            raise FedspanError(f"{client_id} says that it has {count!r} examples: expected a count")
        terms, shapes = header["terms"], header["shapes"]
        by_name = isinstance(terms, dict) and isinstance(shapes, dict)
        if not by_name or not all(isinstance(shape, list) for shape in shapes.values()):
            raise FedspanError(f"{client_id} does not list its settings and shapes by name")
        return cls(client_id, rank, 1 if count is None else count, terms, shapes, str(header["base"]))
