"""FedMomentum: the leading directions of the aggregate go on as the adapter, the rest is added to every base.

Shapes: c = Σ r_k; T = U Σ Vᵀ, U (m, q), V (n, q) with q ≤ min(m, n, c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank
from fedspan.methods.flora import patches_of
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Diagnostics, Request, Template, Tensors
from fedspan.methods.patches import Patch, PatchLog, patch_sum
from fedspan.methods.readout import Balance, leading_adapter
from fedspan.support import parallel
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class _Divided:
    """One module's T in two parts."""

    leading: Tensors
    """U_r and Σ_r V_rᵀ, as "u" and "c"."""
    residual: Patch | None
    """T − T_r; none where T has no more than r directions."""
    size_squared: float
    left_squared: float
    """‖T‖_F² and ‖T − T_r‖_F²."""


def fedmomentum(balance: Balance = "even") -> Method:
    """FedMomentum: T = U Σ Vᵀ; the first r directions become the next adapter, T − T_r is added to every client's base.

    Unlike FLoRA, which starts every round with an empty adapter, clients go on training what was learnt most of; unlike
    FlexLoRA nothing is lost, because the directions beyond r move into the base. "Momentum" is the paper's word for
    that continuation: there is no velocity here as in FedAvgM. Of the K·r directions of a round (K−1)·r at most are
    sent down in the patch.

    Source: Yan et al. 2026, "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning" (2603.08014),
    from its abstract and public summaries.
    Differences: the SVD is exact and from the factors, where the paper uses a randomized one; the residual enters the
    base in the same round, the paper merging it "later"; it stays beside the base in float32 and is low-rank while
    that is smaller. How Σ is shared between the factors is an option, because the public text leaves it open.

    Parameters
    ----------
    balance
        As in `glora`.
    """

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        template, log = state.template, patches_of(state)
        held = {name: LowRank(t["u"], t["c"]) for name, t in state.modules.items()}
        adapter = {
            name: leading_adapter(template, name, x, template.rank, state.round_num, balance)
            for name, x in held.items()
        }
        return Broadcast(adapter, state.dense, patch=log.total, news=log.since(request.seen))

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        shares, rank = partial.shares(), state.template.rank

        def divide(name: str) -> _Divided:
            pairs = partial.products(name)
            _check_ranks(partial.deltas(name), rank)
            return _divided(lowrank.stack(pairs, shares), rank)

        parts = dict(zip(state.modules, parallel.ordered_map(divide, state.modules), strict=True))
        residuals = {name: part.residual for name, part in parts.items() if part.residual is not None}
        log = patches_of(state).append(residuals) if residuals else patches_of(state)
        size, left = (sum(getattr(p, part) for p in parts.values()) for part in ("size_squared", "left_squared"))
        return advance(
            state, modules={n: part.leading for n, part in parts.items()}, patches=log, dense=partial.mean_dense()
        ), {"residual_share": (left / size) ** 0.5 if size > 0 else 0.0}

    return Method(
        info=MethodInfo(
            name="fedmomentum",
            title="FedMomentum",
            paper="2603.08014",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up="r(m+n)",
            traffic_down="r(m+n) + min((K-1)r(m+n), mn)",
        ),
        init=_init,
        broadcast=broadcast,
        finish=finish,
    )


def _init(template: Template, dense: Tensors) -> ServerState:
    empty = {name: lowrank.zeros(m, n) for name, (m, n) in template.modules.items()}
    return ServerState(template, {n: {"u": x.b, "c": x.a} for n, x in empty.items()}, dense, patches=PatchLog({}))


def _check_ranks(pairs: Sequence[LowRank], rank: int) -> None:
    for x in pairs:
        if x.rank != rank:
            raise FedspanError(f"an adapter of rank {x.rank}: expected rank {rank} for every client")


def _divided(total: LowRank, rank: int) -> _Divided:
    f = lowrank.svd(total)
    squares = f.s.double().square()
    # Rounding of the factors adds directions that T does not have.
    live = lowrank.numerical_rank(f.s, lowrank.term_size(total))
    keep = min(rank, live)
    u, c = f.u[:, :live], f.s[:live, None] * f.vh[:live]
    residual = patch_sum(None, LowRank(u[:, keep:].contiguous(), c[keep:].contiguous())) if live > keep else None
    leading = {"u": u[:, :keep].contiguous(), "c": c[:keep].contiguous()}
    return _Divided(leading, residual, float(squares.sum()), float(squares[keep:].sum()))
