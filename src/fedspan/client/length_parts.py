"""The parts of a wide batch of texts on a CPU: rows of similar lengths together, so that little is padded.

Among the rows of a batch there is always a long one, to which all others would have to be padded: of 16 sentences of
SST-2 more than half of the tokens would be padding. On a CPU a wide model's step takes as long as its tokens, so the
rows are taken in parts, whose gradients add up as under `local.accumulate`. So it is done for bases whose blocks cannot
compute rows end to end (`models.packed_rows`), which needs no padding at all. A GPU, where a step takes as long as its
kernels, cuts by a rule of its own (`client.step_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.modules.batchnorm import _BatchNorm

from fedspan.client.sizes import WIDEST, hidden, largest_batch, positions
from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.models.streams import drops

WORTH_A_PART = 2**23
"""Padding that one more part must save, in tokens times the square of the model's hidden size: about what the kernels
of a part cost beside those of its tokens (measured with MiniLM on one core of an EPYC, where it is 57 tokens)."""


def worth_a_part(model: FederatedModel, own: Encoded, batch_size: int) -> float | None:
    """Return the padding that one more part of this client's batches must save, in tokens; None: they stay as they are.

    They do, and are not packed either, unless the model computes each row by itself, and a batch may be so large that
    the client shares no pass with others (`client.grouping`), where a step takes as long as its tokens. Dropout keeps
    them whole: masks have the shapes of batches, and every engine draws the same.
    """
    mixes = model.padding_matters or model.experts or drops(model.model)
    if own.texts is None or model.device_types != ["cpu"] or mixes:
        return None
    width = hidden(model)
    if largest_batch(own, batch_size) * positions(model, own) * width <= WIDEST:
        return None
    if any(isinstance(layer, _BatchNorm) for layer in model.model.modules()):
        return None
    return WORTH_A_PART / width**2


def parts(lengths: Sequence[int], worth: float) -> list[list[int]]:
    """Return the places of a batch's rows in the parts that take the fewest tokens, the longest rows first.

    Parameters
    ----------
    lengths
        Tokens of each row; every row is padded to the longest of its part.
    worth
        Tokens that each part counts for beside those of its rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # Rows of one length stay together. least[k]: the cost of the rows before the k-th bound in their best parts, the
    # last of which begins at the bound starts[k].
    bounds = [k for k in range(len(order)) if k == 0 or lengths[order[k]] < lengths[order[k - 1]]] + [len(order)]
    least, starts = [0.0], [0]
    for k, end in enumerate(bounds[1:], 1):
        cost, start = min((least[i] + (end - bounds[i]) * lengths[order[bounds[i]]] + worth, i) for i in range(k))
        least.append(cost)
        starts.append(start)
    cut, k = [], len(bounds) - 1
    while k:
        cut.append(order[bounds[starts[k]] : bounds[k]])
        k = starts[k]
    return cut[::-1]
