"""Running sums of products Σ n_k s_k B_k A_k over clients that are not held at once.

A sum is a mapping of tensors, so that it can be saved: the clients' factors themselves while they are smaller than the
matrix, `b` (m, c), `a` (c, n), `counts` (K,) and `ranks` (K,); from then on the matrix `w` (m, n) in float64, with an
empty `like` of the factors' type. So it never holds more than min(c(m+n), mn) numbers, c = Σ r_k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Tensors


def product_of(x: LowRank, count: float) -> Tensors:
    """Return the sum that holds n_k B A of one client."""
    counts = torch.tensor([count], dtype=torch.float64)
    one = {"b": lowrank.promote(x.b), "a": lowrank.promote(x.a), "counts": counts, "ranks": torch.tensor([x.rank])}
    return _smaller(one)


def add_products(x: Tensors, y: Tensors) -> Tensors:
    """Return the sum over the union of two disjoint sets of clients, those of x first."""
    if "w" in x or "w" in y:
        (w, like), (other, _) = _dense(x), _dense(y)
        return {"w": w + other, "like": like}
    joined = {
        name: torch.cat([x[name].to(kind := torch.promote_types(x[name].dtype, y[name].dtype)), y[name].to(kind)], dim)
        for name, dim in (("b", 1), ("a", 0), ("counts", 0), ("ranks", 0))
    }
    return _smaller(joined)


def terms_of(x: Tensors) -> tuple[list[LowRank], list[float]] | None:
    """Return B A of every client and its n_k; None where the sum is a matrix."""
    if "w" in x:
        return None
    ranks = x["ranks"].tolist()
    pairs = [LowRank(b, a) for b, a in zip(torch.split(x["b"], ranks, 1), torch.split(x["a"], ranks), strict=True)]
    return pairs, x["counts"].tolist()


def mean_of(x: Tensors, weight: float) -> tuple[Tensor, torch.dtype]:
    """Return Σ p_k B_k A_k in float64 from a sum and Σ n_k, and the type of the factors."""
    total, like = _dense(x)
    return total / weight, like.dtype


def _smaller(x: Tensors) -> Tensors:
    """Return the factors, or the matrix where they are no smaller."""
    m, c, n = x["b"].shape[0], x["b"].shape[1], x["a"].shape[1]
    if c * (m + n) < math.prod((m, n)):
        return x
    w, like = _dense(x)
    return {"w": w, "like": like}


def _dense(x: Tensors) -> tuple[Tensor, Tensor]:
    if "w" in x:
        return x["w"], x["like"]
    b = x["b"]
    # Shares of the largest count in the product, which is multiplied by that in float64.
    top = float(x["counts"].max())
    shares = torch.repeat_interleave(x["counts"] / top, x["ranks"]).to(b)
    return ((b * shares) @ x["a"]).double() * top, b.new_empty(0)
