"""A site's evaluation of what it receives, on rows of its own that it does not train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedspan.client.evaluation import spread_rows
from fedspan.client.executors import EvaluationTask, InlineExecutor
from fedspan.data import Corpus
from fedspan.data.metric_blocks import Vector
from fedspan.federation.clients import Client, site_test_rows
from fedspan.federation.held_out import HeldOutTerms
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast
from fedspan.privacy.budget import BudgetSpent
from fedspan.privacy.held_out_dp import noised_rows
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.site.errors import Refused
from fedspan.site.loading import Loaded
from fedspan.site.message_checks import RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.support.errors import FedspanError
from fedspan.wire.refusals import Code


@dataclass(slots=True)
class HeldOut:
    """The held-out rows of a site, and the form in which their statistics leave it."""

    terms: HeldOutTerms
    client_id: str
    loaded: Loaded
    split: str
    rows: np.ndarray
    """Positions in the split."""
    max_examples: int | None
    examples: ExampleLedgers | None
    """The account of the rows' privacy, under `privacy.dp = "example"`."""
    newest: tuple[str, int] = ("", 0)
    """Run and round of the last evaluation."""

    def statistics(self, model: Broadcast, header: RoundHeader, *, whole: bool) -> Vector:
        """Return what leaves the site about a model, (size,).

        Raises
        ------
        Refused
            For a round before one that was evaluated already, or where the model's figures are not finite.
        BudgetSpent
            When the privacy budget does not allow it.
        """
        run, newest = self.newest
        if header.run == run and header.round_num < newest:
            raise Refused(f"an evaluation after round {header.round_num}: that after {newest} was made", Code.OLD)
        self.newest = (header.run, header.round_num)
        rows = self.rows if whole else spread_rows(self.rows, self.max_examples)
        task = EvaluationTask(model, self.split, rows)
        (figures,) = InlineExecutor(self.loaded.context).evaluate([task])
        try:
            return self.terms.contribution(figures.rows, self._noised(header))
        except BudgetSpent:
            raise
        except FedspanError as error:
            raise Refused(str(error), Code.UNFIT) from None

    def _noised(self, header: RoundHeader) -> Callable[[Vector], Vector] | None:
        ledgers = self.examples
        if ledgers is None:
            return None
        place = f"{header.run}/{header.round_num}"
        charge = partial(ledgers.charge_held_out, self.client_id, place)
        layout, multiplier, about = self.terms.layout, ledgers.privacy.noise_multiplier, (self.client_id, place)
        return lambda vector: noised_rows(layout, vector, multiplier, about, ledgers.held_out_secret, charge)


def held_out_of(
    settings: SiteSettings,
    method: Method,
    client: Client,
    corpus: Corpus,
    loaded: Loaded,
    examples: ExampleLedgers | None,
) -> HeldOut | None:
    """Return a site's held-out rows, or None where its settings let no evaluation at the clients take place.

    They are the share `data.client_holdout` of its rows; without one, its own test data: that of `data.test`, or the
    share `data.holdout` of its training data.

    Raises
    ------
    FedspanError
        When it has none.
    """
    config = settings.config
    if config.evaluation.where == "server":
        return None
    terms = HeldOutTerms.of(config, loaded.context.metrics, corpus.num_labels)
    split, rows = "train", client.holdout
    if not len(rows) and not config.data.client_holdout:
        split = "test"
        own = np.arange(len(corpus.test)) if settings.own_data else None
        rows = own if own is not None else site_test_rows(corpus, config.federation).get(client.client_id, rows)
        if not len(rows):
            raise FedspanError(
                f"evaluation.where = {config.evaluation.where!r}: {client.client_id} has no held-out rows of its own; "
                "expected data.client_holdout above 0, or data.test in its site.toml"
            )
    return HeldOut(terms, client.client_id, loaded, split, rows, config.evaluation.max_examples, examples)
