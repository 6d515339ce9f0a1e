"""Passes over a source, one after the other, until the method's rule has what it needs."""

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
from fedspan.streaming import saved
from fedspan.streaming.blocks import answers_of, sum_of
from fedspan.streaming.saved import Pass, Saved
from fedspan.streaming.source import Edge, RollCall, Source, walk
from fedspan.support.errors import FedspanError

Ask = Callable[[Queries | None, bool], Partial]
"""(questions, dense) -> the sums of one pass over all clients: the method's own sum where nothing is asked, else the
answers, and Σ n_k x_k of the dense weights with them where `dense`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a stream stands, after a block of updates."""

    pass_num: int
    """Passes finished."""
    num_clients: int
    """Updates folded in this pass."""
    total: int | None
    """Updates in a pass; none during the first, which has not seen the end."""


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
    """The server's side of one exchange, as `fedspan.methods.base.aggregate`, over updates that are not held at once.

    Parameters
    ----------
    source
        Encoded updates; iterated once per pass.
    block
        Updates that are held and multiplied together: it changes the speed, and the sums by rounding alone.
    checkpoint
        A file that says how far the stream has come. Where it exists the stream goes on from there, to the same bits
        as if it had never stopped; it is removed when the result is returned.
    checkpoint_seconds
        Time between two checkpoints, which are taken between blocks and after every pass. 0: after every block.

    Raises
    ------
    ValueError
        When the method needs its updates at once; when an update is damaged, comes twice or counts for nothing; when
        the source differs between two passes; when the checkpoint is of another step.
    """
    passes = _Passes(method, state, source, block)
    passes.on_progress = on_progress
    if checkpoint is not None:
        passes.keep(checkpoint, checkpoint_seconds)
    result = drive(method, state, passes.run)
    passes.check_source()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


def sum_pass(
    method: Method,
    state: ServerState,
    source: Source,
    questions: Queries | None = None,
    *,
    dense: bool = True,
    block: int = 32,
) -> Partial:
    """One pass over part of a round's clients: what a server answers to the one above it.

    Parameters
    ----------
    questions
        What the root asks; none: the method's own sum. The answers stand in ``sums`` by the number of their question.
    dense
        Add Σ n_k x_k of the dense weights, which the root needs once.
    """
    return _Passes(method, state, source, block).run(questions, dense)


def drive(method: Method, state: ServerState, ask: Ask) -> tuple[ServerState, Diagnostics]:
    """One exchange at the root of a tree: `ask` is called once per pass and returns the clients' merged partials.

    Raises
    ------
    ValueError
        When the method needs its updates at once.
    """
    if method.exchanges[state.exchange].fold.kind == "sum":
        return method.finish(state, ask(None, True))
    if method.finish_by_queries is None:
        makers = [make() for make in METHODS.values()]
        able = [m.info.name for m in makers if (m.secure_sum or m.finish_by_queries) and not m.info.personalised]
        raise FedspanError(f"{method.info.name} needs all updates at once; these stream: {', '.join(sorted(able))}")
    procedure = method.finish_by_queries(state)
    queries, step = _next(procedure, None)
    # The first pass is taken even where there is no query: the dense weights need it.
    partial = ask(queries, True)
    dense = partial.mean_dense()
    while step is None:
        queries, step = _next(procedure, _results(partial, queries))
        if step is None:
            partial = ask(queries, False)
    return advance(state, modules=step.modules, dense=dense), step.diagnostics


def _next(procedure: QueryProcedure, results: QueryResults | None) -> tuple[Queries, ServerStep | None]:
    """Return the next queries, or none and the procedure's result."""
    try:
        return (next(procedure) if results is None else procedure.send(results)), None
    except StopIteration as stop:
        return {}, stop.value


def _results(partial: Partial, queries: Queries) -> QueryResults:
    means = {name: partial.mean(name) for name in queries}
    return {name: tuple(means[name][str(i)] for i in range(len(asked))) for name, asked in queries.items()}


class _Passes:
    """Passes over one source; goes on from a checkpoint where there is one."""

    def __init__(self, method: Method, state: ServerState, source: Source, block: int) -> None:
        if block < 1:
            raise FedspanError(f"block = {block}: expected at least 1 update")
        self.method = method
        self.state = state
        self.source = source
        self.block = block
        self._contribution_of = method.contributions(state)
        self.on_progress: Callable[[Progress], None] | None = None
        self._path: Path | None = None
        self._seconds = 0.0
        self._saved_at = 0.0
        self._step = ""
        self._finished: list[Pass] = []
        self._before = Saved("", block)
        """What the checkpoint held."""

    def keep(self, path: Path, seconds: float) -> None:
        """Take checkpoints, and go on from the one that is there."""
        self._path, self._seconds, self._saved_at = path, seconds, time.monotonic()
        self._step = saved.digest_of_step(self.method, self.state)
        if path.exists():
            self._before = saved.read(path)
            if self._before.step != self._step:
                raise FedspanError(f"{path} is a checkpoint of another method, state or round: expected this one's")
            if self._before.block != self.block:
                raise FedspanError(f"{path} was written with block = {self._before.block}: expected {self.block}")

    def run(self, questions: Queries | None, dense: bool) -> Partial:
        """One pass over the source, or its answers as a checkpoint holds them."""
        num = len(self._finished)
        # Only a checkpoint compares questions between two processes.
        asked = "" if self._path is None else saved.digest_of_questions(questions)
        held = [*self._before.finished, *([self._before.current] if self._before.current else [])]
        start = held[num] if num < len(held) else Pass(asked)
        if start.asked != asked:
            raise FedspanError(f"{self._path} is a checkpoint of other questions: expected the method's own options")
        done = start if num < len(self._before.finished) else self._walk(start, questions, dense)
        self._finished.append(done)
        return done.stack[0]

    def check_source(self) -> None:
        """Read who is in the source where every pass came from a checkpoint, and nothing else has looked."""
        if len(self._finished) <= len(self._before.finished):
            roll = RollCall(self.source)
            for at in walk(self.source, self.block):
                if isinstance(at, Edge):
                    roll.enter()
                else:
                    roll.call_all(at)
            self._check_same(roll, self._finished[0])

    def _walk(self, start: Pass, questions: Queries | None, dense: bool) -> Pass:
        """The pass from where `start` stands to the end of the source."""
        roll = RollCall(self.source)
        stack: list[Partial] = []
        catching_up = start.num_clients > 0
        for at in walk(self.source, self.block):
            if isinstance(at, Edge):
                roll.enter()
            else:
                roll.call_all(at)
            if catching_up:
                if roll.num_clients >= start.num_clients:
                    self._check_same(roll, start)
                    stack, catching_up = list(start.stack), False
            elif at is Edge.ENTER:
                stack.append(Partial())
            elif at is Edge.LEAVE:
                last = stack.pop()
                stack = [*stack[:-1], SUM.merge(stack[-1], last)] if stack else [last]
            else:
                stack[-1] = SUM.merge(stack[-1], self._sum(at, questions, dense))
                self._block_done(Pass(start.asked, tuple(stack), roll.num_clients, roll.digest))
        if catching_up:
            self._check_same(roll, start)
        return self._pass_done(Pass(start.asked, tuple(stack), roll.num_clients, roll.digest))

    def _sum(self, updates: list[Update], questions: Queries | None, dense: bool) -> Partial:
        if questions is None:
            return sum_of(updates, dense)
        return answers_of(questions, updates, self._contribution_of, self.state.template.modules, dense)

    def _check_same(self, roll: RollCall, start: Pass) -> None:
        if (roll.num_clients, roll.digest) != (start.num_clients, start.roll):
            raise FedspanError(f"{self._path} is a checkpoint of other updates: the source has other clients")

    def _block_done(self, current: Pass) -> None:
        if self.on_progress is not None:
            total = self._finished[0].num_clients if self._finished else None
            self.on_progress(Progress(len(self._finished), current.num_clients, total))
        if self._path is not None and time.monotonic() - self._saved_at >= self._seconds:
            self._save(self._path, current)

    def _pass_done(self, done: Pass) -> Pass:
        if done.num_clients == 0:
            raise FedspanError("no update to aggregate: expected at least one client")
        first = self._finished[0] if self._finished else done
        if (done.num_clients, done.roll) != (first.num_clients, first.roll):
            raise FedspanError(
                f"the source gave {done.num_clients} updates, and {first.num_clients} or others in its first pass: "
                "expected the same clients every time"
            )
        if self._path is not None:
            self._save(self._path, None, done)
        return done

    def _save(self, path: Path, current: Pass | None, *done: Pass) -> None:
        saved.write(path, Saved(self._step, self.block, (*self._finished, *done), current))
        self._saved_at = time.monotonic()
