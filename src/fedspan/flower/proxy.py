"""`python -m fedspan.flower.proxy …`: a reverse proxy with the same rules as nginx.conf, for servers without nginx.

It forwards only the calls of the SuperLink's fleet API, which are signed with a registered node's key. The upstream
address is built from the name of the call alone, so that no path in a request can lead anywhere else. Bodies pass
through part by part, and large ones only from registered nodes, so that strangers cannot fill its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedspan.flower import expiry, node_signatures
from fedspan.flower.fleet_calls import call_name
from fedspan.support.errors import FedspanError

MAX_BYTES = 64 << 20
"""Largest request; Flower sends large messages in pieces of 5 MiB."""
# Headers of one connection rather than of the message (RFC 9110, 7.6.1).
_CONNECTION_HEADERS = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length"),
}
_SECONDS = 60.0
_PAUSE = 20.0
"""Longest time without a further part of a body, in seconds."""
_CONNECTIONS = 1024
"""Connections at the same time; each holds about 64 KiB of a body."""


def create(upstream: str, ca: Path, nodes: Path) -> Starlette:
    """Return the proxy as an ASGI application.

    Parameters
    ----------
    upstream
        HOST:PORT of the SuperLink; HOST must be in its certificate.
    ca
        Certificate of the authority that signed the SuperLink's.
    nodes
        Folder of the public keys of the sites; large bodies are read from their holders only.
    """
    trust = ssl.create_default_context(cafile=str(ca))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        # trust_env: a web proxy of the organisation must not stand between two processes of one machine.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(verify=trust, timeout=_SECONDS, limits=limits, trust_env=False) as client:
            yield {"client": client}

    async def answer(request: Request) -> Response:
        # The path as it was sent: it must not be decoded or normalised before it is checked.
        call = call_name(request.scope["raw_path"].decode("ascii", errors="replace"))
        if call is None or request.method != "POST":
            return _forbidden()
        large = node_signatures.is_large(request.headers)
        if large:
            signature = await run_in_threadpool(node_signatures.read, request.headers, nodes)
            if signature is None or not signature.in_time:
                return node_signatures.unsigned()
        return await _forward(request, f"https://{upstream}/v1/fleet/{call}", _Limits.LARGE if large else _Limits.SMALL)

    async def forbid(request: Request, error: Exception) -> Response:
        return _forbidden()

    return Starlette(
        routes=[Route("/{rest:path}", answer, methods=["POST"])],
        exception_handlers={404: forbid, 405: forbid},
        lifespan=lifespan,
    )


class _Limits(Enum):
    """Limits of one body: bytes in all, seconds in all."""

    SMALL = (node_signatures.SMALL, 20.0)
    LARGE = (MAX_BYTES, 600.0)


async def _forward(request: Request, url: str, limits: _Limits) -> Response:
    client: httpx.AsyncClient = request.state.client
    headers = [(name, value) for name, value in request.headers.items() if name not in _CONNECTION_HEADERS]
    length = request.headers.get("content-length")
    if length is not None and "transfer-encoding" not in request.headers:
        headers.append(("content-length", length))
    outgoing = client.build_request("POST", url, content=_body(request, limits), headers=headers)
    try:
        reply = await client.send(outgoing, stream=True)
    except _Refused as refused:
        return PlainTextResponse(refused.reason, refused.status, {"connection": "close"})
    except ClientDisconnect:
        return Response(status_code=499)
    except httpx.TimeoutException:
        return PlainTextResponse("the SuperLink did not answer in time", 504)
    except httpx.TransportError:
        return PlainTextResponse("the SuperLink cannot be reached", 502)
    # The server of this proxy adds the date itself.
    dropped = {*_CONNECTION_HEADERS, "date"} - {"content-length"}
    kept = {name: value for name, value in reply.headers.items() if name not in dropped}
    return StreamingResponse(reply.aiter_raw(), reply.status_code, kept, background=BackgroundTask(reply.aclose))


def _forbidden() -> Response:
    return PlainTextResponse("forbidden", 403)


class _Refused(Exception):
    """A body that is not passed on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


async def _body(request: Request, limits: _Limits) -> AsyncIterator[bytes]:
    """Pass on a body part by part: the next one is read from the connection only when this one has been sent."""
    largest, seconds = limits.value
    size, end = 0, time.monotonic() + seconds
    parts = request.stream()
    while True:
        try:
            wait = min(_PAUSE, end - time.monotonic())
            part = await asyncio.wait_for(anext(parts, None), max(0.0, wait))
        except TimeoutError:
            raise _Refused(408, "the body did not arrive in time") from None
        if part is None:
            return
        size += len(part)
        if size > largest:
            raise _Refused(413, "too large")
        yield part


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal stops it."""
    parser = argparse.ArgumentParser(
        prog="python -m fedspan.flower.proxy", description="A reverse proxy in front of a SuperLink."
    )
    parser.add_argument("--host", required=True, action="append", help="address to listen on; may be repeated")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--certificate", required=True, metavar="FILE")
    parser.add_argument("--key", required=True, metavar="FILE")
    parser.add_argument("--ca", required=True, type=Path, metavar="FILE")
    parser.add_argument("--nodes", type=Path, default=Path("nodes"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        node_signatures.check_folder(options.nodes)
        for line in expiry.check([Path(options.certificate), options.ca]):
            sys.stderr.write(f"warning: {line}\n")
        sockets = [_listening(host, options.port) for host in options.host]
        config = uvicorn.Config(
            create(options.upstream, options.ca, options.nodes.resolve()),
            ssl_certfile=options.certificate,
            ssl_keyfile=options.key,
            log_level="warning",
            server_header=False,
            limit_concurrency=_CONNECTIONS,
        )
        config.load()
    except (FedspanError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise FedspanError(f"port {port} of {host} cannot be used: {error.strerror}") from None


if __name__ == "__main__":
    main()
