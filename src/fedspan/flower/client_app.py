"""A site's ClientApp: unpacks a message, passes its bytes to the site's worker, and packs the worker's answer.

It imports neither torch nor a model: Flower may start a new process for every message. `app` also runs under Flower's
own `flower-superexec`; `fedspan.flower.client_app_process` keeps it loaded between messages.
"""

from __future__ import annotations

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

SITE = "FEDSPAN_SITE"
SHARE = 0.9
"""Share of a message's lifetime that the worker gets; the rest is for the way back, so that refusals arrive too."""

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
            return refusal(message, error)

    return created


def refusal(message: Message, reason: object) -> Message:
    """Return a reply that holds no answer, only the reason in one line."""
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, one_line(reason))
    return Message(error, reply_to=message)


def _folder(context: Context) -> Path:
    name = context.node_config.get("site") or os.environ.get(SITE)
    if not name:
        raise FedspanError(f"this node has no site folder: expected site=FOLDER in its --node-config, or {SITE}")
    return Path(str(name))


app = client_app()
