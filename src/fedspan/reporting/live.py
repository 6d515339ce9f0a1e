"""The report of runs that go on, served to a browser on this machine and made anew when the folders change.

Only the loopback address is bound. A page of another site that a browser has open could still reach it by a name that
it has resolved anew (DNS rebinding), so requests for any other host than this one are refused; other users of the
machine could too, so the address holds a secret path.
"""

from __future__ import annotations

import html
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedspan.reporting.page import render
from fedspan.reporting.records import Words, read
from fedspan.support.errors import FedspanError, one_line

_HOST = "127.0.0.1"
_LOOK = 0.5
"""Seconds between two looks at the folders."""
_BEAT = 15.0
"""Seconds after which a quiet stream gets a comment, by which a browser that has left is noticed."""
_MOST_STREAMS = 32
_WATCHED = ("config.toml", "metrics.jsonl", "summary.json", ".running")
_OF_SUITE = ("comparison.json", "runs.jsonl", "suite.toml")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(slots=True)
class Live:
    """A server of one page; `serve` creates it, and `run` answers until the process is interrupted."""

    folders: Sequence[Path]
    words: Words
    server: ThreadingHTTPServer
    token: str
    stopped: threading.Event = field(default_factory=threading.Event)
    streams: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_MOST_STREAMS))

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{_HOST}:{self.server.server_address[1]}/{self.token}/"

    def run(self) -> None:
        """Answer requests until `stop`, or until the process is interrupted."""
        try:
            self.server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass  # the usual end
        finally:
            self.close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self.stopped.set()
        self.server.shutdown()

    def close(self) -> None:
        """End the streams and free the port."""
        self.stopped.set()
        self.server.server_close()

    def is_here(self, host: str | None) -> bool:
        """Return whether a request's `Host` is this server."""
        port = self.server.server_address[1]
        return host in {f"{_HOST}:{port}", f"localhost:{port}"}

    def page(self) -> tuple[HTTPStatus, str]:
        """Return the page as it is now; where the folders cannot be read, one that says so."""
        try:
            return HTTPStatus.OK, render(read(self.folders), self.words, live=True)
        except FedspanError as error:
            line = html.escape(one_line(error, 500))
            return HTTPStatus.SERVICE_UNAVAILABLE, f"<!DOCTYPE html><title>fedspan</title><p>{line}</p>"

    def version(self) -> tuple[Any, ...]:
        """Return the state of the files that the page is made of."""
        files = [folder / name for folder in self.folders for name in (*_WATCHED, *_OF_SUITE)]
        files += [
            path / name
            for folder in self.folders
            if (folder / "suite.toml").exists()
            for path in sorted(folder.glob("runs/*/*/seed-*"))
            for name in _WATCHED
        ]
        return tuple(_state(file) for file in files)


def serve(folders: Sequence[Path], words: Words, port: int = 0) -> Live:
    """Return a server of the report of these folders, bound to the loopback address.

    Parameters
    ----------
    words
        As of `fedspan.reporting.render`.
    port
        0: any that is free.

    Raises
    ------
    FedspanError
        When a folder holds no run, matplotlib is missing, or the port is not free.
    """
    render(read(folders), words, live=True)  # which refuses what is no run, before anything listens
    try:
        server = _Server((_HOST, port), _Handler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise FedspanError(f"--port {port} of {_HOST} cannot be served ({why}): expected a free port, or 0") from None
    live = Live(folders, words, server, secrets.token_urlsafe(16))
    server.live = live
    return live


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _Server(ThreadingHTTPServer):
    """A server whose threads end with the process, and which says nothing about browsers that have left."""

    daemon_threads = True
    block_on_close = False
    live: Live
    """The pages that it serves, set when both are there."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a defect of ours; a connection that the other side has cut is none."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one browser: the page, and the stream of its changes."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedspan", ""
    timeout = 30  # seconds for a request to arrive
    server: _Server

    def do_GET(self) -> None:
        """Answer with the page or the stream; any other path, and any other host, is refused."""
        live = self.server.live
        if not live.is_here(self.headers.get("Host")):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "this is not the host of the request\n", "text/plain")
            return
        path = self.path.partition("?")[0].encode()
        if secrets.compare_digest(path, f"/{live.token}/".encode()):
            status, page = live.page()
            self._answer(status, page, "text/html")
        elif secrets.compare_digest(path, f"/{live.token}/events".encode()):
            self._stream(live)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "no such page: expected the whole address\n", "text/plain")

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the address holds the secret path."""

    def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
        body = text.encode()
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str, length: int | None) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()

    def _stream(self, live: Live) -> None:
        if not live.streams.acquire(blocking=False):
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open\n", "text/plain")
            return
        try:
            self._begin(HTTPStatus.OK, "text/event-stream", None)
            self._write_changes(live)
        except OSError:
            pass  # the browser has left
        finally:
            live.streams.release()

    def _write_changes(self, live: Live) -> None:
        # A page that was made before the stream began may be behind by then, so the first event comes at once.
        shown: tuple[Any, ...] | None = None
        said = time.monotonic()
        while not live.stopped.is_set():
            now = live.version()
            if now != shown:
                shown, said = now, time.monotonic()
                self.wfile.write(b"event: change\ndata: 1\n\n")
            elif time.monotonic() - said > _BEAT:
                said = time.monotonic()
                self.wfile.write(b": still here\n\n")
            self.wfile.flush()
            live.stopped.wait(_LOOK)
