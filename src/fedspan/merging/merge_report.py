"""The result of a merge in numbers, gathered module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Factors


@dataclass(frozen=True, slots=True)
class Unlimited:
    """A result that was written without a limit of its rank, beside that of the adapters' own rank."""

    rank: int
    """The largest rank of the adapters."""
    lost: float
    """The share of the result's norm that this rank would cut off."""
    written: int
    """Numbers in the written factors."""
    limited: int
    """Numbers in factors of that rank."""
    bytes_each: int = 4
    """Bytes of a written number."""

    def line(self) -> str:
        """Return the choice as a sentence."""
        written, limited = (f"{number * self.bytes_each / 1e6:.3g} MB" for number in (self.written, self.limited))
        return (
            f"No limit of the rank (--rank) was given: the factors take {written}. With {self.rank}, the largest rank "
            f"of the adapters, they would take {limited} and lose {self.lost:.3%} of the norm."
        )


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
    unlimited: Unlimited | None = None
    """The choice of a rank, where none was given and the result has more directions than the adapters."""

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
        if self.unlimited is not None:
            lines.append(self.unlimited.line())
        lines.append(f"Distance from the average of the updates themselves: {self.distance_overall:.3%} of its norm.")
        return lines

    def written_as(self, dtype: torch.dtype | None, full: bool) -> MergeReport:
        """Return the report of a result written in this type, or as a whole model, whose size no rank changes."""
        if self.unlimited is None or full:
            return replace(self, unlimited=None)
        size = torch.float32.itemsize if dtype is None else dtype.itemsize
        return replace(self, unlimited=replace(self.unlimited, bytes_each=size))

    def __str__(self) -> str:
        return " ".join(self.lines())


@dataclass(frozen=True, slots=True)
class Tally:
    """The directions kept and the norms lost, module by module, added up as the merge goes."""

    rank: int | None
    """The largest rank that may be written; None: all directions are."""
    own_rank: int
    """The largest rank of the adapters."""
    kept: dict[str, int] = field(default_factory=dict)
    full: dict[str, int] = field(default_factory=dict)
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    distance: dict[str, tuple[float, float]] = field(default_factory=dict)
    beyond: dict[str, float] = field(default_factory=dict)
    """Norm of the directions beyond the adapters' own rank."""
    sides: dict[str, int] = field(default_factory=dict)
    """m + n: the numbers of one direction."""

    def fit(self, name: str, result: LowRank, target: LowRank) -> Factors:
        """Return the result as a balanced pair of at most `rank` directions, and record its losses."""
        f = lowrank.svd(result)
        full = lowrank.numerical_rank(f.s)
        keep = full if self.rank is None else min(full, self.rank)
        root = f.s[:keep].sqrt()
        factors = Factors(f.u[:, :keep] * root, root[:, None] * f.vh[:keep], 1.0)
        self.kept[name], self.full[name] = keep, full
        self.lost[name] = float(f.s[keep:].norm()), float(f.s.norm())
        self.distance[name] = lowrank.distance(target, factors.delta()), lowrank.norm(target)
        self.beyond[name], self.sides[name] = float(f.s[self.own_rank :].norm()), sum(result.shape)
        return factors

    def report(
        self, method: str, shares: Sequence[float], num_dense: int, diagnostics: Mapping[str, float]
    ) -> MergeReport:
        """Return the report of the merge."""
        return MergeReport(
            method,
            tuple(shares),
            max(1, *self.kept.values()),
            self.kept,
            self.full,
            {name: _share(*pair) for name, pair in self.lost.items()},
            _share(*(math.hypot(*norms) for norms in zip(*self.lost.values(), strict=True))),
            {name: _share(*pair) for name, pair in self.distance.items()},
            _share(*(math.hypot(*norms) for norms in zip(*self.distance.values(), strict=True))),
            num_dense,
            diagnostics,
            self._unlimited(),
        )

    def _unlimited(self) -> Unlimited | None:
        """Return the choice of a rank; None where one was given, or all fits into that of the adapters."""
        if self.rank is not None or max(self.full.values(), default=0) <= self.own_rank:
            return None
        norms = math.hypot(*self.beyond.values()), math.hypot(*(norm for _, norm in self.lost.values()))
        # A PEFT folder has one rank: modules of fewer directions are filled with zeros.
        each, most = sum(self.sides.values()), max(self.full.values())
        written, limited = each * most, each * min(self.own_rank, most)
        return Unlimited(self.own_rank, _share(*norms), written, limited)


def _share(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf
