"""LoRA-FAIR and its ridge form: FedIT's means, with B̄ corrected so that the product comes nearer the ideal update.

Shapes: N = T Āᵀ (m, r), G = Ā Āᵀ (r, r), E = N − B̄ G (m, r): what the product of the means lacks, seen through Ā.
T stands for Σ p_k B_k A_k: the scaling is common to all clients and left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.distances import Total
from fedspan.methods.fedit import fedit
from fedspan.methods.folds import Exchange, Partial, weighted_mean
from fedspan.methods.messages import Diagnostics
from fedspan.support import parallel
from fedspan.support.errors import FedspanError


@dataclass(frozen=True)
class Round:
    """The clients' factors of one module in one round."""

    pairs: Sequence[LowRank]
    """B_k A_k."""
    shares: Sequence[float]
    """p_k."""
    mean: LowRank
    """FedIT's pair, B̄ Ā."""
    key: tuple[object, ...]
    """Of the seed of whatever is drawn for this module in this round."""

    @functools.cached_property
    def total(self) -> Total:
        """T, for approximations in the rows of Ā."""
        return Total(self.pairs, self.shares, [self.mean.a], *self.key)

    def distances(self, pair: LowRank) -> tuple[float, float, float, bool]:
        """Return ‖T‖, the distances of B̄ Ā and of a pair from it, and whether they are estimates."""
        total = self.total
        if total.estimated and pair.a is not self.mean.a:
            total = Total(self.pairs, self.shares, [self.mean.a, pair.a], *self.key)
        return total.size, total.distance(self.mean), total.distance(pair), total.estimated


Refine = Callable[[Round], LowRank]
"""Returns the pair that is broadcast."""


def lora_fair(penalty: float = 0.01) -> Method:
    """LoRA-FAIR: Ā = Σ p_k A_k and B̄ + ΔB, ΔB = argmin 1 − cos(T, (B̄ + ΔB) Ā) + λ ‖ΔB‖_F.

    Every stationary point is a ridge solution towards some multiple of T, B̄ + ΔB = (ν N + B̄)(I + η G)⁻¹, and ν follows
    from η by a quadratic equation, of which η > 0 gives the largest cosine at each length of ΔB. So the m·r unknowns
    reduce to one, η, bisected to machine precision wherever a grid shows a minimum. The lowest of these counts,
    or ΔB = 0 when that is no worse (as where the gradient of the cosine at B̄ is below λ).
    ΔB = 0 too where T or B̄ Ā is zero and has no cosine, and where B̄ Ā points so far away from T that the objective
    falls all the way to B̄ + ΔB → 0: it has no minimum there, and an adapter that vanishes is none.

    Source: Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement"
    (2411.14961).
    Differences: the paper's objective is minimised as it stands, where the paper takes gradient steps on it; the
    reduction to one unknown is ours. For many clients of a large layer (`fedspan.methods.distances`) ‖T‖ is an
    estimate, usually to a hundredth; it occurs beside λ alone, so that this is a λ that is off by as much.

    Parameters
    ----------
    penalty
        λ, the weight of the correction's norm, above 0.
    """
    _check(penalty)

    def refine(x: Round) -> LowRank:
        g, e = _lacking(x)
        return LowRank(_by_cosine(x.mean.b.double(), g, e, x.total.size, penalty).to(x.mean.b), x.mean.a)

    return nearer(_info("lora_fair", "LoRA-FAIR", "2411.14961"), refine)


def lora_fair_ridge(penalty: float = 0.01) -> Method:
    """LoRA-FAIR with a closed form: ΔB = argmin ‖T − (B̄ + ΔB) Ā‖_F² + λ ‖ΔB‖_F² = (T Āᵀ − B̄ Ā Āᵀ)(Ā Āᵀ + λ I)⁻¹.

    A distance instead of an angle, so that the length is corrected too; the result is never farther from T than FedIT's
    product.

    Source: ours, after Bian et al. 2025 (2411.14961; see `lora_fair`).

    Parameters
    ----------
    penalty
        λ, the weight of the correction's squared norm, above 0, in units of the eigenvalues of Ā Āᵀ (about 1/3 where A
        is as it was drawn).
    """
    _check(penalty)

    def refine(x: Round) -> LowRank:
        g, e = _lacking(x)
        ridge = g + penalty * torch.eye(len(g), dtype=g.dtype, device=g.device)
        return LowRank(x.mean.b + torch.linalg.solve(ridge, e.mT).mT.to(x.mean.b), x.mean.a)

    return nearer(_info("lora_fair_ridge", "LoRA-FAIR (ridge)", "2411.14961, ours"), refine)


def nearer(info: MethodInfo, refine: Refine) -> Method:
    """Return a method that broadcasts one pair made from FedIT's means and the clients' factors.

    Diagnostics: the distance to T of FedIT's product and of the pair that is broadcast, over all modules, relative to
    ‖T‖ (0 where T is zero); `distances_estimated` where they are estimates.
    """
    plain = fedit()

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        shares = partial.shares()

        def refined(name: str) -> tuple[LowRank, tuple[float, float, float, bool]]:
            factors = [update.factors(name) for update in partial.collected]
            pairs = [LowRank(lowrank.promote(f.b), lowrank.promote(f.a)) for f in factors]
            mean = LowRank(weighted_mean([x.b for x in pairs], shares), weighted_mean([x.a for x in pairs], shares))
            module = Round(pairs, shares, mean, (state.template.seed, state.round_num, name))
            pair = refine(module)
            return pair, module.distances(pair)

        by_module = dict(zip(state.modules, parallel.ordered_map(refined, state.modules), strict=True))
        *columns, estimated = zip(*(x for _, x in by_module.values()), strict=True)
        size, before, after = (math.hypot(*column) for column in columns)
        modules = {name: {"a": pair.a, "b": pair.b} for name, (pair, _) in by_module.items()}
        measured = {"fedit_distance": before, "ideal_distance": after}
        diagnostics = {name: value / size if size > 0 else 0.0 for name, value in measured.items()}
        if any(estimated):
            diagnostics["distances_estimated"] = 1.0
        return advance(state, modules=modules, dense=partial.mean_dense()), diagnostics

    return replace(plain, info=info, finish=finish, exchanges=(Exchange(),))


def _info(name: str, title: str, paper: str) -> MethodInfo:
    return replace(fedit().info, name=name, title=title, paper=paper)


def _check(penalty: float) -> None:
    if not (math.isfinite(penalty) and penalty > 0):
        raise FedspanError(f"method.penalty = {penalty}: expected above 0")


def _lacking(x: Round) -> tuple[Tensor, Tensor]:
    """Return G and E in float64; E = Σ p_k B_k ((A_k − Ā) Āᵀ), subtracted first."""
    e = weighted_mean((pair.b @ ((pair.a - x.mean.a) @ x.mean.a.mT) for pair in x.pairs), x.shares)
    a = x.mean.a.double()
    return a @ a.mT, e.double()


@dataclass(frozen=True, slots=True)
class _Cosine:
    """The paper's objective in the eigenbasis of G, in terms of inner products of columns b_j of B̄ and e_j of E."""

    values: Tensor  # (r, 1), the eigenvalues λ_j of G
    bb: Tensor  # (r, 1)
    be: Tensor  # (r, 1)
    ee: Tensor  # (r, 1)
    size: float  # ‖T‖
    penalty: float

    def nu(self, eta: Tensor) -> Tensor:
        """Return the positive root ν of the quadratic, at every η (q,) above 0."""
        lam, d = self.values, 1 + eta * self.values
        bn = lam * self.bb + self.be  # ⟨b_j, n_j⟩ of N = B̄ G + E
        c2 = ((lam * bn + lam * self.be + self.ee) / d**2).sum(dim=0)
        c1 = ((1 - eta * lam) * bn / d**2).sum(dim=0)
        c0 = (eta * lam * self.bb / d**2).sum(dim=0)
        root = (c1**2 + 4 * c2 * c0).sqrt()
        return torch.where(c1 > 0, 2 * c0 / (c1 + root), (root - c1) / (2 * c2))

    def measure(self, eta: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return at the points of η and ν: the objective; ‖X Ā‖; and λ ‖T‖ ‖X Ā‖ ν − ‖ΔB‖, which has the slope's sign.

        The quadratic says that ν ⟨N, X⟩ = η ‖X Ā‖², which rounds less than the sum ⟨N, X⟩ does.
        """
        lam, d = self.values, 1 + eta * self.values
        step, own = (nu - eta) * lam, 1 + nu * lam  # ΔB_j = (step b_j + ν e_j)/d, X_j = (own b_j + ν e_j)/d
        change = ((step**2 * self.bb + 2 * step * nu * self.be + nu**2 * self.ee) / d**2).sum(dim=0)
        rho = (lam * (own**2 * self.bb + 2 * own * nu * self.be + nu**2 * self.ee) / d**2).sum(dim=0)
        change, rho = change.clamp(min=0).sqrt(), rho.clamp(min=0).sqrt()
        objective = 1 - eta * rho / (nu * self.size) + self.penalty * change
        return objective, rho, self.penalty * self.size * rho * nu - change


_GRID = torch.linspace(-23.0, 32.0, 276, dtype=torch.float64)
"""ln(η λ_max): from where ΔB is below 1e-10 of B̄ to where the ridge is below rounding."""
_HALVINGS = 60
_VANISHED = 1e-6


def _by_cosine(b: Tensor, g: Tensor, e: Tensor, size: float, penalty: float) -> Tensor:
    """Return X = B̄ + ΔB (m, r) of the paper's objective."""
    values, vectors = torch.linalg.eigh(g)
    # What Ā maps to zero changes nothing; rounding there would, times a large ν.
    seen = values > 4 * len(values) * torch.finfo(g.dtype).eps * values.max()
    values = values * seen
    given, b, e = b, b @ vectors, (e @ vectors) * seen
    bb, be, ee = ((x * y).sum(dim=0)[:, None] for x, y in ((b, b), (b, e), (e, e)))
    dot, length = float(values @ bb + be.sum()), float((values @ bb).sqrt())
    best, x = 1 - dot / (size * length) if size * length > 0 else -math.inf, given
    turned_back: Tensor = vectors.mT
    for eta, nu, objective, rho in _minima(_Cosine(values[:, None], bb, be, ee, size, penalty)):
        if objective < best and rho > _VANISHED * length:
            # Not B̄ + ΔB: the longer ΔB, the more of X that would cancel.
            best, x = objective, ((1 + nu * values) * b + nu * e) / (1 + eta * values) @ turned_back
    return x


def _minima(problem: _Cosine) -> list[list[float]]:
    """Return (η, ν, objective, ‖X Ā‖) wherever the objective stops falling along the curve of η."""
    top = problem.values.max()

    def at(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        eta = z.exp() / top
        nu = problem.nu(eta)
        return eta, nu, *problem.measure(eta, nu)

    grid = _GRID.to(top.device)
    slope = at(grid)[-1]
    turns = (slope[:-1] < 0) & (slope[1:] >= 0)  # never with a NaN
    low, high = grid[:-1][turns], grid[1:][turns]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        falls = at(middle)[-1] < 0
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    # With a penalty so small that it still falls at the end, the end is the minimum to rounding.
    minima = torch.cat([low, grid[-1:][slope[-1:] < 0]])
    return torch.stack(at(minima)[:-1], dim=1).tolist()
