"""Ledgers of example-level privacy: each client's own account of what it has released, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from fedspan.config import PrivacyConfig
from fedspan.privacy.accountant import AccountantFactory, DPEvent
from fedspan.privacy.accounting import accountant_named
from fedspan.privacy.budget import Budget
from fedspan.privacy.example_dp import release
from fedspan.privacy.pld import PLDAccountant
from fedspan.privacy.secret_file import FOLDER, secret_of
from fedspan.support.errors import FedspanError


class Ledger:
    """The releases that one client has made of its own data, in a file of its own, written before the work is done.

    Parameters
    ----------
    delta, limit
        Of the client's budget; a file with another delta is refused.
    accountant
        What ε is computed with; the file does not depend on it.
    """

    def __init__(
        self, path: Path, delta: float, limit: float | None = None, accountant: AccountantFactory = PLDAccountant
    ) -> None:
        self.path = path
        self.budget = Budget(delta, limit, accountant=accountant)
        if path.exists():
            try:
                restored = Budget.restored(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise FedspanError(f"{path}: {error}") from None
            if restored.delta != delta:
                raise FedspanError(f"{path} counts at delta = {restored.delta}: expected privacy.delta = {delta}")
            self.budget = Budget(delta, limit, restored.events, accountant)

    @property
    def spent(self) -> float:
        """ε so far."""
        return self.budget.spent

    def allows(self, event: DPEvent) -> bool:
        """Return whether the client may make that release."""
        return self.budget.allows(event)

    def charge(self, event: DPEvent) -> None:
        """Count the release, whether or not the work that follows is completed.

        Raises
        ------
        FedspanError
            When it would exceed the budget; the release must then not be made.
        """
        after = self.budget.plus(event)
        if not self.budget.allows(event):
            raise FedspanError(
                f"the privacy budget of this site is spent: this round would bring epsilon to {after.spent:.4g}, "
                f"privacy.epsilon = {after.limit}"
            )
        # On the disk before the data is touched: a crash may then count a release too many, never one too few.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".partial")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(after.record(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.budget = after


class ExampleLedgers:
    """The ledgers and secrets of clients that train by DP-SGD, each as if it were at a site of its own.

    Parameters
    ----------
    batch_size
        `local.batch_size`.
    folder
        Of the run, or of a site.
    """

    def __init__(self, privacy: PrivacyConfig, batch_size: int, folder: Path) -> None:
        self.privacy, self.batch_size, self.folder = privacy, batch_size, folder
        self._accountant = accountant_named(privacy.accountant)
        self._secret = secret_of(folder)
        self._ledgers: dict[str, Ledger] = {}

    def allows(self, client_id: str, num_examples: int, steps: int) -> bool:
        """Return whether this client may work for another round."""
        return self._ledger(client_id).allows(self._release(num_examples, steps))

    def charge(self, client_id: str, num_examples: int, steps: int) -> int:
        """Count a round's work before it is done, and return the secret that its noise is drawn from.

        Raises
        ------
        FedspanError
            When it would exceed the budget.
        """
        self._ledger(client_id).charge(self._release(num_examples, steps))
        # Simulated clients share one file of the run; deriving keeps their noise independent.
        derived = hashlib.sha256(f"{self._secret()} {client_id}".encode()).digest()
        return int.from_bytes(derived, "big")

    def spent(self) -> float:
        """Return the largest ε of any client that has worked."""
        return max((ledger.spent for ledger in self._ledgers.values()), default=0.0)

    def _release(self, num_examples: int, steps: int) -> DPEvent:
        return release(self.privacy, self.batch_size, num_examples, steps)

    def _ledger(self, client_id: str) -> Ledger:
        if client_id not in self._ledgers:
            path = self.folder / FOLDER / f"ledger-{client_id}.json"
            self._ledgers[client_id] = Ledger(path, self.privacy.delta, self.privacy.epsilon, self._accountant)
        return self._ledgers[client_id]
