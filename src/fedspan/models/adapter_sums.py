"""Sums of adapters as adapters."""

from __future__ import annotations

from collections.abc import Mapping

from fedspan.algebra.lowrank import LowRank, stack
from fedspan.methods.messages import Factors


def with_start(start: Mapping[str, Factors], factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
    """Return the sum of the starting adapter and another one as factors, module by module."""
    if not start:
        return factors
    deltas: dict[str, list[LowRank]] = {}
    for adapter in (start, factors):
        for name, f in adapter.items():
            deltas.setdefault(name, []).append(f.delta())
    sums = {name: stack([LowRank(x.b.cpu(), x.a.cpu()) for x in terms]) for name, terms in deltas.items()}
    return {name: Factors(total.b, total.a, 1.0) for name, total in sums.items()}
