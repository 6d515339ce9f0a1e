"""The local work of simulated clients, as assignments for the executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedspan.client.executors import Executor
from fedspan.client.training import Assignment, LocalResult, num_steps
from fedspan.config import LocalConfig
from fedspan.federation.clients import Client
from fedspan.methods.messages import Broadcast
from fedspan.runs.privacy_budget import PrivacyBudget


@dataclass(frozen=True, slots=True)
class SimulatedWork:
    """One round's work of simulated clients; called with a window of them at a time."""

    executor: Executor
    engine: str
    weighting: str
    """`federation.weighting`."""
    steps: Mapping[str, int]
    """Client -> its optimizer steps of the round."""
    budget: PrivacyBudget
    """The budget of the clients' example-level privacy."""

    def __call__(
        self, window: Sequence[tuple[Client, Broadcast]], round_num: int
    ) -> Iterator[tuple[LocalResult, float]]:
        """Train these clients from these broadcasts; results come in their order, with busy seconds."""
        begun = [self.budget.begin(self._assignment(client, started), round_num) for client, started in window]
        trained = self.executor.train([assignment for assignment, _ in begun], round_num, self.engine)
        for (_, charge), (result, seconds) in zip(begun, trained, strict=True):
            # Before anyone else sees it.
            charge(result.update)
            yield result, seconds

    def _assignment(self, client: Client, started: Broadcast) -> Assignment:
        client_id = client.client_id
        return Assignment(client_id, started, client.indices, self.steps[client_id], client.weight(self.weighting))


def steps_of(local: LocalConfig, clients: Iterable[Client]) -> dict[str, int]:
    """Return the optimizer steps of every client in one round."""
    return {client.client_id: num_steps(local, len(client.indices)) for client in clients}
