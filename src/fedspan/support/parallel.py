"""An ordered map over modules, in a pool of threads whose kernels run on one core each.

Kernels of one thread each, side by side, beat kernels of many threads on the small matrices here, and their sums do
not depend on the machine: the result is the same, bit for bit, with any number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import torch

from fedspan.support.errors import FedspanError

T = TypeVar("T")
R = TypeVar("R")

_threads: ContextVar[int] = ContextVar("fedspan_threads", default=1)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let every `ordered_map` inside use this many threads; outside it uses 1.

    Raises
    ------
    FedspanError
        For less than one thread.
    """
    if number < 1:
        raise FedspanError(f"threads = {number}: expected at least 1")
    before = _threads.set(number)
    try:
        yield
    finally:
        _threads.reset(before)


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return [function(x) for x in items], computed on the threads that `threads` allows.

    PyTorch releases Python's lock inside a kernel, so threads are enough. Calls of `function` must not write to shared
    objects. A call inside a call runs on the thread that it is on.
    """
    work = list(items)
    workers = min(_threads.get(), len(work))
    with _one_core_kernels():
        if workers <= 1:
            return [function(item) for item in work]
        with ThreadPoolExecutor(workers, "fedspan", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, work))


@contextlib.contextmanager
def _one_core_kernels() -> Iterator[None]:
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
