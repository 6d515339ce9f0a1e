"""`python -m fedspan.flower.node [--poll SECONDS] [--any-local-user] ARGUMENTS`: Flower's `flower-supernode`, adapted.

Flower's SuperNode sleeps for 3 seconds whenever it finds no message, and polls for its ClientApp's answer every half
second. A round of secure sums takes about six messages, so those sleeps would be most of it. This command is Flower's
own with the intervals of `fedspan.flower.backoff` instead, and with uploads that outlast a broken connection
(`fedspan.flower.lasting_uploads`). Its runtime API answers this account alone (`fedspan.flower.access`). All other
arguments are Flower's.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Sequence
from typing import Any

from fedspan.flower import expiry, lasting_uploads
from fedspan.flower.access import ANY_LOCAL_USER, GuardedUvicorn, guard
from fedspan.flower.backoff import Backoff, shorten_pull_backoff
from fedspan.flower.site_clock import watch_clock
from fedspan.support.errors import FedspanError

POLL = 1.0
"""Longest time between two polls for messages, in seconds."""
_SOON = 0.15
"""Seconds between two polls after a message. Each is a request to the SuperLink, whose one process serves all sites
and takes some milliseconds for it."""


class ShortSleeps:
    """A stand-in for the module `time` in Flower's main loop: `sleep` is shorter, everything else is `time`'s.

    Parameters
    ----------
    longest
        Longest sleep in seconds.
    """

    def __init__(self, longest: float) -> None:
        self._message, self._answer = Backoff(longest, min(longest, _SOON)), Backoff(longest)
        self._answering = False

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`, or less."""
        # The loop asks for 3 s while there is no message, and for 0.5 s while there is no answer to one.
        answering = seconds < 1
        backoff = self._answer if answering else self._message
        if answering != self._answering:
            backoff.restart()
        self._answering = answering
        time.sleep(min(seconds, backoff.seconds()))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def shorten_sleeps(longest: float) -> None:
    """Install `ShortSleeps` in Flower's main loop.

    Raises
    ------
    FedspanError
        When that loop differs from the one of the versions that this was written for.
    """
    from flwr.supernode import start_client_internal as loop

    names = ("start_client_internal", "_push_messages")
    source = "".join(inspect.getsource(getattr(loop, name, ShortSleeps)) for name in names)
    if vars(loop).get("time") is not time or "time.sleep(3)" not in source or "time.sleep(0.5)" not in source:
        raise FedspanError("the main loop of flwr's SuperNode has no sleeps to shorten: expected flwr>=1.41,<1.43")
    vars(loop)["time"] = ShortSleeps(longest)
    shorten_pull_backoff()


def split_arguments(arguments: Sequence[str]) -> tuple[float, list[str]]:
    """Return our `--poll` (`POLL` if it is not given), and the arguments that are Flower's."""
    rest: list[str] = []
    text = str(POLL)
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--poll":
            text = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    try:
        return float(text), rest
    except ValueError:
        raise FedspanError(f"--poll {text!r}: expected a number of seconds") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the SuperNode until it is stopped by a signal."""
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    try:
        poll, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
        for line in expiry.check(expiry.given(rest, ("--root-certificates",))):
            sys.stderr.write(f"warning: {line}\n")
        shorten_sleeps(poll)
        lasting_uploads.install()
        watch_clock()
        guard(command, GuardedUvicorn(any_local_user=ANY_LOCAL_USER in rest), "uvicorn.Config(")
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv = ["flower-supernode", *(argument for argument in rest if argument != ANY_LOCAL_USER)]
    command.flower_supernode()


if __name__ == "__main__":
    main()
