"""The SuperLink's database, where it is on the disk: how long a request waits for another one's writing.

SQLite lets one request write at a time, and Flower gives up after 5 seconds in which others came first. While sites
upload large answers, pieces of 5 MiB are written one after the other, and on a slow disk or a busy machine a request is
passed over for longer than that. Flower's answer is then an error of its own, at which a SuperNode, or a run, ends.
"""

from __future__ import annotations

from fedspan.support.errors import FedspanError

WAIT = 25
"""Seconds. Flower's clients repeat a request after 30, so that a longer wait would not be noticed."""
_NAME = "busy_timeout"


def wait_for_writers() -> None:
    """Have a SuperLink's requests wait `WAIT` seconds for their turn to write.

    Raises
    ------
    FedspanError
        When it opens its database in another way than the versions that this was written for.
    """
    from flwr.supercore import sql_mixin

    settings = vars(sql_mixin).get("SQLITE_PRAGMAS")
    if settings is None or _NAME not in dict(settings):
        raise FedspanError(f"flwr's SuperLink sets no {_NAME} of SQLite: expected flwr>=1.41,<1.43")
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple({**dict(settings), _NAME: str(1000 * WAIT)}.items())
