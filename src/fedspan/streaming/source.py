"""Sources of updates: anything that can be iterated repeatedly in sorted client order, and trees of such sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from itertools import islice

from fedspan.methods.messages import Update
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Tree:
    """A server whose children are sources or servers: the sums of a node are the sums of its children's sums.

    The clients of each source are sorted, and none stands in two of them. Servers on other machines do `sum_pass` on
    their own clients and send the partial up: see `aggregate_passes`.
    """

    children: Sequence[Source]


Source = Iterable[Update] | Tree
"""Updates in sorted client order, the same at every iteration: a list, a `Spool`, an object that makes them again."""


class Boundary(Enum):
    """The points at which a walk through a tree of servers enters and leaves a node."""

    ENTER = auto()
    LEAVE = auto()


def walk(source: Source, block: int) -> Iterator[Boundary | list[Update]]:
    """Yield the source's updates in blocks, always in the same order, between the boundaries of the nodes."""
    yield Boundary.ENTER
    if isinstance(source, Tree):
        for child in source.children:
            yield from walk(child, block)
    else:
        updates = iter(source)
        while current := list(islice(updates, block)):
            yield current
            current.clear()  # or this block would stay in memory while the next one is read
    yield Boundary.LEAVE


class ClientSequence:
    """The clients seen so far in one pass; one without weight, repeated or out of order is refused.

    ``digest`` identifies all of them with their weights, so that two passes, or a checkpoint and its source, can be
    compared without keeping the ids.
    """

    def __init__(self, source: Source) -> None:
        self.num_clients = 0
        self.digest = ""
        self._last: str | None = None
        # In one source, sorted order puts a repeated client next to itself; across a tree's sources only ids show it.
        self._known: set[str] | None = set() if isinstance(source, Tree) else None

    def begin_source(self) -> None:
        """Begin a new source, whose order is its own."""
        self._last = None

    def add_all(self, updates: Iterable[Update]) -> None:
        """Add the next updates' clients; a FedspanError when one of them is refused."""
        for update in updates:
            self._add(update)

    def _add(self, update: Update) -> None:
        client, count = update.client_id, update.num_examples
        if client == self._last or (self._known is not None and client in self._known):
            raise FedspanError(f"two updates of {client}: expected one each")
        if self._last is not None and client < self._last:
            raise FedspanError(f"the update of {client} comes after that of {self._last}: expected sorted clients")
        if not (math.isfinite(count) and count > 0):
            raise FedspanError(f"{client} has {count} examples: expected more than 0")
        if self._known is not None:
            self._known.add(client)
        self._last = client
        self.num_clients += 1
        entry = f"{self.digest} {client} {float(count)!r}"
        self.digest = blake2b(entry.encode(), digest_size=16).hexdigest()
