"""One number for each client as two tensors of a checkpoint: the bytes of the ids, and the numbers.

A federation's checkpoint is written after every round and names every client that ever took part. As JSON a million of
them would take longer than the round of ten thousand that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_BETWEEN = "\n"
"""Between two ids; no client's id holds it (`fedspan.wire.names`)."""


def number_tensors(numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the ids' bytes (uint8) and the numbers (int64), in the mapping's order."""
    text = _BETWEEN.join(numbers).encode()
    values = np.fromiter(numbers.values(), np.int64, len(numbers))
    return {"ids": torch.from_numpy(np.frombuffer(text, np.uint8).copy()), "numbers": torch.from_numpy(values)}


def numbers_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the mapping that `number_tensors` took apart.

    Raises
    ------
    ValueError
        When there are not as many ids as numbers.
    """
    values = tensors["numbers"].tolist()
    text = tensors["ids"].numpy().tobytes().decode()
    ids = text.split(_BETWEEN) if values else []
    if len(ids) != len(values) or (text and not values):
        raise ValueError(f"{len(ids)} ids for {len(values)} numbers of clients")
    return dict(zip(ids, values, strict=True))
