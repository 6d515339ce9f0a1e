"""The model under audit and its untouched base, each beside the loss that it has on every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedspan.auditing.statistics import Scores
from fedspan.client.evaluation import batches, in_order, predict
from fedspan.client.executors import WorkContext
from fedspan.client.setup import Prepared, device_of, prepare, work_context
from fedspan.config import Config
from fedspan.data import Corpus, Encoded, Rows, encode
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models.encoder_decoder import decoder_start
from fedspan.models.federated_model import Trains
from fedspan.models.losses import client_losses
from fedspan.models.merged import merged
from fedspan.support.activity import report


@dataclass(slots=True)
class Loaded:
    """A base in memory with its data, and the models that can be put into it."""

    config: Config
    prepared: Prepared
    context: WorkContext
    untouched: Broadcast
    """The base as it is before any training: an adapter that adds nothing, and the heads that training starts from."""

    @classmethod
    def of(cls, config: Config, corpus: Corpus, trains: Trains, max_rank: int, galore_rank: int = 0) -> Loaded:
        """Load a base.

        Raises
        ------
        FedspanError
            When it cannot be read, or does not fit the rows.
        """
        torch.set_num_threads(config.threads)
        prepared = prepare(config.model.name, config.data, corpus)
        device = device_of(config.device)
        context = work_context(
            config,
            prepared,
            trains=trains,
            max_rank=max_rank,
            device=device,
            galore_rank=galore_rank,
            training=False,
        )
        untouched = Broadcast(context.model.adapter(), context.model.dense(), Recipe())
        return cls(config, prepared, context, untouched)

    def encode(self, rows: Rows) -> Encoded:
        """Return rows as this base reads them."""
        decoder = decoder_start(self.config.model.name, rows.kind, self.prepared.processor)
        return encode(rows, self.prepared.processor, self.prepared.config, self.prepared.base, decoder=decoder)

    def use(self, broadcast: Broadcast) -> None:
        """Put a model into the base, in evaluation mode."""
        self.context.model.load(broadcast)
        self.context.model.model.eval()

    @torch.no_grad()
    def losses(self, examples: Encoded) -> Scores:
        """Return the loss of the model in use on every row, (N,): of an answer the mean over its tokens."""
        model = self.context.model
        found: dict[int, float] = {}
        # A model that mixes rows of unequal length gets them one by one.
        size = 1 if model.padding_matters else self.config.evaluation.batch_size
        with merged(model):
            for rows in batches(examples, size):
                batch = {name: value.to(model.device) for name, value in examples.batch(rows).items()}
                found |= dict(zip(rows, client_losses(model, batch, len(rows)).double().tolist(), strict=True))
        return np.asarray([found[i] for i in range(len(examples))])

    def answers(self, examples: Encoded, max_new_tokens: int) -> list[str]:
        """Return the text with which the model in use continues every prompt, by its likeliest tokens."""
        cut = batches(examples, self.config.evaluation.batch_size)
        found = predict(self.context.model, examples, cut, self.prepared.processor, max_new_tokens)
        return [str(text) for text in in_order(cut, [one.values for one in found])]


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """The losses of the trained model and of its untouched base on the same rows, each (N,)."""

    trained: Scores
    base: Scores


@dataclass(slots=True)
class Subject:
    """A trained model, its base, and what is known of both."""

    trained: Loaded
    final: Broadcast
    base: Loaded | None
    """The untouched base, where the trained one cannot be turned into it; None: it is `trained` with `untouched`."""
    notes: tuple[str, ...] = ()

    def losses(self, parts: Sequence[Rows]) -> list[RowLosses]:
        """Return the losses on each of these sets of rows, of the trained model and of the base."""
        encoded = [self.trained.encode(rows) for rows in parts]
        report(f"scoring {sum(map(len, parts)):,} rows")
        self.trained.use(self.final)
        own = [self.trained.losses(examples) for examples in encoded]
        reference = self.trained if self.base is None else self.base
        reference.use(reference.untouched)
        before = [reference.losses(examples) for examples in encoded]
        return [RowLosses(x, y) for x, y in zip(own, before, strict=True)]
