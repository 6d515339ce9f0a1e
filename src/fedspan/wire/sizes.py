"""The sizes of what is sent and held, in tensors and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Update
from fedspan.methods.patches import Patch, patch_tensors


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def payload_tensors(update: Update) -> list[Tensor]:
    """Return all tensors of an update: dense weights, moments, and every module's payload."""
    modules = [t for payload in update.modules.values() for t in payload.tensors().values()]
    return [*update.dense.values(), *update.moments.values(), *modules]


def payload_bytes(update: Update) -> int:
    """Return the bytes of an update's tensors as they are in memory."""
    return _bytes(payload_tensors(update))


def broadcast_bytes(broadcast: Broadcast) -> int:
    """Return the bytes of the tensors that travel to one client, without those that it holds or can derive itself."""
    local = broadcast.dense.keys() if "dense" in broadcast.seeded else broadcast.seeded
    total = _bytes(t for name, t in broadcast.dense.items() if name not in local)
    for factors in broadcast.adapter.values():
        total += _bytes(t for part, t in factors.tensors().items() if part not in broadcast.seeded)
    if "subspaces" not in broadcast.seeded:
        total += _bytes(space.basis for space in broadcast.subspaces.values())
    total += _bytes([*broadcast.correction.values(), *broadcast.moments.values()])
    return total + sum(patch_bytes(patch) for patch in broadcast.news)


def patch_bytes(patch: Mapping[str, Patch]) -> int:
    """Return the bytes of additions to the base."""
    return sum(_bytes(patch_tensors(p).values()) for p in patch.values())


def state_bytes(state: ServerState) -> int:
    """Return the bytes that a server's state holds, its log of patches included."""
    total = _bytes([*state.dense.values(), *state.extra.values()])
    total += sum(_bytes(tensors.values()) for tensors in state.modules.values())
    if state.patches:
        total += patch_bytes(state.patches.total) + sum(patch_bytes(x) for x in state.patches.increments)
    return total


def partial_bytes(partial: Partial) -> int:
    """Return the bytes that a fold holds in memory: its running sums, and the updates that it had to collect."""
    total = _bytes(partial.dense.values()) + sum(_bytes(tensors.values()) for tensors in partial.sums.values())
    # A mapping of another type reads its tensors from a file at every access.
    held = [update for update in partial.collected if isinstance(update.modules, dict)]
    return total + sum(payload_bytes(update) for update in held)
