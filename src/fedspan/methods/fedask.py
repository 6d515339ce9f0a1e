"""FedASK: the range of T from a sketch that is a sum, then T inside that range, a sum as well.

Shapes: X_k (m, n) = s_k B_k A_k, never formed; l = min(R + p, m, n); Ω (n, l); Q (m, l) orthonormal; C (l, n).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import spectral
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.glora import glora
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Subspace, Tensors, Update, Vector
from fedspan.methods.readout import Balance
from fedspan.support import parallel
from fedspan.support.errors import FedspanError

_SKETCH, _RANGE = "rows", "range"
"""The last parts of the names in `Broadcast.subspaces`."""


def fedask(oversampling: int = 8, balance: Balance = "even") -> Method:
    """FedASK: Y = Σ p_k s_k B_k (A_k Ω), Q = orth(Y), Cᵀ = Σ p_k (s_k B_k A_k)ᵀ Q; clients get the SVD of Q C ≈ T.

        1. every client trains and returns s_k B_k (A_k Ω), m·l numbers; the server sums these to Y = T Ω;
        2. every client is sent Q and returns X_kᵀ Q, n·l numbers; the sum is Tᵀ Q, and Q Qᵀ T stands for T.

    The randomized SVD of Halko, Martinsson and Tropp (2011, 0909.4061) with each product by T taken as a sum over the
    clients, so that the server sees sums alone. Exact where T has no more than l directions. Where it has more,
    E ‖T − Q Qᵀ T‖_F² ≤ (1 + R/(p−1)) Σ_{j>R} σ_j² (their theorem 10.5, for p ≥ 2). The basis follows the energy of T;
    that of `glora_sums` follows the clients' projectors, each client's directions counting alike.

    Source: Wen et al. 2025, "Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix" (2507.09990)
    and its public code.
    Differences: Ω is drawn afresh every round from the run's seed and does not travel, where the code draws it once; it
    is the identity where l = n, so that nothing is left to chance; the server keeps the leading R directions and
    clients of any rank get as many as they train, the paper's all train one rank; scalings are folded in; the paper's
    private local training, noise on B alone beside an A that is fixed for the round, is not part of this rule (see
    docs/differential_privacy.md for what is offered here).

    Lost of T, ‖T − U·C‖²/‖T‖², in the setting of the table of `glora_sums` (R = 16, m = 256, n = 224), where its one
    pass sends 9,792 numbers up per client and FedASK 11,520:

    ========  ======  =======  ============  ========
    spectrum  K       `glora`  `glora_sums`  `fedask`
    ========  ======  =======  ============  ========
    flat      10      0.446    0.584         0.540
    flat      50      0.720    0.796         0.785
    flat      100     0.786    0.846         0.839
    decaying  10      0.0010   0.0077        0.0001
    decaying  50      0.0002   0.0097        0.0001
    decaying  100     0.0002   0.0095        0.0001
    ========  ======  =======  ============  ========

    Parameters
    ----------
    oversampling
        p: the columns of the sketch beyond R, the largest client rank.
    balance
        As in `glora`.
    """
    if oversampling < 0:
        raise FedspanError(f"method.oversampling = {oversampling}: expected at least 0")
    # A readout depends on the state alone, not on how it was made.
    plain = glora(balance=balance)
    plan = _Plan(oversampling)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        if state.exchange:
            asked = {name: Subspace(q) for name, q in state.extra.items()}
            return Broadcast({}, {}, subspaces=asked)
        names = list(state.template.modules)
        probes = parallel.ordered_map(lambda name: plan.probe(state, name), names)
        drawn = {f"{n}/{_SKETCH}": Subspace(x, "right") for n, x in zip(names, probes, strict=True)}
        return replace(plain.broadcast(state, request), subspaces=drawn, seeded=frozenset({"subspaces"}))

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        if state.exchange == 0:
            ranges = {f"{name}/{_RANGE}": torch.linalg.qr(partial.mean(name)["sketch"])[0] for name in partial.sums}
            return replace(state, dense=partial.mean_dense(), extra=ranges), {}
        return _closed(state, partial)

    return Method(
        info=MethodInfo(
            name="fedask",
            title="FedASK",
            paper="2507.09990",
            exact=True,
            gauge_invariant=True,
            hetero_rank=True,
            traffic_up=f"(m+n) min(R+{oversampling},m,n)",
            traffic_down=f"r(m+n) + m min(R+{oversampling},m,n)",
        ),
        init=plain.init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM), Exchange(SUM, "again")),
        encode=_encode,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    oversampling: int

    def probe(self, state: ServerState, name: str) -> Tensor:
        """Return Ω, the same on both sides; the identity where it would be square, since Y is then T itself."""
        m, n = state.template.modules[name]
        width = min(state.template.rank + self.oversampling, m, n)
        if width == n:
            return torch.eye(n)
        return spectral.gaussian(n, width, state.template.seed, state.round_num, name, "fedask")


def _encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
    def reply_about(name: str) -> dict[str, Tensor]:
        # Not the factors as they came: after an ill-conditioned gauge their products cancel.
        f = update.factors(name)
        x = lowrank.scaled(lowrank.collected(LowRank(f.b, f.a)), f.scaling)
        if (sketch := sent.subspaces.get(f"{name}/{_SKETCH}")) is not None:
            return {"sketch": x.b @ (x.a @ sketch.basis.to(x.a))}
        q = sent.subspaces[f"{name}/{_RANGE}"].basis.to(x.b)
        return {"core": x.a.mT @ (x.b.mT @ q)}  # (n, l)

    names = list(update.modules)
    replies = zip(names, parallel.ordered_map(reply_about, names), strict=True)
    # Heads go with the sketches.
    first = "subspaces" in sent.seeded
    modules = {name: Vector(reply) for name, reply in replies}
    return replace(update, modules=modules, dense=update.dense if first else {}, moments={}, rate_sum=0.0), kept


def _closed(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
    """Return the next state, from Q and Tᵀ Q: the leading R directions of Q Qᵀ T."""

    def close(name: str) -> tuple[Tensors, float, float]:
        q, c = state.extra[f"{name}/{_RANGE}"], partial.mean(name)["core"].mT
        turn, s = lowrank.left_singular(c, state.template.rank)
        squares = s.double().square()
        keep = min(turn.shape[1], lowrank.numerical_rank(s))
        held = {"u": q.to(c) @ turn[:, :keep], "c": turn[:, :keep].mT @ c}
        return held, float(squares[keep:].sum()), float(squares.sum())

    names = list(state.modules)
    closed = dict(zip(names, parallel.ordered_map(close, names), strict=True))
    cut, size = sum(x for _, x, _ in closed.values()), sum(x for _, _, x in closed.values())
    modules = {name: held for name, (held, _, _) in closed.items()}
    # Beside what the sketch saw of T alone: what it missed would take a further exchange to learn.
    diagnostics = {
        "server_rank": float(max((t["u"].shape[1] for t in modules.values()), default=0)),
        "sketch_truncation_error": (cut / size) ** 0.5 if size > 0 else 0.0,
    }
    return advance(state, modules=modules, extra={}), diagnostics
