"""The report of an error: the whole of it in the site's own log, and a code and a number to the server."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import protocol
from fedspan.wire.refusals import Code, new_incident


def refusal(client_id: str | None, code: Code, error: Exception, notify: Callable[[str], None]) -> bytes:
    """Return the answer that there is none, after giving the people at this site the reason.

    Parameters
    ----------
    client_id
        None where the site could not read its own settings.
    notify
        Called with the lines of this site's log.
    """
    incident = new_incident()
    notify(one_line(f"incident {incident} ({code}): {one_line(error)}"))
    if not isinstance(error, FedspanError):
        # A defect, or a machine in trouble: the one line of its error would not say where.
        for text in traceback.format_exception(error):
            for line in text.splitlines():
                notify(one_line(f"incident {incident}: {line}"))
    return protocol.encode({"client_id": client_id, "code": code, "incident": incident}, protocol.MessageTensors())
