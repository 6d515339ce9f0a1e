"""The server's plan for secure sums of which no two are over nearly the same sites: see `privacy.differencing`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from fedspan.config import PrivacyConfig
from fedspan.privacy.differencing import too_near, without_too_near
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes

WAITS = "waits, so that the sum is not over nearly the same sites as an earlier one (privacy.differencing)"


class TooNear(FedspanError):
    """A sum would be over nearly the same sites as an earlier one, and the settings forbid it."""


class RosterPlan:
    """The survivors of a run's sums, which later ones must not be too near to. The sites check it by themselves.

    Parameters
    ----------
    least
        Fewest clients in a sum.
    path
        The file that keeps them for a server that is started again.
    notify
        Called with a line for people.

    Raises
    ------
    FedspanError
        When the file is damaged.
    """

    def __init__(self, privacy: PrivacyConfig, least: int, path: Path, notify: Callable[[str], None]) -> None:
        self._least_difference, self._least = privacy.min_difference, least
        # Under example-level privacy every answer has noise of its own, so that a difference has too.
        self._policy = "allow" if privacy.dp == "example" else privacy.differencing
        self._path, self._notify = path, notify
        self._survivors: dict[str, list[str]] = {}
        """By round and exchange, as `ROUND/EXCHANGE`."""
        if path.exists():
            try:
                self._survivors = {str(k): [str(x) for x in v] for k, v in json.loads(path.read_bytes()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise FedspanError(f"{path} is damaged ({error}): expected the sites of this run's sums") from None

    def choose(self, round_num: int, number: int, ids: Sequence[str], without: Collection[str]) -> Sequence[str]:
        """Return the clients to ask for a sum: all of them, or as many as no earlier sum is too near to.

        Parameters
        ----------
        number
            Of the exchange.
        without
            Clients that have no part in sums any more: what concerns them alone is no reason.

        Raises
        ------
        TooNear
            When there is no such choice.
        """
        if self._policy != "refuse" or len(ids) < self._least:
            return ids
        earlier = self._earlier(round_num, number, without)
        chosen = without_too_near(ids, earlier, self._least_difference, self._least, round_num)
        if chosen is None:
            raise TooNear(
                f"round {round_num + 1} would be over nearly the same sites as an earlier one, whoever of "
                f"{sorted(ids)} is left out: expected other sites, or privacy.differencing = 'warn'"
            )
        return chosen

    def check(self, round_num: int, number: int, survivors: Sequence[str], without: Collection[str]) -> None:
        """Check the survivors of a sum before anyone is asked to unmask it, and record them.

        Raises
        ------
        TooNear
            When they are nearly those of an earlier sum, and the settings forbid it.
        """
        sites = too_near(survivors, self._earlier(round_num, number, without), self._least_difference)
        if sites is not None and self._policy != "allow":
            line = (
                f"round {round_num + 1}: the sum differs from an earlier one by {', '.join(sites)} alone, and the "
                "difference of the two says much about that update"
            )
            if self._policy == "refuse":
                raise TooNear(f"{line}: it is given up (privacy.differencing = 'refuse')")
            self._notify(f"{line} (privacy.differencing)")
        self._survivors[f"{round_num}/{number}"] = list(survivors)
        write_bytes(self._path, json.dumps(self._survivors).encode())

    def _earlier(self, round_num: int, number: int, without: Collection[str]) -> list[list[str]]:
        own = f"{round_num}/{number}"
        return [
            [who for who in survivors if who not in without]
            for name, survivors in self._survivors.items()
            if name != own and name.endswith(f"/{number}")
        ]
