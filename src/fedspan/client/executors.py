"""Who does a run's local work and evaluation: this process, or several that share the base.

A task is one group of clients of a round, or one batch of an evaluation. What is in a task depends on the work alone
and its result on nothing but the task, so how many processes there are, and which of them is done first, changes no
bit of a run. Tasks go to whoever is free, the costliest first; results are handed back in their order.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import current_process
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedspan.client import cohort
from fedspan.client.evaluation import Answers, answer, batches, figures, writes
from fedspan.client.processes import Message, Processes, Task, start_method
from fedspan.client.shared_payloads import PayloadCache, SharedPayloads, get_result, put_result
from fedspan.client.training import Assignment, LocalResult
from fedspan.config import Config
from fedspan.data import Encoded
from fedspan.data.metrics import METRICS
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.wire import packing

Trained = tuple[LocalResult, float]
"""What a client learnt, and the busy seconds that it took."""


@dataclass(slots=True)
class WorkContext:
    """What every process needs to work."""

    config: Config
    model: FederatedModel
    data: Mapping[str, Encoded]
    """`train`, `test`, and `unseen` where there is any."""
    processor: Any
    metrics: tuple[str, ...]

    def examples(self, evaluation_task: EvaluationTask) -> Encoded:
        """What the exam is held on."""
        whole = self.data[evaluation_task.split]
        return whole if evaluation_task.rows is None else whole.subset(evaluation_task.rows)

    def settings(self, engine: str) -> Config:
        """The run's, with the engine that this work is done by."""
        return self.config.model_copy(update={"engine": self.config.engine.model_copy(update={"name": engine})})

    def answer(self, examples: Encoded, indices: Sequence[int]) -> Answers:
        """What the model, as it is loaded, makes of one batch."""
        tokens = self.config.evaluation.max_new_tokens if writes(examples, self.metrics) else 0
        return answer(self.model, examples, indices, self.processor, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationTask:
    """One model to be judged on one set of examples."""

    broadcast: Broadcast
    split: str = "test"
    rows: np.ndarray | None = None
    """Positions in the split; none: all of it."""


class Executor(Protocol):
    """Who does the work."""

    context: WorkContext

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """What every client learns, in the order of the assignments."""

    def evaluate(self, evaluation_tasks: Sequence[EvaluationTask]) -> list[dict[str, float]]:
        """The figures of every exam."""

    def close(self) -> None:
        """End every process that was started."""


def create_executor(context: WorkContext, num_workers: int, device: torch.device) -> Executor:
    """This process alone for one worker, otherwise so many processes; none is started yet.

    Parameters
    ----------
    device
        Where the work is done. With several workers the kit's own model stays on the CPU, and each worker's goes to
        a device of this kind.
    """
    return InlineExecutor(context) if num_workers == 1 else ProcessExecutor(context, num_workers, device)


def num_worker_processes(config: Config, device: torch.device, most: int) -> int:
    """Worker processes of a run.

    Parameters
    ----------
    most
        Tasks that there can be at once: more workers would have nothing to do.
    """
    if config.engine.workers != "auto":
        return config.engine.workers
    if current_process().daemon:
        return 1  # which may start no processes of its own
    if device.type != "cpu":
        available = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    else:
        affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
        cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
        available = cores // config.threads
    return max(1, min(available, most))


@dataclass(slots=True)
class InlineExecutor:
    """This process does everything."""

    context: WorkContext

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """What every client learns, in the order of the assignments."""
        context, config = self.context, self.context.settings(engine)
        data = context.data["train"]
        order = _Order()
        # The costliest need not come first where nobody waits for it: whoever is asked for first does.
        for group in sorted(cohort.plan(context.model, data, assignments, config), key=min):
            began = time.perf_counter()
            results = cohort.work(context.model, data, [assignments[i] for i in group], config, round_num)
            yield from order.add(group, results, time.perf_counter() - began)

    def evaluate(self, evaluation_tasks: Sequence[EvaluationTask]) -> list[dict[str, float]]:
        """The figures of every exam."""
        return [self._evaluate(evaluation_task) for evaluation_task in evaluation_tasks]

    def _evaluate(self, evaluation_task: EvaluationTask) -> dict[str, float]:
        context, examples = self.context, self.context.examples(evaluation_task)
        context.model.load(evaluation_task.broadcast)
        cut = batches(examples, context.config.evaluation.batch_size)
        return figures(examples, context.metrics, cut, [context.answer(examples, b) for b in cut])

    def close(self) -> None:
        """Nothing was started."""


@dataclass(slots=True)
class _Order:
    """Results that come group by group, handed on one by one in their order."""

    done: dict[int, Trained] = field(default_factory=dict)
    next: int = 0

    def add(self, group: Sequence[int], results: Sequence[LocalResult], seconds: float) -> Iterator[Trained]:
        """Whatever is next, now that this group is done."""
        self.done |= {i: (result, seconds / len(group)) for i, result in zip(group, results, strict=True)}
        while self.next in self.done:
            yield self.done.pop(self.next)
            self.next += 1


class ProcessExecutor:
    """Processes share the work; this one plans it, hands it out and puts the results together."""

    def __init__(self, context: WorkContext, num_workers: int, device: torch.device) -> None:
        self.context = context
        # As the workers hold it, for a plan that asks where the model is.
        self._planned = replace(context.model, device=device)
        method = start_method(device, context.config.threads)
        places = [_place(device, number) for number in range(num_workers)]
        self.processes = Processes(_Worker, [(context, place, method == "spawn") for place in places], method)
        self._shared_payloads = SharedPayloads()
        self._warm = False

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """What every client learns, in the order of the assignments."""
        groups = cohort.plan(self._planned, self.context.data["train"], assignments, self.context.settings(engine))
        self._shared_payloads.expect([a.broadcast for a in assignments])

        def task(group: Sequence[int]) -> Task:
            def message(held: set[int]) -> Message:
                parcel = packing.TensorList()
                header: dict[str, Any] = {"work": "train", "round_num": round_num, "engine": engine}
                header["clients"] = [self._shared_payloads.assignment(parcel, held, assignments[i]) for i in group]
                header["forget"] = self._shared_payloads.forget(held)
                return header, parcel.tensors

            return message

        order = _Order()
        for number, header, tensors in self.processes.run([task(group) for group in groups]):
            results = [get_result(x, tensors) for x in header["results"]]
            yield from order.add(groups[number], results, header["seconds"])

    def evaluate(self, evaluation_tasks: Sequence[EvaluationTask]) -> list[dict[str, float]]:
        """The figures of every exam."""
        context = self.context
        examples = [context.examples(evaluation_task) for evaluation_task in evaluation_tasks]
        cuts = [batches(x, context.config.evaluation.batch_size) for x in examples]
        papers = [(e, b) for e, cut in enumerate(cuts) for b in range(len(cut))]
        self._shared_payloads.expect([evaluation_task.broadcast for evaluation_task in evaluation_tasks])

        def task(e: int, b: int) -> Task:
            def message(held: set[int]) -> Message:
                parcel, rows = packing.TensorList(), evaluation_tasks[e].rows
                header: dict[str, Any] = {"work": "evaluate", "split": evaluation_tasks[e].split}
                header["rows"] = None if rows is None else parcel.put(torch.as_tensor(rows))
                header["indices"] = parcel.put(torch.tensor(cuts[e][b]))
                header["broadcast"] = self._shared_payloads.broadcast(parcel, held, evaluation_tasks[e].broadcast)
                header["forget"] = self._shared_payloads.forget(held)
                return header, parcel.tensors

            return message

        self.processes.start()
        if not self._warm:
            # What the metrics import takes a second: the time is there while the others work.
            self._warm = True
            threading.Thread(target=_import_metrics, args=(context,), daemon=True).start()
        found: dict[tuple[int, int], Answers] = {}
        for number, header, _ in self.processes.run([task(e, b) for e, b in papers]):
            found[papers[number]] = Answers(header["loss"], header["count"], header["predictions"])
        return [
            figures(x, context.metrics, cut, [found[e, b] for b in range(len(cut))])
            for e, (x, cut) in enumerate(zip(examples, cuts, strict=True))
        ]

    def close(self) -> None:
        """End every process that was started."""
        self.processes.close()


def _place(device: torch.device, number: int) -> torch.device:
    """The device of a worker: GPUs in turn."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _import_metrics(context: WorkContext) -> None:
    """Have every metric import what it needs."""
    sample = context.data["test"].references[:2]
    # Whatever is wrong with a metric is said where the figures are worked out.
    with contextlib.suppress(Exception):
        for name in context.metrics:
            if name != "perplexity":
                METRICS[name].score(sample, sample)


class _Worker:
    """What a worker process answers."""

    def __init__(self, context: WorkContext, device: torch.device, shared: bool) -> None:
        """Take the kit to this process.

        Parameters
        ----------
        shared
            The kit's tensors are other processes' too, and what is trained in place must not be.
        """
        torch.set_num_threads(context.config.threads)
        model = context.model
        if model.device != device:
            model.model.to(device)
            model.device = device
        elif shared:
            for parameter in model.dense_parameters.values():
                parameter.data = parameter.data.clone()
        self.context, self.cache = context, PayloadCache()

    def __call__(self, header: Mapping[str, Any], tensors: list[Tensor]) -> Message:
        """The answer to one task."""
        self.cache.forget(header["forget"])
        return self._train(header, tensors) if header["work"] == "train" else self._evaluate(header, tensors)

    def _train(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Message:
        context = self.context
        group = [self.cache.assignment(x, tensors) for x in header["clients"]]
        began = time.perf_counter()
        results = cohort.work(
            context.model, context.data["train"], group, context.settings(header["engine"]), header["round_num"]
        )
        seconds = time.perf_counter() - began
        parcel = packing.TensorList()
        return {"results": [put_result(parcel, x) for x in results], "seconds": seconds}, parcel.tensors

    def _evaluate(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Message:
        rows = None if header["rows"] is None else tensors[header["rows"]].numpy()
        evaluation_task = EvaluationTask(self.cache.broadcast(header["broadcast"], tensors), header["split"], rows)
        self.context.model.load(evaluation_task.broadcast)
        answers = self.context.answer(self.context.examples(evaluation_task), tensors[header["indices"]].tolist())
        return {"loss": answers.loss, "count": answers.count, "predictions": answers.predictions}, ()
