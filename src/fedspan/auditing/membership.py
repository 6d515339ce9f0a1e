"""Membership inference: can somebody with the model tell the rows that it was trained on from rows that it was not?

Three scores, each higher for a likelier member:

* **loss**: −ℓ(x), the trained model's loss (Yeom et al. 2018, 1709.01604);
* **calibrated loss**: ℓ₀(x) − ℓ(x), with ℓ₀ the loss of the untouched base, so that rows that are easy for any model do
  not count (Watson et al. 2022, 2111.08440; for language models Mireshghallah et al. 2022, 2203.03929);
* **loss ratio**: −ℓ(x)/ℓ₀(x), the same for losses of very different size (Carlini et al. 2021, 2012.07805).

A **control** makes the first attack on the untouched base. It has never seen the members, so if its AUC is not ½ the
members and the non-members differ by themselves, and the other figures are of that difference too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspan.auditing.rows import FEWEST, AuditRows
from fedspan.auditing.statistics import (
    CONFIDENCE,
    Interval,
    OperatingPoint,
    Scores,
    at_false_positives,
    auc,
    curve,
)
from fedspan.auditing.subject import RowLosses

LIMITS = (0.01, 0.1)
"""Shares of false positives at which attacks are judged."""
_LEAST_LOSS = 1e-12
"""A base that is certain of a row has a loss of 0, which nothing can be divided by."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack on the rows of one site, or of all."""

    name: str
    site: str | None
    """None: all members."""
    num_members: int
    num_others: int
    compared_with: str
    auc: Interval
    adjusted_low: float
    """Lower end of the AUC's interval at a confidence corrected for the number of attacks (Bonferroni)."""
    points: tuple[OperatingPoint | None, ...]
    """One for each of `LIMITS`; None with too few non-members for it."""
    roc: Sequence[tuple[float, float]] = ()

    @property
    def succeeds(self) -> bool:
        """True where members are told from non-members better than chance explains, whatever else was tried."""
        return self.adjusted_low > 0.5


@dataclass(frozen=True, slots=True)
class Membership:
    """All attacks, and the control."""

    attacks: tuple[Attack, ...]
    control: Attack
    too_small: tuple[str, ...]
    """Sites with too few rows to be judged by themselves."""

    @property
    def whole(self) -> tuple[Attack, ...]:
        """The attacks on all rows together."""
        return tuple(attack for attack in self.attacks if attack.site is None)

    @property
    def strongest(self) -> Attack:
        """The attack on all rows with the largest AUC."""
        return max(self.whole, key=lambda attack: attack.auc.value)

    @property
    def succeeded(self) -> tuple[Attack, ...]:
        """The attacks that found members: those on all rows first, then the strongest."""
        found = [attack for attack in self.attacks if attack.succeeds]
        return tuple(sorted(found, key=lambda attack: (attack.site is not None, -attack.auc.value)))

    @property
    def differs_before(self) -> bool:
        """True where members and non-members differ for the untouched base already."""
        return not self.control.auc.low <= 0.5 <= self.control.auc.high


def infer(rows: AuditRows, members: RowLosses, others: RowLosses) -> Membership:
    """Make all attacks.

    Parameters
    ----------
    members, others
        The losses on `rows.members` and on `rows.others`.
    """
    x, y = _scores(members), _scores(others)
    scores = {name: (x[name], y[name]) for name in x}
    judged = [s for s in rows.sites if min(len(s.members), len(s.others)) >= FEWEST] if len(rows.sites) > 1 else []
    small = tuple(s.name for s in rows.sites if s not in judged) if len(rows.sites) > 1 else ()
    num_attacks = len(scores) * (1 + len(judged))
    whole = rows.whole
    attacks = [
        _attack(name, None, x[whole.members], y[whole.others], whole.matched_by, num_attacks, with_curve=True)
        for name, (x, y) in scores.items()
    ]
    attacks += [
        _attack(name, site.name, x[site.members], y[site.others], site.matched_by, num_attacks)
        for site in judged
        for name, (x, y) in scores.items()
    ]
    untouched = -members.base[whole.members], -others.base[whole.others]
    control = _attack("loss of the untouched base", None, *untouched, whole.matched_by, 1)
    return Membership(tuple(attacks), control, small)


def _scores(losses: RowLosses) -> dict[str, Scores]:
    return {
        "loss": -losses.trained,
        "calibrated loss": losses.base - losses.trained,
        "loss ratio": -losses.trained / np.maximum(losses.base, _LEAST_LOSS),
    }


def _attack(
    name: str,
    site: str | None,
    members: Scores,
    others: Scores,
    compared_with: str,
    num_attacks: int,
    with_curve: bool = False,
) -> Attack:
    # A loss that overflowed is larger than every other.
    x, y = (np.nan_to_num(scores, nan=-1e300, posinf=1e300, neginf=-1e300) for scores in (members, others))
    corrected = 1 - (1 - CONFIDENCE) / num_attacks
    return Attack(
        name=name,
        site=site,
        num_members=len(x),
        num_others=len(y),
        compared_with=compared_with,
        auc=auc(x, y),
        adjusted_low=auc(x, y, corrected).low,
        points=tuple(at_false_positives(x, y, limit) for limit in LIMITS),
        roc=curve(x, y) if with_curve else (),
    )
