"""A few processes that answer one message at a time, and none of which outlives the run."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import torch
import torch.multiprocessing as mp  # which teaches spawn to hand tensors over in shared memory
from torch import Tensor

from fedspan.support.errors import FedspanError
from fedspan.wire import packing

Message = tuple[Any, Sequence[Tensor]]
"""A JSON-able description, and the tensors that it names by number."""
Answer = Callable[[Any, list[Tensor]], Message]
"""What a process makes of a message."""
Task = Callable[[set[int]], Message]
"""The message of one task, made when it is sent. It is given what was noted about the process that gets it, nothing
at first: a task can leave out what an earlier one has brought there, and note what it brings."""

_PATIENCE = 5.0
"""Seconds that a process has to end after it was told to, before it is killed."""


class ProcessLost(FedspanError):
    """A process ended without having been told to."""


@dataclass(slots=True)
class _Worker:
    process: Any
    channel: Any
    notes: set[int] = field(default_factory=set)
    task: int | None = None


@dataclass(slots=True)
class Processes:
    """`make(*arguments)` of each is called in a process of its own and answers what that process is sent.

    Nothing is started before the first task. However a run ends (by itself, an error, Ctrl-C, or the death of the
    process that started these), `close` or the operating system ends them all.
    """

    make: Callable[..., Answer]
    arguments: Sequence[tuple[Any, ...]]
    method: str
    """`fork`: everything in memory is there at once, shared until it is written. `spawn`: a new interpreter, to which
    tensors go through shared memory."""
    _workers: list[_Worker] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """The answers to all tasks, with the tasks' numbers, as they come in. Tasks are begun in their order.

        Raises
        ------
        ProcessLost
            When a process was killed.
        Exception
            What a task raised, where its class is a common one; otherwise a RuntimeError that names it.
        """
        if any(worker.task is not None for worker in self._workers):
            self.close()  # whoever was given the answers before took only some of them
        self.start()
        workers, waiting = self._workers, deque(range(len(tasks)))
        try:
            for worker in workers:
                self._give(worker, waiting, tasks)
            while busy := {worker.channel: worker for worker in workers if worker.task is not None}:
                # A channel is ready when its process died, too.
                for channel in connection.wait(list(busy)):
                    task, message, tensors = self._take(busy[channel])
                    self._give(busy[channel], waiting, tasks)
                    yield task, message, tensors
        except BaseException:
            if workers is self._workers:
                self.close()
            raise

    def close(self) -> None:
        """End all processes; they can be started again."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.channel.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()

    def pids(self) -> list[int]:
        """The operating system's numbers of the processes that run."""
        return [worker.process.pid for worker in self._workers]

    def start(self) -> None:
        """Start the processes, where they do not run yet."""
        if self._workers:
            return
        context: Any = mp.get_context(self.method)
        with _forking():
            for number, given in enumerate(self.arguments):
                near, far = context.Pipe()
                mine = [near, *(w.channel for w in self._workers)] if self.method == "fork" else []
                process = context.Process(
                    target=_serve, args=(far, mine, self.make, given), name=f"fedspan-{number}", daemon=True
                )
                process.start()
                far.close()
                self._workers.append(_Worker(process, near))

    def _give(self, worker: _Worker, waiting: deque[int], tasks: Sequence[Task]) -> None:
        """The next task to this process, if there is one left."""
        worker.task = waiting.popleft() if waiting else None
        if worker.task is None:
            return
        message, tensors = tasks[worker.task](worker.notes)
        try:
            packing.send(worker.channel, message, tensors)
        except OSError:
            raise self._lost(worker) from None

    def _take(self, worker: _Worker) -> tuple[int, Any, list[Tensor]]:
        assert worker.task is not None
        try:
            reply, tensors = packing.receive(worker.channel)
        except (EOFError, OSError):
            raise self._lost(worker) from None
        if "error" in reply:
            raise _raised(reply["error"])
        return worker.task, reply["answer"], tensors

    def _lost(self, worker: _Worker) -> ProcessLost:
        worker.process.join(_PATIENCE)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        hint = "; was there too little memory? fewer engine.workers need less" if code == -signal.SIGKILL else ""
        return ProcessLost(f"worker process {worker.process.pid} ended unexpectedly ({how}){hint}")


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """What keeps a fork quiet and small."""
    header = os.environ.get("TOKENIZERS_PARALLELISM")
    # Otherwise the tokenizers' own threads are warned about in every child.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # a child's garbage collector would touch, and so copy, every page of the parent's objects
    try:
        with warnings.catch_warnings():
            # A display's thread runs beside us; a child never uses what it holds.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        gc.unfreeze()
        if header is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = header


def _serve(channel: Any, others: Sequence[Any], make: Callable[..., Answer], given: tuple[Any, ...]) -> None:
    """A process's whole life: answer until the channel closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()  # or the others would not see that the process that started us is gone
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        answer: Answer | None = None
        while True:
            message, tensors = packing.receive(channel)
            try:
                answer = answer or make(*given)
                found, out = answer(message, tensors)
                reply: dict[str, Any] = {"answer": found}
            except Exception as error:
                reply, out = {"error": _told(error)}, ()
            packing.send(channel, reply, out)
    except (EOFError, OSError):
        return  # the channel is closed, or whoever held its other end is gone


def _die_with_parent() -> None:
    """End at once, in the middle of whatever is done, when the process that started this one is gone."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _told(error: Exception) -> dict[str, Any]:
    parts = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else None
    return {
        "class": "FedspanError" if isinstance(error, FedspanError) else type(error).__name__,
        "text": str(error),
        "os": parts,
        "trace": "".join(traceback.format_exception(error)),
    }


def _raised(header: Mapping[str, Any]) -> Exception:
    """The error of another process, as if it had been raised here."""
    text = header["text"]
    classes = (FedspanError, ValueError, MemoryError, RuntimeError, TypeError)
    common: dict[str, type[Exception]] = {c.__name__: c for c in classes}
    common["OutOfMemoryError"] = torch.OutOfMemoryError
    error: Exception
    if header["os"] is not None and header["os"][0] is not None:
        error = OSError(*header["os"])
    elif header["class"] in common:
        error = common[header["class"]](text)
    else:
        error = RuntimeError(f"{header['class']}: {text}")
    error.add_note(f"in a worker process:\n{header['trace']}")
    return error


def start_method(device: torch.device, threads: int) -> str:
    """How processes that work on this device are started."""
    # A GPU's driver does not survive a fork, nor do a thread pool's threads.
    forkable = sys.platform == "linux" and device.type == "cpu" and threads == 1
    return "fork" if forkable else "spawn"
