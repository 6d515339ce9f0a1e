"""Several cores with scales of their own, as the parameters behind one confined tensor's coordinates.

Shapes: r coordinates in h heads; K, H (r, r) block-diagonal; t (h,).
"""

from __future__ import annotations

import torch
from torch import nn

from fedspan.methods.messages import head_mask, head_of


class HeadCores:
    """The square blocks of one confined tensor's coordinates, K_i = t_i H_i, with H_i and t_i the parameters.

    Zeros between the blocks are no parameters: their gradient is zero, which no optimizer here moves.
    """

    def __init__(self, start: torch.Tensor, heads: int) -> None:
        rank = len(start)
        self.head = head_of(rank, heads).to(start.device)
        self.mask = head_mask(rank, heads).to(start)
        self.start = start * self.mask  # (r, r)
        self.matrices = nn.Parameter(self.start.clone())
        self.scales = nn.Parameter(start.new_ones(min(heads, rank)))

    def take(self, grad: torch.Tensor | None) -> None:
        """Set the parameters' gradients from that of K: t_i ∂K_i for H_i, ⟨∂K_i, H_i⟩ for t_i."""
        if grad is None:
            self.matrices.grad = self.scales.grad = None
            return
        grad = grad * self.mask
        self.matrices.grad = grad * self.scales[self.head][:, None]
        inner = (grad * self.matrices).sum(dim=1)
        self.scales.grad = torch.zeros_like(self.scales).index_add_(0, self.head, inner)

    def moved(self) -> torch.Tensor:
        """Return K − K₀."""
        return self.matrices * self.scales[self.head][:, None] - self.start
