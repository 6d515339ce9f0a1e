"""Passes over a source, one after another, until the method's rule has what it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState, advance
from fedspan.methods.folds import SUM, Partial
from fedspan.methods.messages import Diagnostics, Update
from fedspan.methods.queries import Queries, QueryProcedure, QueryResults, ServerStep
from fedspan.streaming import stream_checkpoint
from fedspan.streaming.blocks import products_of, results_of, sum_of
from fedspan.streaming.source import Boundary, ClientSequence, Source, walk
from fedspan.streaming.stream_checkpoint import PassSums, StreamCheckpoint
from fedspan.support.errors import FedspanError

RunPass = Callable[[Queries | None, bool], Partial]
"""(queries, dense) -> the sums of one pass over all clients: the method's own sum where the queries are None, else
their answers; with Σ n_k x_k of the dense weights where `dense`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a stream after a block of updates."""

    pass_num: int
    """Passes finished."""
    num_clients: int
    """Updates folded in this pass."""
    total: int | None
    """Updates in a pass; None during the first, which has not reached the end."""


def aggregate_stream(
    method: Method,
    state: ServerState,
    source: Source,
    *,
    block: int = 32,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[ServerState, Diagnostics]:
    """Perform the server's side of one exchange, as `fedspan.methods.base.aggregate`, over a stream of updates.

    Parameters
    ----------
    source
        Encoded updates; iterated once per pass.
    block
        Updates in memory at once, multiplied together: it changes the speed, and the sums by rounding alone.
    checkpoint
        A file for the stream's state. Where it exists, the stream resumes from it and ends with the same bits as if
        it had never stopped; it is removed when the result is returned.
    checkpoint_seconds
        Time between two checkpoints, which are taken between blocks and after every pass. 0: after every block.

    Raises
    ------
    FedspanError
        When the method needs all its updates at once; when an update is damaged, repeated or without weight; when the
        source differs between two passes; when the checkpoint is of another step.
    """
    passes = _PassRunner(method, state, source, block)
    passes.on_progress = on_progress
    if checkpoint is not None:
        passes.use_checkpoint(checkpoint, checkpoint_seconds)
    result = aggregate_passes(method, state, passes.run)
    passes.check_source()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


def sum_pass(
    method: Method,
    state: ServerState,
    source: Source,
    queries: Queries | None = None,
    *,
    dense: bool = True,
    block: int = 32,
) -> Partial:
    """Return the sums of one pass over part of a round's clients: a server's answer to the one above it.

    Parameters
    ----------
    queries
        Asked by the root; None: the method's own sum. The answers are in ``sums`` by the number of their query.
    dense
        Add Σ n_k x_k of the dense weights, which the root needs once.
    """
    return _PassRunner(method, state, source, block).run(queries, dense)


def aggregate_passes(method: Method, state: ServerState, run_pass: RunPass) -> tuple[ServerState, Diagnostics]:
    """Perform one exchange at the root of a tree of servers.

    `run_pass` is called once per pass and returns the merged partials of all clients.

    Raises
    ------
    FedspanError
        When the method needs all its updates at once.
    """
    if method.exchanges[state.exchange].fold.kind == "sum":
        return method.finish(state, run_pass(None, True))
    if method.product_sums is not None and method.sums_products:
        return method.product_sums.finish(state, run_pass(None, True))
    if method.finish_by_queries is None:
        candidates = [make() for make in METHODS.values()]
        streams = [m for m in candidates if m.secure_sum or m.finish_by_queries or m.sums_products]
        able = [m.info.name for m in streams if not m.info.personalised]
        raise FedspanError(f"{method.info.name} needs all updates at once; these stream: {', '.join(sorted(able))}")
    procedure = method.finish_by_queries(state)
    queries, step = _next(procedure, None)
    # The first pass is made even where there is no query: the dense weights need it.
    partial = run_pass(queries, True)
    dense = partial.mean_dense()
    while step is None:
        queries, step = _next(procedure, _results(partial, queries))
        if step is None:
            partial = run_pass(queries, False)
    return advance(state, modules=step.modules, dense=dense), step.diagnostics


def _next(procedure: QueryProcedure, results: QueryResults | None) -> tuple[Queries, ServerStep | None]:
    """Return the next queries, or none of them and the result of the procedure."""
    try:
        return (next(procedure) if results is None else procedure.send(results)), None
    except StopIteration as stop:
        return {}, stop.value


def _results(partial: Partial, queries: Queries) -> QueryResults:
    means = {name: partial.mean(name) for name in queries}
    return {name: tuple(means[name][str(i)] for i in range(len(asked))) for name, asked in queries.items()}


class _PassRunner:
    """Runs passes over one source, and resumes from a checkpoint where there is one."""

    def __init__(self, method: Method, state: ServerState, source: Source, block: int) -> None:
        if block < 1:
            raise FedspanError(f"block = {block}: expected at least 1 update")
        self.method = method
        self.state = state
        self.source = source
        self.block = block
        self._contribution_of = method.contributions(state)
        self._products = method.product_sums if method.sums_products else None
        self.on_progress: Callable[[Progress], None] | None = None
        self._path: Path | None = None
        self._seconds = 0.0
        self._saved_at = 0.0
        self._step = ""
        self._finished: list[PassSums] = []
        self._resumed = StreamCheckpoint("", block)
        """The checkpoint that was found; empty without one."""

    def use_checkpoint(self, path: Path, seconds: float) -> None:
        """Write checkpoints to `path`, and resume from the one that is there."""
        self._path, self._seconds, self._saved_at = path, seconds, time.monotonic()
        self._step = stream_checkpoint.digest_of_step(self.method, self.state)
        if path.exists():
            self._resumed = stream_checkpoint.read(path)
            if self._resumed.step != self._step:
                raise FedspanError(f"{path} is a checkpoint of another method, state or round: expected this one's")
            if self._resumed.block != self.block:
                raise FedspanError(f"{path} was written with block = {self._resumed.block}: expected {self.block}")

    def run(self, queries: Queries | None, dense: bool) -> Partial:
        """Return the sums of one pass over the source, or of the same pass as a checkpoint holds it."""
        num = len(self._finished)
        # Digested for checkpoints alone, in which two processes' queries are compared.
        asked = "" if self._path is None else stream_checkpoint.digest_of_queries(queries)
        recorded = [*self._resumed.finished, *([self._resumed.current] if self._resumed.current else [])]
        start = recorded[num] if num < len(recorded) else PassSums(asked)
        if start.queries_digest != asked:
            raise FedspanError(f"{self._path} is a checkpoint of other queries: expected the method's own options")
        done = start if num < len(self._resumed.finished) else self._walk(start, queries, dense)
        self._finished.append(done)
        return done.stack[0]

    def check_source(self) -> None:
        """Compare the source's clients with the checkpoint's where no pass of this process has read the source."""
        if len(self._finished) <= len(self._resumed.finished):
            clients = ClientSequence(self.source)
            for part in walk(self.source, self.block):
                _count(clients, part)
            self._check_same(clients, self._finished[0])

    def _walk(self, start: PassSums, queries: Queries | None, dense: bool) -> PassSums:
        """Return the pass that `start` began, continued to the end of the source."""
        clients = ClientSequence(self.source)
        stack: list[Partial] = []
        catching_up = start.num_clients > 0
        for part in walk(self.source, self.block):
            _count(clients, part)
            if catching_up:
                # Blocks already in the checkpoint's sums are read over, to see that they are of the same clients.
                if clients.num_clients >= start.num_clients:
                    self._check_same(clients, start)
                    stack, catching_up = list(start.stack), False
            elif part is Boundary.ENTER:
                stack.append(Partial())
            elif part is Boundary.LEAVE:
                last = stack.pop()
                stack = [*stack[:-1], SUM.merge(stack[-1], last)] if stack else [last]
            else:
                stack[-1] = SUM.merge(stack[-1], self._sum(part, queries, dense))
                self._block_done(PassSums(start.queries_digest, tuple(stack), clients.num_clients, clients.digest))
        if catching_up:
            self._check_same(clients, start)
        return self._pass_done(PassSums(start.queries_digest, tuple(stack), clients.num_clients, clients.digest))

    def _sum(self, updates: list[Update], queries: Queries | None, dense: bool) -> Partial:
        if queries is None and self._products is not None:
            return products_of(self._products, updates, self.state.template.modules, dense)
        if queries is None:
            return sum_of(updates, dense)
        return results_of(queries, updates, self._contribution_of, self.state.template.modules, dense)

    def _check_same(self, clients: ClientSequence, start: PassSums) -> None:
        if (clients.num_clients, clients.digest) != (start.num_clients, start.clients_digest):
            raise FedspanError(f"{self._path} is a checkpoint of other updates: the source has other clients")

    def _block_done(self, current: PassSums) -> None:
        if self.on_progress is not None:
            total = self._finished[0].num_clients if self._finished else None
            self.on_progress(Progress(len(self._finished), current.num_clients, total))
        if self._path is not None and time.monotonic() - self._saved_at >= self._seconds:
            self._save(self._path, current)

    def _pass_done(self, done: PassSums) -> PassSums:
        if done.num_clients == 0:
            raise FedspanError("no update to aggregate: expected at least one client")
        first = self._finished[0] if self._finished else done
        if (done.num_clients, done.clients_digest) != (first.num_clients, first.clients_digest):
            raise FedspanError(
                f"the source gave {done.num_clients} updates, and {first.num_clients} or others in its first pass: "
                "expected the same clients every time"
            )
        if self._path is not None:
            self._save(self._path, None, done)
        return done

    def _save(self, path: Path, current: PassSums | None, *done: PassSums) -> None:
        stream_checkpoint.write(path, StreamCheckpoint(self._step, self.block, (*self._finished, *done), current))
        self._saved_at = time.monotonic()


def _count(clients: ClientSequence, part: Boundary | list[Update]) -> None:
    """Count the clients of one step of a walk."""
    if isinstance(part, Boundary):
        clients.begin_source()
    else:
        clients.add_all(part)
