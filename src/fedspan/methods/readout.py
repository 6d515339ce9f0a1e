"""Adapters for clients: fresh ones, and the best one of a given rank for an update."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank, scales
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, Template
from fedspan.support.seeding import generator

Balance = Literal["auto", "init", "even", "root"]
FRESH = 1 / math.sqrt(3)
"""The expected length of a row of a fresh A: n entries of variance 1/(3n)."""
_SMALL = 2.0**-60
"""Directions of smaller size are brought to length 1 before anything is divided by their size."""


def fresh_a(template: Template, module: str, rank: int, round_num: int = 0) -> Tensor:
    """Return a newly initialised A (rank, n), the same everywhere for the same seed, module and round.

    PEFT's initialisation, U(−1/√n, 1/√n). Row j does not depend on `rank`, so adapters of different ranks nest.
    """
    n = template.modules[module][1]
    values = torch.rand((rank, n), generator=generator(template.seed, module, round_num, "lora_A"))
    return (values * 2 - 1) / math.sqrt(n)


def fresh_adapter(template: Template, rank: int, round_num: int = 0) -> dict[str, Factors]:
    """Return LoRA's start for every module: random A, zero B, hence ΔW = 0."""
    return {
        name: Factors(torch.zeros(m, rank), fresh_a(template, name, rank, round_num), template.scaling(rank))
        for name, (m, _) in template.modules.items()
    }


def leading_adapter(
    template: Template, module: str, x: LowRank, rank: int, round_num: int, balance: Balance = "auto"
) -> Factors:
    """Return the first `rank` directions of X = U·C as an adapter; U orthonormal.

    Where the rows of C are orthogonal, the longest first, this is the best rank-`rank` approximation of X. Direction j,
    of size σ_j = ‖C_j‖ and to be scaled by s, is shared out as b_j = β_j u_j, a_j = α_j C_j/σ_j with s α_j β_j = σ_j.
    The product is the same for every α; Adam's further steps are not (docs/readout.md has figures).

    Where X has fewer directions than `rank`, or one of size zero, that row of A is fresh and the column of B zero: the
    product is the same, and the adapter can still learn there (with both factors zero its gradient would vanish).

    Parameters
    ----------
    balance
        ``auto``: `init` where the clients' optimizer is adaptive, else `even`.
        ``init``: α is the length of a freshly drawn row of A, so that old directions train on as new ones do.
        ``even``: α = β = (σ/s)^½.  ``root``: β = σ^½, α = σ^½/s.
    """
    s = template.scaling(rank)
    keep = min(rank, x.rank)
    b, a = x.b[:, :keep], x.a[:keep]
    size = scales.norms(a, 1)
    if balance == "auto":
        balance = "init" if template.adaptive else "even"
    alpha = {"init": torch.full_like(size, FRESH), "even": (size / s).sqrt(), "root": size.sqrt() / s}[balance]
    live = size > 0
    b = torch.where(live, b * (size / (s * torch.where(live, alpha, 1.0))), 0.0)
    # Rows near length 1 first: α/σ may be beyond the type's range.
    by = torch.where((size > _SMALL) & (size < 1 / _SMALL), 0, -scales.row_exponents(a, 1)[:, 0])
    a = scales.shifted(a, by[:, None]) * (alpha / scales.shifted(size, by))[:, None]
    if keep == rank and bool(live.all()):
        return Factors(b, a, s)
    fresh = fresh_a(template, module, rank, round_num).to(a)
    a = torch.cat([torch.where(live[:, None], a, fresh[:keep]), fresh[keep:]], dim=0)
    return Factors(torch.cat([b, b.new_zeros((x.shape[0], rank - keep))], dim=1), a, s)


def received(answer: Broadcast, name: str) -> LowRank:
    """Return everything that a client adds to its base for one module, adapter and patch, as one pair."""
    terms = [answer.adapter[name].delta()] if name in answer.adapter else []
    patch = answer.patch.get(name)
    if isinstance(patch, LowRank):
        terms.append(patch)
    elif patch is not None:
        u, s, vh = torch.linalg.svd(patch, full_matrices=False)
        terms.append(LowRank(u * s, vh))
    total = lowrank.stack(terms)
    # Fresh rows of A meet zero columns of B: they add nothing but work.
    live = (total.b != 0).any(dim=0) & (total.a != 0).any(dim=1)
    return LowRank(total.b[:, live], total.a[live])
