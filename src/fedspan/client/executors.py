"""Executors of a run's local work and evaluation: this process, or several that share the base.

A task is one group of clients of a round, or one batch of an evaluation. The tasks depend on the work alone, and a
task's result on nothing but the task, so neither the number of processes nor the order in which they finish changes a
bit of a run. Tasks go to the next free process, the costliest first; results are returned in their own order.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import current_process
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedspan.client import cohort, grouping
from fedspan.client.evaluation import Figures, Predictions, batches, figures, needs_probabilities, needs_text, predict
from fedspan.client.processes import MakeMessage, Message, Processes, start_method
from fedspan.client.shared_payloads import PayloadCache, SharedPayloads, get_result, put_result
from fedspan.client.training import Assignment, LocalResult, TrainingSettings
from fedspan.config import EngineConfig, EvaluationConfig
from fedspan.data import Encoded
from fedspan.data.metrics import METRICS
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.models.placement import is_spread
from fedspan.wire import packing

Trained = tuple[LocalResult, float]
"""A client's result, and the busy seconds that it took."""


@dataclass(slots=True)
class WorkContext:
    """The settings, model and data that every process needs for local work and evaluation."""

    training: TrainingSettings
    evaluation: EvaluationConfig
    threads: int
    model: FederatedModel
    data: Mapping[str, Encoded]
    """`train`, `test`, and `unseen` where there is any."""
    processor: Any
    metrics: tuple[str, ...]

    def examples(self, task: EvaluationTask) -> Encoded:
        """Return the examples of an evaluation."""
        whole = self.data[task.split]
        return whole if task.rows is None else whole.subset(task.rows)

    def max_new_tokens(self, examples: Encoded) -> int:
        """Return the length of the text to generate for the run's metrics; 0 where they need none."""
        return self.evaluation.max_new_tokens if needs_text(examples, self.metrics) else 0

    def predict(
        self, examples: Encoded, cut: Sequence[Sequence[int]], max_new_tokens: int, probabilities: bool
    ) -> list[Predictions]:
        """Return the predictions of the model, as it is loaded, for each of these batches."""
        return predict(self.model, examples, cut, self.processor, max_new_tokens, probabilities)


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationTask:
    """One model to be evaluated on one set of examples."""

    broadcast: Broadcast
    split: str = "test"
    rows: np.ndarray | None = None
    """Indices into the split; None for all of it."""


class Executor(Protocol):
    """A way of doing local work and evaluation."""

    context: WorkContext

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """Yield every client's result, in the order of the assignments."""

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> list[Figures]:
        """Return the loss and the metrics of every evaluation."""

    def close(self) -> None:
        """End every process that was started."""


def create_executor(context: WorkContext, num_workers: int, device: torch.device) -> Executor:
    """Return an executor in this process for one worker, otherwise one of several processes; none is started yet.

    Parameters
    ----------
    device
        The device of the work. With several workers the model of `context` stays on the CPU, and each worker's own
        goes to a device of this kind.
    """
    if num_workers == 1:
        return InlineExecutor(context)
    method = start_method(device, context.threads)
    places = [place_of(device, number) for number in range(num_workers)]
    processes = Processes(Worker, [(context, place, method == "spawn") for place in places], method)
    return ProcessExecutor(context, processes, device)


def num_worker_processes(engine: EngineConfig, threads: int, device: torch.device, most: int) -> int:
    """Return the number of worker processes of a run.

    Parameters
    ----------
    engine
        Its `workers`: `auto` takes one process per device, or per `threads` cores; one for a base on several devices,
        which work in turn.
    most
        Tasks that there can be at once: more workers would have nothing to do.
    """
    if engine.workers != "auto":
        return engine.workers
    if current_process().daemon or is_spread(engine.device_map):
        return 1  # a daemonic process may not start others
    if device.type != "cpu":
        available = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    else:
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
        available = cores // threads
    return max(1, min(available, most))


@dataclass(slots=True)
class InlineExecutor:
    """Does all work in this process."""

    context: WorkContext

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """Yield every client's result, in the order of the assignments."""
        context, settings = self.context, self.context.training.with_engine(engine)
        data = context.data["train"]
        order = _Order()
        # No process waits for the costliest group here, so the group whose result is needed first comes first.
        for group in sorted(grouping.plan(context.model, data, assignments, settings), key=min):
            began = time.perf_counter()
            results = cohort.work(context.model, data, [assignments[i] for i in group], settings, round_num)
            yield from order.add(group, results, time.perf_counter() - began)

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> list[Figures]:
        """Return the loss and the metrics of every evaluation."""
        return [self._evaluate(task) for task in tasks]

    def _evaluate(self, task: EvaluationTask) -> Figures:
        context, examples = self.context, self.context.examples(task)
        context.model.load(task.broadcast)
        cut = batches(examples, context.evaluation.batch_size)
        tokens = context.max_new_tokens(examples)
        shares = needs_probabilities(context.metrics)
        return figures(examples, context.metrics, cut, context.predict(examples, cut, tokens, shares))

    def close(self) -> None:
        """Do nothing: no process was started."""


@dataclass(slots=True)
class _Order:
    """Puts results that come group by group back into the order of the clients."""

    done: dict[int, Trained] = field(default_factory=dict)
    next: int = 0

    def add(self, group: Sequence[int], results: Sequence[LocalResult], seconds: float) -> Iterator[Trained]:
        """Yield the results that are next in order, now that this group is done."""
        self.done |= {i: (result, seconds / len(group)) for i, result in zip(group, results, strict=True)}
        while self.next in self.done:
            yield self.done.pop(self.next)
            self.next += 1


class Pool(Protocol):
    """Processes that answer messages, each with a `Worker` in it."""

    def start(self) -> None:
        """Start the processes, unless they run already."""

    def run(self, tasks: Sequence[MakeMessage]) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """Yield the answers to all tasks, with the tasks' numbers, as they come in. Tasks begin in their order."""

    def close(self) -> None:
        """End the processes, if this started them."""


class ProcessExecutor:
    """Plans the work in this process, has others do it, and puts their results together.

    Metrics are scored here, from the workers' predictions: a worker knows no metric, so that one which the caller has
    registered in `METRICS` works however the workers were started.
    """

    def __init__(self, context: WorkContext, processes: Pool, device: torch.device) -> None:
        self.context = context
        # The model on the workers' device, for a plan that depends on the device.
        self._planned = replace(context.model, device=device)
        self.processes = processes
        self._shared_payloads = SharedPayloads()
        self._warm = False

    def train(self, assignments: Sequence[Assignment], round_num: int, engine: str) -> Iterator[Trained]:
        """Yield every client's result, in the order of the assignments."""
        settings = self.context.training.with_engine(engine)
        groups = grouping.plan(self._planned, self.context.data["train"], assignments, settings)
        self._shared_payloads.expect([a.broadcast for a in assignments])
        messages = [self._training_message([assignments[i] for i in group], round_num, engine) for group in groups]
        order = _Order()
        for number, header, tensors in self.processes.run(messages):
            results = [get_result(result, tensors) for result in header["results"]]
            yield from order.add(groups[number], results, header["seconds"])

    def _training_message(self, group: Sequence[Assignment], round_num: int, engine: str) -> MakeMessage:
        def message(held: set[int]) -> Message:
            packed = packing.TensorList()
            # The precision too: it may have been chosen after the processes were started.
            options = {"name": engine, "precision": self.context.training.engine.precision}
            header: dict[str, Any] = {"work": "train", "round_num": round_num, "engine": options}
            header["clients"] = [self._shared_payloads.assignment(packed, held, a) for a in group]
            header["forget"] = self._shared_payloads.forget(held)
            return header, packed.tensors

        return message

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> list[Figures]:
        """Return the loss and the metrics of every evaluation."""
        context = self.context
        examples = [context.examples(task) for task in tasks]
        cuts = [batches(x, context.evaluation.batch_size) for x in examples]
        self._shared_payloads.expect([task.broadcast for task in tasks])
        messages = [
            self._evaluation_message(task, indices, tokens)
            for task, tokens, cut in zip(tasks, map(context.max_new_tokens, examples), cuts, strict=True)
            for indices in cut
        ]
        self.processes.start()
        self._import_metrics()
        received: dict[int, Predictions] = {}
        for number, header, _ in self.processes.run(messages):
            received[number] = Predictions(**header)
        # Whichever batch was done first, they are scored in the order in which they were cut.
        in_order = iter([received[number] for number in range(len(messages))])
        return [
            figures(x, context.metrics, cut, list(islice(in_order, len(cut))))
            for x, cut in zip(examples, cuts, strict=True)
        ]

    def _evaluation_message(self, task: EvaluationTask, indices: Sequence[int], max_new_tokens: int) -> MakeMessage:
        def message(held: set[int]) -> Message:
            packed = packing.TensorList()
            header: dict[str, Any] = {"work": "evaluate", "split": task.split, "max_new_tokens": max_new_tokens}
            # A worker does not know the metrics.
            header["probabilities"] = needs_probabilities(self.context.metrics)
            header["rows"] = None if task.rows is None else packed.put(torch.as_tensor(task.rows))
            header["indices"] = packed.put(torch.tensor(indices))
            header["broadcast"] = self._shared_payloads.broadcast(packed, held, task.broadcast)
            header["forget"] = self._shared_payloads.forget(held)
            return header, packed.tensors

        return message

    def _import_metrics(self) -> None:
        """Have the metrics import their libraries, which takes a second, while the workers are busy."""
        if not self._warm:
            self._warm = True
            sample = self.context.data["test"].references[:2]
            threading.Thread(target=_try_metrics, args=(self.context.metrics, sample), daemon=True).start()

    def close(self) -> None:
        """End every process that was started."""
        self.processes.close()


def place_of(device: torch.device, number: int) -> torch.device:
    """Return the device of the worker of this number on a machine: GPUs in turn."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _try_metrics(metrics: Sequence[str], sample: Sequence[Any]) -> None:
    for name in metrics:
        # An error of a metric is raised where the figures are computed.
        with contextlib.suppress(Exception):
            # As many probabilities as there are labels, where a metric takes those.
            given = [[0.5, 0.5] for _ in sample] if METRICS[name].needs == "probabilities" else sample
            METRICS[name].score(given, sample)


class Worker:
    """The work of a worker process: answers tasks of training and of evaluation."""

    def __init__(self, context: WorkContext, device: torch.device, shared: bool) -> None:
        """Bring the model to this process's device.

        Parameters
        ----------
        shared
            The model's tensors are shared with other processes, so what is trained in place must be copied.
        """
        torch.set_num_threads(context.threads)
        model = context.model
        if model.device != device:
            model.model.to(device)
            model.device = device
            model.prefix = model.packed = None  # they were found for the CPU
        elif shared:
            for parameter in model.dense_parameters.values():
                parameter.data = parameter.data.clone()
        self.context, self.cache = context, PayloadCache()

    def __call__(self, header: Mapping[str, Any], tensors: list[Tensor]) -> Message:
        """Return the answer to one task."""
        self.cache.forget(header["forget"])
        return self._train(header, tensors) if header["work"] == "train" else self._evaluate(header, tensors)

    def _train(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Message:
        context = self.context
        group = [self.cache.assignment(x, tensors) for x in header["clients"]]
        settings = context.training.with_options(**header["engine"])
        began = time.perf_counter()
        results = cohort.work(context.model, context.data["train"], group, settings, header["round_num"])
        seconds = time.perf_counter() - began
        packed = packing.TensorList()
        return {"results": [put_result(packed, x) for x in results], "seconds": seconds}, packed.tensors

    def _evaluate(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Message:
        rows = None if header["rows"] is None else tensors[header["rows"]].numpy()
        task = EvaluationTask(self.cache.broadcast(header["broadcast"], tensors), header["split"], rows)
        self.context.model.load(task.broadcast)
        indices = tensors[header["indices"]].tolist()
        examples, tokens, shares = self.context.examples(task), header["max_new_tokens"], header["probabilities"]
        (predictions,) = self.context.predict(examples, [indices], tokens, shares)
        return asdict(predictions), ()
