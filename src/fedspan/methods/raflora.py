"""raFLoRA: every component of the rank axis is averaged over the clients that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.glora import Algebra, flexlora
from fedspan.methods.messages import Diagnostics, Factors, Update
from fedspan.support.errors import FedspanError


def raflora(weighting: Literal["rank", "rb"] = "rank", algebra: Algebra = "auto") -> Method:
    """raFLoRA: T' = Σ_j Σ_{k: r_k ≥ j} (n_k / N_j) s_k b_kj a_kj, read out at each client's rank by SVD.

    b_kj and a_kj are column j of B_k and row j of A_k, N_j = Σ_{k: r_k ≥ j} n_k. Plain averaging divides what few
    clients can learn by the examples of all: round by round the components beyond the smallest rank fade (rank
    collapse). Here a component counts in full for any number of clients that have it. At equal ranks T' = T and the
    method is FlexLoRA; at mixed ranks it is exact for T' and not for T, and a client's gauge moves strength between
    components that are weighted differently.

    Source: Wu et al. 2026, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity"
    (2602.13486).
    `weighting = "rb"` is RB-LoRA (Ha et al. 2026, Findings of EACL, "RB-LoRA: Rank-Balanced Aggregation for Low-Rank
    Adaptation with Federated Fine-Tuning"), a reconstruction: the weights p_k·β_j, β_j = N/N_j, are those above, but
    T' = (Σ_k p_k β_j s_k b_kj) (Σ_k p_k β_j a_kj). The paper states the weights; its public code computes them and
    never calls them.
    Differences: component by component, which gives what slices between any rank levels give, since N_j changes only
    at the ranks of the clients; those are the participants of the round, so what none of them has is not in T'. The
    SVD is FlexLoRA's here, from the factors.

    Parameters
    ----------
    weighting
        `rank`: raFLoRA's weights, on the products. `rb`: RB-LoRA's, the same numbers on the zero-padded factors.
    algebra
        As in `glora`.
    """
    if weighting not in ("rank", "rb"):
        raise FedspanError(f"method.weighting = {weighting!r}: expected 'rank' or 'rb'")
    server = flexlora(algebra)

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        by_module = {name: balance(partial.collected, name) for name in state.modules}
        if weighting == "rb":
            mean = _mean_pairs(partial, by_module)
            return server.finish(state, replace(partial, collected=(mean,)))
        updates = [_balanced(update, by_module) for update in partial.collected]
        return server.finish(state, replace(partial, collected=tuple(updates)))

    info = replace(server.info, name="raflora", title="raFLoRA", paper="2602.13486", exact=False, gauge_invariant=False)
    # FlexLoRA's queries are about plain sums.
    return replace(server, info=info, finish=finish, finish_by_queries=None)


def balance(updates: Sequence[Update], module: str) -> Tensor:
    """Return β_j = N / N_j ≥ 1 for every component j that some client has."""
    ranks = [update.factors(module).rank for update in updates]
    counts = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    having = torch.tensor(ranks)[:, None] > torch.arange(max(ranks))  # (K, largest rank)
    return counts.sum() / (counts[:, None] * having).sum(dim=0)


def _balanced(update: Update, by_module: dict[str, Tensor]) -> Update:
    """Return the update with β_j on column j of B, so that a plain weighted sum of such products is T'."""
    modules: dict[str, Factors] = {}
    for name, beta in by_module.items():
        f = update.factors(name)
        b = lowrank.promote(f.b)
        modules[name] = replace(f, b=b * beta[: f.rank].to(b))
    return replace(update, modules=modules)


def _mean_pairs(partial: Partial, by_module: dict[str, Tensor]) -> Update:
    """Return both factors averaged component by component, as the update of one client in place of all."""
    shares = partial.shares()
    modules: dict[str, Factors] = {}
    for name, beta in by_module.items():
        pairs = partial.deltas(name)
        b, a = pairs[0].b, pairs[0].a
        mean = LowRank(_zeros(b, (b.shape[0], len(beta))), _zeros(a, (len(beta), a.shape[1])))
        for x, p in zip(pairs, shares, strict=True):
            weights = p * beta[: x.rank].to(b.device)
            mean.b[:, : x.rank] += x.b * weights
            mean.a[: x.rank] += x.a * weights[:, None]
        mean = LowRank(mean.b.to(b.dtype), mean.a.to(a.dtype))
        modules[name] = Factors(mean.b, mean.a, 1.0)
    return Update("mean", partial.weight, modules, {})


def _zeros(like: Tensor, shape: tuple[int, int]) -> Tensor:
    return like.new_zeros(shape, dtype=torch.float64)
