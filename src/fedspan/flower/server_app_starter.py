"""`python -m fedspan.flower.server_app_starter ARGUMENTS`: Flower's `flower-superexec`, with two things changed.

Flower's own starts a run's ServerApp with its token on the command line, which every account of the machine can read.
This one gives the token in a file without a name, which only the new process has open.

Flower takes a ServerApp that has not spoken for 30 s after its start for dead, and starts another one; the token of the
first is then void, but the process stays. On a machine so slow that a start takes longer (a full disk cache, a network
drive, many runs), every new process slows the others down, and none ever comes through. This one therefore speaks for
a process in the first 15 minutes of its life; one that hangs as it starts is not replaced before.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fedspan.flower.runtime import Runtime
from fedspan.support.errors import FedspanError

_TOKEN, _ADDRESS, _CERTIFICATES = "--token", "--runtime-api-address", "--root-certificates"
HEARTBEAT = 10.0
"""Seconds between two heartbeats for a process that is starting; Flower waits 30 s for the first."""
STARTING = 900.0
"""Seconds after its start from which on a process has to speak for itself."""


class Starter:
    """A stand-in for the module `subprocess` in Flower's executor: `Popen` takes `--token` off the command line, and
    sends heartbeats for the new process."""

    def Popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process."""
        place = list(command).index(_TOKEN)
        with tempfile.TemporaryFile() as file:
            file.write(command[place + 1].encode())
            file.seek(0)
            given = ["--token-file", f"/dev/fd/{file.fileno()}"]
            hidden = [*command[:place], *given, *command[place + 2 :]]
            process = subprocess.Popen(hidden, pass_fds=[file.fileno()], **options)
        threading.Thread(target=_speak_for, args=(process, command), daemon=True).start()
        return process

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def _speak_for(process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    """Send heartbeats for a process until it has ended, or has had the time to start."""
    words = dict(itertools.pairwise(command))
    runtime = Runtime(words[_ADDRESS], words.get(_CERTIFICATES))
    try:
        runtime.take_over(words[_TOKEN])
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(HEARTBEAT)
                return
            runtime.heartbeat()
    finally:
        runtime.close()


def replace_popen() -> None:
    """Install `Starter` in Flower's executor.

    Raises
    ------
    FedspanError
        When the executor differs from the one of the versions that this was written for.
    """
    executor = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    source = inspect.getsource(executor)
    if source.count("subprocess.Popen(") != 2 or f'"{_TOKEN}",\n' not in source:
        raise FedspanError("flwr's SuperExec passes tokens in another way: expected flwr>=1.41,<1.43")
    vars(executor)["subprocess"] = Starter()


def take_place() -> None:
    """Have Flower's SuperLink start this module in the place of `flower-superexec`.

    Raises
    ------
    FedspanError
        When the SuperLink differs from the one of the versions that this was written for.
    """
    superlink = importlib.import_module("flwr.superlink.cli.flower_superlink")
    own: Any = getattr(superlink, "_get_superexec_command", None)
    if own is None or 'command = ["flower-superexec"]' not in inspect.getsource(own):
        raise FedspanError("flwr's SuperLink starts no flower-superexec: expected flwr>=1.41,<1.43")

    def command(*arguments: Any, **keywords: Any) -> list[str]:
        return [sys.executable, "-m", "fedspan.flower.server_app_starter", *own(*arguments, **keywords)[1:]]

    vars(superlink)["_get_superexec_command"] = command


def main() -> None:
    """Run Flower's SuperExec until it is stopped by a signal."""
    from flwr.supercore.cli.flower_superexec import flower_superexec

    try:
        replace_popen()
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
