"""What a run under differential privacy has spent, round by round, of clients or of their examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fedspan.config import Config
from fedspan.privacy.accountant import Event
from fedspan.privacy.example_dp import Ledger, release
from fedspan.privacy.gaussian import kept_secret

FOLDER = "privacy"
"""In a run's folder or a site's, for its owner alone."""


def secret_of(folder: Path) -> Callable[[], int]:
    """The secret that is kept in that folder, made when it is first asked for."""
    return kept_secret(folder / FOLDER / "secret")


class Examples:
    """The ledgers and secrets of clients that train by DP-SGD, each as if it were at a site of its own.

    Parameters
    ----------
    folder
        Of the run, or of a site.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._secret = secret_of(folder)
        self._ledgers: dict[str, Ledger] = {}

    def allows(self, client_id: str, num_examples: int, steps: int) -> bool:
        """Whether this client may work for another round."""
        return self._ledger(client_id).allows(self._release(num_examples, steps))

    def charge(self, client_id: str, num_examples: int, steps: int) -> int:
        """Count a round's work before it is done; the secret that its noise is drawn from.

        Raises
        ------
        ValueError
            When it would exceed the budget.
        """
        self._ledger(client_id).charge(self._release(num_examples, steps))
        told = hashlib.sha256(f"{self._secret()} {client_id}".encode()).digest()
        return int.from_bytes(told, "big")

    def spent(self) -> float:
        """The largest ε of any client that has worked."""
        return max((ledger.spent for ledger in self._ledgers.values()), default=0.0)

    def _release(self, num_examples: int, steps: int) -> Event:
        return release(self.config.privacy, self.config.local.batch_size, num_examples, steps)

    def _ledger(self, client_id: str) -> Ledger:
        if client_id not in self._ledgers:
            p, path = self.config.privacy, self.folder / FOLDER / f"ledger-{client_id}.json"
            self._ledgers[client_id] = Ledger(path, p.delta, p.epsilon)
        return self._ledgers[client_id]
