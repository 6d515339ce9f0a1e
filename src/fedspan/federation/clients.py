"""Who the clients are: their examples, their ranks, and who takes part in a round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedspan.config import Config
from fedspan.data import Corpus, partition
from fedspan.federation import requirements
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """One client of the run."""

    client_id: str
    rank: int
    indices: np.ndarray
    """Its training examples, as rows of the corpus's training data."""
    holdout: np.ndarray
    """Its own examples kept back for evaluation; may be empty."""
    stated: int | None = None
    """How many examples a client says that it has whose data is elsewhere."""

    @property
    def num_examples(self) -> int:
        """Its training examples."""
        return len(self.indices) if self.stated is None else self.stated

    def weight(self, weighting: str) -> float:
        """What it counts for in averages."""
        return float(self.num_examples) if weighting == "examples" else 1.0


def make_clients(config: Config, corpus: Corpus) -> list[Client]:
    """Partition the training data and draw the ranks, all from the run's seed.

    Raises
    ------
    ValueError
        For more clients than examples, a client without data, or ranks that do not fit the clients.
    """
    f = config.federation
    rng = np.random.default_rng([config.seed, 1])
    parts = _partition(config, corpus, rng)
    ranks = requirements.ranks(config)
    width = len(str(len(parts) - 1))
    clients: list[Client] = []
    empty: list[str] = []
    for k, (indices, rank) in enumerate(zip(parts, ranks, strict=True)):
        client_id = f"client-{k:0{width}d}"
        kept = round(len(indices) * config.data.client_holdout)
        order = np.random.default_rng([config.seed, 3, k]).permutation(indices)
        client = Client(client_id, rank, np.sort(order[kept:]), np.sort(order[:kept]))
        if len(client.indices) == 0:
            empty.append(client_id)
        else:
            clients.append(client)
    if empty and not f.drop_empty:
        raise FedspanError(
            f"{', '.join(empty)} got no data from the {f.partition} partition: give fewer clients or a larger "
            f"federation.dirichlet_alpha, or set federation.drop_empty = true"
        )
    return clients


def _partition(config: Config, corpus: Corpus, rng: np.random.Generator) -> list[np.ndarray]:
    f, rows = config.federation, corpus.train
    if f.partition == "files":
        files = corpus.client_files or ()
        if len(files) != f.num_clients:
            raise FedspanError(
                f"federation.num_clients = {f.num_clients}, but data.train has {len(files)} files: expected as many"
            )
        return list(files)
    if f.partition == "preset":
        parts = partition.preset(f.preset, rows.fields, rng)
        if len(parts) != f.num_clients:
            raise FedspanError(
                f"federation.num_clients = {f.num_clients}: the preset {f.preset} has {len(parts)} clients"
            )
        return parts
    if f.partition == "iid":
        return partition.iid(len(rows), f.num_clients, rng)
    if f.partition == "by_field":
        if len(set(rows.fields)) < 2:
            raise FedspanError('federation.partition = "by_field" needs data.field_column with at least two values')
        return partition.by_field(rows.fields, f.num_clients, rng)
    labels = rows.fields if corpus.kind == "instruction" else rows.targets
    return partition.dirichlet(np.asarray(labels), f.num_clients, f.dirichlet_alpha, rng)


def pooled(clients: list[Client]) -> list[Client]:
    """One client with everybody's data, at the largest rank."""
    indices = np.sort(np.concatenate([c.indices for c in clients]))
    return [Client("all", max(c.rank for c in clients), indices, np.zeros(0, dtype=np.int64))]
