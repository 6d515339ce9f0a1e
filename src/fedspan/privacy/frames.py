"""Orthonormal coordinates of a product of which one factor is trained and the other is fixed and shared by all.

Shapes: B (m, r), A (r, n); the fixed factor's thin QR Aᵀ = Q·T or B = Q·T, T (q, r) with q = min(r, n) or min(r, m).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Payload, Update, Vector

_SINGULAR = 1e-12


@dataclass(frozen=True, slots=True)
class Frame:
    """The coordinates of one module.

    With Y = σ·X·Tᵀ for a change X of B, X's product is σ·X·A = Y·Qᵀ, so ‖Y‖_F is the norm of the product.

    Y is as wide as X, its spare columns zero where r is larger than n. The first r_k columns of Y belong to the first
    r_k rows of A alone, so what clients of smaller rank send adds up as their factors would.
    """

    triangle: Tensor
    """σ·T, (q, r) in float64."""
    trains_b: bool

    def to_coordinates(self, change: Tensor) -> Tensor:
        """Return Y of X."""
        x = change if self.trains_b else change.mT
        y = torch.zeros_like(x)
        y[:, : len(self.triangle)] = x @ self.triangle.mT
        return y if self.trains_b else y.mT

    def to_change(self, coordinates: Tensor) -> Tensor:
        """Return X of Y: the smallest with that product."""
        y = coordinates if self.trains_b else coordinates.mT
        x: Tensor = y[:, : len(self.triangle)] @ torch.linalg.pinv(self.triangle, rtol=_SINGULAR).mT
        return x if self.trains_b else x.mT


def frames_of(method: Method, sent: Broadcast) -> dict[str, Frame]:
    """Return the frames of the modules of which one factor is trained freely, and the other not at all.

    Where a core is trained between bases, these are orthonormal already: such a module needs no frame.
    """
    recipe = sent.recipe
    free = [n for n in sent.adapter if not {f"{n}/a", f"{n}/b"} & sent.subspaces.keys()]
    if recipe.train_a == recipe.train_b or not free:
        return {}
    ones = {name: _ones(f, recipe.train_b) if name in free else f for name, f in sent.adapter.items()}
    answer, _ = method.encode(Update("ones", 1.0, ones, dict(sent.dense)), sent, None)
    return {name: _frame(name, sent.adapter[name], answer.modules[name], recipe.train_b) for name in free}


def _frame(name: str, f: Factors, answer: Payload, trains_b: bool) -> Frame:
    """Return the frame of one module, given the answer for a trained factor of ones."""
    if not isinstance(answer, Vector) or len(answer.values) != 1:
        raise ValueError(f"client-level privacy: {name} is sent as {type(answer).__name__}: expected one factor")
    (sent_ones,) = answer.values.values()
    fixed = f.a.mT if trains_b else f.b
    triangle = torch.linalg.qr(fixed.double())[1]
    # A method may send its factor times the scaling; the ones as sent show which part of σ is still to be applied.
    return Frame(triangle * (f.scaling / float(sent_ones[0, 0])), trains_b)


def _ones(f: Factors, trains_b: bool) -> Factors:
    return replace(f, b=torch.ones_like(f.b)) if trains_b else replace(f, a=torch.ones_like(f.a))
