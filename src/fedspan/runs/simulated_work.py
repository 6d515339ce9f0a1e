"""The local work of simulated clients, as assignments for the executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedspan.client.executors import Executor
from fedspan.client.training import Assignment, LocalResult, num_steps
from fedspan.config import LocalConfig
from fedspan.federation.clients import Client
from fedspan.methods.messages import Broadcast


@dataclass(frozen=True, slots=True)
class SimulatedWork:
    """One round's work of simulated clients; called with a window of them at a time."""

    executor: Executor
    engine: str
    weighting: str
    """`federation.weighting`."""
    steps: Mapping[str, int]
    """Client -> its optimizer steps of the round."""
    charge: Callable[[Client, int], int | None]
    """Counts a client's steps against its privacy budget and returns the secret that its noise is drawn from."""

    def __call__(
        self, window: Sequence[tuple[Client, Broadcast]], round_num: int
    ) -> Iterable[tuple[LocalResult, float]]:
        """Train these clients from these broadcasts; results come in their order, with busy seconds."""
        # The whole window is charged before any of it trains: work that was begun counts, even if it is lost.
        assignments = [
            Assignment(
                client.client_id,
                started,
                client.indices,
                self.steps[client.client_id],
                client.weight(self.weighting),
                self.charge(client, self.steps[client.client_id]),
            )
            for client, started in window
        ]
        return self.executor.train(assignments, round_num, self.engine)


def steps_of(local: LocalConfig, clients: Iterable[Client]) -> dict[str, int]:
    """Return the optimizer steps of every client in one round."""
    return {client.client_id: num_steps(local, len(client.indices)) for client in clients}
