"""The parts of a run that are costly to make: its corpus, the encoded data, the base in memory, the executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedspan.client.executors import Executor, WorkContext, create_executor, num_worker_processes
from fedspan.client.setup import Prepared, prepare, work_context
from fedspan.config import Config
from fedspan.data import Corpus, Encoded
from fedspan.data import load as load_data
from fedspan.models import FederatedModel
from fedspan.models.federated_model import Trains


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The base and the executor that a run wants."""

    config: Config
    prepared: Prepared
    trains: Trains
    max_rank: int
    """The largest rank of any client."""
    galore_rank: int
    """The rank that gradients of the target modules' weights are projected to; 0: they are not."""
    device: torch.device
    num_tasks: int
    """The most tasks that there can be at once."""
    training: bool = True
    """Its clients are trained in this base; False: real sites train them in theirs."""

    def context(self, device: torch.device, data: Mapping[str, Encoded] | None = None) -> WorkContext:
        """Return the base in memory on this device, beside its own data or other data that it is to be trained on."""
        prepared = self.prepared if data is None else replace(self.prepared, data=data)
        return work_context(
            self.config,
            prepared,
            trains=self.trains,
            max_rank=self.max_rank,
            device=device,
            galore_rank=self.galore_rank,
            # Not in one that workers copy to devices of another kind, where other ways are the fast ones.
            training=self.training and device.type == self.device.type,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Provided:
    """The base and the executor of a run."""

    model: FederatedModel
    initial_dense: Mapping[str, torch.Tensor]
    """Heads and trained weights of the untouched base, the run's own."""
    base: str
    """Digest of the untouched base."""
    executor: Executor
    num_workers: int
    """Processes that share the local work and the evaluation."""
    shared: bool = False
    """The executor works for other runs too."""


class Provision:
    """Makes everything for one run alone."""

    def corpus(self, config: Config) -> Corpus:
        """Return a run's rows."""
        return load_data(config.data, config.data_seed)

    def prepared(self, config: Config, corpus: Corpus) -> Prepared:
        """Return a run's rows, encoded with the tokenizer or image processor of its base."""
        return prepare(config.model.name, config.data, corpus)

    def work(self, wanted: Wanted) -> Provided:
        """Return a run's base in memory, and the executor of its work."""
        config, device = wanted.config, wanted.device
        num_workers = num_worker_processes(config.engine, config.threads, device, wanted.num_tasks)
        # Several workers copy a model that stays on the CPU to devices of their own.
        placed = device if num_workers == 1 else torch.device("cpu")
        context = wanted.context(placed)
        executor = create_executor(context, num_workers, device)
        model = context.model
        return Provided(model, model.dense(), model.digest(), executor, num_workers)

    def ready(self, described: Mapping[str, Any]) -> None:
        """Return when the run may begin: everything that can be refused has been.

        Parameters
        ----------
        described
            The run's settings, data, base and libraries (`runs.identity`).
        """
