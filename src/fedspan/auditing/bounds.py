"""The limits that (ε, δ) puts on an attack, and the ε that an attack's success speaks for.

With (ε, δ)-differential privacy every test that decides whether one record was used has

    TPR ≤ e^ε·FPR + δ    and    1 − FPR ≤ e^ε·(1 − TPR) + δ.

Source: Kairouz, Oh and Viswanath 2015, "The Composition Theorem for Differential Privacy" (1311.0776), theorem 2.1,
after Wasserman and Zhou 2010 (0811.2501). The empirical ε is that of Jagielski et al. 2020 (2006.07709).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedspan.auditing.statistics import OperatingPoint


@dataclass(frozen=True, slots=True)
class Guarantee:
    """The (ε, δ) that bounds an attack on one training row."""

    epsilon: float
    delta: float
    source: str
    """One sentence on where it comes from, and of what it is."""

    def best_tpr(self, fpr: float) -> float:
        """Return the largest share of members that any attack can find at that share of false positives."""
        grown = math.exp(self.epsilon) * fpr + self.delta if self.epsilon < 700 else 1.0
        shrunk = 1 - math.exp(-self.epsilon) * (1 - self.delta - fpr)
        return max(0.0, min(1.0, grown, shrunk))

    def best_auc(self) -> float:
        """Return the area under that bound: it is linear between the points where its parts meet."""
        corner = (1 - self.delta) / (1 + math.exp(min(self.epsilon, 700.0)))
        points = sorted({0.0, min(max(corner, 0.0), 1.0), max(0.0, 1 - self.delta), 1.0})
        heights = [self.best_tpr(x) for x in points]
        pairs = zip(points[1:], points, heights[1:], heights, strict=False)
        return sum((x1 - x0) * (y0 + y1) / 2 for x1, x0, y1, y0 in pairs)

    def is_exceeded(self, point: OperatingPoint) -> bool:
        """Return whether an attack did better than the bound allows, beyond what chance explains."""
        return point.tpr.low > self.best_tpr(point.fpr.high)

    def for_one_row(self) -> Guarantee:
        """Return the guarantee for a row of a client whose whole data is protected.

        Such a row's presence replaces one client by another, which is to take one away and to add one: by group privacy
        (2ε, δ(1 + e^ε)).
        """
        grown = self.delta * (1 + math.exp(self.epsilon)) if self.epsilon < 700 else 1.0
        return Guarantee(2 * self.epsilon, min(1.0, grown), self.source)


def empirical_epsilon(point: OperatingPoint, delta: float) -> float:
    """Return the smallest ε that is compatible with the intervals of an operating point, at that δ."""
    tpr, fpr = point.tpr.low, point.fpr.high
    odds = [(tpr - delta) / fpr if fpr > 0 else 0.0, (1 - delta - fpr) / (1 - tpr) if tpr < 1 else 0.0]
    return max(0.0, *(math.log(x) for x in odds if x > 0)) if any(x > 0 for x in odds) else 0.0
