"""`python -m fedspan.flower.proxy …`: the reverse proxy of a deployment where there is no nginx, with the same rules.

Of all that a SuperLink answers it passes on the calls of the fleet API, which are signed with a registered node's key.
The address of what is asked is written anew from the name of the call, so that no path leads anywhere else.
"""

from __future__ import annotations

import argparse
import re
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

MOST = 64 << 20
"""Bytes of one request; Flower sends large messages in pieces of 5 MiB."""
_CALL = re.compile(r"/v1/fleet/([a-z]+(?:-[a-z]+)*)")
# What concerns one connection and not the message (RFC 9110, 7.6.1).
_HOPS = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length"),
}
_SECONDS = 60.0


def create(upstream: str, ca: Path) -> Starlette:
    """The proxy as an ASGI application.

    Parameters
    ----------
    upstream
        HOST:PORT of the SuperLink, as its certificate names it.
    ca
        The certificate of the authority that vouches for the SuperLink.
    """
    trust = ssl.create_default_context(cafile=str(ca))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        # trust_env: a web proxy of the house is not on the way between two processes of one machine.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(verify=trust, timeout=_SECONDS, limits=limits, trust_env=False) as client:
            yield {"client": client}

    async def answer(request: Request) -> Response:
        # The path as it was sent: nothing is decoded or tidied up before it is judged.
        path = request.scope["raw_path"].decode("ascii", errors="replace")
        call = _CALL.fullmatch(path)
        if call is None or request.method != "POST":
            return _forbidden()
        try:
            content = await _content(request)
        except _TooLarge:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return Response(status_code=499)
        client: httpx.AsyncClient = request.state.client
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOPS]
        try:
            told = await client.post(f"https://{upstream}/v1/fleet/{call[1]}", content=content, headers=headers)
        except httpx.TimeoutException:
            return PlainTextResponse("the SuperLink is late", 504)
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink cannot be reached", 502)
        # httpx has undone a compression, if there was one.
        kept = {name: value for name, value in told.headers.items() if name not in {*_HOPS, "content-encoding"}}
        return Response(told.content, told.status_code, kept)

    async def otherwise(request: Request, error: Exception) -> Response:
        return _forbidden()

    return Starlette(
        routes=[Route("/{rest:path}", answer, methods=["POST"])],
        exception_handlers={404: otherwise, 405: otherwise},
        lifespan=lifespan,
    )


def _forbidden() -> Response:
    return PlainTextResponse("forbidden", 403)


class _TooLarge(Exception):
    pass


async def _content(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser(prog="python -m fedspan.flower.proxy", description="The proxy before a SuperLink.")
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
