"""GLoRA where the server may see sums alone: first a sketch of the projector sum, then the core inside its basis.

Shapes: B_k (m, r_k), A_k (r_k, n); P_k (m, m) the projector on col(B_k A_k), never formed unless m ≤ l; l = R + 8;
Ω (m, l), U (m, R) with orthonormal columns; C (R, n); G (m, 8) and H (n, 8) Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods import spectral
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.glora import glora, kept_rank, step_of
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Subspace, Template, Update, Vector
from fedspan.methods.queries import Query, Sums, own_contribution
from fedspan.methods.readout import Balance
from fedspan.methods.spectral import PROBES, Approximation, Leading
from fedspan.support import parallel
from fedspan.support.errors import FedspanError

_PARTS = _SKETCH, _BASIS, _LEFT, _RIGHT = "columns", "adjoint", "left", "right"
"""The last parts of the names in `Broadcast.subspaces`: a client multiplies P_k or X_kᵀ by the first two; the others
are the two sides of the probes."""
_VOTES = "votes"


@dataclass(frozen=True, slots=True)
class _Plan:
    """The settings that server and clients share."""

    server_rank: int | Literal["double"] | None
    passes: int

    def rank(self, template: Template, name: str) -> int:
        """Return R, at most m."""
        return min(kept_rank(template, self.server_rank), template.modules[name][0])

    def first(self, state: ServerState, name: str) -> Tensor:
        """Return Ω, the same on both sides from the run's seed and the round; the identity where it would be square."""
        m = state.template.modules[name][0]
        omega = spectral.first_block(m, self.rank(state.template, name), *_key(state, name), _SKETCH)
        # Y is then the whole projector sum.
        return torch.eye(m) if omega.shape[1] == m else omega


def glora_sums(
    server_rank: int | Literal["double"] | None = None, passes: Literal[1, 2] = 1, balance: Balance = "auto"
) -> Method:
    """GLoRA for a server that sees sums alone: Σ p_k P_k Ω, then Σ p_k Wᵀ X_k.

    With X_k = s_k B_k A_k, T = Σ p_k X_k and S = Σ p_k P_k, whose leading eigenvectors are GLoRA's consensus basis:

        1. every client trains and returns P_k Ω; the server sums these to Y = S Ω, and W are the eigenvectors of S,
           which Y determines where they are fewer than l, or else of Y (Ωᵀ Y)⁺ Yᵀ ≈ S (Nyström);
        2. every client is sent W and returns Wᵀ X_k = s_k (Wᵀ B_k) A_k. U are the R leading columns of W, among equal
           votes those of most energy in Wᵀ T = Σ p_k Wᵀ X_k; C = Uᵀ T.

    The state U·C, what is read out of it and what training starts from are those of `glora`. Ω is drawn from the run's
    seed and the round and does not travel. What a client sends has the same shapes whatever its rank and its data, W
    padded by columns of zeros where the clients name fewer than l directions, so that it can be masked and summed.

    Source: ours, based on Chen et al. 2026 (2605.06733); the basis by Gittens and Mahoney 2016 (1303.1849).
    Prior art: FedASK (Wen et al. 2025, 2507.09990) gets the range of T itself from one sketch, and T inside it from a
    second sum; the basis here is that of the clients' projectors. `fedask` has a comparison.
    Differences: from `glora`, the basis: the same where S has no more than l = R + 8 directions (or m ≤ l), up to
    rounding; a sum of projectors in floating point shows a direction only where its eigenvalue stands above rounding,
    so angles between clients' spaces below √eps are not seen. Where the clients name many more directions than l, one
    pass loses more of T. A client that is lost between two exchanges counts in U and in the heads, and not in C.

    Sketches travel in float32, so a client's directions are seen only while its share of the votes stands above
    rounding, at about 1e-5, which matters where its update is as many times larger than the others'. Of T with a client
    of share 1e-4 and an update 1e4 times as large, at an R that holds all directions, less than 2e-4 is lost in norm.
    `truncation_error` says what was lost, as an unbiased estimate.

    Lost of T, ‖T − U·C‖²/‖T‖², by K clients of rank 8 at R = 16 (m = 256, n = 224; clients see one target through
    random directions, its singular values equal or as 1/j²):

    ========  ======  =======  ========  ==========
    spectrum  K       `glora`  one pass  two passes
    ========  ======  =======  ========  ==========
    flat      10      0.445    0.583     0.472
    flat      50      0.679    0.797     0.721
    flat      100     0.752    0.847     0.786
    decaying  10      0.0012   0.0073    0.0012
    decaying  50      0.0003   0.0073    0.0003
    decaying  100     0.0002   0.0075    0.0002
    ========  ======  =======  ========  ==========

    Parameters
    ----------
    server_rank
        R, the rank of the server's state; `none`: the largest client rank, `double`: twice that.
    passes
        2: the clients are asked once more, about what Y adds to Ω, before U is made. That costs another exchange of m·l
        numbers each way, and recovers nearly all that one pass loses.
    balance
        As in `glora`.
    """
    # A readout depends on the state alone, not on how it was made.
    plain = glora(server_rank=server_rank, balance=balance)
    if passes not in (1, 2):
        raise FedspanError(f"method.passes = {passes}: expected 1 or 2")
    plan = _Plan(server_rank, passes)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        if state.exchange:
            return Broadcast({}, {}, subspaces=_asked(state, _BASIS if state.exchange == passes else _SKETCH))
        names = list(state.template.modules)
        drawn: dict[str, Subspace] = {}
        for spaces in parallel.ordered_map(lambda name: _drawn(state, name, plan), names):
            drawn |= spaces
        return replace(plain.broadcast(state, request), subspaces=drawn, seeded=frozenset({"subspaces"}))

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        if state.exchange < passes:
            return _with_basis(state, partial, plan), {}
        return _closed(state, partial, plan)

    return Method(
        info=_info(passes),
        init=plain.init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM), *[Exchange(SUM, "again")] * passes),
        encode=_encode,
    )


def _info(passes: int) -> MethodInfo:
    widths = "min(R+8,m)" if passes == 1 else "min(2R+16,m)"
    second = "" if passes == 1 else " + m(min(2R+16,m)-min(R+8,m))"
    return MethodInfo(
        name="glora_sums",
        title="GLoRA in sums",
        paper="2605.06733, ours",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up=f"(m+n){widths} + {PROBES**2}",
        traffic_down=f"r(m+n) + m {widths}{second}",
    )


def _key(state: ServerState, name: str) -> tuple[object, ...]:
    """Return the key of `glora` with randomized algebra, whose queries are then the same."""
    return state.template.seed, state.round_num, name, "spectral"


def _drawn(state: ServerState, name: str, plan: _Plan) -> dict[str, Subspace]:
    """Return Ω and the probes of one module, for the first exchange."""
    (m, n), key = state.template.modules[name], _key(state, name)
    return {
        f"{name}/{_SKETCH}": Subspace(plan.first(state, name)),
        f"{name}/{_LEFT}": Subspace(spectral.gaussian(m, PROBES, *key, _LEFT)),
        f"{name}/{_RIGHT}": Subspace(spectral.gaussian(n, PROBES, *key, _RIGHT), "right"),
    }


def _asked(state: ServerState, part: str) -> dict[str, Subspace]:
    """Return the subspaces of a later exchange: a second block, or in the last one U."""
    return {name: Subspace(value) for name, value in state.extra.items() if name.endswith(f"/{part}")}


def _encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
    def reply_about(name: str) -> dict[str, Tensor]:
        blocks = {part: sent.subspaces[key].basis for part in _PARTS if (key := f"{name}/{part}") in sent.subspaces}
        own = Sums([own_contribution(update, name)], [1.0])
        reply: dict[str, Tensor] = {}
        if _SKETCH in blocks:
            (reply["sketch"],) = own((Query("columns", blocks[_SKETCH]),))
        if _BASIS in blocks:
            reply["core"] = own((Query("adjoint", blocks[_BASIS]),))[0].mT.contiguous()
        if _LEFT in blocks:
            (x,) = own.contributions
            b, a = lowrank.promote(x.own.b) * x.scaling, lowrank.promote(x.own.a)
            reply["probes"] = (blocks[_LEFT].to(b).mT @ b) @ (a @ blocks[_RIGHT].to(a))
        return reply

    replies = zip(update.modules, parallel.ordered_map(reply_about, list(update.modules)), strict=True)
    # Heads go with the sketches.
    first = "subspaces" in sent.seeded
    modules = {name: Vector(reply) for name, reply in replies if reply}
    return replace(update, modules=modules, dense=update.dense if first else {}, moments={}, rate_sum=0.0), kept


def _with_basis(state: ServerState, partial: Partial, plan: _Plan) -> ServerState:
    """Return the state with U, or with the block that the next exchange is about."""
    extra = {name: value for name, value in state.extra.items() if not name.endswith(f"/{_SKETCH}")}
    if state.exchange == 0:
        extra["weight"] = torch.tensor(partial.weight, dtype=torch.float64)
    for name in partial.sums:
        mean = partial.mean(name)
        y, rank = mean["sketch"], plan.rank(state.template, name)
        omega = plan.first(state, name).to(y)
        if state.exchange == 0:
            extra[f"{name}/probes"] = mean["probes"]
            if plan.passes == 2 and omega.shape[0] > omega.shape[1]:
                extra |= {f"{name}/seen": y, f"{name}/{_SKETCH}": spectral.beside(omega, y)}
                continue
        else:
            omega = torch.cat([omega, state.extra[f"{name}/{_SKETCH}"]], dim=1)
            y = torch.cat([extra.pop(f"{name}/seen"), y], dim=1)
        extra |= _basis(name, omega, y, rank)
    dense = partial.mean_dense() if state.exchange == 0 else state.dense
    return replace(state, dense=dense, extra=extra)


def _basis(name: str, omega: Tensor, y: Tensor, rank: int) -> dict[str, Tensor]:
    """Return W (m, columns of Ω) from Y = S Ω, zero where fewer directions stand above rounding, and their votes."""
    named = _eigenvectors(omega, y, rank)
    width = omega.shape[1] - named.u.shape[1]
    return {f"{name}/{_BASIS}": torch.nn.functional.pad(named.u, (0, width)), f"{name}/{_VOTES}": named.votes}


def _eigenvectors(omega: Tensor, y: Tensor, rank: int) -> Leading:
    """Return the eigenvectors of S that Y shows, or R of them at least where it shows all of S.

    Directions made by rounding need not be cut there: C holds what T is along them, too.
    """
    if omega.shape[0] > omega.shape[1]:
        return spectral.leading(omega, y)
    # All of S is known.
    s = torch.linalg.solve(omega.mT.double(), y.mT.double())  # Sᵀ
    values, vectors = torch.linalg.eigh((s + s.mT) / 2)
    votes = values.flip(0)
    named = int((votes > 4 * len(votes) * torch.finfo(y.dtype).eps * votes[0]).sum())
    named = max(named, rank)
    return Leading(vectors.flip(1)[:, :named].to(y), votes[:named].to(y))


def _closed(state: ServerState, partial: Partial, plan: _Plan) -> tuple[ServerState, Diagnostics]:
    """Return the next state, from U and the sum of the cores."""
    # Probes and cores of different clients would be compared otherwise.
    whole = math.isclose(float(state.extra["weight"]), partial.weight, rel_tol=1e-9)

    def close(name: str) -> Approximation:
        u, c = _chosen(state, name, partial.mean(name)["core"], plan)
        size = float(c.double().square().sum())
        lost = _left_out(state, name, u, c) if whole else 0.0
        return Approximation(spectral.arranged(u.to(c), c), lost, lost + size, True)

    names = list(state.modules)
    step = step_of(dict(zip(names, parallel.ordered_map(close, names), strict=True)))
    known = {key: value for key, value in step.diagnostics.items() if whole or not key.startswith("truncation")}
    return advance(state, modules=step.modules, extra={}), known


def _chosen(state: ServerState, name: str, core: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Return U and C, from the basis W that was sent and Wᵀ T."""
    w, votes, rank = state.extra[f"{name}/{_BASIS}"], state.extra[f"{name}/{_VOTES}"], plan.rank(state.template, name)
    named = len(votes)
    return Leading(w[:, :named], votes).settle(rank).chosen(core[:named], rank)


def _left_out(state: ServerState, name: str, u: Tensor, c: Tensor) -> float:
    """Return an unbiased estimate of ‖T − U C‖_F² from Gᵀ T H: E ‖Gᵀ D H‖_F² = 64 ‖D‖_F² for D independent of G, H."""
    (m, n), key = state.template.modules[name], _key(state, name)
    left, right = (spectral.gaussian(m, PROBES, *key, _LEFT), spectral.gaussian(n, PROBES, *key, _RIGHT))
    inside = (left.to(u).mT @ u) @ (c @ right.to(c))
    return float((state.extra[f"{name}/probes"] - inside).double().square().sum()) / PROBES**2
