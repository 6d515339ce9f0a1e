"""The privacy budget of a run: how much has been spent, and which rounds and clients it still allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedspan.client.training import num_steps
from fedspan.config import LocalConfig, PrivacyConfig
from fedspan.federation.clients import Client
from fedspan.federation.requirements import client_account
from fedspan.methods.base import Method
from fedspan.privacy.budget import Account
from fedspan.privacy.ledgers import ExampleLedgers


class PrivacyBudget(Protocol):
    """The privacy of its clients, or of their examples, that a run may still spend."""

    def able(self, sampled: Sequence[Client]) -> list[Client]:
        """Return the clients that have enough budget left for one more round."""

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round (counted from 0) may not take place; none: it may."""

    def charge(self, client: Client, steps: int) -> int | None:
        """Count a client's work before it is done.

        Returns
        -------
        int or None
            The secret that the noise of its DP-SGD is drawn from; none: it trains without noise of its own.
        """

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return what a round's record says of the first `rounds` rounds."""


@dataclass(frozen=True, slots=True)
class NoBudget:
    """No budget here: there is no privacy to spend, nothing is released, or the sites keep their own ledgers."""

    noise_secret: int | None = None
    """A number for the noise of DP-SGD in a control, which must train as the federation does. Its result is not
    published, so the number need not be secret."""

    def able(self, sampled: Sequence[Client]) -> list[Client]:
        """Return all clients."""
        return list(sampled)

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return none: every round may take place."""
        return None

    def charge(self, client: Client, steps: int) -> int | None:
        """Return the number that noise is drawn from, and count nothing."""
        return self.noise_secret

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class ClientBudget:
    """The budget of client-level privacy. It depends on the number of rounds alone, not on the clients in them."""

    account: Account

    def able(self, sampled: Sequence[Client]) -> list[Client]:
        """Return all clients: leaving any out would make the draw depend on them."""
        return list(sampled)

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round would exceed the budget; none: it does not."""
        if self.account.allows(round_num):
            return None
        return f"the privacy budget of {self.account.limit:g} is spent after {round_num} rounds"

    def charge(self, client: Client, steps: int) -> int | None:
        """Return none: the server adds the noise."""
        return None

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return ε after the first `rounds` rounds."""
        return {"epsilon": self.account.spent(rounds)}


@dataclass(frozen=True, slots=True)
class ExampleBudget:
    """The budget of simulated clients that train by DP-SGD, each with a ledger of its own."""

    examples: ExampleLedgers
    local: LocalConfig
    limit: float | None
    """`privacy.epsilon`."""

    def able(self, sampled: Sequence[Client]) -> list[Client]:
        """Return the clients whose ledgers allow one more round."""
        return [c for c in sampled if self.examples.allows(c.client_id, len(c.indices), self._steps(c))]

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round has no client left; none: it has one."""
        if self.limit is None or cohort:
            return None
        return f"all clients of round {round_num + 1} have spent their privacy budget of {self.limit:g}"

    def charge(self, client: Client, steps: int) -> int | None:
        """Count the work in the client's ledger and return the client's secret.

        Raises
        ------
        FedspanError
            When the work would exceed the budget.
        """
        return self.examples.charge(client.client_id, len(client.indices), steps)

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return the largest ε of any client."""
        return {"epsilon": self.examples.spent()}

    def _steps(self, client: Client) -> int:
        return num_steps(self.local, len(client.indices))


def create_budget(
    method: Method,
    privacy: PrivacyConfig,
    participation: float,
    local: LocalConfig,
    examples: ExampleLedgers | None,
    *,
    released: bool,
) -> PrivacyBudget:
    """Return the budget of a method's run.

    Parameters
    ----------
    examples
        The ledgers of simulated clients under example-level privacy; none: there are none here.
    released
        The result is published: a control's is not, so it spends nothing.
    """
    if released and privacy.dp == "client":
        return ClientBudget(client_account(method, privacy, participation))
    if examples is None:
        return NoBudget()
    if not released:
        return NoBudget(noise_secret=0)
    return ExampleBudget(examples, local, privacy.epsilon)
