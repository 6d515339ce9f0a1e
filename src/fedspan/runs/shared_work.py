"""The work that several runs ask for together: their requests, their joined data, each run's view of the executor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedspan.client.evaluation import Figures
from fedspan.client.executors import EvaluationTask, Executor, Trained, WorkContext
from fedspan.client.training import Assignment, Terms
from fedspan.data import Encoded
from fedspan.data.joined import form_of, joined
from fedspan.runs.provision import Wanted
from fedspan.runs.turns import Turn


class Ready:
    """A run's request to begin."""


@dataclass(frozen=True, slots=True, eq=False)
class Train:
    """A run's request for local work."""

    assignments: Sequence[Assignment]
    engine: str
    precision: str
    """`engine.precision`, as it was chosen for the run."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluate:
    """A run's request for figures."""

    tasks: Sequence[EvaluationTask]


@dataclass(slots=True, eq=False)
class SharedBase:
    """The base, the joined data and the executor of the runs that share them."""

    executor: Executor
    starts: Mapping[int, Mapping[str, tuple[int, int]]]
    """Run -> split -> its first row in the joined data, and its number of rows."""
    measured: bool = False
    """The number of clients that share a pass on a GPU is settled."""

    def rows(self, number: int, split: str, rows: np.ndarray | None) -> np.ndarray:
        """Return rows of one run's split as rows of the joined split."""
        start, count = self.starts[number][split]
        return start + (np.arange(count) if rows is None else np.asarray(rows))


@dataclass(frozen=True, slots=True, eq=False)
class BaseShare:
    """One run's share of a base."""

    view: WorkContext
    """The base that is shared, with the run's own settings and data."""
    dense: Mapping[str, torch.Tensor]
    digest: str
    num_workers: int


class RunExecutor:
    """One run's view of the shared executor: asks in its turn, and is answered together with the others."""

    def __init__(self, turn: Turn, context: WorkContext) -> None:
        self._turn, self.context = turn, context

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """Yield every client's result, in the order of the assignments."""
        settings = self.context.training
        terms = Terms(settings.seed, settings.local, round_num)
        work = [replace(a, terms=terms) for a in assignments]
        yield from self._turn.ask(Train(work, engine, settings.engine.precision))

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> list[Figures]:
        """Return the loss and the metrics of every evaluation."""
        figures: list[Figures] = self._turn.ask(Evaluate(tasks))
        return figures

    def close(self) -> None:
        """Do nothing: the processes are shared with the other runs."""


def join_data(group: Mapping[int, Wanted]) -> tuple[dict[str, Encoded], dict[int, dict[str, tuple[int, int]]]]:
    """Return the runs' data in one piece, each different data set once, and where each run's rows are in it."""
    data: dict[str, Encoded] = {}
    starts: dict[int, dict[str, tuple[int, int]]] = {number: {} for number in group}
    for split in sorted({split for own in group.values() for split in own.prepared.data}):
        distinct: dict[int, tuple[int, Encoded]] = {}
        length = 0
        for number, own in group.items():
            if split not in own.prepared.data:
                continue
            part = own.prepared.data[split]
            if id(part) not in distinct:
                distinct[id(part)] = (length, part)
                length += len(part)
            starts[number][split] = (distinct[id(part)][0], len(part))
        data[split] = joined([part for _, part in distinct.values()])
    return data, starts


def kind_of(number: int, wanted: Wanted) -> str:
    """Return what must be equal for two runs to share a base and its passes."""
    config, corpus = wanted.config, wanted.prepared.corpus
    evaluation, data = config.evaluation, wanted.prepared.data
    # The account of an example's privacy is of one base: the run's own, with the head that it starts from.
    alone = number if config.privacy.dp == "example" else None
    return json.dumps(
        [
            alone,
            config.model.model_dump(mode="json"),
            config.adapter.model_dump(mode="json", exclude={"alpha"}),
            config.engine.model_dump(mode="json"),
            config.privacy.model_dump(mode="json", include={"dp"}),
            [config.device, config.threads, evaluation.batch_size, evaluation.max_new_tokens],
            [
                corpus.kind,
                corpus.num_labels,
                corpus.label_names,
                corpus.metrics,
                wanted.trains,
                wanted.max_rank,
                wanted.galore_rank,
            ],
            # Without unseen rows a run can join those that have some like its test rows.
            [form_of(part) for part in (data["train"], data["test"], data.get("unseen", data["test"]))],
        ]
    )
