"""The parts that every pass over a cohort has: its members, and each client's own clipped gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.client.batching import batches
from fedspan.client.learning_rates import rate, round_factor
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.config import LocalConfig
from fedspan.methods.messages import Broadcast
from fedspan.models.stacked import Stack
from fedspan.support.seeding import generator

Penalty = tuple[Tensor, Tensor]
"""HetLoRA's λ and k of each client, both (C,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One client of a pass."""

    assignment: Assignment
    local: LocalConfig
    rows: Tensor
    schedule: Sequence[Sequence[int]]
    """Indices into `rows`, step by step."""
    dropout_seed: int
    round_num: int

    @property
    def rates(self) -> tuple[int, float, float, float]:
        """The settings that its learning rates follow from: clients with equal ones share a schedule."""
        factor = round_factor(self.local, self.round_num)
        return self.assignment.steps, self.local.learning_rate, self.local.warmup, factor

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0; 0 after the last."""
        steps = self.assignment.steps
        return rate(self.local, step, steps, self.round_num) if step < steps else 0.0


def member(a: Assignment, settings: TrainingSettings, round_num: int) -> Member:
    """Return a client with the streams that `train` would seed for it: the same keys, so the same batches and masks."""
    own, round_num = a.under(settings, round_num)
    local, key = own.local, (own.seed, round_num)
    schedule = list(batches(len(a.rows), local.batch_size, a.steps, generator(*key, a.client_id, "batches")))
    dropout_seed = generator(*key, a.client_id, "dropout").initial_seed()
    return Member(a, local, torch.as_tensor(a.rows), schedule, dropout_seed, round_num)


def penalty_of(broadcasts: Sequence[Broadcast], device: torch.device) -> Penalty | None:
    """Return the clients' tail penalties, or None where their recipe has none."""
    own = [b.recipe.tail_penalty for b in broadcasts]
    if own[0] is None:
        return None
    strengths, tails = zip(*(p for p in own if p is not None), strict=True)
    return torch.tensor(strengths, device=device), torch.tensor(tails, device=device)


def compute_gradients(
    stack: Stack, parts: Iterable[Tensor], penalty: Penalty | None, clip_norm: float | None, active: int
) -> None:
    """Compute every client's own gradients, clipped by its own norm.

    One backward pass through the sum of the losses is enough: no trained number is shared, so the gradient of the sum
    with respect to one client's numbers is that of its own loss.

    Parameters
    ----------
    parts
        The losses of the clients that are active, (C,), or several parts that add up to them; each is computed when
        it is asked for, after the backward pass of the one before.
    active
        C
    """
    assert stack.trained.grads is not None
    grads = stack.trained.grads[:active]  # (C, P)
    grads.zero_()
    for losses in parts:
        total = losses.sum()
        if penalty is not None:
            strengths, tails = (part[:active] for part in penalty)
            total = total + (stack.tail_penalties(tails) * strengths).sum()
            penalty = None
        torch.autograd.backward(total)
        stack.gather_gradients()
    if clip_norm is not None:
        # The formula of clip_grad_norm_, row by row; the zeros that pad a smaller rank add nothing to the norm.
        norms = torch.linalg.vector_norm(grads, dim=1)
        grads.mul_((clip_norm / (norms + 1e-6)).clamp_(max=1.0)[:, None])


def keep_active(stack: Stack, num_clients: int) -> None:
    """Let the clients after the first `num_clients`, whose steps are done, fall out of the pass."""
    stack.activate(num_clients)
    assert stack.trained.grads is not None
    for k, row in enumerate(stack.rows):
        # The optimizer skips a row without a gradient; with one of zeros, momentum and decay would still move it.
        row.grad = stack.trained.grads[k] if k < num_clients else None
