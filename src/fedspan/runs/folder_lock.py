"""One process at a time in a run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fedspan.events.chain import FILE as EVENTS
from fedspan.events.log import LOCK as EVENTS_LOCK
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import make_folder

RUNNING = ".running"
"""The file that describes the run at work in a folder; one that was killed leaves it behind."""
_LOCK = ".lock"
FILES = frozenset({_LOCK, RUNNING, EVENTS, EVENTS_LOCK})
"""Names of the files of the lock, and of the log of earlier attempts to start a run of real sites. A folder that holds
nothing else is as good as empty."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of the folder, which is created where it is missing.

    The system releases the lock however this process ends, so that of a killed run no lock is left. The holder's
    process id and host stand in a file of their own, since an attempt to take the lock empties the lock's.

    Raises
    ------
    FedspanError
        When another process is at work in the folder, which the message names; or where files cannot be locked.
    """
    make_folder(folder)
    lock = FileLock(str(folder / _LOCK), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FedspanError(f"{folder} is in use by {holder(folder)}: expected to be the only run in it") from None
    except NotImplementedError as error:
        raise FedspanError(
            f"{folder} cannot be locked ({one_line(error)}): expected a disk whose files can be"
        ) from None
    try:
        began = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": began}
        (folder / RUNNING).write_text(json.dumps(record) + "\n", encoding="utf-8")
        yield
    finally:
        (folder / RUNNING).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str:
    """Return the process that holds the folder's lock, as it has described itself."""
    try:
        record = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        return one_line(f"a run with process id {record['pid']} on {record['host']}, since {record['since']}", 200)
    except (OSError, ValueError, TypeError, KeyError):
        return "another run"  # between its lock and its description


def is_running(folder: Path) -> bool:
    """Return whether a run has described itself as at work in the folder, and is not known to have been killed.

    Only the processes of this machine are known; the lock itself is not tried, since a run could miss it meanwhile.
    """
    try:
        record = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        pid, host = int(record["pid"]), record["host"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if host != socket.gethostname() or os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def is_free(folder: Path) -> bool:
    """Return whether the path is no file, and holds nothing but perhaps what a lock leaves behind."""
    return not folder.exists() or (folder.is_dir() and all(path.name in FILES for path in folder.iterdir()))
