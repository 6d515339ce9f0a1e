"""The result of a merge in numbers, gathered module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Factors


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The result of a merge in numbers. All losses are shares of a Frobenius norm, 0 for none."""

    method: str
    shares: tuple[float, ...]
    """p_k, in the order of the folders; of TIES and its like the factors of the changes, as PEFT has them."""
    rank: int
    """r of the written adapter."""
    ranks: Mapping[str, int]
    """Directions written, per module."""
    full_ranks: Mapping[str, int]
    """Directions of the method's result, per module: the rank that holds all of it."""
    lost: Mapping[str, float]
    """‖result − written‖ / ‖result‖ per module: the part of the method's result that the rank limit cut off."""
    lost_overall: float
    """The same over all modules together."""
    distance: Mapping[str, float]
    """‖T − written‖ / ‖T‖ per module: the written adapter's distance from the true average."""
    distance_overall: float
    """The same over all modules together."""
    num_dense: int
    """Whole weights (heads) averaged."""
    diagnostics: Mapping[str, float]
    """The method's own diagnostics."""

    def lines(self) -> list[str]:
        """Return the report as sentences."""
        shares = ", ".join(f"{share:.4g}" for share in self.shares)
        heads = f" and {self.num_dense} whole weights" if self.num_dense else ""
        lines = [
            f"{self.method}: {len(self.shares)} adapters (weights {shares}) merged into one "
            f"of rank {self.rank}, {len(self.ranks)} modules{heads}."
        ]
        cut = [name for name, full in self.full_ranks.items() if full > self.ranks[name]]
        if cut:
            worst = max(cut, key=lambda name: self.lost[name])
            lines.append(
                f"The rank does not hold all of it: {len(cut)} modules were cut and {self.lost_overall:.3%} "
                f"of the norm is lost (most in {worst}, {self.lost[worst]:.3%}); "
                f"rank {max(self.full_ranks.values())} would hold everything."
            )
        else:
            lines.append(f"The adapter holds all that {self.method} gives.")
        lines.append(f"Distance from the average of the updates themselves: {self.distance_overall:.3%} of its norm.")
        return lines

    def __str__(self) -> str:
        return " ".join(self.lines())


@dataclass(frozen=True, slots=True)
class Tally:
    """The directions kept and the norms lost, module by module, added up as the merge goes."""

    kept: dict[str, int]
    full: dict[str, int]
    lost: dict[str, tuple[float, float]]
    distance: dict[str, tuple[float, float]]

    def fit(self, name: str, result: LowRank, target: LowRank, rank: int | None) -> Factors:
        """Return the result as a balanced pair of at most `rank` directions, and record its losses."""
        f = lowrank.svd(result)
        full = lowrank.numerical_rank(f.s)
        keep = full if rank is None else min(full, rank)
        root = f.s[:keep].sqrt()
        factors = Factors(f.u[:, :keep] * root, root[:, None] * f.vh[:keep], 1.0)
        self.kept[name], self.full[name] = keep, full
        self.lost[name] = float(f.s[keep:].norm()), float(f.s.norm())
        self.distance[name] = lowrank.distance(target, factors.delta()), lowrank.norm(target)
        return factors

    def report(
        self,
        method: str,
        shares: Sequence[float],
        rank: int,
        num_dense: int,
        diagnostics: Mapping[str, float],
    ) -> MergeReport:
        """Return the report of the merge."""
        return MergeReport(
            method,
            tuple(shares),
            rank,
            self.kept,
            self.full,
            {name: _share(*pair) for name, pair in self.lost.items()},
            _share(*(math.hypot(*norms) for norms in zip(*self.lost.values(), strict=True))),
            {name: _share(*pair) for name, pair in self.distance.items()},
            _share(*(math.hypot(*norms) for norms in zip(*self.distance.values(), strict=True))),
            num_dense,
            diagnostics,
        )


def _share(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf
