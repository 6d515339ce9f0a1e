"""The signature with which a node's request begins, checked before anything of its body is read.

Flower's nodes sign the time of each request with their key, in its headers; Flower checks it once the whole body is in
memory. What is checked here is the same, with the keys in `nodes/` of the server's folder.
"""

from __future__ import annotations

import binascii
import datetime
import logging
import time
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedspan.flower.fleet_calls import is_fleet_call
from fedspan.flower.node_keys import read_keys
from fedspan.support.errors import FedspanError

SMALL = 64 << 10
"""Bytes of the largest body that is read without a signature; a message's parts, up to 5 MiB each, are larger."""
AHEAD, BEHIND = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
"""Seconds by which a node's clock may differ from the server's before Flower refuses what it signs."""
_REPORT_AGAIN = 60.0
"""Seconds until a site is reported again, or seconds by which its clock must have changed."""
_log = logging.getLogger("flwr")


@dataclass(frozen=True, slots=True)
class Signature:
    """A valid signature of a registered node."""

    site: str
    """Name of the file in `nodes/` with its key."""
    age: float
    """Seconds since the request was signed, by the server's clock; negative where the node's clock is ahead."""

    @property
    def in_time(self) -> bool:
        """Return whether Flower accepts a signature of this age."""
        return -AHEAD < self.age < BEHIND


def read(headers: Mapping[str, str], nodes: Path) -> Signature | None:
    """Return the signature in a request's headers, or None where no key in the folder `nodes` made one."""
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        timestamp = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.datetime.fromisoformat(timestamp)).total_seconds()
        if not verify_signature(bytes_to_public_key(key), timestamp.encode("ascii"), signature):
            return None
        sites = [site for site, own in read_keys(nodes).items() if own == key]
    except (KeyError, ValueError, TypeError, binascii.Error):  # FedspanError, where the folder has no keys, is one
        return None
    return Signature(sites[0], age) if sites else None


def is_large(headers: Mapping[str, str]) -> bool:
    """Return whether a request announces a body that needs a signature, or a body of unknown length."""
    length = headers.get("content-length", "0")
    return "transfer-encoding" in headers or not length.isdecimal() or int(length[:20]) > SMALL


class SignedBodies:
    """ASGI middleware before a SuperLink: large bodies of fleet calls are read from registered nodes only.

    It also reports registered nodes whose clock is so wrong that Flower refuses what they sign, which it does without
    a word.

    Parameters
    ----------
    nodes
        Folder of the sites' public keys.
    """

    def __init__(self, app: ASGIApp, nodes: Path) -> None:
        self._app, self._nodes = app, nodes
        self._reported: dict[str, tuple[float, float]] = {}
        """Site -> when it was reported last, and the age of its signature then."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not is_fleet_call(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        large = is_large(headers)
        # Most requests are small and in time: their signature is left to Flower.
        if large or not _looks_in_time(headers):
            signature = await run_in_threadpool(read, headers, self._nodes)
            if signature is not None and not signature.in_time:
                self._report(signature)
            if large and (signature is None or not signature.in_time):
                await unsigned()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _report(self, signature: Signature) -> None:
        site, moment = signature.site, time.monotonic()
        since, before = self._reported.get(site, (float("-inf"), 0.0))
        if moment - since > _REPORT_AGAIN or abs(signature.age - before) > _REPORT_AGAIN:
            self._reported[site] = moment, signature.age
            _log.error("what %s signs is refused: %s", site, clock_difference(-signature.age, f"{site}'s clock"))


def clock_difference(seconds: float, clock: str) -> str:
    """Return one line about a clock that is ahead of the server's by some seconds, or behind it where negative."""
    side = "ahead of" if seconds > 0 else "behind"
    return (
        f"{clock} is about {abs(seconds):.0f} s {side} the server's: expected at most {AHEAD} s ahead or {BEHIND} s "
        "behind; set both machines' clocks by NTP"
    )


def unsigned() -> PlainTextResponse:
    """Return the answer to a large body without the signature of a registered node."""
    return PlainTextResponse("a body of this size needs the signature of a registered node", 401, _CLOSE)


_CLOSE = {"connection": "close"}


def _looks_in_time(headers: Mapping[str, str]) -> bool:
    try:
        signed_at = datetime.datetime.fromisoformat(headers[TIMESTAMP_HEADER])
        return -AHEAD < (now() - signed_at).total_seconds() < BEHIND
    except (KeyError, ValueError, TypeError):
        return True  # not signed at all, which Flower refuses


def check_folder(nodes: Path) -> None:
    """Check that there is a folder of public keys.

    Raises
    ------
    FedspanError
        When there is none.
    """
    if not nodes.is_dir():
        raise FedspanError(f"--nodes {nodes}: expected the folder of the sites' public keys")
