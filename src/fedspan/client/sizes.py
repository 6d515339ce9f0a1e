"""The sizes of a client's steps, by which it is decided how they are computed."""

from __future__ import annotations

from fedspan.data import Encoded
from fedspan.models import FederatedModel

WIDEST = 2**17
"""Tokens of one client's step times the model's hidden size. Above it a pass of its own is as fast; below it as many
clients share a pass as together reach it, for then their activations still lie in the cache (measured on a CPU)."""


def hidden(model: FederatedModel) -> int:
    """Return the width at which most of the model works."""
    return min((n for _, n in model.modules().values()), default=1)


def positions(model: FederatedModel, data: Encoded) -> int:
    """Return the positions that one row of an image batch takes in the model, one per patch; 1 for text.

    2 for prompts and answers that an encoder and a decoder read, each at most as long as the row counts.
    """
    if data.pixels is None:
        return 2 if data.kind == "instruction" and getattr(model.model.config, "is_encoder_decoder", False) else 1
    height, width = data.pixels.shape[-2:]
    patch = getattr(model.model.config, "patch_size", 16)
    side = patch if isinstance(patch, int) else max(patch)
    return max(1, (height // side) * (width // side))


def largest_batch(own: Encoded, batch_size: int) -> int:
    """Return the tokens of a client's largest batch, padding counted; images of an image batch."""
    return min(batch_size, len(own)) * int(own.lengths.max())
