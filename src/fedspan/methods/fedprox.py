"""FedProx: weights averaged, clients held near where they started."""

from __future__ import annotations

from typing import Literal

from fedspan.methods.base import Method, MethodInfo
from fedspan.methods.full_weights import average_weights
from fedspan.methods.messages import Recipe
from fedspan.support.errors import FedspanError


def fedprox(mu: float = 0.01, trains: Literal["targets", "all"] = "targets") -> Method:
    """FedProx: each client minimises f_k(W) + μ/2·‖W − W₀‖², W₀ being what it was sent; W̄ = Σ p_k W_k.

    With μ = 0 it is FedAvg, to the bit.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (1812.06127).
    Differences: the local solver is the run's own optimizer, so with AdamW the proximal gradient μ (W − W₀) is scaled
    like any other part of the gradient, and it is clipped with it; every client does the work that `[local]` says,
    none a part of it; clients are averaged by the run's weights, the paper's are drawn by them and averaged plainly.

    Parameters
    ----------
    mu
        μ, the weight of the proximal term, at least 0.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    if not mu >= 0:
        raise FedspanError(f"method.mu = {mu}: expected at least 0")
    info = MethodInfo(
        name="fedprox",
        title="FedProx",
        paper="1812.06127",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="mn",
        traffic_down="mn",
        trains=trains,
    )
    return average_weights(info, Recipe(proximal=mu))
