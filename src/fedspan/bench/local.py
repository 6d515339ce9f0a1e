"""The clients of the clients suite in one process: every arm gets the same batches and the same initial adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedspan.bench import tiny
from fedspan.bench.peers import PlainLoop, TrainerLoop
from fedspan.bench.process_pool import TrainingCase
from fedspan.client import cohort, grouping
from fedspan.client.batching import batches
from fedspan.client.training import Assignment, TrainingSettings
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


def settings(case: TrainingCase, engine: str) -> TrainingSettings:
    """Return the settings of a case for an engine."""
    local = {"steps": case.steps, "batch_size": case.batch, "learning_rate": LEARNING_RATE, "clip_norm": 1.0}
    # All clients of a case in one pass: the choice of the cohort size is not measured.
    size = {"cohort_size": case.num_clients} if engine == "cohort" else {}
    return TrainingSettings.of(from_mapping({"seed": SEED, "local": local, "engine": {"name": engine, **size}}))


class LocalClients:
    """A case's base, data and clients in this process."""

    def __init__(self, case: TrainingCase, device: torch.device) -> None:
        self.case = case
        self.model = load_model(case, device)
        self.data = load_data(case)
        template = self.model.template(max(case.ranks), 16.0, False, SEED)
        self.assignments = []
        rows_each = len(self.data) // case.num_clients
        for client in range(case.num_clients):
            rows = np.arange(client * rows_each, (client + 1) * rows_each)
            sent = Broadcast(fresh_adapter(template, case.rank(client)), {})
            self.assignments.append(Assignment(f"client-{client:02d}", sent, rows, case.steps, 1.0))
        self._peers: dict[str, PlainLoop | TrainerLoop] = {}

    def prepare(self, arm: str) -> None:
        """Load what the arm needs and train one client, untimed."""
        if arm not in ENGINES:
            kind = PlainLoop if arm == "plain" else TrainerLoop
            self._peers[arm] = kind(self.case.base, self.case.ranks, LEARNING_RATE, self.model.device)
        self.train(arm, [0])

    def train(self, arm: str, clients: Sequence[int]) -> list[float]:
        """Train clients and return the mean training loss of each."""
        if arm not in ENGINES:
            return [self._peers[arm].train(self.assignments[i].broadcast.adapter, self._batches(i)) for i in clients]
        chosen, group = settings(self.case, arm), [self.assignments[i] for i in clients]
        losses: dict[int, float] = {}
        for positions in grouping.plan(self.model, self.data, group, chosen):
            results = cohort.work(self.model, self.data, [group[i] for i in positions], chosen, 0)
            losses |= {i: result.train_loss for i, result in zip(positions, results, strict=True)}
        return [losses[i] for i in range(len(group))]

    def _batches(self, client: int) -> list[dict[str, Any]]:
        """Return the batches that the engines would draw for this client."""
        assignment = self.assignments[client]
        examples = self.data.subset(assignment.rows)
        rng = generator(SEED, 0, assignment.client_id, "batches")
        return [examples.batch(rows) for rows in batches(len(examples), self.case.batch, self.case.steps, rng)]


def load_model(case: TrainingCase, device: torch.device) -> FederatedModel:
    """Load the base with adapters on every linear layer."""
    return build(
        case.base,
        "instruction",
        trains="adapter",
        num_labels=0,
        target_modules=tiny.TARGETS,
        max_rank=max(case.ranks),
        rslora=False,
        dropout=0.0,
        dtype="float32",
        device=device,
        seed=SEED,
    )


def load_data(case: TrainingCase) -> Encoded:
    """Make as many sequences per client as a round needs, at most 64."""
    each = min(64, case.batch * case.steps)
    parts = [tiny.tokens(each, case.length, client) for client in range(case.num_clients)]
    return encoded(case.base, torch.cat(parts))


def encoded(base: str, tokens: torch.Tensor) -> Encoded:
    """Return token sequences (num_examples, length) as the library's instruction data."""
    texts = [tiny.text(row) for row in tokens]
    rows = Rows("instruction", [(prompt, "") for prompt, _ in texts], [a for _, a in texts], [""] * len(texts))
    config = from_mapping({"data": {"template": "{instruction}", "max_length": tokens.shape[1]}})
    return encode(rows, load_processor(base, "instruction"), config.data)
