"""The root of the errors that a user can do something about, and errors as one line of text."""

from __future__ import annotations


class FedspanError(ValueError):
    """A mistake of the user or a refusal of the outside world, described in one line.

    The command prints the line and exits with status 2. Any other exception is a defect of this library; the command
    writes its traceback to a file and exits with status 1. It is a `ValueError`, so code that caught one still does.
    """


def one_line(error: object) -> str:
    """Return an error's text in one line; where it has none, the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: object) -> str:
    """Return the first line of a long-winded error; where it has no text, the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
