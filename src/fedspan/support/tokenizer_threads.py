"""The cores that tokenizers use: all of them for the data, one where processes are forked.

A tokenizer that has used several cores warns in every process that is forked later, unless the environment says whether
it may use them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_VARIABLE = "TOKENIZERS_PARALLELISM"
_ours: int | None = None
"""The process that `one_core` set the variable in; None: it did not."""


def one_core() -> None:
    """Have tokenizers use one core from here on, outside `all_cores`; a value that the user has set stays."""
    global _ours
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE], _ours = "false", os.getpid()


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Have tokenizers use all cores inside, which changes no token; a value that the user has set stays."""
    if os.getpid() != _ours:  # a process that was forked has lost the threads of its tokenizers
        yield
        return
    with _set("true"):
        yield


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Have tokenizers use one core in every process that is forked inside, without a warning."""
    with _set("false"):
        yield


@contextlib.contextmanager
def _set(value: str) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
