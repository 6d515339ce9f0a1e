"""Access to Flower's HTTP interfaces on this machine for its own account alone, as the kernel names the callers.

Flower's control and runtime APIs have no user accounts. On the loopback that would let every account of the machine
start runs, and so run code, as the account that the SuperLink runs under. The interfaces are therefore served through
`GuardedUvicorn`, which takes the place of the module `uvicorn` in Flower's own commands.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedspan.flower import local_peers
from fedspan.support.errors import FedspanError

ANY_LOCAL_USER = "--any-local-user"
"""Option of our own commands that gives this up, for systems that do not tell their accounts apart."""
Exempt = Callable[[str], bool]
"""Path of a request, decoded as the router compares it -> everybody may call it."""
_USER = "fedspan_peer_user"
_log = logging.getLogger("flwr")


def never(path: str) -> bool:
    """Exempt no path."""
    return False


class OwnUserOnly:
    """Answers 403 to every request from another account, except for the paths that are exempt.

    Parameters
    ----------
    app
        The application, served with `identified` as uvicorn's protocol.
    """

    def __init__(self, app: ASGIApp, exempt: Exempt) -> None:
        self._app, self._exempt, self._allowed = app, exempt, local_peers.allowed_users()
        self._reported: set[int | None] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._exempt(scope["path"])):
            await self._app(scope, receive, send)
            return
        user = scope["state"].pop(_USER, None)
        if user in self._allowed:
            await self._app(scope, receive, send)
            return
        self._report(user)
        await PlainTextResponse("forbidden", 403, {"connection": "close"})(scope, receive, send)

    def _report(self, user: int | None) -> None:
        if user not in self._reported:  # once for each account, so that it cannot fill the log
            self._reported.add(user)
            who = "an unknown account" if user is None else f"the account with user id {user}"
            _log.warning("%s of this machine was refused: expected user id %s", who, sorted(self._allowed)[-1])


def identified(*arguments: Any, **keywords: Any) -> asyncio.Protocol:
    """Return uvicorn's own protocol for one connection, which adds the peer's user id to the state of each request."""
    protocol: Any = AutoHTTPProtocol(*arguments, **keywords)
    connected = protocol.connection_made

    def connection_made(transport: asyncio.Transport) -> None:
        # Now, when the other end has just sent something, rather than at a request: it may have closed by then.
        user = local_peers.peer_user(transport.get_extra_info("socket"))
        protocol.app_state = {**protocol.app_state, _USER: user}
        connected(transport)

    protocol.connection_made = connection_made
    made: asyncio.Protocol = protocol
    return made


class GuardedUvicorn:
    """A stand-in for the module `uvicorn` that serves an application to this account alone.

    Parameters
    ----------
    exempt
        Paths that everybody may call.
    any_local_user
        Let every account of this machine in, where the system does not tell them apart.
    wrap
        Wraps the application once more, outermost; by default it does not.
    """

    def __init__(
        self,
        exempt: Exempt = never,
        any_local_user: bool = False,
        wrap: Callable[[Any], ASGIApp] = lambda app: app,
    ) -> None:
        if not any_local_user:
            local_peers.check_support()
        self._exempt, self._any_local_user, self._wrap = exempt, any_local_user, wrap

    def Config(self, app: Any, **options: Any) -> uvicorn.Config:
        """Return uvicorn's configuration for the guarded application."""
        return uvicorn.Config(self._guarded(app), **options, **self._options())

    def run(self, app: Any, **options: Any) -> None:
        """Serve the guarded application until a signal stops it."""
        uvicorn.run(self._guarded(app), **options, **self._options())

    def _guarded(self, app: Any) -> ASGIApp:
        # FastAPI's attributes are used by `wrap`, so it comes first.
        inner = self._wrap(app)
        return inner if self._any_local_user else OwnUserOnly(inner, self._exempt)

    def _options(self) -> dict[str, Any]:
        # uvicorn believes X-Forwarded-For from the loopback unless it is told not to.
        return {"proxy_headers": False} | ({} if self._any_local_user else {"http": identified})

    def __getattr__(self, name: str) -> Any:
        return getattr(uvicorn, name)


def guard(module: Any, uvicorn: GuardedUvicorn, use: str) -> None:
    """Have one of Flower's modules serve through `uvicorn`.

    Parameters
    ----------
    use
        The text with which the module's source serves.

    Raises
    ------
    FedspanError
        When that module differs from the one of the versions that this was written for.
    """
    if not hasattr(module, "uvicorn") or inspect.getsource(module).count(use) != 1:
        raise FedspanError(f"{module.__name__} does not serve with {use}…): expected flwr>=1.41,<1.43")
    module.uvicorn = uvicorn
