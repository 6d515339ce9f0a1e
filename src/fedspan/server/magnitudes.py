"""Bounds on the numbers of an update, so that no later step of any method can overflow.

float32 ends at 3.4e38. What a server computes from updates are weighted sums of them and of products s·B·A, norms and
Gram matrices of these, which are squares, and at times a product of three factors; all of it over at most some ten
thousand clients. The bounds are chosen so that such results stay finite, and lie many orders of magnitude above
anything that training gives. They protect the server's arithmetic, not its model: an update within them may still be
a bad one, against which there are filters (`[robust]`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedspan.methods.messages import Factors, Update
from fedspan.wire.sizes import payload_tensors

LARGEST = 1e15
"""Of n_k·‖X‖_F for every tensor that is added up as it is, and of n_k·s·‖B‖_F·‖A‖_F for a pair of factors. Its square
is 1e30, and that of a sum over ten thousand clients 1e38."""
LARGEST_FACTOR = 1e24
"""Of n_k·‖B‖_F and n_k·‖A‖_F where only the product of a pair counts: a client's gauge is its own choice, so that one
factor may be 1e19 times as large and the other as small."""
LARGEST_OWN_FACTOR = 1e9
"""Of n_k·‖B‖_F and n_k·‖A‖_F where the server's rule mixes the factors of different clients: B_j·A_k·Āᵀ."""


def problem(update: Update, gauge_free: bool) -> str | None:
    """Return the first reason why an update's numbers cannot be used, or None.

    Parameters
    ----------
    gauge_free
        The method's result depends on the products of the factors alone.
    """
    sizes = {id(x): _norm(x) for x in payload_tensors(update)}
    if not all(math.isfinite(size) for size in sizes.values()):
        return "sent NaN or infinity"
    if any(bool((v < 0).any()) for v in update.moments.values()):
        return "sent second moments below 0"
    weight = max(update.num_examples, 1.0)
    most = LARGEST_FACTOR if gauge_free else LARGEST_OWN_FACTOR
    for name, payload in update.modules.items():
        if isinstance(payload, Factors):
            b, a = sizes[id(payload.b)], sizes[id(payload.a)]
            if max(b, a) * weight > most or abs(payload.scaling) * b * a * weight > LARGEST:
                return f"sent factors of {name} of norms {b:.3g} and {a:.3g}: expected weights that training gives"
        elif any(sizes[id(x)] * weight > LARGEST for x in payload.values.values()):
            return f"sent numbers of {name} that are too large: expected weights that training gives"
    for name, value in (*update.dense.items(), *update.moments.items()):
        if sizes[id(value)] * weight > LARGEST:
            return f"sent {name} of norm {sizes[id(value)]:.3g}: expected weights that training gives"
    return None


def _norm(x: Tensor) -> float:
    """Return ‖X‖_F; NaN or infinity where X is not finite, and there alone."""
    # One pass in float32; its squares overflow, or vanish, long before the numbers themselves do.
    size = float(torch.linalg.vector_norm(x))
    return size if math.isfinite(size) else float(torch.linalg.vector_norm(x, dtype=torch.float64))
