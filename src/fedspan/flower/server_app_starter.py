"""`python -m fedspan.flower.server_app_starter ARGUMENTS`: Flower's `flower-superexec`, with tokens out of sight.

Flower's own starts a run's ServerApp with its token on the command line, which every account of the machine can read.
This one gives the token in a file without a name, which only the new process has open.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from fedspan.support.errors import FedspanError

_TOKEN = "--token"


class TokensInFiles:
    """A stand-in for the module `subprocess` in Flower's executor: `Popen` takes `--token` off the command line."""

    def Popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process."""
        place = list(command).index(_TOKEN)
        with tempfile.TemporaryFile() as file:
            file.write(command[place + 1].encode())
            file.seek(0)
            given = ["--token-file", f"/dev/fd/{file.fileno()}"]
            hidden = [*command[:place], *given, *command[place + 2 :]]
            return subprocess.Popen(hidden, pass_fds=[file.fileno()], **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def hide_tokens() -> None:
    """Install `TokensInFiles` in Flower's executor.

    Raises
    ------
    FedspanError
        When the executor differs from the one of the versions that this was written for.
    """
    executor = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    source = inspect.getsource(executor)
    if source.count("subprocess.Popen(") != 2 or f'"{_TOKEN}",\n' not in source:
        raise FedspanError("flwr's SuperExec passes tokens in another way: expected flwr>=1.41,<1.43")
    vars(executor)["subprocess"] = TokensInFiles()


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
        hide_tokens()
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
