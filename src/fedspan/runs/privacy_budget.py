"""The privacy budget of a run: how much has been spent, and which rounds and clients it still allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedspan.client.training import Assignment, num_steps
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.federation.clients import Client
from fedspan.federation.requirements import client_account
from fedspan.methods.base import Method
from fedspan.methods.messages import Update
from fedspan.privacy.budget import Account
from fedspan.privacy.ledgers import ClientLedger, ExampleLedgers
from fedspan.runs.context import RunContext
from fedspan.support.errors import FedspanError

Charge = Callable[[Update], None]
"""Counts the result of a client's work before anyone else sees it; raises BudgetSpent where nobody may."""

_SIMULATED = "simulated"
"""Stands for the run in the questions to simulated clients, whose ledgers and secrets are those of one run's folder."""


class PrivacyBudget(Protocol):
    """The privacy of its clients, or of their examples, that a run may still spend."""

    def check(self, rounds: int) -> None:
        """Check that what was counted so far is enough for the rounds that the checkpoint has finished.

        Raises
        ------
        FedspanError
            Where it is not: the ledger was lost, or is older than the checkpoint.
        """

    def able(self, sampled: Sequence[Client], round_num: int) -> list[Client]:
        """Return the clients that have enough budget left for this round, counted from 0."""

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round (counted from 0) may not take place; none: it may."""

    def begin(self, assignment: Assignment, round_num: int) -> tuple[Assignment, Charge]:
        """Return a client's work with the secret that its DP-SGD draws from, if any, and what counts its result."""

    def spent(self) -> Mapping[str, float]:
        """Return what a round's record says of everything spent so far."""


@dataclass(frozen=True, slots=True)
class NoBudget:
    """No budget here: there is no privacy to spend, nothing is released, or the sites keep their own ledgers."""

    noise_secret: int | None = None
    """A number for the noise of DP-SGD in a control, which must train as the federation does. Its result is not
    published, so the number need not be secret."""

    def check(self, rounds: int) -> None:
        """Return: nothing is counted."""

    def able(self, sampled: Sequence[Client], round_num: int) -> list[Client]:
        """Return all clients."""
        return list(sampled)

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return none: every round may take place."""
        return None

    def begin(self, assignment: Assignment, round_num: int) -> tuple[Assignment, Charge]:
        """Return the work with the number that noise is drawn from; its result is not counted."""
        return replace(assignment, secret=self.noise_secret), _uncounted

    def spent(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class ClientBudget:
    """The budget of client-level privacy. It depends on what was released alone, not on the clients in it."""

    account: Account
    ledger: ClientLedger

    def check(self, rounds: int) -> None:
        """Check that the ledger has all sums of the finished rounds."""
        for round_num in range(rounds):
            held, due = self.ledger.num_released(round_num), self.account.num_due(round_num)
            if held < due:
                raise FedspanError(
                    f"{self.ledger.path} counts {held} sums of round {round_num + 1}, which is finished: expected at "
                    f"least {due}; the file was lost or is an older copy, and epsilon cannot be known without it"
                )

    def able(self, sampled: Sequence[Client], round_num: int) -> list[Client]:
        """Return all clients: leaving any out would make the draw depend on them."""
        return list(sampled)

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round would exceed the budget; none: it does not."""
        if self.account.limit is None or self.ledger.allows(round_num, self.account.num_due(round_num)):
            return None
        return f"the privacy budget of {self.account.limit:g} is spent after {round_num} rounds"

    def begin(self, assignment: Assignment, round_num: int) -> tuple[Assignment, Charge]:
        """Return the work as it is: the server adds the noise, and counts."""
        return assignment, _uncounted

    def spent(self) -> Mapping[str, float]:
        """Return ε of everything that the run has released."""
        return {"epsilon": self.ledger.spent}


@dataclass(frozen=True, slots=True)
class ExampleBudget:
    """The budget of simulated clients that train by DP-SGD, each with a ledger of its own."""

    examples: ExampleLedgers
    local: LocalConfig
    limit: float | None
    """`privacy.epsilon`."""
    data: Encoded
    """The training data of all clients."""

    def check(self, rounds: int) -> None:
        """Return: which clients worked in the finished rounds is not known."""

    def able(self, sampled: Sequence[Client], round_num: int) -> list[Client]:
        """Return the clients whose ledgers allow one more round."""
        return [c for c in sampled if self._allows(c, round_num)]

    def refusal(self, round_num: int, cohort: Sequence[Client]) -> str | None:
        """Return why this round has no client left; none: it has one."""
        if self.limit is None or cohort:
            return None
        return f"all clients of round {round_num + 1} have spent their privacy budget of {self.limit:g}"

    def begin(self, assignment: Assignment, round_num: int) -> tuple[Assignment, Charge]:
        """Return the work with a secret of its own, and what enters its result in the client's ledger."""
        a, examples = assignment, self.data.subset(assignment.rows)
        ask = self.examples.ask(_SIMULATED, a.client_id, round_num, a.steps, a.broadcast, examples)
        return replace(a, secret=self.examples.secret(ask)), lambda update: self.examples.charge(ask, update)

    def spent(self) -> Mapping[str, float]:
        """Return the largest ε of any client."""
        return {"epsilon": self.examples.spent()}

    def _allows(self, client: Client, round_num: int) -> bool:
        num_examples = len(client.indices)
        steps = num_steps(self.local, num_examples)
        return self.examples.allows(client.client_id, _SIMULATED, round_num, num_examples, steps)


def create_budget(context: RunContext, method: Method, *, released: bool) -> PrivacyBudget:
    """Return the budget of a method's run.

    Parameters
    ----------
    released
        The result is published: a control's is not, so it spends nothing.
    """
    config, examples = context.config, context.examples
    participation = config.federation.participation
    if released and config.privacy.dp == "client":
        account = client_account(method, config.privacy, participation)
        return ClientBudget(account, ClientLedger(context.out, config.privacy, participation))
    if examples is None:
        return NoBudget()
    if not released:
        return NoBudget(noise_secret=0)
    return ExampleBudget(examples, config.local, config.privacy.epsilon, context.data["train"])


def _uncounted(update: Update) -> None:
    pass
