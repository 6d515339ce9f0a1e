"""`python -m fedspan.flower.node [--poll SECONDS] ARGUMENTS`: Flower's `flower-supernode` with a shorter poll.

Flower's SuperNode sleeps for 3 seconds whenever it found no message, and looks for its ClientApp's answer every half
a second. A round of secure sums is about six messages long, so those naps would be most of it. This command is
Flower's own with the naps of `fedspan.flower.backoff` in their place; all other arguments are Flower's.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Sequence
from typing import Any

from fedspan.flower.backoff import Backoff, quicken
from fedspan.support.errors import FedspanError

POLL = 1.0
"""Seconds between two looks for messages at most."""
_SOON = 0.15
"""Seconds between two looks after a message: each is a request to the SuperLink, which has one process for all sites
and takes some milliseconds for it."""


class Naps:
    """What Flower's main loop takes for the module `time`: the naps it asks for are shortened, the rest is `time`'s.

    Parameters
    ----------
    most
        Seconds of the longest nap.
    """

    def __init__(self, most: float) -> None:
        self._message, self._answer, self._answering = Backoff(most, min(most, _SOON)), Backoff(most), False

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`, or less."""
        # The loop asks for 3 s while there is no message, and for 0.5 s while there is no answer to one.
        answering = seconds < 1
        pace = self._answer if answering else self._message
        if answering != self._answering:
            pace.restart()
        self._answering = answering
        time.sleep(min(seconds, pace.seconds()))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def shorten(most: float) -> None:
    """Put `Naps` into Flower's main loop.

    Raises
    ------
    RuntimeError
        When that loop does not look as in the versions that this was written for.
    """
    from flwr.supernode import start_client_internal as loop

    asked = "".join(inspect.getsource(getattr(loop, n, Naps)) for n in ("start_client_internal", "_push_messages"))
    if vars(loop).get("time") is not time or "time.sleep(3)" not in asked or "time.sleep(0.5)" not in asked:
        raise RuntimeError("the main loop of flwr's SuperNode has no naps to shorten: expected flwr>=1.41,<1.43")
    vars(loop)["time"] = Naps(most)
    quicken()


def own_arguments(arguments: Sequence[str]) -> tuple[float, list[str]]:
    """Our `--poll` (`POLL` unless given), and the arguments that are Flower's."""
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
    """Run the SuperNode until it is told to end."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    try:
        poll, rest = own_arguments(sys.argv[1:] if arguments is None else arguments)
        shorten(poll)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()


if __name__ == "__main__":
    main()
