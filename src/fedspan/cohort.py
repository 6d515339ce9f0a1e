"""Many clients' local work in one batched pass over the base that they share."""

from __future__ import annotations

from collections.abc import Sequence

from fedspan.config import Config
from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.train import Assignment, LocalResult, train


def plan(model: FederatedModel, data: Encoded, assignments: Sequence[Assignment], config: Config) -> list[list[int]]:
    """Which assignments are worked on together: positions in `assignments`, the costliest group first.

    Depends on the work alone, never on how many processes share it.
    """
    return [[i] for i in range(len(assignments))]


def work(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], config: Config, round_num: int
) -> list[LocalResult]:
    """The local work of one group of `plan`, in its order."""
    return [
        train(
            model,
            a.broadcast,
            data.subset(a.rows),
            config.local,
            steps=a.steps,
            client_id=a.client_id,
            weight=a.weight,
            key=(config.seed, round_num),
        )
        for a in group
    ]
