"""Errors at the command: one line for what a user can mend, a report for a bug of ours."""

from __future__ import annotations

import difflib
import os
import platform
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from fedspan.support.errors import FedspanError, one_line
from fedspan.support.versions import installed_version

# Newer versions of typer bundle the click they build on: its errors are reached through typer alone.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
_REPORT = "traceback.txt"
_LONGEST = 900  # characters


class Interrupted(Exception):
    """Ctrl-C, with the message for the user."""


class Bug(Exception):
    """An unexpected error, its cause, in a run whose folder is `folder`."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder


def is_users(error: Exception) -> bool:
    """Return whether the user or the outside world is at fault, and not this program."""
    # Pydantic's error is a ValueError of another library, recognised by its name so that it is not imported here.
    return isinstance(error, (FedspanError, OSError)) or type(error).__name__ == "ValidationError"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a GPU's memory is full."""
    # Torch's own subclass of RuntimeError, recognised by its name so that torch is not imported here.
    return type(error).__name__ == "OutOfMemoryError"


def message(error: BaseException) -> str:
    """Return an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _shortened(one_line(error))


def _shortened(line: str) -> str:
    """Return the line without its middle where it is no line to read, such as one that quotes a whole file."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 3 :]}"


def usage(error: Exception) -> str:
    """Return a mistake in the command line in one line, with the help to read."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoSuchOption" and context is not None:
        text = _unknown_option(str(getattr(error, "option_name", "")), context)
    else:
        text = _shortened(one_line(getattr(error, "format_message", lambda: error)())).rstrip(".")
    command = context.command_path if context is not None else "fedspan"
    return f"{text[:1].lower()}{text[1:]}; see `{command} --help`"


def _unknown_option(name: str, context: Any) -> str:
    """Return the mistake of an option that a command does not have, with the one that was meant, if any is near.

    Versions of click differ in what they suggest, and some name the letters that two options share.
    """
    if name == "--set" and context.info_name == "resume":
        return "no such option '--set': a run goes on with the settings that it has, and --rounds extends it"
    own = sorted({option for parameter in context.command.params for option in parameter.opts if option[:2] == "--"})
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.7)
    return f"no such option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def report(error: BaseException, folder: Path | None) -> str:
    """Write the traceback of a bug to a file and return the line that says so.

    Parameters
    ----------
    folder
        The run's folder, where the file goes; None, or no folder: the directory of temporary files.
    """
    what = f"internal error, a bug in fedspan: {type(error).__name__}: {message(error)}"
    try:
        path = _write(error, folder)
    except OSError:  # a full disk must not hide the error
        traceback.print_exception(error)
        return f"{what}; please report it with the traceback above"
    return f"{what}; please report it with the traceback in {path}"


def _write(error: BaseException, folder: Path | None) -> Path:
    versions = f"fedspan {installed_version('fedspan')}, Python {platform.python_version()}"
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {versions}",
        f"command: {' '.join(sys.argv)}",
        *traceback.format_exception(error),
    ]
    if folder is not None and folder.is_dir():
        path = folder / _REPORT
        # A run may fail, be resumed and fail again: the first report is kept.
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        return path
    # A new file of an unpredictable name: the directory is shared with other users.
    descriptor, name = tempfile.mkstemp(prefix="fedspan-", suffix=f"-{_REPORT}")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return Path(name)
