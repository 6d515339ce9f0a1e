"""The sums of one run in a region: in the open, or under masks whose keys are the region's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.regions.relayed_question import RelayedQuestion
from fedspan.server.key_exchange import RunTerms
from fedspan.server.masked_sums import MaskedSums
from fedspan.server.requests import Requests
from fedspan.server.roster_plan import RosterPlan
from fedspan.server.sums import PlainSum, SumCollector


class SumsOfRun:
    """Begins the sums of a run, in training and in evaluations.

    Parameters
    ----------
    run
        The run's own name.
    num_clients
        Of the region.
    folder
        Keeps in `RUN.sums.json` which sites were in which sums.
    """

    def __init__(
        self,
        run: str,
        config: Config,
        num_clients: int,
        requests: Requests,
        folder: Path,
        trusted: Mapping[str, bytes] | None,
        notify: Callable[[str], None],
    ) -> None:
        self.run, self._config = run, config
        self._masked: tuple[MaskedSums, MaskedSums] | None = None
        if config.privacy.secure_sums:
            least = requirements.least_in_sums(config.federation, config.privacy, num_clients)
            terms = RunTerms(config.privacy, config.federation.rounds, least, trusted)
            plan = RosterPlan(config.privacy, least, folder / f"{run}.sums.json", notify)
            # Keys of their own: an evaluation asks every site, whoever is in the round.
            self._masked = (
                MaskedSums(requests, terms, plan, notify),
                MaskedSums(requests, terms, plan, notify),
            )

    def begin(self, asked: RelayedQuestion, ready: Sequence[Client], evaluation: bool) -> SumCollector:
        """Begin the sum of an exchange over the sites that can be reached.

        Raises
        ------
        FedspanError
            When too few are left for a sum under masks.
        """
        if self._masked is not None:
            masked = self._masked[evaluation]
            return masked.begin(asked.question, asked.heading, ready, asked.layout, asked.largest)
        point = FixedPoint(self._config.privacy.fraction_bits)
        return PlainSum(asked.layout.num_words, point, asked.room, asked.weights)

    @staticmethod
    def tensor_of(total: Words) -> Tensor:
        """Return a sum as the whole numbers in which it travels, (num_words,) of int64."""
        return torch.from_numpy(np.ascontiguousarray(total).view(np.int64))
