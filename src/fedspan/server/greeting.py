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
        header = _introduction(delivery)
        client_id, rank, count = header["client_id"], header["rank"], header["num_examples"]
        terms, shapes = header["terms"], header["shapes"]
        if not isinstance(client_id, str) or not _is_count(rank):
            raise FedspanError(f"a site says client_id {client_id!r} and rank {rank!r}: expected a name and a count")
        if count is not None and not _is_count(count):
            raise FedspanError(f"{client_id} says that it has {count!r} examples: expected a count")
        if not isinstance(terms, dict) or not _are_shapes(shapes):
            raise FedspanError(f"{client_id} does not list its settings and shapes by name")
        return cls(client_id, rank, 1 if count is None else count, terms, shapes, str(header["base"]))


def _introduction(delivery: Delivery) -> Mapping[str, Any]:
    """Return the head of an answer that has all the fields of an introduction."""
    if delivery.content is None:
        raise FedspanError(delivery.error or "no answer")
    header, _ = protocol.decode(delivery.content)
    if "problem" in header:
        raise FedspanError(str(header["problem"]))
    missing = sorted({"client_id", "rank", "num_examples", "terms", "shapes", "base"} - header.keys())
    if missing:
        raise FedspanError(f"a site's introduction lacks {missing[0]}")
    return header


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1  # not isinstance, for which `true` is a number


def _are_shapes(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(shape, list) for shape in value.values())
