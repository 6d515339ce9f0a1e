"""The clients of a run: their examples and their ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspan.config import FederationConfig
from fedspan.data import Corpus, partition
from fedspan.federation import requirements
from fedspan.federation.client_names import names_of_sites, numbered_ids
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

    Clients are called `client-0`, `client-1`, …; where each file is one client and there are several, after the files
    (`Corpus.client_names`), in the order of these names. Ranks are given in the order of the files.

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
    clients: list[Client] = []
    empty: list[str] = []
    named = zip(parts, ranks, _ids(corpus, federation, len(parts)), strict=True)
    for k, (indices, rank, client_id) in enumerate(named):
        num_kept = round(len(indices) * client_holdout)
        # A generator for each of many thousand clients takes seconds, so only where something is drawn.
        order = np.random.default_rng([seed, 3, k]).permutation(indices) if num_kept else indices
        client = Client(client_id, rank, np.sort(order[num_kept:]), np.sort(order[:num_kept]))
        if len(client.indices) == 0:
            empty.append(client_id)
        else:
            clients.append(client)
    if empty and not federation.drop_empty:
        raise FedspanError(
            f"{', '.join(empty)} got no data from the {partition_of(corpus, federation)} partition: give fewer clients "
            f"or a larger federation.dirichlet_alpha, or set federation.drop_empty = true"
        )
    return sorted(clients, key=lambda client: client.client_id)


def partition_of(corpus: Corpus, federation: FederationConfig) -> str:
    """Return the division of the data: the one that the settings name, or for `auto` the one that the data allows."""
    if federation.partition != "auto":
        return federation.partition
    return "by_field" if len(set(corpus.train.fields)) >= 2 else "iid"


def partition_note(corpus: Corpus, federation: FederationConfig) -> tuple[str, ...]:
    """Return one line where rows are divided at random without a setting that says so."""
    if federation.partition != "auto" or federation.num_clients < 2 or partition_of(corpus, federation) != "iid":
        return ()
    return (
        f"{federation.num_clients} clients get rows at random (federation.partition = 'iid'): no field of the data "
        "divides it; data.field_column, or a file of each client in data.train, would",
    )


def _ids(corpus: Corpus, federation: FederationConfig, count: int) -> Sequence[str]:
    if federation.partition == "files" and corpus.client_names is not None:
        return names_of_sites(corpus.client_names)
    return numbered_ids(count)


def site_test_rows(corpus: Corpus, federation: FederationConfig) -> dict[str, np.ndarray]:
    """Return the rows of the test data that belong to each named client, without clients that have none."""
    if federation.partition != "files" or corpus.client_names is None or corpus.client_tests is None:
        return {}
    named = zip(corpus.client_names, corpus.client_tests, strict=True)
    return {name: rows for name, rows in sorted(named, key=lambda pair: pair[0]) if len(rows)}


def _partition(corpus: Corpus, federation: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    rows, num_clients = corpus.train, federation.num_clients
    name = partition_of(corpus, federation)
    if name == "files":
        files = corpus.client_files or ()
        if len(files) != num_clients:
            raise FedspanError(
                f"federation.num_clients = {num_clients}, but data.train has {len(files)} files: expected as many"
            )
        return list(files)
    if name == "preset":
        parts = partition.preset(federation.preset, rows.fields, rng)
        if len(parts) != num_clients:
            raise FedspanError(
                f"federation.num_clients = {num_clients}: the preset {federation.preset} has {len(parts)} clients"
            )
        return parts
    if name == "iid":
        return partition.iid(len(rows), num_clients, rng)
    if name == "by_field":
        if len(set(rows.fields)) < 2:
            raise FedspanError(
                'federation.partition = "by_field" needs data.field_column with at least two values: without one, '
                'expected "iid" or "dirichlet", or a file of each client in data.train'
            )
        return partition.by_field(rows.fields, num_clients, rng)
    # Instructions have no labels to be skewed by: their fields (tasks, categories) stand in.
    labels = rows.fields if corpus.kind == "instruction" else rows.targets
    return partition.dirichlet(np.asarray(labels), num_clients, federation.dirichlet_alpha, rng)


def pooled(clients: list[Client]) -> list[Client]:
    """Return one client with the data of all, at the largest rank, for the centralised control."""
    indices = np.sort(np.concatenate([c.indices for c in clients]))
    return [Client("all", max(c.rank for c in clients), indices, np.zeros(0, dtype=np.int64))]
