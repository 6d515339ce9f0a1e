"""The names that come from outside: of clients, runs and sessions, which become keys and folders, and of tensors."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, Strict

from fedspan.support.errors import FedspanError, one_line

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
# ASCII written out, not \w: letters and digits of other scripts look like these and are other names.
Name = Annotated[str, Strict(), Field(pattern=rf"\A{_NAME}\z")]
"""A client id, a run, or a session: letters, digits, `.`, `_`, `-`, at most 64 and no `.` or `-` in front, so that no
path, hidden file or option can be made of it."""
TensorName = Annotated[str, Strict(), Field(pattern=r"\A[!-~]([ -~]{0,510}[!-~])?\z")]
"""A module, a weight, or one part of it: printable ASCII, at most 512. It is a key, never a path."""


def is_name(value: object) -> bool:
    """Return whether a value is a `Name`."""
    return isinstance(value, str) and re.fullmatch(_NAME, value) is not None


def check_name(value: object, what: str) -> str:
    """Return a name that may become a key or a folder.

    Parameters
    ----------
    what
        The kind of name, for the error.

    Raises
    ------
    FedspanError
        When it is not a `Name`.
    """
    if isinstance(value, str) and is_name(value):
        return value
    shown = one_line(repr(value), 100)
    raise FedspanError(
        f"{what} = {shown}: expected at most 64 of the letters a to z, digits, '.', '_' and '-'; first no '.' or '-'"
    )
