"""Distances of low-rank approximations from T = Σ p_k B_k A_k: exact where it is small, else estimated from products.

Shapes: B_k (m, r), A_k (r, n); c = Σ r_k; approximations B̂ Â of rank r.

‖T − X‖_F takes the triangular factor of a QR of c columns, O(c²(m+n)), as much as all the rest of a rule that needs
r of them. Above the bound of `spectral.prefers_exact` it is read off three products of T with a few columns instead: on
an orthonormal V (n, q) that holds the rows of every Â, and those that one power step from them finds in T,

    ‖T − X‖² = ‖(T − X) V‖² + ‖T (I − V Vᵀ)‖²,

of which the first term is exact and the second, the same for every X, is estimated without bias from Gaussian probes
(Girard 1989; Meyer et al. 2021, 2010.09649, on what the exact term saves). So a difference of two distances is exact
either way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import spectral
from fedspan.methods.queries import Contribution, Query, Sums


class Total:
    """T, from which approximations whose rows lie among some given rows are measured.

    Parameters
    ----------
    pairs, shares
        B_k A_k and p_k.
    rows
        The Â (r, n) of all that will be measured; at least one.
    key
        Of the probes' seed: the result depends on it alone, not on any other draw.
    """

    def __init__(self, pairs: Sequence[LowRank], shares: Sequence[float], rows: Sequence[Tensor], *key: object) -> None:
        self.estimated = not measurable(pairs)
        if self.estimated:
            self._seen = _Seen.of(pairs, shares, rows, key)
        else:
            self._whole = lowrank.stack(pairs, shares)

    @functools.cached_property
    def size(self) -> float:
        """‖T‖_F."""
        return self._seen.size() if self.estimated else lowrank.norm(self._whole)

    def distance(self, x: LowRank) -> float:
        """Return ‖T − X‖_F."""
        return self._seen.distance(x) if self.estimated else lowrank.distance(self._whole, x)


def measurable(pairs: Sequence[LowRank]) -> bool:
    """Return whether T is small enough for its exact norm."""
    return spectral.prefers_exact(pairs[0].shape, sum(x.rank for x in pairs), 0)


@dataclass(frozen=True, slots=True)
class _Seen:
    """T V, and an estimate of the rest of T; both of 2^−e T."""

    v: Tensor  # (n, q), orthonormal
    image: Tensor  # (m, q)
    rest: float
    """‖T (I − V Vᵀ)‖²."""
    exponent: int

    @classmethod
    def of(
        cls, pairs: Sequence[LowRank], shares: Sequence[float], rows: Sequence[Tensor], key: tuple[object, ...]
    ) -> _Seen:
        scaled = [lowrank.normalised(x) for x in pairs]
        # One power of two for all: products of factors far from ordinary size have squares beyond float32.
        top = max(e for _, e in scaled)
        sums = Sums([Contribution(x, 2.0 ** max(e - top, -1000)) for x, e in scaled], shares)
        given = torch.cat([_ordinary_rows(a).mT for a in rows], dim=1)
        (image,) = sums([Query("times", torch.linalg.qr(given)[0])])
        (back,) = sums([Query("adjoint", torch.linalg.qr(image)[0])])
        v = torch.linalg.qr(torch.cat([given, back], dim=1))[0]
        probes = spectral.gaussian(v.shape[0], spectral.PROBES, *key, "distances").to(v)
        probes = probes - v @ (v.mT @ probes)
        (image,) = sums([Query("times", torch.cat([v, probes], dim=1))])
        rest = _squares(image[:, v.shape[1] :]) / spectral.PROBES
        return cls(v, image[:, : v.shape[1]], rest, top)

    def size(self) -> float:
        return math.ldexp((_squares(self.image) + self.rest) ** 0.5, self.exponent)

    def distance(self, x: LowRank) -> float:
        b, a = lowrank.promote(x.b).double(), lowrank.promote(x.a).double()
        inside = self.image.double() - (b @ (a @ self.v.double())) * 2.0**-self.exponent
        return math.ldexp((_squares(inside) + self.rest) ** 0.5, self.exponent)


def _ordinary_rows(a: Tensor) -> Tensor:
    """Return the rows of Â near ordinary size, so that none vanishes beside the others in a QR."""
    rows = lowrank.promote(a)
    size: Tensor = rows.abs().amax(dim=1, keepdim=True)
    return rows / torch.where(size > 0, size, torch.ones_like(size))


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())
