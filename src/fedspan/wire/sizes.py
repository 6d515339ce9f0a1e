"""What is sent and held, in tensors and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Update
from fedspan.methods.patches import Patch, patch_tensors


def _bytes(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def payload_tensors(update: Update) -> list[torch.Tensor]:
    held = [t for payload in update.modules.values() for t in payload.tensors().values()]
    return [*update.dense.values(), *update.moments.values(), *held]


def payload_bytes(update: Update) -> int:
    return _bytes(payload_tensors(update))


def broadcast_bytes(broadcast: Broadcast) -> int:
    """Bytes of the tensors that travel to one client: what it can derive from the seed or holds already does not."""
    held = broadcast.dense.keys() if "dense" in broadcast.seeded else broadcast.seeded
    total = _bytes([t for name, t in broadcast.dense.items() if name not in held])
    for factors in broadcast.adapter.values():
        total += _bytes([t for part, t in factors.tensors().items() if part not in broadcast.seeded])
    if "subspaces" not in broadcast.seeded:
        total += _bytes([space.basis for space in broadcast.subspaces.values()])
    total += _bytes([*broadcast.correction.values(), *broadcast.moments.values()])
    return total + sum(patch_bytes(patch) for patch in broadcast.news)


def patch_bytes(patch: Mapping[str, Patch]) -> int:
    return sum(_bytes(list(patch_tensors(p).values())) for p in patch.values())


def state_bytes(state: ServerState) -> int:
    total = _bytes([*state.dense.values(), *state.extra.values()])
    total += sum(_bytes(list(t.values())) for t in state.modules.values())
    if state.patches:
        total += patch_bytes(state.patches.total) + sum(patch_bytes(x) for x in state.patches.increments)
    return total


def partial_bytes(partial: Partial) -> int:
    total = _bytes(list(partial.dense.values())) + sum(_bytes(list(t.values())) for t in partial.sums.values())
    return total + sum(payload_bytes(update) for update in partial.collected)
