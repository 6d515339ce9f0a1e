"""A site's ClientApp: takes the bytes out of a message, has the site's worker answer them, and puts the answer back.

It imports neither torch nor a model: Flower may start it anew for every message. `app` runs under Flower's own
`flower-superexec` too; `fedspan.flower.client_app_process` keeps it loaded between messages.
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
from fedspan.support.errors import FedspanError
from fedspan.wire import unix_socket

SITE = "FEDSPAN_SITE"
SHARE = 0.9
"""Of a message's lifetime is the worker's; the rest is left for the way, so that a refusal arrives in time too."""

Call = Callable[[Path, bytes, float], bytes]
"""(site's folder, content, seconds) -> answer, as `fedspan.wire.unix_socket.call`."""


def client_app(call: Call = unix_socket.call, site: Path | None = None, most: float = float("inf")) -> ClientApp:
    """The app that asks with `call`.

    Parameters
    ----------
    site
        The site's folder; none: `site` of the node's configuration, else the environment's FEDSPAN_SITE.
    most
        Seconds that one answer may take, whatever the message allows.
    """
    made = ClientApp()

    @made.query("fedspan")
    def answer(message: Message, context: Context) -> Message:
        # Whatever goes wrong, the server is told: a message without an answer holds its SuperNode up.
        try:
            content, lifetime = records.unpack(message)
            answered = call(site or _folder(context), content, min(most, SHARE * lifetime))
            return Message(records.pack(answered), reply_to=message)
        except Exception as error:
            return refusal(message, error)

    return made


def refusal(message: Message, error: object) -> Message:
    """An answer that only says why there is none."""
    told = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, records.one_line(error))
    return Message(told, reply_to=message)


def _folder(context: Context) -> Path:
    named = context.node_config.get("site") or os.environ.get(SITE)
    if not named:
        raise FedspanError(f"this node names no site: expected site=FOLDER in its --node-config, or {SITE}")
    return Path(str(named))


app = client_app()
