"""Processes that answer one message at a time, none of which outlives the run."""

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
import torch.multiprocessing as mp  # after which spawn passes tensors in shared memory
from torch import Tensor

from fedspan.support import tokenizer_threads
from fedspan.support.errors import FedspanError
from fedspan.wire import packing

Message = tuple[Any, Sequence[Tensor]]
"""A JSON-able description, and the tensors that it names by number."""
Answer = Callable[[Any, list[Tensor]], Message]
"""The function by which a process answers a message."""
MakeMessage = Callable[[set[int]], Message]
"""Makes the message of one task when it is sent. Its argument is the notes on the process that will receive it, at
first empty: a message can leave out what an earlier one has brought there, and note what it brings."""

_PATIENCE = 5.0
"""Seconds that a process has to end after it was asked to, before it is killed."""
_REBUILT: Mapping[str, type[Exception]] = {
    "FedspanError": FedspanError,
    "OutOfMemoryError": torch.OutOfMemoryError,
    **{kind.__name__: kind for kind in (ValueError, TypeError, MemoryError, RuntimeError)},
}
"""Errors that keep their class on the way from a process, if only as that of a base class."""


class ProcessLost(FedspanError):
    """A worker process that ended although it was not asked to."""


@dataclass(slots=True)
class _Handle:
    """A running process: the channel to it, the notes on it, and the number of the task that it is busy with."""

    process: Any
    channel: Any
    notes: set[int] = field(default_factory=set)
    task: int | None = None


@dataclass(slots=True)
class Processes:
    """Several processes; in each, `make(*arguments)` is called once and answers the messages sent to that process.

    Nothing is started before the first task. However a run ends (normally, by an error, by Ctrl-C, or by the death of
    the process that started these), `close` or the operating system ends them all.
    """

    make: Callable[..., Answer]
    arguments: Sequence[tuple[Any, ...]]
    method: str
    """`fork`: the child shares all memory until it is written to. `spawn`: a new interpreter, which receives tensors
    through shared memory."""
    _handles: list[_Handle] = field(default_factory=list)

    def run(self, tasks: Sequence[MakeMessage]) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """Yield the answers to all tasks, with the tasks' numbers, as they come in. Tasks begin in their order.

        Raises
        ------
        ProcessLost
            When a process was killed.
        Exception
            An error that a task raised, where its class is a common one; otherwise a RuntimeError that names it.
        """
        if any(handle.task is not None for handle in self._handles):
            # An earlier caller took only some of its answers. The rest are still on their way, and must not be taken
            # for answers to these tasks: new processes have none.
            self.close()
        self.start()
        handles, waiting = self._handles, deque(range(len(tasks)))
        try:
            for handle in handles:
                self._give(handle, waiting, tasks)
            while busy := {handle.channel: handle for handle in handles if handle.task is not None}:
                # A channel is ready when its process died, too.
                for channel in connection.wait(list(busy)):
                    task, message, tensors = self._take(busy[channel])
                    # The next task before the caller sees the answer: it may take its time.
                    self._give(busy[channel], waiting, tasks)
                    yield task, message, tensors
        except BaseException:
            # Also where the caller gave up (GeneratorExit), but not where others were started in the meantime.
            if handles is self._handles:
                self.close()
            raise

    def close(self) -> None:
        """End all processes; they can be started again."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.channel.close()
            handle.process.terminate()
        for handle in handles:
            handle.process.join(_PATIENCE)
            if handle.process.is_alive():
                handle.process.kill()
                handle.process.join()
            handle.process.close()

    def pids(self) -> list[int]:
        """Return the process ids of the processes that run."""
        return [handle.process.pid for handle in self._handles]

    def start(self) -> None:
        """Start the processes, unless they run already."""
        if self._handles:
            return
        context: Any = mp.get_context(self.method)
        with _forking():
            for number, arguments in enumerate(self.arguments):
                near, far = context.Pipe()
                # A forked child inherits this process's ends of all channels so far.
                inherited = [near, *(handle.channel for handle in self._handles)] if self.method == "fork" else []
                process = context.Process(
                    target=_serve, args=(far, inherited, self.make, arguments), name=f"fedspan-{number}", daemon=True
                )
                process.start()
                far.close()
                self._handles.append(_Handle(process, near))

    def _give(self, handle: _Handle, waiting: deque[int], tasks: Sequence[MakeMessage]) -> None:
        """Send the next task to this process, if there is one left."""
        handle.task = waiting.popleft() if waiting else None
        if handle.task is None:
            return
        message, tensors = tasks[handle.task](handle.notes)
        try:
            packing.send(handle.channel, message, tensors)
        except OSError:
            raise self._lost(handle) from None

    def _take(self, handle: _Handle) -> tuple[int, Any, list[Tensor]]:
        assert handle.task is not None
        try:
            reply, tensors = packing.receive(handle.channel)
        except (EOFError, OSError):
            raise self._lost(handle) from None
        if "error" in reply:
            raise rebuild_error(reply["error"])
        return handle.task, reply["answer"], tensors

    def _lost(self, handle: _Handle) -> ProcessLost:
        handle.process.join(_PATIENCE)
        code = handle.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        hint = "; if memory ran out, set fewer engine.workers" if code == -signal.SIGKILL else ""
        return ProcessLost(f"worker process {handle.process.pid} ended unexpectedly ({how}){hint}")


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Fork without warnings, and without copying more memory than is written to."""
    gc.freeze()  # a child's garbage collector would touch, and so copy, every page of the parent's objects
    try:
        with tokenizer_threads.forking(), warnings.catch_warnings():
            # Python warns of forking beside a display's thread; a child never takes a lock that it may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        gc.unfreeze()


def _serve(channel: Any, inherited: Sequence[Any], make: Callable[..., Answer], arguments: tuple[Any, ...]) -> None:
    """Answer messages until the channel closes: all that a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its children itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()  # a channel closes for its child only when no other process holds its other end
    threading.Thread(target=_die_with_parent, daemon=True).start()
    made: list[Answer] = []

    def answer(message: Any, tensors: list[Tensor]) -> Message:
        if not made:
            made.append(make(*arguments))  # here, so that its errors are answers
        return made[0](message, tensors)

    answer_messages(channel, answer)


def answer_messages(channel: packing.Channel, answer: Answer) -> None:
    """Answer messages until the channel closes; an error is an answer too, which `rebuild_error` reads."""
    try:
        while True:
            message, tensors = packing.receive(channel)
            try:
                description, out = answer(message, tensors)
                reply: dict[str, Any] = {"answer": description}
            except Exception as error:
                reply, out = {"error": describe_error(error)}, ()
            packing.send(channel, reply, out)
    except (EOFError, OSError):
        return  # the channel is closed, or the other side is gone


def _die_with_parent() -> None:
    """End at once, in the middle of any work, when the process that started this one is gone."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def describe_error(error: Exception) -> dict[str, Any]:
    """Return an error as JSON, for another process."""
    parts = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else None
    names = [kind.__name__ for kind in type(error).__mro__]
    return {
        "class": next((name for name in names if name in _REBUILT), names[0]),
        "text": str(error),
        "os": parts,
        "trace": "".join(traceback.format_exception(error)),
    }


def rebuild_error(header: Mapping[str, Any]) -> Exception:
    """Return the error of another process, as if it had been raised here."""
    name, text = header["class"], header["text"]
    error: Exception
    if header["os"] is not None and header["os"][0] is not None:
        error = OSError(*header["os"])
    elif name in _REBUILT:
        error = _REBUILT[name](text)
    else:
        error = RuntimeError(f"{name}: {text}")
    error.add_note(f"in a worker process:\n{header['trace']}")
    return error


def start_method(device: torch.device, threads: int) -> str:
    """Return the way in which processes that work on this device must be started: `fork` or `spawn`."""
    # A GPU's driver does not survive a fork, nor do a thread pool's threads.
    forkable = sys.platform == "linux" and device.type == "cpu" and threads == 1
    return "fork" if forkable else "spawn"
