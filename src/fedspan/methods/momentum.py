"""Momentum on a server state that is a product U·C: heavy ball in low-rank form.

S_t = trunc_R(T̂_t + β (S_{t−1} − S_{t−2})), T̂_t being what the server would hold without momentum. The sum is a stack
of at most 3R columns, so it costs one small SVD per module and never a dense matrix; and since it is taken of
products, no client's gauge can be seen in it, which factors extrapolated one by one would show.

Shapes: U (m, R), C (R, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Tensors
from fedspan.methods.queries import ServerStep
from fedspan.support import parallel

Limits = Callable[[str], tuple[int, float | None]]
"""Module -> R, and the share of the sum's norm up to which fewer directions are kept; none: R of them."""


def previous(m: int, n: int) -> Tensors:
    """Return S_{−1} = 0, the state before the first, as the entries that momentum keeps beside U and C."""
    nothing = lowrank.zeros(m, n)
    return {"u0": nothing.b, "c0": nothing.a}


def extrapolated(state: ServerState, step: ServerStep, momentum: float, limits: Limits) -> ServerStep:
    """Return the step with β (S_{t−1} − S_{t−2}) added to every module and cut to R again, by energy.

    Without truncation this is FedAvgM on T (Hsu et al. 2019, 1909.06335): Polyak's heavy ball. What the second
    truncation discards is reported as "momentum_truncation_error", a share of the sum's norm over all modules.

    Parameters
    ----------
    state
        The state of the round before, whose modules hold S_{t−1} as "u", "c" and S_{t−2} as "u0", "c0".
    step
        T̂_t as "u", "c".
    """

    def push(name: str) -> tuple[LowRank, float, float]:
        held, new = state.modules[name], step.modules[name]
        terms = [LowRank(new["u"], new["c"]), LowRank(held["u"], held["c"]), LowRank(held["u0"], held["c0"])]
        return _cut(terms, [1.0, momentum, -momentum], *limits(name))

    pushed = dict(zip(step.modules, parallel.ordered_map(push, step.modules), strict=True))
    modules: dict[str, Tensors] = {}
    for name, (x, _, _) in pushed.items():
        modules[name] = {"u": x.b, "c": x.a, "u0": state.modules[name]["u"], "c0": state.modules[name]["c"]}
    lost, size = sum(lost for _, lost, _ in pushed.values()), sum(size for _, _, size in pushed.values())
    diagnostics = {
        **step.diagnostics,
        **_certified(step, pushed),
        "server_rank": float(max(x.rank for x, _, _ in pushed.values())),
        "momentum_truncation_error": (lost / size) ** 0.5 if size > 0 else 0.0,
    }
    return ServerStep(modules, diagnostics)


def _certified(step: ServerStep, pushed: Mapping[str, tuple[LowRank, float, float]]) -> dict[str, Any]:
    """Return the certificate, where there is one, about the state that is kept after the second truncation."""
    if "certificate" not in step.diagnostics:
        return {}
    own = step.diagnostics["certificate"]
    return {
        "certificate": {
            name: {**own[name], "rank": x.rank, "momentum_discarded": lost / size if size > 0 else 0.0}
            for name, (x, lost, size) in pushed.items()
        }
    }


def _cut(
    terms: list[LowRank], weights: list[float], rank: int, tolerance: float | None
) -> tuple[LowRank, float, float]:
    """Return the sum's leading part in the form of its SVD, and the squared norms of what it leaves out and of all."""
    if not any(term.rank for term in terms[1:]):
        # Nothing to extrapolate from: the estimate stays as it is, to the bit.
        return terms[0], 0.0, float(terms[0].a.double().square().sum())
    total = lowrank.stack(terms, weights)
    f = lowrank.svd(total)
    squares = f.s.double().square()
    tails = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # ‖·‖² of the directions j, j+1, …
    keep = min(rank, lowrank.numerical_rank(f.s, lowrank.term_size(total)))
    if tolerance is not None:
        keep = min(keep, next(j for j, tail in enumerate(tails) if tail <= tolerance**2 * tails[0]))
    return LowRank(f.u[:, :keep].contiguous(), f.s[:keep, None] * f.vh[:keep]), tails[keep], tails[0]
