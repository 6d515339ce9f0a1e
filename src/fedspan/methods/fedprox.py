"""FedProx: what is trained is averaged, and clients are held near where they started."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedspan.methods.base import Method, MethodInfo, ServerState
from fedspan.methods.fed_sb import fed_sb
from fedspan.methods.fedsvd import fedsvd
from fedspan.methods.ffa_lora import ffa_lora
from fedspan.methods.full_weights import average_weights
from fedspan.methods.messages import Broadcast, Recipe, Request
from fedspan.methods.ravan import ravan
from fedspan.methods.rolora import rolora
from fedspan.support.errors import FedspanError

_ADAPTERS = {"ffa_lora": ffa_lora, "rolora": rolora, "fedsvd": fedsvd, "fed_sb": fed_sb, "ravan": ravan}
"""Methods whose clients train one factor or a core beside what is the server's, so that they have no gauge."""


def fedprox(
    mu: float = 0.01,
    trains: Literal["targets", "all", "adapter"] = "targets",
    adapter: Literal["ffa_lora", "rolora", "fedsvd", "fed_sb", "ravan"] = "ffa_lora",
) -> Method:
    """FedProx: each client minimises f_k(x) + μ/2·‖x − x₀‖², x₀ being what it was sent; x̄ = Σ p_k x_k.

    With μ = 0 it is FedAvg, or the adapter method itself, to the bit. x are the weights or, with `trains = "adapter"`,
    the one factor (or core) that clients train beside what the server fixes, and the heads. On a pair (B, A) of which
    both are trained the rule is not offered: ‖B − B₀‖² + ‖A − A₀‖² depends on the gauge in which the pair is written.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (1812.06127).
    Differences: the local solver is the run's own optimizer, so with AdamW the proximal gradient μ (x − x₀) is scaled
    like any other part of the gradient, and it is clipped with it; every client does the work that `[local]` says,
    none a part of it; clients are averaged by the run's weights, the paper's are drawn by them and averaged plainly.
    Adapters are ours: there the distance is that of the trained tensor, ‖B − B₀‖_F for a trained B, not that of the
    product; the two differ by the scaling, and by the server's A unless its rows are orthonormal (as FedSVD's are).

    Parameters
    ----------
    mu
        μ, the weight of the proximal term, at least 0.
    trains
        The weights that clients train: those of the target modules, or every weight of the model; or an `adapter`.
    adapter
        With `trains = "adapter"`, the method whose trained factor or core is held, at its default options.
    """
    if not mu >= 0:
        raise FedspanError(f"method.mu = {mu}: expected at least 0")
    if trains == "adapter":
        return _on_adapter(_ADAPTERS[adapter](), mu)
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


def _on_adapter(method: Method, mu: float) -> Method:
    def broadcast(state: ServerState, request: Request) -> Broadcast:
        sent = method.broadcast(state, request)
        return replace(sent, recipe=replace(sent.recipe, proximal=mu))

    info = replace(method.info, name="fedprox", title=f"FedProx on {method.info.title}", paper="1812.06127")
    return replace(method, info=info, broadcast=broadcast)
