"""Child processes that Ctrl-C reaches even when the tests themselves run with SIGINT ignored."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible_children() -> Iterator[None]:
    """Give SIGINT its default action in the processes that are started in this block.

    A shell starts a background job (`nohup make test &`) with SIGINT ignored, and its children inherit that. A signal
    with a handler is reset to its default action in a new program, whereas an ignored one stays ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
