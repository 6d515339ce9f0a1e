"""Ledgers of privacy: what a site has released of its examples, or a server of its clients, in files of their own.

A release is on the disk before anyone sees it, so that after a crash too much is counted and never too little. It is
entered by what it is about (the draw of coins) and by what it is (a digest): the identical release again, of a resumed
run or after a lost answer, is no new one; everything else is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from fedspan.config import PrivacyConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Update
from fedspan.privacy.accountant import AccountantFactory, DPEvent
from fedspan.privacy.accounting import accountant_named
from fedspan.privacy.asks import Ask, data_digest, update_digest
from fedspan.privacy.budget import Budget, BudgetSpent
from fedspan.privacy.example_dp import release
from fedspan.privacy.gaussian import keyed_digest
from fedspan.privacy.pld import PLDAccountant
from fedspan.privacy.releases import Release, Sample, restored_samples, samples_record, with_release
from fedspan.privacy.secret_file import FOLDER, secret_of
from fedspan.support.errors import FedspanError
from fedspan.support.files import make_folder, write_bytes

_FORMAT = 2
"""Raised whenever the layout changes: a file of another format is refused, never guessed at."""


class Ledger:
    """The releases made of one party's data, in a file of its own that is read anew for every question.

    Parameters
    ----------
    delta, limit
        Of the party's budget; a file with another delta is refused.
    accountant
        What ε is computed with; the file does not depend on it.
    """

    def __init__(
        self, path: Path, delta: float, limit: float | None = None, accountant: AccountantFactory = PLDAccountant
    ) -> None:
        self.path = path
        self._empty = Budget(delta, limit, accountant=accountant)
        self.samples()

    @property
    def spent(self) -> float:
        """ε so far."""
        return self._budget(self.samples()).spent

    def samples(self) -> dict[str, Sample]:
        """Return what was released, by the draw of coins that it is about.

        Raises
        ------
        FedspanError
            When the file is damaged, of another format, or counts at another δ.
        """
        if not self.path.exists():
            return {}
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FedspanError(f"{self.path}: a privacy ledger that cannot be read ({error})") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise FedspanError(f"{self.path} is not a privacy ledger of format {_FORMAT}")
        if record.get("delta") != self._empty.delta:
            raise FedspanError(
                f"{self.path} counts at delta = {record.get('delta')}: expected privacy.delta = {self._empty.delta}"
            )
        try:
            return restored_samples(record["samples"])
        except (KeyError, FedspanError) as error:
            raise FedspanError(f"{self.path}: {error}") from None

    def allows(self, made: Release) -> bool:
        """Return whether the party may make that release."""
        return self.fits(with_release(self.samples(), made))

    def charge(self, made: Release) -> None:
        """Count a release, whether or not anyone comes to see it.

        Raises
        ------
        BudgetSpent
            When it would exceed the budget; the release must then not be made.
        """
        make_folder(self.path.parent)
        # Two processes over one folder, by mistake, must not overwrite each other's entries.
        with FileLock(f"{self.path}.lock"):
            before = self.samples()
            after = with_release(before, made)
            if after == before:
                return
            if not self.fits(after):
                raise self.exceeded(made)
            record = {"format": _FORMAT, "delta": self._empty.delta, "samples": samples_record(after)}
            write_bytes(self.path, json.dumps(record).encode())

    def exceeded(self, made: Release) -> BudgetSpent:
        """Return the error for a release that would exceed the budget."""
        after = self._budget(with_release(self.samples(), made))
        return BudgetSpent(
            f"the privacy budget is spent: this release would bring epsilon to {after.spent:.4g}, "
            f"privacy.epsilon = {after.limit}"
        )

    def fits(self, samples: Mapping[str, Sample]) -> bool:
        """Return whether these releases together are within the budget."""
        budget = self._budget(samples)
        return budget.limit is None or budget.spent <= budget.limit

    def _budget(self, samples: Mapping[str, Sample]) -> Budget:
        return replace(self._empty, events=tuple(sample.event for sample in samples.values()))


class ExampleLedgers:
    """The ledgers and secrets of clients that train by DP-SGD, each as if it were at a site of its own.

    Parameters
    ----------
    batch_size
        `local.batch_size`.
    folder
        Of the run, or of a site.
    setting
        Digest of everything that the results depend on beside the questions: the agreed terms and the base.
    """

    def __init__(self, privacy: PrivacyConfig, batch_size: int, folder: Path, setting: str) -> None:
        self.privacy, self.batch_size, self.folder, self.setting = privacy, batch_size, folder, setting
        self._accountant = accountant_named(privacy.accountant)
        self._secret = secret_of(folder)
        self._ledgers: dict[str, Ledger] = {}
        self._data: dict[str, str] = {}
        """Client -> digest of its examples, which do not change while this process has them in memory."""

    def ask(self, run: str, client_id: str, round_num: int, steps: int, started: Broadcast, examples: Encoded) -> Ask:
        """Return the name of a question: by everything that the answer to it depends on."""
        if client_id not in self._data:
            self._data[client_id] = data_digest(examples)
        about = (self.setting, self._data[client_id])
        return Ask.of(run, client_id, round_num, steps, len(examples), started, about)

    def secret(self, ask: Ask) -> int:
        """Return the secret that the coins and the noise of one question are drawn from, and of no other.

        It depends on the question alone, not on how often it was asked: an exact repetition has the same answer to the
        bit, even where the ledger was lost.
        """
        return int(keyed_digest(self._secret(), "example", ask.client_id, ask.digest), 16)

    def check(self, ask: Ask) -> None:
        """Check the budget before the work.

        Raises
        ------
        BudgetSpent
            When no answer can be within the budget.
        """
        if not self.allows(ask.client_id, ask.run, ask.round_num, ask.num_examples, ask.steps):
            raise self._ledger(ask.client_id).exceeded(self._release(ask, "new"))

    def allows(self, client_id: str, run: str, round_num: int, num_examples: int, steps: int) -> bool:
        """Return whether this client may work in a round.

        It may where it has worked in it before: the answer may be the one that is counted already. If it is not, it is
        refused before it leaves.
        """
        ledger = self._ledger(client_id)
        if any(name.startswith(_place(run, round_num)) for name in ledger.samples()):
            return True
        return ledger.allows(Release("new", "new", self._event(num_examples, steps)))

    def charge(self, ask: Ask, update: Update) -> None:
        """Count a round's answer before it leaves.

        Raises
        ------
        BudgetSpent
            When it would exceed the budget: it must not leave.
        """
        self._ledger(ask.client_id).charge(self._release(ask, update_digest(update)))

    def charge_held_out(self, client_id: str, place: str, name: str) -> None:
        """Count noised statistics of a client's held-out rows, which are in a ledger of their own.

        Parameters
        ----------
        place
            Names the evaluation: the run and the round.
        name
            Digest of everything that the noise is keyed by.

        Raises
        ------
        BudgetSpent
            When it would exceed the budget: they must not leave.
        """
        event = DPEvent(self.privacy.noise_multiplier, 1.0)
        self._ledger(f"{client_id}.held-out").charge(Release(f"held-out/{place}", name, event))

    def held_out_secret(self) -> int:
        """Return the secret that the noise of these statistics is drawn from."""
        return self._secret()

    def spent(self) -> float:
        """Return the largest ε of any client that has worked, in this process or in an earlier one."""
        paths = (self.folder / FOLDER).glob("ledger-*.json")
        return max((self._ledger(path.stem.removeprefix("ledger-")).spent for path in paths), default=0.0)

    def _release(self, ask: Ask, name: str) -> Release:
        coins = keyed_digest(self.secret(ask), "sample")[:32]
        event = self._event(ask.num_examples, ask.steps)
        return Release(_place(ask.run, ask.round_num) + coins, name, event)

    def _event(self, num_examples: int, steps: int) -> DPEvent:
        return release(self.privacy, self.batch_size, num_examples, steps)

    def _ledger(self, client_id: str) -> Ledger:
        if client_id not in self._ledgers:
            path = self.folder / FOLDER / f"ledger-{client_id}.json"
            self._ledgers[client_id] = Ledger(path, self.privacy.delta, self.privacy.epsilon, self._accountant)
        return self._ledgers[client_id]


class ClientLedger:
    """The server's secret, and what its run has released of its clients by client-level privacy.

    Parameters
    ----------
    folder
        Of the run.
    participation
        `federation.participation`, the probability of every client's coin.
    """

    def __init__(self, folder: Path, privacy: PrivacyConfig, participation: float) -> None:
        self.path = folder / FOLDER / "ledger.json"
        self.secret = secret_of(folder)
        self._privacy, self._participation = privacy, participation

    @property
    def spent(self) -> float:
        """ε of everything released so far."""
        return self._ledger().spent

    def charge(self, round_num: int, name: str) -> None:
        """Count the noised sum of one exchange before the noise is drawn.

        Parameters
        ----------
        name
            Digest of the sum and of everything else that the noise is keyed by.

        Raises
        ------
        BudgetSpent
            When it would exceed the budget: there must be no such sum.
        """
        self._ledger().charge(self._release(round_num, name))

    def charge_held_out(self, round_num: int, name: str) -> None:
        """Count the noised statistics of all clients' held-out rows after that many rounds, before noise is drawn.

        Every client is asked, so that no coins amplify it.

        Raises
        ------
        BudgetSpent
            When it would exceed the budget.
        """
        event = DPEvent(self._privacy.noise_multiplier, 1.0)
        self._ledger().charge(Release(f"held-out/{round_num}", name, event))

    def num_released(self, round_num: int) -> int:
        """Return the number of different sums that were released in a round, counted from 0."""
        sample = self._ledger().samples().get(self._release(round_num, "").sample)
        return 0 if sample is None else len(sample.noise)

    def allows(self, round_num: int, num_due: int) -> bool:
        """Return whether a round of that many exchanges fits the budget.

        Sums that were released in this round before a crash count as some of them: if a new one is not the same, it is
        refused when it comes.
        """
        ledger = self._ledger()
        samples = ledger.samples()
        for number in range(num_due - self.num_released(round_num)):
            samples = with_release(samples, self._release(round_num, f"due {number}"))
        return ledger.fits(samples)

    def _release(self, round_num: int, name: str) -> Release:
        # By the coins, so that a secret that was lost and drawn anew begins a new sample.
        coins = keyed_digest(self.secret(), "clients", round_num, self._participation)[:32]
        event = DPEvent(self._privacy.noise_multiplier, self._participation)
        return Release(f"{round_num + 1}/{coins}", name, event)

    def _ledger(self) -> Ledger:
        privacy = self._privacy
        return Ledger(self.path, privacy.delta, privacy.epsilon, accountant_named(privacy.accountant))


def _place(run: str, round_num: int) -> str:
    return f"{run}/{round_num + 1}/"
