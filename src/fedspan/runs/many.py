"""Many runs at once over one base: their clients share passes, their evaluations the worker processes.

Every run is the ordinary run: it has its own folder, records, checkpoints and resume. It takes turns with the others
(`runs.turns`), and where it asks for local work or an evaluation, it waits until all the others have asked or ended;
then all of that work is done together. A client's seed, round, batches and learning rates are those of its own run, so
its results agree with those of the run alone up to rounding: clients share a pass with others than they would alone,
unless the runs are to be kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fedspan.client import calibration
from fedspan.client.executors import (
    EvaluationTask,
    create_executor,
    num_worker_processes,
)
from fedspan.client.setup import Prepared
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.config import Config, with_absolute_paths
from fedspan.config import load as load_config
from fedspan.data import Corpus
from fedspan.runs.events import Event
from fedspan.runs.execution import Result, resume, run
from fedspan.runs.provision import Provided, Provision, Wanted
from fedspan.runs.shared_work import BaseShare, Evaluate, Ready, RunExecutor, SharedBase, Train, join_data, kind_of
from fedspan.runs.turns import Turn, take_turns
from fedspan.support.errors import FedspanError
from fedspan.support.files import StrPath


class OnRunEvent(Protocol):
    """Receives every event of every run, with the run's number."""

    def __call__(self, number: int, event: Event, /) -> None: ...


def ignore(number: int, event: Event) -> None:
    """Show nothing."""


class RunFailed(FedspanError):
    """The first error of a run among several."""

    def __init__(self, num_runs: int, errors: Mapping[int, FedspanError]) -> None:
        (number, error), *others = errors.items()
        more = f" (and {len(others)} more)" if others else ""
        super().__init__(f"run {number + 1} of {num_runs}{more}: {error}")
        self.number, self.others, self.error, self.errors = number, len(others), error, errors


def run_many(
    configs: Sequence[Config],
    outs: Sequence[StrPath | None] | None = None,
    on_event: OnRunEvent = ignore,
    *,
    apart: bool = False,
) -> list[Result]:
    """Run several federations at once; those over one base share its memory, its passes and its processes.

    Parameters
    ----------
    outs
        The run folders; one that holds a run of the same settings is resumed. None: new ones.
    on_event
        Receives every event as it happens, with the number of its run.
    apart
        Let only clients of one run share a pass: every result has the bits of the run alone on the same device,
        whatever else is run with it.

    Raises
    ------
    FedspanError
        For anything wrong with one of the configurations, before any training starts; or, when the other runs have
        ended, for those that failed on the way, which can be resumed.
    """
    folders = list(outs) if outs is not None else [None] * len(configs)
    if len(folders) != len(configs):
        raise FedspanError(f"{len(folders)} folders for {len(configs)} runs: expected one for each")
    given = [Path(folder).resolve() for folder in folders if folder is not None]
    if len(set(given)) < len(given):
        raise FedspanError("two runs in one folder: expected a folder for each")
    with closing(_Pool(len(configs), apart)) as pool:
        turns = [
            Turn(partial(pool.lead, number, config, folder, on_event))
            for number, (config, folder) in enumerate(zip(configs, folders, strict=True))
        ]
        with suppress(_NotAll):  # some run has an error then
            take_turns(turns, pool.answer)
        _raise_first(turns)
        return [turn.result for turn in turns]


def _raise_first(turns: Sequence[Turn]) -> None:
    """Raise the first error of a run, naming the run."""
    failed = {number: turn.error for number, turn in enumerate(turns) if isinstance(turn.error, Exception)}
    known = {number: error for number, error in failed.items() if isinstance(error, FedspanError)}
    for error in failed.values():
        if not isinstance(error, FedspanError):
            raise error
        raise RunFailed(len(turns), known) from error


class _NotAll(Exception):
    """Some run was refused before all of them were ready to begin."""


class _SharedProvision(Provision):
    """Makes a run's parts once for all runs that are alike, and asks in the run's turn for the base."""

    def __init__(self, turn: Turn, pool: _Pool) -> None:
        self._turn, self._pool = turn, pool

    def corpus(self, config: Config) -> Corpus:
        """Return a run's rows, read once for runs of the same data and seed."""
        key = config.data.model_dump_json(), config.data_seed
        if key not in self._pool.corpora:
            self._pool.corpora[key] = super().corpus(config)
        return self._pool.corpora[key]

    def prepared(self, config: Config, corpus: Corpus) -> Prepared:
        """Return a run's rows, encoded once for runs of the same data, seed and base."""
        key = config.data.model_dump_json(), config.data_seed, config.model.model_dump_json()
        if key not in self._pool.prepared:
            self._pool.prepared[key] = super().prepared(config, corpus)
        return self._pool.prepared[key]

    def work(self, wanted: Wanted) -> Provided:
        """Return a run's share of a base in memory, and of the executor of its work."""
        base: BaseShare = self._turn.ask(wanted)
        executor = RunExecutor(self._turn, base.view)
        return Provided(base.view.model, base.dense, base.digest, executor, base.num_workers, shared=True)

    def ready(self, described: Mapping[str, Any]) -> None:
        """Return when all runs may begin."""
        self._turn.ask(Ready())


@dataclass(slots=True)
class _Pool:
    """All bases and executors, and the work of all runs."""

    num_runs: int
    apart: bool
    corpora: dict[Any, Corpus] = field(default_factory=dict)
    prepared: dict[Any, Prepared] = field(default_factory=dict)
    shared: list[SharedBase] = field(default_factory=list)
    of_run: dict[int, SharedBase] = field(default_factory=dict)

    def lead(self, number: int, config: Config, out: StrPath | None, on_event: OnRunEvent, turn: Turn) -> Result:
        """Run one federation in its turn, or resume it."""
        torch.set_num_threads(config.threads)  # which is a thread's own setting
        listen, provision = partial(on_event, number), _SharedProvision(turn, self)
        if out is None or not (Path(out) / "config.toml").exists():
            return run(config, out, listen, provision=provision)
        if load_config(Path(out) / "config.toml") != with_absolute_paths(config):
            raise FedspanError(f"{out} holds a run of other settings: expected a new folder, or one of the same run")
        return resume(out, listen, provision=provision)

    def answer(self, waiting: Sequence[tuple[int, Any]]) -> dict[int, Any]:
        """Do what the runs ask for: at first their bases, afterwards local work and evaluations."""
        if isinstance(waiting[0][1], Wanted | Ready):
            if len(waiting) < self.num_runs:
                raise _NotAll
            bases = {number: request for number, request in waiting if isinstance(request, Wanted)}
            return self._provide(bases) if bases else dict.fromkeys(dict(waiting))
        answers: dict[int, Any] = {}
        for shared in self.shared:
            own = {number: request for number, request in waiting if self.of_run[number] is shared}
            training = {number: request for number, request in own.items() if isinstance(request, Train)}
            for kind in sorted({(request.engine, request.precision) for request in training.values()}):
                alike = {n: r.assignments for n, r in training.items() if (r.engine, r.precision) == kind}
                answers |= self._each(alike, partial(self._train, shared, *kind))
            tasks = {number: request.tasks for number, request in own.items() if isinstance(request, Evaluate)}
            answers |= self._each(tasks, partial(self._evaluate, shared))
        return answers

    def _each(self, requests: Mapping[int, Sequence[Any]], work: Any) -> dict[int, Any]:
        """Return what `work` makes of all requests together; when that fails, of each by itself, or its error."""
        if not requests:
            return {}
        try:
            return dict(work(requests))
        except FedspanError:
            answers: dict[int, Any] = {}
            for number, own in requests.items():
                try:
                    answers |= work({number: own})
                except FedspanError as error:
                    answers[number] = error
            return answers

    def _train(
        self, shared: SharedBase, engine: str, precision: str, requests: Mapping[int, Sequence[Assignment]]
    ) -> dict[int, Any]:
        context = shared.executor.context
        context.training = context.training.with_options(precision=precision)
        everything = [
            replace(a, rows=shared.rows(number, "train", a.rows), run=number if self.apart else None)
            for number, own in requests.items()
            for a in own
        ]
        self._measure(shared, everything, engine)
        results = iter(list(shared.executor.train(everything, 0, engine)))
        return {number: [next(results) for _ in own] for number, own in requests.items()}

    def _measure(self, shared: SharedBase, assignments: Sequence[Assignment], engine: str) -> None:
        """Measure once how many of all runs' clients should share a pass on a GPU."""
        context = shared.executor.context
        settings = context.training
        here = context.model.device.type != "cpu" and settings.engine.cohort_size == "auto"
        if shared.measured or not here or engine == "sequential":
            return
        shared.measured = True
        size = calibration.cohort_size(context.model, context.data["train"], assignments, settings)
        engine_settings = settings.engine.model_copy(update={"cohort_size": size})
        context.training = replace(settings, engine=engine_settings)

    def _evaluate(self, shared: SharedBase, requests: Mapping[int, Sequence[EvaluationTask]]) -> dict[int, Any]:
        everything = [
            replace(task, rows=shared.rows(number, task.split, task.rows))
            for number, own in requests.items()
            for task in own
        ]
        figures = iter(shared.executor.evaluate(everything))
        return {number: [next(figures) for _ in own] for number, own in requests.items()}

    def _provide(self, wanted: Mapping[int, Wanted]) -> dict[int, BaseShare]:
        alike: dict[str, dict[int, Wanted]] = {}
        for number, own in wanted.items():
            alike.setdefault(kind_of(number, own), {})[number] = own
        provided: dict[int, Any] = {}
        for group in alike.values():
            try:
                provided |= self._provide_alike(group)
            except FedspanError as error:
                provided |= dict.fromkeys(group, error)
        return provided

    def _provide_alike(self, group: Mapping[int, Wanted]) -> dict[int, BaseShare]:
        """Return one base and executor for these runs, over all their rows."""
        # The widest batches say whether rows are tried end to end; a client's own say whether they lie so.
        first = max(group.values(), key=lambda own: own.config.local.batch_size)
        data, starts = join_data(group)
        config, device = first.config, first.device
        num_tasks = sum(own.num_tasks for own in group.values())
        num_workers = num_worker_processes(config.engine, config.threads, device, num_tasks)
        placed = device if num_workers == 1 else torch.device("cpu")

        context = first.context(placed, data)
        model = context.model
        # Before anything is trained in it. A new head is drawn from the run's seed: another base for every seed.
        bases = {first.config.seed: (model.dense(), model.digest())}
        for own in group.values():
            if own.config.seed not in bases:
                other = replace(own, training=False).context(placed, data).model if model.heads else model
                bases[own.config.seed] = (other.dense(), other.digest())
        shared = SharedBase(create_executor(context, num_workers, device), starts)
        self.shared.append(shared)
        self.of_run |= dict.fromkeys(group, shared)
        return {
            number: BaseShare(
                replace(context, training=TrainingSettings.of(own.config), data=own.prepared.data),
                *bases[own.config.seed],
                num_workers,
            )
            for number, own in group.items()
        }

    def close(self) -> None:
        """End every process that was started."""
        for shared in self.shared:
            shared.executor.close()
