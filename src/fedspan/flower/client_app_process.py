"""A site's ClientApp, kept loaded between messages.

    python -m fedspan.flower.client_app_process --runtime-api-address HOST:PORT --site FOLDER

It takes the place of Flower's `flower-superexec` beside a SuperNode that runs with `--isolation process`. Flower's own
starts a Python process for every message, which costs seconds; this one asks the SuperNode for a task, hands its
message to the site's worker, and pushes the answer back, over and over, in one process that imports no torch.

What it runs is the `fedspan` that is installed at the site. The bundle that comes with a run is neither installed nor
imported, on purpose: whoever controls the SuperLink (its control interface knows no users) can thus have a site train
and answer, within what the worker validates, but cannot have it run code of theirs.

A SuperNode handles one message at a time and waits for its answer for ever, so a failure is always answered: by a
refusal, or, where not even that gets through, by letting the task expire, which the SuperNode notices within a minute.
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
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supercore.auth import load_superexec_auth_secret

from fedspan.flower.backoff import Backoff
from fedspan.flower.client_app import client_app, refusal
from fedspan.flower.runtime import Lost, Runtime
from fedspan.flower.worker_supervisor import WorkerSupervisor
from fedspan.support.errors import FedspanError

POLL = 0.1
"""Seconds between two looks for a task at most."""
BEAT = 10.0
"""Seconds between two signs of life; a SuperNode gives a task up after 30 to 60 without one."""
_RETRY = 2.0

_log = logging.getLogger("fedspan.flower")


class Executor:
    """The loop: acquire, pull, answer, push."""

    def __init__(self, runtime: Runtime, app: ClientApp, poll: float = POLL) -> None:
        self._runtime, self._app, self._pace = runtime, app, Backoff(poll, poll / 2)
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def run(self, keeper: WorkerSupervisor) -> None:
        """Until the process is told to end. No task's failure ends it, nor does a SuperNode that is away."""
        self._beating.start()
        away = False
        while not self._ended.is_set():
            keeper.ensure()
            try:
                acquired = self._runtime.acquire()
            except Lost as error:
                if not away:
                    _log.warning("the SuperNode cannot be reached, waiting for it: %s", error)
                away = True
                time.sleep(_RETRY)
                continue
            away = False
            if not acquired:
                time.sleep(self._pace.seconds())
                continue
            self.handle()
            self._pace.restart()

    def handle(self) -> None:
        """Answer the task in hand."""
        try:
            message, context = self._runtime.pull()
        except Exception as error:
            # Without the message there is nothing to reply to; the task is left to expire.
            _log.error("a task's message could not be pulled: %s", error)
            return
        try:
            reply = self._app(message, context)
        except BaseException as error:
            if not isinstance(error, Exception):  # told to end in the middle: the server need not wait for nothing
                self._runtime.hurry()
                with suppress(Exception):
                    self._runtime.push(refusal(message, "the site is being shut down"), context)
                raise
            _log.error("a message could not be answered: %s", error)
            reply = refusal(message, error)
        for attempt in (reply, refusal(message, "the answer could not be handed to the SuperNode")):
            try:
                self._runtime.push(attempt, context)
                return
            except Exception as error:
                _log.error("an answer could not be pushed: %s", error)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._runtime.beat()

    def stop(self) -> None:
        """No more tasks."""
        self._ended.set()


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fedspan.flower.client_app_process", description="A site's warm ClientApp."
    )
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT", help="of the site's SuperNode")
    parser.add_argument("--site", required=True, type=Path, metavar="FOLDER", help="the site's folder")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds of one answer at most")
    parser.add_argument("--poll", type=float, default=POLL, help="seconds between two looks for a task at most")
    parser.add_argument("--root-certificates", metavar="FILE", help="where the SuperNode's runtime API has TLS")
    parser.add_argument(
        "--superexec-auth-secret-file", metavar="FILE", help="as given to the SuperNode; keeps other users' hands off"
    )
    return parser.parse_args(given)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None, command: Sequence[str] | None = None) -> None:
    """Run until SIGTERM or SIGINT.

    Parameters
    ----------
    command
        What to run as the worker instead of `fedspan.site.worker`.
    """
    options: Any = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s executor: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every look would bury the rest
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        if not options.site.is_dir():
            raise FedspanError(f"--site {options.site}: expected a site's folder")
        secret = load_superexec_auth_secret(options.superexec_auth_secret_file)
        keeper = WorkerSupervisor(options.site, command)
        runtime = Runtime(options.runtime_api_address, options.root_certificates, secret)
        executor = Executor(runtime, client_app(keeper.call, options.site, options.deadline), options.poll)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    with ExitStack() as stack:
        stack.callback(runtime.close)
        stack.callback(keeper.stop)
        stack.callback(executor.stop)
        executor.run(keeper)


if __name__ == "__main__":
    main(sys.argv[1:])
