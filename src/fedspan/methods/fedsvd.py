"""FedSVD: FFA-LoRA rounds, after each of which the server re-factors the global update by its SVD."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank, factors_of, fedit, init_factors
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Recipe, Request, Tensors, Update, Vector
from fedspan.support import parallel


def fedsvd() -> Method:
    """FedSVD: A is frozen and common, B is trained and averaged; then B̄ A = U Σ Vᵀ becomes B = U Σ, A = Vᵀ.

    T = s B̄ A, exactly, before and after the SVD. The rows of A are orthonormal, which bounds the gradient of B; but
    they always span what the first, random A spanned: rotating A inside its row space does not leave it.

    Until something is learnt (B̄ = 0) A stays as it was drawn. As in FFA-LoRA no client has a gauge of its own, A being
    the server's: that is what the tag `gauge_invariant` says here.

    Source: Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA" (2505.12805).
    Differences: the SVD is that of the r×r core, no m×n product is formed; an adapter with another scaling than the
    run's is rescaled into its B; no noise is added here.
    """
    plain = fedit()

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        return Broadcast(factors_of(state), state.dense, Recipe(train_a=False))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        rescaled, kept = plain.encode(update, sent, kept)
        return replace(rescaled, modules={n: Vector({"b": rescaled.factors(n).b}) for n in rescaled.modules}), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        def refactored(name: str) -> Tensors:
            return _orthogonal(partial.mean(name)["b"], state.modules[name]["a"])

        pairs = parallel.ordered_map(refactored, state.modules)
        modules = dict(zip(state.modules, pairs, strict=True))
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="fedsvd",
            title="FedSVD",
            paper="2505.12805",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up="rm",
            traffic_down="r(m+n)",
        ),
        init=init_factors,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
    )


def _orthogonal(b: Tensor, a: Tensor) -> Tensors:
    """Return the same product with the orthonormal rows of its SVD for A, in the shapes of B (m, r) and A (r, n)."""
    a = a.to(b.dtype)
    if not b.any():
        return {"a": a, "b": b}
    # The SVD of the core keeps r directions inside row(A), those of zero strength too: they can still be learnt.
    f = lowrank.svd(LowRank(b, a))
    spare = b.shape[1] - len(f.s)  # where r exceeds m or n, the rest of A stays as it is and its B is zero
    rows, columns = a[len(f.s) :], b.new_zeros((len(b), spare))
    return {"a": torch.cat([f.vh, rows], dim=0), "b": torch.cat([f.u * f.s, columns], dim=1)}
