"""A site's ClientApp, kept loaded between messages.

    python -m fedspan.flower.client_app_process --runtime-api-address HOST:PORT --site FOLDER

It takes the place of Flower's `flower-superexec` beside a SuperNode that runs with `--isolation process`. Flower's own
starts a Python process for every message, which costs seconds; this one asks the SuperNode for a task, passes its
message to the site's worker and pushes the answer back, in a loop, in one process that imports no torch.

It runs the `fedspan` that is installed at the site. The code bundle of a run is deliberately neither installed nor
imported: anyone who controls the SuperLink (its control API has no user accounts) can thus make a site train and
answer, within what the worker validates, but cannot make it run their code.

A SuperNode handles one message at a time and waits for its answer for ever, so a failure is always answered: with a
refusal or, if not even that gets through, by letting the task expire, which the SuperNode notices within a minute.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from flwr.clientapp import ClientApp
from flwr.supercore.auth import load_superexec_auth_secret

from fedspan.flower.backoff import Backoff
from fedspan.flower.client_app import client_app, refusal
from fedspan.flower.runtime import Runtime, SuperNodeLost
from fedspan.flower.worker_supervisor import WorkerSupervisor
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import unix_socket
from fedspan.wire.refusals import Code

POLL = 0.1
"""Longest time between two polls for a task, in seconds."""
HEARTBEAT = 10.0
"""Seconds between two heartbeats; a SuperNode gives up a task after 30 to 60 seconds without one."""
_RETRY = 2.0

_log = logging.getLogger("fedspan.flower")


class Supervisor(Protocol):
    """Holder of the process that answers: `WorkerSupervisor`, or nothing where that process is another's."""

    def ensure(self) -> bool:
        """Start the process unless it runs; return whether it runs."""

    def call(self, folder: Path, content: bytes, timeout: float) -> bytes:
        """Return the process's answer."""

    def stop(self) -> None:
        """End the process."""


class RegionProcess:
    """The server of a region, which `serve.sh` has started and which listens in the folder of its way up."""

    def ensure(self) -> bool:
        """Return that there is nothing to start."""
        return True

    def call(self, folder: Path, content: bytes, timeout: float) -> bytes:
        """Return the server's answer; a `CallFailed` where it does not listen."""
        return unix_socket.call(folder, content, timeout)

    def stop(self) -> None:
        """Leave it alone."""


class TaskLoop:
    """The loop over tasks: acquire, pull, answer, push."""

    def __init__(self, runtime: Runtime, app: ClientApp, poll: float = POLL) -> None:
        self._runtime, self._app, self._backoff = runtime, app, Backoff(poll, poll / 2)
        self._stopped = threading.Event()
        self._heartbeats = threading.Thread(target=self._send_heartbeats, daemon=True)

    def run(self, supervisor: Supervisor) -> None:
        """Handle tasks until `stop`. Neither a failing task nor an unreachable SuperNode ends the loop."""
        self._heartbeats.start()
        away = False
        while not self._stopped.is_set():
            supervisor.ensure()
            try:
                acquired = self._runtime.acquire()
            except SuperNodeLost as error:
                if not away:
                    _log.warning("the SuperNode cannot be reached, waiting for it: %s", error)
                away = True
                time.sleep(_RETRY)
                continue
            away = False
            if not acquired:
                time.sleep(self._backoff.seconds())
                continue
            self.handle()
            self._backoff.restart()

    def handle(self) -> None:
        """Answer the current task."""
        try:
            message, context = self._runtime.pull()
        except Exception as error:
            # Without the message there is nothing to reply to; the task is left to expire.
            _log.error("a task's message could not be pulled: %s", one_line(error))
            return
        try:
            reply = self._app(message, context)
        except BaseException as error:
            if not isinstance(error, Exception):
                # A signal ends this process: with this answer the server need not wait until its deadline.
                self._runtime.stop_retrying()
                with suppress(Exception):
                    self._runtime.push(refusal(message, Code.ENDING, "the site is being shut down"), context)
                raise
            reply = refusal(message, Code.UNREADABLE, error)
        try:
            self._runtime.push(reply, context)
        except Exception as error:
            try:
                self._runtime.push(refusal(message, Code.NOT_PASSED_ON, error), context)
            except Exception as again:
                _log.error("an answer could not be pushed: %s", one_line(again))

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT):
            self._runtime.heartbeat()

    def stop(self) -> None:
        """End the loop after the current task."""
        self._stopped.set()


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fedspan.flower.client_app_process",
        description="A site's ClientApp, kept loaded between messages.",
    )
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT", help="of the site's SuperNode")
    parser.add_argument("--site", required=True, type=Path, metavar="FOLDER", help="the site's folder")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="longest time for one answer in seconds")
    parser.add_argument("--poll", type=float, default=POLL, help="longest time between two polls for a task in seconds")
    parser.add_argument("--root-certificates", metavar="FILE", help="if the SuperNode's runtime API has TLS")
    parser.add_argument(
        "--superexec-auth-secret-file", metavar="FILE", help="the SuperNode's secret, which other users cannot read"
    )
    parser.add_argument(
        "--region", action="store_true", help="answers come from a region's server, which is started by its own script"
    )
    return parser.parse_args(given)


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None, command: Sequence[str] | None = None) -> None:
    """Run until SIGTERM or SIGINT.

    Parameters
    ----------
    command
        Command to run as the worker instead of `fedspan.site.worker`.
    """
    options: Any = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s client app: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per poll would bury everything else
    for number in (signal.SIGTERM, signal.SIGINT):
        # A shell starts background jobs, such as this one in start.sh, with SIGINT ignored; that is kept.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    try:
        if not options.site.is_dir():
            raise FedspanError(f"--site {options.site}: expected a site's folder")
        secret = load_superexec_auth_secret(options.superexec_auth_secret_file)
        supervisor: Supervisor = RegionProcess() if options.region else WorkerSupervisor(options.site, command)
        runtime = Runtime(options.runtime_api_address, options.root_certificates, secret)
        loop = TaskLoop(runtime, client_app(supervisor.call, options.site, options.deadline), options.poll)
    except (ValueError, OSError) as error:  # ValueError: Flower's, for an unusable address or secret
        raise SystemExit(f"error: {error}") from None
    with ExitStack() as stack:
        stack.callback(runtime.close)
        stack.callback(supervisor.stop)
        stack.callback(loop.stop)
        loop.run(supervisor)


if __name__ == "__main__":
    main(sys.argv[1:])
