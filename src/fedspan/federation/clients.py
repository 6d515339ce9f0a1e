"""The clients of a run: their examples and their ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedspan.config import FederationConfig
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
    """The number of training examples that a client whose data is elsewhere says it has."""

    @property
    def num_examples(self) -> int:
        """Return the number of its training examples."""
        return len(self.indices) if self.stated is None else self.stated

    def weight(self, weighting: str) -> float:
        """Return its weight in averages, before normalisation.

        A rounded weight is the power of two nearest on a logarithmic scale: at most √2 times the number of examples and
        at least 1/√2 times it. All clients of one power weigh the same.

        Parameters
        ----------
        weighting
            `federation.weighting`.
        """
        if weighting == "rounded":
            return 2.0 ** round(math.log2(self.num_examples))
        return float(self.num_examples) if weighting == "examples" else 1.0


def make_clients(corpus: Corpus, federation: FederationConfig, seed: int, client_holdout: float) -> list[Client]:
    """Partition the training data and draw the ranks, all from the run's seed.

    Parameters
    ----------
    seed
        The run's seed.
    client_holdout
        Share of each client's own data that is kept back for evaluation (`data.client_holdout`).

    Raises
    ------
    FedspanError
        For more clients than examples, a client without data, or ranks that do not fit the clients.
    """
    parts = _partition(corpus, federation, np.random.default_rng([seed, 1]))
    ranks = requirements.ranks(federation, seed)
    width = len(str(len(parts) - 1))  # ids sort like numbers
    clients: list[Client] = []
    empty: list[str] = []
    for k, (indices, rank) in enumerate(zip(parts, ranks, strict=True)):
        client_id = f"client-{k:0{width}d}"
        num_kept = round(len(indices) * client_holdout)
        order = np.random.default_rng([seed, 3, k]).permutation(indices)
        client = Client(client_id, rank, np.sort(order[num_kept:]), np.sort(order[:num_kept]))
        if len(client.indices) == 0:
            empty.append(client_id)
        else:
            clients.append(client)
    if empty and not federation.drop_empty:
        raise FedspanError(
            f"{', '.join(empty)} got no data from the {federation.partition} partition: give fewer clients or a larger "
            f"federation.dirichlet_alpha, or set federation.drop_empty = true"
        )
    return clients


def _partition(corpus: Corpus, federation: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    rows, num_clients = corpus.train, federation.num_clients
    if federation.partition == "files":
        files = corpus.client_files or ()
        if len(files) != num_clients:
            raise FedspanError(
                f"federation.num_clients = {num_clients}, but data.train has {len(files)} files: expected as many"
            )
        return list(files)
    if federation.partition == "preset":
        parts = partition.preset(federation.preset, rows.fields, rng)
        if len(parts) != num_clients:
            raise FedspanError(
                f"federation.num_clients = {num_clients}: the preset {federation.preset} has {len(parts)} clients"
            )
        return parts
    if federation.partition == "iid":
        return partition.iid(len(rows), num_clients, rng)
    if federation.partition == "by_field":
        if len(set(rows.fields)) < 2:
            raise FedspanError('federation.partition = "by_field" needs data.field_column with at least two values')
        return partition.by_field(rows.fields, num_clients, rng)
    # Instructions have no labels to be skewed by: their fields (tasks, categories) stand in.
    labels = rows.fields if corpus.kind == "instruction" else rows.targets
    return partition.dirichlet(np.asarray(labels), num_clients, federation.dirichlet_alpha, rng)


def pooled(clients: list[Client]) -> list[Client]:
    """Return one client with the data of all, at the largest rank, for the centralised control."""
    indices = np.sort(np.concatenate([c.indices for c in clients]))
    return [Client("all", max(c.rank for c in clients), indices, np.zeros(0, dtype=np.int64))]
