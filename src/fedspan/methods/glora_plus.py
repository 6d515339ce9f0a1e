"""GLoRA+: GLoRA's options put together for mixed ranks and sparse participation."""

from __future__ import annotations

from dataclasses import replace

from fedspan.methods.base import Method
from fedspan.methods.glora import ServerRank, glora


def glora_plus(server_rank: ServerRank = "double", momentum: float = 0.0) -> Method:
    """GLoRA whose clients train the readout of their rank on top of the rest of a state of twice the largest rank.

    A client of rank r_k is sent the whole state U·C: its leading r_k directions as the adapter that it trains, the rest
    as a frozen patch. So its model is complete whatever its rank, and the new state,

        Σ p_k (s_k B_k A_k + rest_k) = U·C + Σ p_k (s_k B_k A_k − readout_k),

    is the mean of the models that the clients really ran, for any ranks and any participation: no direction
    fades because low-rank clients could not carry it. Every client ends with the same model. Same traffic up as GLoRA,
    R(m+n) down instead of r_k(m+n).

    Source: ours, based on Chen et al. 2026 (2605.06733): `glora(start="split", server_rank="double")`. Its gains
    and losses against GLoRA are measured in benchmarks/CLAIMS.md.

    Parameters
    ----------
    server_rank
        As in `glora`. The tolerance is 0.01.
    momentum
        As in `glora`.
    """
    method = glora(server_rank=server_rank, start="split", momentum=momentum)
    return replace(method, info=replace(method.info, name="glora_plus", title="GLoRA+", paper="2605.06733, ours"))
