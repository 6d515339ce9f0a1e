"""The parts of a site that are read once and stay in memory: its client, its data, its base."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from fedspan.client.executors import WorkContext
from fedspan.client.setup import device_of, notes_of, prepare, work_context
from fedspan.config import Config
from fedspan.data import Corpus
from fedspan.federation import requirements
from fedspan.federation.clients import Client, make_clients
from fedspan.methods.base import Method
from fedspan.methods.messages import Tensors
from fedspan.site.settings import SiteSettings
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement


@dataclass(frozen=True, slots=True)
class Loaded:
    """The base and the data in memory."""

    context: WorkContext
    initial: Tensors
    """Heads and trained weights of the untouched base."""
    base: str
    """Digest of the untouched base."""
    labels: str
    """Digest of what the labels of the data mean."""
    notes: tuple[str, ...] = ()
    """Lines on how base and data were read where that may surprise."""

    @classmethod
    def of(cls, config: Config, method: Method, corpus: Corpus, max_rank: int) -> Loaded:
        """Read the base and encode the data as the configuration says."""
        prepared = prepare(config.model.name, config.data, corpus)
        trains, device = method.info.trains, device_of(config.device)
        context = work_context(
            config,
            prepared,
            trains=trains,
            max_rank=max_rank,
            device=device,
            galore_rank=requirements.galore_rank(method),
        )
        model, read = context.model, prepared.corpus
        labels = agreement.labels(read.kind, read.num_labels, read.label_names)
        return cls(context, model.dense(), model.digest(), labels, notes_of(prepared, model))


def client_of(settings: SiteSettings, corpus: Corpus) -> Client:
    """Return the client that a site's settings describe, with its rows of the data.

    Raises
    ------
    FedspanError
        When the federation has no such client, or its rank is not known.
    """
    return _with_own_data(settings, corpus) if settings.own_data else _in_partition(settings, corpus)


def _in_partition(settings: SiteSettings, corpus: Corpus) -> Client:
    """Return the client of this name in the federation's partition of the data."""
    config = settings.config
    partitioned = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
    clients = {client.client_id: client for client in partitioned}
    if settings.client_id not in clients:
        raise FedspanError(f"client_id = {settings.client_id!r}: expected one of {', '.join(sorted(clients))}")
    client = clients[settings.client_id]
    return client if settings.rank is None else replace(client, rank=settings.rank)


def _with_own_data(settings: SiteSettings, corpus: Corpus) -> Client:
    """Return a client to which all of the data belongs, except for the part that it keeps back for evaluation."""
    config, rank = settings.config, settings.rank
    if rank is None:
        ranks = config.federation.ranks
        possible = (
            {ranks} if isinstance(ranks, int) else set(requirements.ranks(config.federation, config.federation_seed))
        )
        if len(possible) != 1:
            raise FedspanError(
                f"{settings.client_id} has no rank: expected `rank` in its site.toml, since ranks differ"
            )
        rank = possible.pop()
    rows = np.arange(len(corpus.train))
    # Python's hash of a string is salted per process: after a restart the site would keep other rows back.
    rng = np.random.default_rng([config.federation_seed, 3, zlib.crc32(settings.client_id.encode())])
    kept = round(len(rows) * config.data.client_holdout)
    order = rng.permutation(rows)
    return Client(settings.client_id, rank, np.sort(order[kept:]), np.sort(order[:kept]))
