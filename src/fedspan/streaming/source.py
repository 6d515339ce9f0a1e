"""Where updates come from: anything that can be iterated again and again in sorted client order, and trees of it."""

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
    their own clients and send the partial up: see `drive`.
    """

    children: Sequence[Source]


Source = Iterable[Update] | Tree
"""Updates in sorted client order, the same at every iteration: a list, a `Spool`, an object that makes them anew."""


class Edge(Enum):
    """Where a walk through a tree enters and leaves a node."""

    ENTER = auto()
    LEAVE = auto()


def walk(source: Source, block: int) -> Iterator[Edge | list[Update]]:
    """The source's updates in blocks, in an order that is the same every time, with the edges of its nodes."""
    yield Edge.ENTER
    if isinstance(source, Tree):
        for child in source.children:
            yield from walk(child, block)
    else:
        updates = iter(source)
        while held := list(islice(updates, block)):
            yield held
            held.clear()  # or this block would live on while the next one is read
    yield Edge.LEAVE


class RollCall:
    """Who has been heard in one pass: refuses a client that counts for nothing, comes twice or out of order.

    ``digest`` stands for all clients so far and their weights, so that two passes, or a checkpoint and its source,
    can be compared without keeping the ids.
    """

    def __init__(self, source: Source) -> None:
        self.num_clients = 0
        self.digest = ""
        self._last: str | None = None
        # Sorted order shows a repetition inside one source; across the sources of a tree it takes the ids.
        self._known: set[str] | None = set() if isinstance(source, Tree) else None

    def enter(self) -> None:
        """A new source begins."""
        self._last = None

    def call_all(self, updates: Iterable[Update]) -> None:
        """The next updates; a ValueError when one cannot be taken."""
        for update in updates:
            self._call(update)

    def _call(self, update: Update) -> None:
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
