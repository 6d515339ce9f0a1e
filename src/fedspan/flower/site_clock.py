"""A site's clock beside the server's: Flower refuses what a site signs at a wrong time, and says nothing about it."""

from __future__ import annotations

import logging
from email.utils import parsedate_to_datetime

import httpx
from flwr.supercore.date import now
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode import fleet_http_connection
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedspan.flower.node_signatures import AHEAD, BEHIND, clock_difference
from fedspan.support.errors import FedspanError

NOTICEABLE = 3.0
"""Seconds of difference that are reported: more than a slow connection and whole seconds in the answer explain."""
_ANOTHER = 5.0
"""Seconds by which the difference must have changed to be reported again."""
_log = logging.getLogger("flwr")


class ClockWatch(NodeAuthHttpInterceptor):
    """Flower's own signing of requests, which also compares the `Date` of each answer with this machine's clock."""

    _reported = 0.0

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request."""
        began = now()
        response = super().intercept(context, call_next)
        taken = (now() - began).total_seconds()
        # Half of the way there and back, and on average half of the second that `Date` leaves out.
        own = began.timestamp() + taken / 2 - 0.5
        try:
            ahead = own - parsedate_to_datetime(response.headers["date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            return response  # a server that does not tell the time
        # The server may have written its answer at any time in between: a request that takes long says less.
        if abs(ahead) > NOTICEABLE + taken / 2 and abs(ahead - self._reported) > _ANOTHER:
            type(self)._reported = ahead
            refused = "the server refuses what this site signs: " if not -BEHIND < ahead < AHEAD else ""
            _log.error("%s%s", refused, clock_difference(ahead, "this machine's clock"))
        return response


def watch_clock() -> None:
    """Have Flower's SuperNode sign its requests with `ClockWatch`.

    Raises
    ------
    FedspanError
        When the SuperNode differs from the one of the versions that this was written for.
    """
    if vars(fleet_http_connection).get("NodeAuthHttpInterceptor") is not NodeAuthHttpInterceptor:
        raise FedspanError("flwr's SuperNode signs its requests in another way: expected flwr>=1.41,<1.43")
    vars(fleet_http_connection)["NodeAuthHttpInterceptor"] = ClockWatch
