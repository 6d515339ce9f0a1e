"""The root of the errors that a user can do something about, and errors as one line of text."""

from __future__ import annotations


class FedspanError(ValueError):
    """A mistake of the user or a refusal of the outside world, described in one line.

    The command prints the line and exits with status 2. Any other exception is a defect of this library; the command
    writes its traceback to a file and exits with status 1. It is a `ValueError`, so code that caught one still does.
    """


class NotResumable(FedspanError):
    """A failure of a run that resuming it would only repeat: something has to be set otherwise."""


def one_line(error: object, limit: int | None = None) -> str:
    """Return an error's text in one line of printable characters; where it has none, the name of its type.

    Control characters, marks that turn the direction of writing and lone surrogates are escaped: a text may come from
    outside, and must not move the cursor of the terminal that shows it, nor begin a line of its own in a log.

    Parameters
    ----------
    limit
        Largest number of characters; the rest is replaced by `…`. None: any number.
    """
    line = " ".join(str(error).split()) or type(error).__name__
    if limit is not None and len(line) > limit:
        line = line[: limit - 1] + "…"
    return line if line.isprintable() else "".join(map(_printable, line))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


_LONGEST = 300  # torch lists every backend that it has, over a thousand characters, in one line


def first_line(error: object) -> str:
    """Return the first line of a long-winded error, at most 300 characters; without a text, the name of its type."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 2]} …"
