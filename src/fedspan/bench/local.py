"""One process's clients: the same batches and the same starting adapters for every way of training them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedspan.bench import tiny
from fedspan.bench.peers import PlainLoop, TrainerLoop
from fedspan.bench.process_pool import Job
from fedspan.client import cohort, grouping
from fedspan.client.training import Assignment, TrainingSettings, batches
from fedspan.config import from_mapping
from fedspan.data import Encoded, encode
from fedspan.data.rows import Rows
from fedspan.methods.messages import Broadcast
from fedspan.methods.readout import fresh_adapter
from fedspan.models import FederatedModel, build, load_processor
from fedspan.support.seeding import generator

ENGINES = ("sequential", "cohort")
SEED = 0
LEARNING_RATE = 1e-3


def settings(job: Job, engine: str) -> TrainingSettings:
    """The settings that the engines read."""
    local = {"steps": job.steps, "batch_size": job.batch, "learning_rate": LEARNING_RATE, "clip_norm": 1.0}
    # All clients of a case in one pass: how many fit is not what is measured.
    size = {"cohort_size": job.num_clients} if engine == "cohort" else {}
    return TrainingSettings.of(from_mapping({"seed": SEED, "local": local, "engine": {"name": engine, **size}}))


class Workplace:
    """One case's base, data and clients in this process."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.model = load_model(job, device)
        self.data = load_data(job)
        template = self.model.template(max(job.ranks), 16.0, False, SEED)
        self.assignments = []
        rows_each = len(self.data) // job.num_clients
        for client in range(job.num_clients):
            rows = np.arange(client * rows_each, (client + 1) * rows_each)
            sent = Broadcast(fresh_adapter(template, job.rank(client)), {})
            self.assignments.append(Assignment(f"client-{client:02d}", sent, rows, job.steps, 1.0))
        self._peers: dict[str, PlainLoop | TrainerLoop] = {}

    def prepare(self, arm: str) -> None:
        """Make what the arm needs and let one client train."""
        if arm not in ENGINES:
            kind = PlainLoop if arm == "plain" else TrainerLoop
            self._peers[arm] = kind(self.job.base, self.job.ranks, LEARNING_RATE, self.model.device)
        self.work(arm, [0])

    def work(self, arm: str, clients: Sequence[int]) -> list[float]:
        """The mean training loss of each client."""
        if arm not in ENGINES:
            return [self._peers[arm].train(self.assignments[i].broadcast.adapter, self._batches(i)) for i in clients]
        chosen, group = settings(self.job, arm), [self.assignments[i] for i in clients]
        losses: dict[int, float] = {}
        for positions in grouping.plan(self.model, self.data, group, chosen):
            results = cohort.work(self.model, self.data, [group[i] for i in positions], chosen, 0)
            losses |= {i: result.train_loss for i, result in zip(positions, results, strict=True)}
        return [losses[i] for i in range(len(group))]

    def _batches(self, client: int) -> list[dict[str, Any]]:
        """What the engines would draw for this client."""
        one = self.assignments[client]
        examples = self.data.subset(one.rows)
        rng = generator(SEED, 0, one.client_id, "batches")
        return [examples.batch(rows) for rows in batches(len(examples), self.job.batch, self.job.steps, rng)]


def load_model(job: Job, device: torch.device) -> FederatedModel:
    """The base with adapters on every linear layer."""
    return build(
        job.base,
        "instruction",
        trains="adapter",
        num_labels=0,
        target_modules=tiny.TARGETS,
        max_rank=max(job.ranks),
        rslora=False,
        dropout=0.0,
        dtype="float32",
        device=device,
        seed=SEED,
    )


def load_data(job: Job) -> Encoded:
    """As many sequences a client as one of its rounds needs, at most 64."""
    each = min(64, job.batch * job.steps)
    parts = [tiny.tokens(each, job.length, client) for client in range(job.num_clients)]
    return encoded(job.base, torch.cat(parts))


def encoded(base: str, tokens: torch.Tensor) -> Encoded:
    """Token sequences (num_examples, length) as the library's own instruction data."""
    texts = [tiny.text(row) for row in tokens]
    rows = Rows("instruction", [(prompt, "") for prompt, _ in texts], [a for _, a in texts], [""] * len(texts))
    config = from_mapping({"data": {"template": "{instruction}", "max_length": tokens.shape[1]}})
    return encode(rows, load_processor(base, "instruction"), config.data)
