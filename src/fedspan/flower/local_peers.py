"""The account behind a connection over the loopback, as the kernel names it.

Every TCP socket of this machine is a row of /proc/net/tcp or tcp6 with the user id of the process that opened it. A
connection from the same machine has a row of its own for the other side: its local address is the peer's, its remote
address ours. No header and no message can change that.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedspan.support.errors import FedspanError

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
Address = tuple[str, int]
"""(IP address, port)."""
_TRIES = 3
"""Readings of the tables: a row may be missed while the kernel moves others."""
_ESTABLISHED, _LISTENING = "01", "0A"


@dataclass(frozen=True, slots=True)
class _Row:
    local: Address
    remote: Address
    state: str
    uid: int
    inode: int


def allowed_users() -> set[int]:
    """Return the user ids that may use what this process serves: its own, and root, which may do everything anyway."""
    return {os.geteuid(), 0}


class Connection(Protocol):
    """The part of a socket that names its two ends."""

    def fileno(self) -> int:
        """Return the file descriptor."""

    def getpeername(self) -> Any:
        """Return the other end's address."""

    def getsockname(self) -> Any:
        """Return this end's address."""


def peer_user(connection: Connection) -> int | None:
    """Return the user id of the process at the other end of a connection that this process has accepted.

    None where that end is on another machine, or where one of the ends is closed: the kernel gives the row of a closed
    end to root, and its port may already belong to somebody else's next connection.
    """
    try:
        peer, own = _address(connection.getpeername()), _address(connection.getsockname())
        inode = os.fstat(connection.fileno()).st_ino
    except OSError:
        return None
    for _ in range(_TRIES):
        ours = theirs = None
        # Both rows are in the first table as a rule, and the kernel takes milliseconds for each.
        for row in _rows():
            if row.state == _ESTABLISHED and row.inode:
                ours = row if (row.local, row.remote, row.inode) == (own, peer, inode) else ours
                theirs = row if (row.local, row.remote) == (peer, own) else theirs
            if ours is not None and theirs is not None:
                return theirs.uid
    return None


def listening_users(port: int) -> set[int]:
    """Return the user ids of the processes that listen on that port of the loopback or of all addresses."""
    return {
        row.uid for row in _rows() if row.state == _LISTENING and row.local[1] == port and _takes_loopback(row.local[0])
    }


def check_support() -> None:
    """Find this process's own user behind a connection to itself.

    Raises
    ------
    FedspanError
        Where the system does not say who is at the other end of a connection, or does not tell its users apart.
    """
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            found = peer_user(accepted)
            client.close()
    if found != os.geteuid():
        raise FedspanError(
            "this system does not say which account opened a connection: expected Linux with /proc/net/tcp, or "
            "--any-local-user, with which every account of this machine may use this port"
        )
    if os.geteuid() == _overflow_user():
        raise FedspanError(
            f"user id {os.geteuid()} also stands for accounts that the kernel cannot name: expected another account"
        )


def _rows() -> Iterator[_Row]:
    for table in TABLES:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # a kernel without IPv6 has one table only; without any, nobody is found
            continue
        for line in lines:
            fields = line.split()
            yield _Row(_decoded(fields[1]), _decoded(fields[2]), fields[3], int(fields[7]), int(fields[9]))


def _decoded(text: str) -> Address:
    """Return the address of a field such as 0100007F:1F90: words of four bytes in the machine's order."""
    words, _, port = text.partition(":")
    packed = b"".join(int(words[k : k + 8], 16).to_bytes(4, sys.byteorder) for k in range(0, len(words), 8))
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _address(name: Any) -> Address:
    return _plain(ipaddress.ip_address(str(name[0]).partition("%")[0])), int(name[1])


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return one spelling for an IPv4 address, whichever kind of socket it is in."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _takes_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_unspecified


def _overflow_user() -> int | None:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except OSError:
        return None
