"""Frozen additions to the base, kept low-rank while that is smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.support.errors import FedspanError

Patch = LowRank | Tensor
"""A frozen addition to one base weight: low-rank while that is smaller, dense otherwise."""


@dataclass(frozen=True, slots=True)
class PatchLog:
    """The base's accumulated patch and its latest increments.

    A client that was away fetches the increments it missed, or the whole patch where that is smaller. A total whose
    factors outgrow the m×n matrix is kept dense, and increments that outgrow the total are dropped, so the log
    stays within twice the size of the dense patch for any number of rounds.
    """

    total: Mapping[str, Patch]
    version: int = 0
    increments: tuple[Mapping[str, Patch], ...] = ()
    """The increments that led to versions version − len(increments) + 1 … version."""

    def append(self, increment: Mapping[str, Patch]) -> PatchLog:
        """Return the log after adding `increment` to the base."""
        increment = {name: patch_sum(None, patch) for name, patch in increment.items()}
        total = dict(self.total)
        for name, patch in increment.items():
            total[name] = patch_sum(total.get(name), patch)
        kept: list[Mapping[str, Patch]] = []
        budget = patch_numel(total)
        for candidate in (increment, *reversed(self.increments)):
            budget -= patch_numel(candidate)
            if budget < 0:
                break
            kept.append(candidate)
        return PatchLog(total, self.version + 1, tuple(reversed(kept)))

    def since(self, seen: int) -> tuple[Mapping[str, Patch], ...]:
        """Return the patches that a client with version `seen` must fetch: increments to add, or the one whole patch.

        As many increments as versions missed; otherwise (never for a client that missed one) the whole patch.

        Raises
        ------
        FedspanError
            When the client holds a version that this log has not reached.
        """
        missed = self.version - seen
        if missed < 0:
            raise FedspanError(f"a client holds patch version {seen}: expected at most {self.version}")
        if missed == 0:
            return ()
        return self.increments[-missed:] if missed <= len(self.increments) else (self.total,)


def patch_sum(x: Patch | None, y: Patch) -> Patch:
    """Return x + y, kept low-rank while the factors are smaller than the matrix."""
    total: Patch
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        total = lowrank.stack([x, y])
    else:
        total = y if x is None else patch_dense(x) + patch_dense(y)
    if isinstance(total, LowRank) and total.rank * sum(total.shape) >= math.prod(total.shape):
        return total.dense()
    return total


def patch_dense(x: Patch) -> Tensor:
    """Return the patch as an m×n matrix."""
    return x.dense() if isinstance(x, LowRank) else x


def patch_tensors(x: Patch) -> dict[str, Tensor]:
    """Return the patch's tensors by name: its factors "b" (m, r) and "a" (r, n), or "w" (m, n)."""
    return {"b": x.b, "a": x.a} if isinstance(x, LowRank) else {"w": x}


def patch_of(tensors: Mapping[str, Tensor]) -> Patch:
    """Return the patch that `patch_tensors` took apart."""
    return tensors["w"] if "w" in tensors else LowRank(tensors["b"], tensors["a"])


def patch_numel(patch: Mapping[str, Patch]) -> int:
    """Return the number of entries that the patch stores."""
    return sum(t.numel() for p in patch.values() for t in patch_tensors(p).values())
