"""Orthonormal coordinates of a product of which one factor is trained and the other is everybody's.

Shapes: B (m, r), A (r, n); the fixed factor's thin QR Aᵀ = Q·T or B = Q·T, T (q, r) with q = min(r, n) or min(r, m).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Update, Vector
from fedspan.support.errors import FedspanError

_SINGULAR = 1e-12


@dataclass(frozen=True, slots=True)
class Frame:
    """One module's: with Y = σ·X·Tᵀ for a change X of B, X's product is σ·X·A = Y·Qᵀ, so ‖Y‖_F is the product's norm.

    Y is as wide as X, its spare columns zero where r is larger than n. The first r_k columns of Y belong to the first
    r_k rows of A alone, so what clients of smaller rank send adds up as their factors would.
    """

    triangle: Tensor
    """σ·T, (q, r) in float64."""
    trains_b: bool

    def into(self, change: Tensor) -> Tensor:
        """Y from X."""
        x = change if self.trains_b else change.mT
        y = torch.zeros_like(x)
        y[:, : len(self.triangle)] = x @ self.triangle.mT
        return y if self.trains_b else y.mT

    def out(self, coordinates: Tensor) -> Tensor:
        """X from Y: the smallest with that product."""
        y = coordinates if self.trains_b else coordinates.mT
        x: Tensor = y[:, : len(self.triangle)] @ torch.linalg.pinv(self.triangle, rtol=_SINGULAR).mT
        return x if self.trains_b else x.mT


def frames_of(method: Method, sent: Broadcast) -> dict[str, Frame]:
    """The frames of the modules of which one factor is trained freely, and the other not at all.

    Bases between which a core is trained are orthonormal already: such a module needs none.
    """
    recipe = sent.recipe
    if recipe.train_a == recipe.train_b:
        return {}
    free = [n for n in sent.adapter if not {f"{n}/a", f"{n}/b"} & sent.subspaces.keys()]
    if not free:
        return {}
    ones = {name: _ones(f, recipe.train_b) if name in free else f for name, f in sent.adapter.items()}
    answer, _ = method.encode(Update("ones", 1.0, ones, dict(sent.dense)), sent, None)
    found: dict[str, Frame] = {}
    for name in free:
        f, payload = sent.adapter[name], answer.modules[name]
        if not isinstance(payload, Vector) or len(payload.values) != 1:
            raise FedspanError(f"client-level privacy: {name} is sent as {type(payload).__name__}: expected one factor")
        (sent_as,) = payload.values.values()
        fixed = f.a.mT if recipe.train_b else f.b
        triangle = torch.linalg.qr(fixed.double())[1]
        # What the method makes of a factor of ones tells whether it folds the scaling into it.
        found[name] = Frame(triangle * (f.scaling / float(sent_as[0, 0])), recipe.train_b)
    return found


def _ones(f: Factors, trains_b: bool) -> Factors:
    return replace(f, b=torch.ones_like(f.b)) if trains_b else replace(f, a=torch.ones_like(f.a))
