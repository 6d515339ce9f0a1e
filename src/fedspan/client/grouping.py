"""The division of a round's clients into groups that are trained together.

It depends on the work and the settings alone, never on how many processes share the work: which clients share a pass
changes the last bits of their results, and the number of workers must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedspan.client.sizes import WIDEST, hidden, largest_batch, positions
from fedspan.client.training import Assignment, TrainingSettings, shared_part
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Tensors
from fedspan.methods.patches import patch_tensors
from fedspan.models import FederatedModel

_MOST = 16
UNMEASURED = 32
"""Clients that share a pass on a GPU where nothing was measured on it: about where an H100 is full (MiniLM)."""
_SHARES = 4
"""Groups that the clients of a round are cut into where they are many, so that as many processes can share it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """One client's work and its size."""

    index: int
    assignment: Assignment
    local: LocalConfig
    tokens: int
    """Of its largest batch, padding counted."""

    @property
    def cost(self) -> int:
        """Tokens of all its steps."""
        return self.assignment.steps * self.tokens


def plan(
    model: FederatedModel, data: Encoded, assignments: Sequence[Assignment], settings: TrainingSettings
) -> list[list[int]]:
    """Return the groups that are trained together, as indices into `assignments`, the costliest group first.

    Clients with similar numbers of steps and lengths of rows share a group, so that little is padded and few of them
    finish long before the others.
    """
    each = positions(model, data)
    engine, owns = settings.engine, [a.under(settings, 0)[0].local for a in assignments]
    planned = [
        _Planned(i, a, own, largest_batch(data.subset(a.rows), own.batch_size) * each)
        for i, (a, own) in enumerate(zip(assignments, owns, strict=True))
    ]
    # On a GPU a pass of any size costs less when it is shared: there is always room for more rows in a kernel.
    every = max(p.tokens for p in planned)
    auto = every if model.device.type == "cuda" else WIDEST // hidden(model)
    largest = {"sequential": 0, "cohort": every, "auto": auto}[engine.name]
    shared: list[_Planned] = []
    groups: list[list[_Planned]] = []
    for p in planned:
        # A gradient of the base is computed in a pass of its own: all clients would add to the same weights' gradient.
        if p.tokens <= largest and not p.assignment.broadcast.recipe.gradient:
            shared.append(p)
        else:
            groups.append([p])
    for own in _by_run(shared):
        groups += _alike(own, _cohort_size(model, own, engine))
    # The costliest first: a long group that is begun last would keep every process waiting for it.
    groups.sort(key=lambda group: (-sum(p.cost for p in group), group[0].index))
    return [[p.index for p in group] for group in groups]


def _by_run(planned: Sequence[_Planned]) -> list[list[_Planned]]:
    """Return the clients of each run that shares no pass with another; together those of all other runs."""
    runs: dict[int | None, list[_Planned]] = {}
    for p in planned:
        runs.setdefault(p.assignment.run, []).append(p)
    return list(runs.values())


def most_that_fit(
    model: FederatedModel, data: Encoded, assignments: Sequence[Assignment], settings: TrainingSettings
) -> int:
    """Return how many of these clients could share a pass within the memory that it may take."""
    each = positions(model, data)
    sizes = [largest_batch(data.subset(a.rows), a.under(settings, 0)[0].local.batch_size) for a in assignments]
    per_client = max(_bytes(model, a.broadcast, size * each) for a, size in zip(assignments, sizes, strict=True))
    return max(1, min(len(assignments), int(_memory(model.device, settings.engine) / per_client)))


def longest_work(data: Encoded, assignments: Sequence[Assignment]) -> int:
    """Return the tokens of the longest row of these clients."""
    return max(int(data.subset(a.rows).lengths.max()) for a in assignments)


def _alike(planned: Sequence[_Planned], size: int) -> list[list[_Planned]]:
    """Return these clients in groups of at most `size` that can share a pass."""
    groups: list[list[_Planned]] = []
    for p in sorted(planned, key=lambda p: (-p.assignment.steps, -p.tokens, p.index)):
        if not groups or len(groups[-1]) == size or not _together(groups[-1][0], p):
            groups.append([])
        groups[-1].append(p)
    return groups


def _together(p: _Planned, q: _Planned) -> bool:
    """Return whether two clients can share a pass: they train the same parts alike, over the same patch on the base."""
    if shared_part(p.local) != shared_part(q.local):
        return False
    x, y = p.assignment.broadcast, q.assignment.broadcast
    same_parts = (x.recipe.train_a, x.recipe.train_b) == (y.recipe.train_a, y.recipe.train_b)
    penalised = (x.recipe.tail_penalty is None) == (y.recipe.tail_penalty is None)
    return same_parts and penalised and _same_patch(x, y)


def _same_patch(x: Broadcast, y: Broadcast) -> bool:
    if x.patch is y.patch or x.patch.keys() != y.patch.keys():
        return x.patch is y.patch
    return all(_same_tensors(patch_tensors(x.patch[name]), patch_tensors(y.patch[name])) for name in x.patch)


def _same_tensors(x: Tensors, y: Tensors) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def _cohort_size(model: FederatedModel, planned: Sequence[_Planned], engine: EngineConfig) -> int:
    """Return how many of these clients share a pass: as many as fit into memory, and on a CPU into the cache."""
    if engine.cohort_size != "auto":
        # Groups of one size find each other's recordings: two of 13 rather than one of 20 and one of 6.
        even = model.device.type != "cpu" and engine.name == "auto"
        return _even(len(planned), engine.cohort_size) if even else engine.cohort_size
    per_client = max(_bytes(model, p.assignment.broadcast, p.tokens) for p in planned)
    fits = max(1, int(_memory(model.device, engine) / per_client))
    count = len(planned)
    if model.device.type != "cpu":
        return _even(count, min(fits, UNMEASURED))
    shared = max(2, -(-count // _SHARES), min(4, -(-count // 2)))
    cached = max(2, WIDEST // (max(p.tokens for p in planned) * hidden(model)))
    return min(fits, shared, cached, _MOST)


def _even(count: int, most: int) -> int:
    """Return the size of the fewest groups of at most `most` that are as equal as can be."""
    return -(-count // -(-count // most))


def _memory(device: torch.device, engine: EngineConfig) -> float:
    """Return the bytes that a pass may take in addition to the base."""
    if engine.memory != "auto":
        return engine.memory * 2**30
    return torch.cuda.get_device_properties(device).total_memory / 2 if device.type == "cuda" else 2 * 2**30


def _bytes(model: FederatedModel, broadcast: Broadcast, tokens: int) -> int:
    """Estimate what one client adds to a pass: its numbers four times (gradients, Adam's moments), its activations."""
    numbers = sum(f.a.numel() + f.b.numel() for f in broadcast.adapter.values())
    numbers += sum(t.numel() for t in broadcast.dense.values())
    # Each linear layer keeps its input, and what follows keeps about as much again as its output.
    activations = tokens * sum(m * 2 + n for m, n in model.modules().values())
    return 4 * (4 * numbers + activations)
