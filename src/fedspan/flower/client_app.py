"""A site's ClientApp: unpacks a message, passes its bytes to the site's worker, and packs the worker's answer.

It imports neither torch nor a model: Flower may start a new process for every message. `app` also runs under Flower's
own `flower-superexec`; `fedspan.flower.client_app_process` keeps it loaded between messages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedspan.flower import records
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import unix_socket
from fedspan.wire.refusals import Code, new_incident, packed

SITE = "FEDSPAN_SITE"
SHARE = 0.9
"""Share of a message's lifetime that the worker gets; the rest is for the way back, so that refusals arrive too."""

_log = logging.getLogger("fedspan.flower")

Call = Callable[[Path, bytes, float], bytes]
"""(site's folder, content, timeout in seconds) -> answer, as `fedspan.wire.unix_socket.call`."""


def client_app(call: Call = unix_socket.call, site: Path | None = None, deadline: float = float("inf")) -> ClientApp:
    """Return a ClientApp that answers messages with `call`.

    Parameters
    ----------
    site
        The site's folder; by default `site` of the node's configuration, else FEDSPAN_SITE in the environment.
    deadline
        Longest time for one answer in seconds, whatever the message's lifetime allows.
    """
    created = ClientApp()

    @created.query("fedspan")
    def answer(message: Message, context: Context) -> Message:
        # Every failure becomes a reply: a SuperNode waits for ever for the answer to its one message.
        try:
            content, lifetime = records.unpack(message)
            reply = call(site or _folder(context), content, min(deadline, SHARE * lifetime))
            return Message(records.pack(reply), reply_to=message)
        except Exception as error:
            return refusal(message, _code_of(error), error)

    return created


def refusal(message: Message, code: Code, reason: object) -> Message:
    """Return a reply that holds no answer, only a code and the number of the incident.

    The reason itself, which may quote the site's data or its paths, stays in this process's log.
    """
    incident = new_incident()
    _log.error("incident %s (%s): %s", incident, code, one_line(reason))
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, packed(code, incident)), reply_to=message)


def _code_of(error: Exception) -> Code:
    if isinstance(error, unix_socket.CallTimedOut):
        return Code.WORKER_LATE
    if isinstance(error, unix_socket.CallFailed):
        return Code.WORKER_GONE
    if isinstance(error, _NoFolder):
        return Code.NOT_READY
    return Code.UNREADABLE if isinstance(error, FedspanError) else Code.FAILED


class _NoFolder(FedspanError):
    pass


def _folder(context: Context) -> Path:
    name = context.node_config.get("site") or os.environ.get(SITE)
    if not name:
        raise _NoFolder(f"this node has no site folder: expected site=FOLDER in its --node-config, or {SITE}")
    return Path(str(name))


app = client_app()
