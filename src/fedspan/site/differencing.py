"""A site's memory of the sums that it has helped to unmask, against sums over nearly the same sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedspan.config import PrivacyConfig
from fedspan.privacy.differencing import too_near
from fedspan.site.errors import Refused
from fedspan.site.storage import SiteStorage
from fedspan.wire.refusals import Code


class Differencing:
    """Compares the survivors of a sum with those of all sums of the same exchange that this site has unmasked.

    Those of other runs too: a server may call any sum another run's, and every run begins with the same base.

    Parameters
    ----------
    notify
        Called with a line for the people at this site.
    """

    def __init__(self, privacy: PrivacyConfig, storage: SiteStorage, notify: Callable[[str], None]) -> None:
        covered = privacy.dp == "example"  # each answer has noise of its own, so that a difference has too
        self._policy = "allow" if covered else privacy.differencing
        self._least, self._storage, self._notify = privacy.min_difference, storage, notify

    def check(self, run: str, sum_name: str, survivors: Sequence[str], warns: bool = True) -> None:
        """Check the survivors of a sum before this site signs or unmasks for them.

        Parameters
        ----------
        sum_name
            This site's own name of the sum: its round and exchange.
        warns
            Say so where they are too near to earlier ones and the settings allow it.

        Raises
        ------
        Refused
            When they are too near, and the settings forbid it.
        """
        if self._policy == "allow":
            return
        number = sum_name.rpartition("/")[2]
        earlier = self._storage.unmasked_for(number, (run, sum_name), strict=self._policy == "refuse")
        sites = too_near(survivors, earlier, self._least)
        if sites is None:
            return
        line = (
            f"sum {sum_name} differs from an earlier one by {', '.join(sites)} alone: the difference of the two sums "
            f"says much about that update; expected {self._least} sites or more, or none (privacy.differencing)"
        )
        if self._policy == "refuse":
            raise Refused(line, Code.DIFFERENCING)
        if warns:
            self._notify(line)
