"""`python -m fedspan.flower.proxy …`: a reverse proxy with the same rules as nginx.conf, for servers without nginx.

It forwards only the calls of the SuperLink's fleet API, which are signed with a registered node's key. The upstream
address is built from the name of the call alone, so that no path in a request can lead anywhere else.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedspan.flower.fleet_calls import call_name

MAX_BYTES = 64 << 20
"""Largest request; Flower sends large messages in pieces of 5 MiB."""
# Headers of one connection rather than of the message (RFC 9110, 7.6.1).
_CONNECTION_HEADERS = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length"),
}
_SECONDS = 60.0


def create(upstream: str, ca: Path) -> Starlette:
    """Return the proxy as an ASGI application.

    Parameters
    ----------
    upstream
        HOST:PORT of the SuperLink; HOST must be in its certificate.
    ca
        Certificate of the authority that signed the SuperLink's.
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
        path = request.scope["raw_path"].decode("ascii", errors="replace")
        call = call_name(path)
        if call is None or request.method != "POST":
            return _forbidden()
        try:
            content = await _content(request)
        except _TooLarge:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return Response(status_code=499)
        return await _forward(request, f"https://{upstream}/v1/fleet/{call}", content)

    async def forbid(request: Request, error: Exception) -> Response:
        return _forbidden()

    return Starlette(
        routes=[Route("/{rest:path}", answer, methods=["POST"])],
        exception_handlers={404: forbid, 405: forbid},
        lifespan=lifespan,
    )


async def _forward(request: Request, url: str, content: bytes) -> Response:
    client: httpx.AsyncClient = request.state.client
    headers = [(name, value) for name, value in request.headers.items() if name not in _CONNECTION_HEADERS]
    try:
        reply = await client.post(url, content=content, headers=headers)
    except httpx.TimeoutException:
        return PlainTextResponse("the SuperLink did not answer in time", 504)
    except httpx.TransportError:
        return PlainTextResponse("the SuperLink cannot be reached", 502)
    # httpx has already decompressed the content, if it was compressed.
    dropped = {*_CONNECTION_HEADERS, "content-encoding"}
    kept = {name: value for name, value in reply.headers.items() if name not in dropped}
    return Response(reply.content, reply.status_code, kept)


def _forbidden() -> Response:
    return PlainTextResponse("forbidden", 403)


class _TooLarge(Exception):
    pass


async def _content(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal stops it."""
    parser = argparse.ArgumentParser(
        prog="python -m fedspan.flower.proxy", description="A reverse proxy in front of a SuperLink."
    )
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--certificate", required=True, metavar="FILE")
    parser.add_argument("--key", required=True, metavar="FILE")
    parser.add_argument("--ca", required=True, type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    uvicorn.run(
        create(options.upstream, options.ca),
        host=options.host,
        port=options.port,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    main()
