"""The batches of a group's steps, in few shapes and with little padding.

Lengths of rows, numbers of answer tokens and of clients that still have steps are rounded up to a few sizes. And the
rows of a step may be taken in several parts, long ones and short ones, whose gradients add up: among the rows of many
clients there is always a long one, to which all others would have to be padded.

Shapes: S steps of C clients with at most b rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.client.passes import Member
from fedspan.data import Encoded
from fedspan.models.counted_dropout import step_seeds
from fedspan.models.losses import fixed_shape_batches

NUMBERS = "numbers"
"""The name beside a batch's inputs of the numbers of its rows within the clients' batches."""
WORTH_A_PART = 2**20
"""Padding that one more part must save, in tokens times the model's hidden size: a part has as many kernels as a whole
step, which take about as long to start as these numbers take to be worked on (measured on an H100)."""
_SPLITS = ((1.0,), (0.25, 0.75), (0.125, 0.375, 0.5))
"""Shares of a client's rows in each part, the longest rows first."""


def rounded_up(size: int, finest: int = 8, each: int = 4) -> int:
    """Return the next of the few sizes that occur: multiples of `finest`, further on `each` to a power of two."""
    step = max(finest, (1 << (size - 1).bit_length()) // (2 * each))
    return -(-size // step) * step


@dataclass(slots=True)
class StepPlan:
    """The batches and rates of all steps of a group, known before the first of them."""

    data: Encoded
    members: Sequence[Member]
    hidden: int
    rows: Tensor  # (S, C, b), each client's longest first; a client with fewer rows or steps repeats a short one
    lengths: Tensor  # (S, C, b) their tokens
    numbers: Tensor  # (S, C, b) their places in the client's own batch
    counts: Tensor  # (S, C) real rows, which are the first
    active: list[int]
    """Clients in the pass, step by step: those with steps left, rounded up."""

    @classmethod
    def of(cls, data: Encoded, members: Sequence[Member], hidden: int) -> StepPlan:
        """Return the plan for these clients, the first of which has the most steps."""
        num_steps, count = members[0].assignment.steps, len(members)
        width = max(len(m.schedule[0]) for m in members)
        tokens = data.lengths
        rows = torch.stack([m.rows[tokens[m.rows].argmin()] for m in members])[:, None].repeat(num_steps, 1, width)
        counts = torch.zeros(num_steps, count, dtype=torch.int64)
        for k, m in enumerate(members):
            counts[: len(m.schedule), k] = torch.tensor([len(own) for own in m.schedule])
            padded = torch.tensor([[*own, *[-1] * (width - len(own))] for own in m.schedule])
            rows[: len(padded), k] = torch.where(padded < 0, rows[0, k], m.rows[padded.clamp(min=0)])
        real = torch.arange(width) < counts[..., None]
        order = torch.where(real, tokens[rows], -1).sort(dim=2, descending=True, stable=True).indices
        rows = rows.gather(2, order)
        left = (counts > 0).sum(dim=1).tolist()
        active = [min(count, rounded_up(number, 1)) for number in left]
        return cls(data, members, hidden, rows, tokens[rows], order, counts, active)

    def rates(self, num_rates: int) -> Tensor:
        """Return the learning rates, (S, 1) for clients of equal rates or (S, C)."""
        own = self.members[:num_rates]
        return torch.tensor([[m.rate(step) for m in own] for step in range(len(self.counts))])

    def seeds(self) -> Tensor:
        """Return the words that the clients' dropout is drawn from, (S, C, 2)."""
        own = [step_seeds(m.dropout_seed, len(self.counts)) for m in self.members]
        return torch.tensor(own, dtype=torch.int64).transpose(0, 1)

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Return one step's batches, on the CPU."""
        active, texts = self.active[step], self.data.texts
        parts, numbers = [], []
        for first, last, length in self._parts(step):
            real = torch.arange(first, last) < self.counts[step, :active, None]
            batch = self.data.batch(self.rows[step, :active, first:last].flatten())
            parts.append((batch, real, length))
            numbers.append(self.numbers[step, :active, first:last].flatten())
        fixed = fixed_shape_batches(parts, texts.pad if texts is not None else 0, rounded_up)
        return [batch | {NUMBERS: own} for batch, own in zip(fixed, numbers, strict=True)]

    def _parts(self, step: int) -> list[tuple[int, int, int]]:
        """Return the first row, the last row and the padded length of each part of a step."""
        lengths = self.lengths[step, : self.active[step]]
        # A repeated row, though short, may lie behind shorter ones.
        longest = lengths.flip(1).cummax(dim=1).values.flip(1).max(dim=0).values.tolist()  # (b,)
        cap = int(self.data.lengths.max())
        best, least = [(0, len(longest), 0)], None
        for shares in _SPLITS:
            ends = [round(len(longest) * sum(shares[: i + 1])) for i in range(len(shares))]
            bounds = [(a, b) for a, b in zip([0, *ends], ends, strict=False) if a < b]
            # Coarser where there are several: with as many sizes for each there would be many shapes in all.
            each = 4 if len(bounds) == 1 else 2
            parts = [(a, b, _length(longest[a], cap, each)) for a, b in bounds]
            tokens = len(lengths) * sum((b - a) * length for a, b, length in parts)
            cost = tokens * self.hidden + WORTH_A_PART * len(parts)
            if least is None or cost < least:
                best, least = parts, cost
        return best


def _length(longest: int, cap: int, each: int) -> int:
    """Return the tokens that rows are padded to, at most those of the longest row of all."""
    rounded = rounded_up(longest, each=each)
    return cap if rounded > 0.9 * cap else rounded
