"""The last answer of a region's server, for a server above that asks the same question once more.

A server above that is started again in the middle of a round repeats its question. Nothing has changed for the region
then: its sites need not train and mask a second time, and their sum is not made twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspan.wire import protocol


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A question, by its fingerprint, and the answer to it."""

    question: bytes
    fields: Mapping[str, Any]
    words: Tensor
    """The sum (num_words,), int64."""


def fingerprint(message: Mapping[str, Any], contents: Sequence[bytes]) -> bytes:
    """Return the same digest for two questions that ask the same, and for no others.

    Not one of their bytes: a server that reads its state from a checkpoint may name the same tensors in another order.

    Parameters
    ----------
    message
        The question as it was checked.
    contents
        The messages for sites in it.
    """
    digest = hashlib.sha256()
    layout = message["layout"]  # in the order of whose names the numbers of a sum stand
    names = [list(layout["dense"]), [[name, list(parts)] for name, parts in layout["modules"].items()]]
    digest.update(json.dumps([names, message], sort_keys=True).encode())
    for content in contents:
        head, tensors = protocol.decode(content)
        described = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
        digest.update(json.dumps([head, described], sort_keys=True).encode())
        for tensor in tensors:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
