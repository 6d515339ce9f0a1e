"""A chain of log lines, each of which holds the SHA-256 of the line before it.

A line is one JSON object. Its `number` counts from zero, its `previous` is the digest of the line before (of the first
line: 64 zeros), its `time` is in UTC, and its `event` says what happened. Whoever edits, cuts, moves or inserts a line
must rewrite every later one, which changes the digest of the last line: the head. The other side of a federation has
written down the heads that it was shown, so a chain that was rewritten, or cut at its end, is found by its log.

What remains: the lines after the last head that the other side has seen can be cut or changed without a trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspan.support.errors import FedspanError, one_line

FORMAT = 1
FILE = "events.jsonl"
"""Name of a log in the folder of a run or a site."""
GENESIS = "0" * 64
Entry = Mapping[str, Any]
_MAX_FAULTS = 20
"""Broken places of one chain that are named."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a chain."""

    number: int
    digest: str
    """SHA-256 in hexadecimal."""
    log: str
    """Digest of the first line, by which a log is told from others."""

    def listed(self) -> list[Any]:
        """Return it as the `peer` of an entry in another log."""
        return [self.number, self.digest, self.log]


@dataclass(slots=True)
class Chain:
    """The lines of a log as they were read, and the places where they are not a chain."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    """Every whole line; an empty object for one that is no JSON object."""
    digests: list[str] = field(default_factory=list)
    """Of every whole line."""
    faults: list[str] = field(default_factory=list)
    torn: bytes = b""
    """The end of the file after the last line break: a line whose writing was interrupted."""

    @property
    def head(self) -> Head | None:
        """Return the last whole line; None where there is none."""
        return Head(len(self.digests) - 1, self.digests[-1], self.digests[0]) if self.digests else None

    @property
    def node(self) -> str:
        """Return the name of the side whose log it is: `server`, or a client id."""
        return one_line(self.entries[0].get("node", "?"), 80) if self.entries else "?"


def line_of(entry: Entry) -> bytes:
    """Return an entry as the bytes of its line, with the line break."""
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of a message, or of a line without its line break, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path) -> Chain:
    """Read a log whatever has become of it.

    Raises
    ------
    FedspanError
        When the file cannot be read at all.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FedspanError(f"{path} cannot be read ({error.strerror}): expected a log of events") from None
    chain = Chain(path, torn=torn)
    previous = GENESIS
    for number, line in enumerate(lines):
        entry, fault = entry_of(line, number, previous)
        if fault is not None and len(chain.faults) < _MAX_FAULTS:
            chain.faults.append(fault)
        chain.entries.append(entry)
        previous = digest_of(line)
        chain.digests.append(previous)
    return chain


def entry_of(line: bytes, number: int, previous: str) -> tuple[Entry, str | None]:
    """Return the entry of a line, and the reason why it does not continue the chain, or None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        return {}, f"line {number} is no JSON object"
    if entry.get("number") != number:
        return entry, f"line {number} has the number {one_line(repr(entry.get('number')), 40)}: lines were cut or added"
    if entry.get("previous") != previous:
        before = "the start of a log" if number == 0 else f"line {number - 1} as it is now"
        return entry, f"line {number} does not follow {before}: a line was edited, cut, moved or added"
    if number == 0 and (entry.get("event") != "begin" or entry.get("format") != FORMAT):
        return entry, f"line 0 is no beginning of a log of format {FORMAT}"
    return entry, None


def require_unbroken(chain: Chain, expected: str) -> None:
    """Check that every whole line continues the chain.

    Raises
    ------
    FedspanError
        Naming the first line that does not.
    """
    if chain.faults:
        raise FedspanError(f"{chain.path}: {chain.faults[0]}; expected {expected}")
