"""The ids of clients: numbered, or the names of the files that their data is in."""

from __future__ import annotations

from collections.abc import Sequence

from fedspan.support.errors import FedspanError
from fedspan.wire.names import check_name


def numbered_ids(count: int) -> tuple[str, ...]:
    """Return the ids of clients without names of their own; they sort like their numbers."""
    width = len(str(count - 1))
    return tuple(f"client-{k:0{width}d}" for k in range(count))


def names_of_sites(names: Sequence[str]) -> tuple[str, ...]:
    """Return the client ids of clients that are named after their files.

    Raises
    ------
    FedspanError
        For a name that no client can have, and for two that are one where case does not count.
    """
    seen: set[str] = set()
    for name in names:
        check_name(name, "data.train: the name of a file, which becomes that of its client,")
        if name.lower() in seen:
            raise FedspanError(
                f"data.train: two files, or their folders, are called {name!r} where case does not count: expected "
                "different names, since each file's client is named after it"
            )
        seen.add(name.lower())
    return tuple(names)
