"""A health page and metrics for Prometheus about a deployment, a server or a site, on the loopback.

    python -m fedspan.flower.health FOLDER --port PORT [--parent PID]

It is a process of its own, which reads the folder's logs and certificates and can neither change nor delay anything.
`/` is for people, `/health` answers 200 or 503 with JSON, `/metrics` is for Prometheus.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedspan.flower import prometheus
from fedspan.flower.status import Status
from fedspan.support.errors import FedspanError, one_line

_HOSTS = ("localhost", "127.0.0.1")
_TEXT = "text/plain; charset=utf-8"
_LOOK = 1.0
"""Seconds between two looks at the parent process."""


class HealthServer(ThreadingHTTPServer):
    """Serves the state of a folder to this machine.

    Raises
    ------
    FedspanError
        When the folder holds nothing to watch, or the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.status, self.lock = Status(folder), threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise FedspanError(f"port {port} cannot be used: {one_line(error)}") from None

    def page(self, path: str) -> tuple[int, str, str] | None:
        """Return the status, type and content of an answer; None where there is no such page."""
        with self.lock:
            try:
                self.status.update()
            except FedspanError as error:
                return 503, _TEXT, f"{error}\n"
            if path == "/":
                return 200, _TEXT, "".join(f"{line}\n" for line in self.status.lines())
            if path == "/health":
                state = self.status.as_json()
                return (200 if state["healthy"] else 503), "application/json", json.dumps(state, indent=2) + "\n"
            return (200, prometheus.CONTENT_TYPE, prometheus.metrics(self.status)) if path == "/metrics" else None


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    timeout = 10

    def do_GET(self) -> None:
        # A page of another origin whose name leads here must not read this one.
        if self.headers.get("host", "").rpartition(":")[0] not in _HOSTS:
            self._send(403, _TEXT, "forbidden\n")
            return
        page = self.server.page(self.path)
        self._send(*((404, _TEXT, "expected /, /health or /metrics\n") if page is None else page))

    def _send(self, code: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line for every scrape would bury everything else."""


def end_with(parent: int) -> None:
    """End this process when its parent, of this process id, has ended; at once where it has ended already."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal stops it, or its parent ends where `--parent` names it."""
    parser = argparse.ArgumentParser(prog="python -m fedspan.flower.health", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a deployment, a server or a site")
    parser.add_argument("--port", required=True, type=int)
    # The id, since a parent that has ended before this line is reached could not be told from another.
    parser.add_argument("--parent", type=int, metavar="PID", help="of the parent process, with which this one ends")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with(options.parent)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        server = HealthServer(options.folder, options.port)
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
