"""A hash-chained log that is being written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedspan.events import chain
from fedspan.events.chain import Entry, Head
from fedspan.support.errors import FedspanError
from fedspan.support.files import flush, make_folder
from fedspan.support.versions import installed_version

LOCK = ".events.lock"
"""Name of the lock beside a log, so that two processes never continue one line."""
_EXPECTED = "an unbroken chain; `fedspan log verify` says more, and a log that was moved elsewhere is begun anew"


def utc_now() -> str:
    """Return the time in UTC, to the microsecond."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"


class EventLog:
    """An append-only log of one side of a federation.

    Every line is on the disk before `append` returns. A line whose writing was interrupted is removed by the next
    process that writes, with an entry that says so; nobody can have been shown it.

    Parameters
    ----------
    path
        The file; it is made by the first entry.
    opening
        Fields of the entry with which each process begins: `node` (`server`, or a client id), `run`, `config` (a digest
        of the agreed settings), `keys` (fingerprints by name).

    Raises
    ------
    FedspanError
        When the file is there and its lines are not a chain.
    """

    def __init__(self, path: Path, opening: Mapping[str, Any], clock: Callable[[], str] = utc_now) -> None:
        self.path, self._clock = path, clock
        self._opening = {**opening, "version": installed_version("fedspan")}
        self._opened = False
        self._size = 0
        self._torn = b""
        self.head: Head | None = None
        """The last line."""
        self._peers: dict[tuple[Any, Any], int] = {}
        """Sender and run -> the largest number of a line of its own log that it has shown."""
        if path.exists():
            self._load()

    def append(self, *events: Mapping[str, Any]) -> list[Entry]:
        """Write entries at the end, flush them to the disk, and return them as they were written.

        An entry whose `peer` (the sender's head, as `Head.listed`) has a smaller number than an earlier one of the
        same sender gets `rolled_back`, the larger number: the other log has lost lines.

        Raises
        ------
        FedspanError
            When another process has broken the chain.
        OSError
            When the file cannot be written.
        """
        make_folder(self.path.parent)
        with FileLock(str(self.path.parent / LOCK), thread_local=False):
            if (self.path.stat().st_size if self.path.exists() else 0) != self._size + len(self._torn):
                self._load()
            given = [*self._preamble(), *events]
            before, peers = self.head, dict(self._peers)
            try:
                entries, content = self._chained(given)
                self._write(content)
            except BaseException:
                self.head, self._peers = before, peers
                raise
            self._opened = True
        return entries[len(given) - len(events) :]

    def _preamble(self) -> list[Mapping[str, Any]]:
        """Return the entries that come before the first one of this process, or after an interrupted line."""
        entries: list[Mapping[str, Any]] = []
        if self.head is None:
            entries.append({"event": "begin", "format": chain.FORMAT, **self._opening})
        elif not self._opened:
            entries.append({"event": "opened", **self._opening})
        if self._torn:
            torn = {"bytes": len(self._torn), "digest": chain.digest_of(self._torn)}
            entries.append({"event": "healed", **torn})
        return entries

    def _chained(self, events: list[Mapping[str, Any]]) -> tuple[list[Entry], bytes]:
        entries: list[Entry] = []
        content = b""
        for event in events:
            number, previous = (0, chain.GENESIS) if self.head is None else (self.head.number + 1, self.head.digest)
            entry = {"number": number, "previous": previous, "time": self._clock(), **event}
            known = self._see(entry)
            if known is not None:
                entry["rolled_back"] = known
            line = chain.line_of(entry)
            digest = chain.digest_of(line[:-1])
            self.head = Head(number, digest, digest if self.head is None else self.head.log)
            entries.append(entry)
            content += line
        return entries, content

    def _see(self, entry: Entry) -> int | None:
        """Take note of a sender's head; return the largest number that it has shown where that is a larger one."""
        peer = entry.get("peer")
        if peer is None:
            return None
        key = entry.get("from"), entry.get("run")
        known = self._peers.get(key, -1)
        self._peers[key] = max(known, peer[0])
        return known if peer[0] < known else None

    def _write(self, content: bytes) -> None:
        new = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # Here and not when the log is read: a reader changes nothing.
            os.ftruncate(handle, self._size)
            os.lseek(handle, self._size, os.SEEK_SET)
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(content)
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            flush(self.path.parent)
        self._size, self._torn = self._size + len(content), b""

    def _load(self) -> None:
        """Read what is there, as after another process has written."""
        read = chain.read(self.path) if self.path.exists() else chain.Chain(self.path)
        chain.require_unbroken(read, _EXPECTED)
        if self.head is not None and read.digests[self.head.number : self.head.number + 1] != [self.head.digest]:
            raise FedspanError(f"{self.path} has lost lines while it was in use: expected it only to grow")
        self.head, self._torn = read.head, read.torn
        self._size = (self.path.stat().st_size if self.path.exists() else 0) - len(read.torn)
        for entry in read.entries:
            self._see(entry)
