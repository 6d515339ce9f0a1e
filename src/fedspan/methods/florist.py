"""FLoRIST: FLoRA whose patch keeps the leading singular values of the aggregate alone.

Shapes: c = Σ r_k; T = U Σ Vᵀ from the QR core of the stacked factors, no larger than c × c.
"""

from __future__ import annotations

from dataclasses import replace

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, ServerState, advance
from fedspan.methods.flora import flora, patches_of
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Diagnostics
from fedspan.support import parallel
from fedspan.support.errors import FedspanError


def florist(threshold: float = 0.95) -> Method:
    """FLoRIST: the fewest singular directions of T with Σ_{j≤p} σ_j² ≥ τ Σ_j σ_j² enter every client's base.

    As in FLoRA clients start afresh on that base, each at its own rank, and the rank p, chosen module by module, is one
    for all. What the threshold leaves out, (1 − τ)^½ of ‖T‖_F at most, is lost. With τ = 1 the clients receive T.

    Source: Ramesh and Dass 2025, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning
    of Large Language Models" (2506.09199).
    Differences: the SVD is that of the QR core, where the paper decomposes each of the two stacks by an SVD of its own;
    the product is the same. The threshold is on squared singular values; the patch stays beside the base in float32.

    Parameters
    ----------
    threshold
        τ, above 0 and at most 1: the share of ‖T‖_F² that is kept.
    """
    if not 0 < threshold <= 1:
        raise FedspanError(f"method.threshold = {threshold}: expected above 0 and at most 1")
    plain = flora()

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        shares = partial.shares()

        def cut(name: str) -> tuple[LowRank, float, float]:
            return _leading(lowrank.stack(partial.products(name), shares), threshold)

        names = list(state.template.modules)
        kept = dict(zip(names, parallel.ordered_map(cut, names), strict=True))
        lost, size = sum(x for _, x, _ in kept.values()), sum(x for _, _, x in kept.values())
        log = patches_of(state).append({name: x for name, (x, _, _) in kept.items()})
        return advance(state, patches=log, dense=partial.mean_dense()), {
            "patch_rank": float(max((x.rank for x, _, _ in kept.values()), default=0)),
            "truncation_error": (lost / size) ** 0.5 if size > 0 else 0.0,
        }

    kept_rank = "c" if threshold == 1 else "p"
    info = replace(
        plain.info,
        name="florist",
        title="FLoRIST",
        paper="2506.09199",
        exact=threshold == 1,
        traffic_down=f"min({kept_rank}(m+n), mn)",
    )
    return replace(plain, info=info, finish=finish)


def _leading(total: LowRank, threshold: float) -> tuple[LowRank, float, float]:
    """Return the directions that are kept, and the squared norms of those that are not and of all."""
    f = lowrank.svd(total)
    squares = f.s.double().square()
    live = lowrank.numerical_rank(f.s, lowrank.term_size(total))
    size = float(squares.sum())
    # What is lost by keeping 0, 1, … directions; not size − cumsum, which rounding could leave above 0.
    tails = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    rank = next(j for j, tail in enumerate(tails) if tail <= (1 - threshold) * size)
    keep = min(rank, live)
    return LowRank((f.u[:, :keep] * f.s[:keep]).contiguous(), f.vh[:keep].contiguous()), tails[keep], size
