"""The number of clients that should share a pass on a device, measured at a run's start on its own clients.

More rows in a kernel cost less each until the kernel fills the device, and then the caches are too small for them;
where that is depends on the device, the model and the lengths of rows. A few steps of passes of 1, 2, 4, … clients
take a second or two. The choice changes the last bits of a run, so it is kept in the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedspan.client import grouping
from fedspan.client.device_pass import DevicePass
from fedspan.client.passes import Member, member
from fedspan.client.precision import products
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.models.streams import drops

_ENOUGH = 0.97
"""Of two widths the narrower one is taken, if it reaches this share of the best rate: it needs less memory."""
_FALLING = 0.9
"""Wider passes are not tried once one falls to this share of the best rate."""
_STEPS = 3
_MEASURED: dict[tuple[object, ...], int] = {}
"""Choices of this process by device, model and work."""


def cohort_size(
    model: FederatedModel, data: Encoded, assignments: Sequence[Assignment], settings: TrainingSettings
) -> int:
    """Return how many of these clients should share a pass on the model's device.

    Parameters
    ----------
    assignments
        Clients of one round; none of them is changed.
    """
    most = grouping.most_that_fit(model, data, assignments, settings)
    if most == 1:
        return 1
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    modules, rank = tuple(model.modules().values()), max(_rank(a) for a in assignments)
    key = (device, modules, rank, settings.local, settings.engine, grouping.longest_work(data, assignments), most)
    if key not in _MEASURED:

        def rate(width: int) -> float:
            return _client_steps_per_second(model, data, assignments[:width], settings)

        _MEASURED[key] = best_width(rate, most)
    return _MEASURED[key]


def best_width(rate: Callable[[int], float], most: int) -> int:
    """Return the narrowest of 1, 2, 4, … and `most` clients a pass that comes near the best rate.

    Parameters
    ----------
    rate
        Gives the client-steps a second of a width; 0 for one that does not fit.
    """
    widths = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    found: dict[int, float] = {}
    for width in widths:
        found[width] = rate(width)
        if found[width] < _FALLING * max(found.values()):
            break
    return next(width for width in found if found[width] >= _ENOUGH * max(found.values()))


def _rank(a: Assignment) -> int:
    return max((f.rank for f in a.broadcast.adapter.values()), default=0)


def _client_steps_per_second(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], settings: TrainingSettings
) -> float:
    members = [_repeated(member(replace(a, steps=1), settings, 0)) for a in group]
    broadcasts = [a.broadcast for a in group]
    try:
        with products(model, settings.engine, broadcasts[0].recipe):
            tried = DevicePass.create(model, broadcasts, settings, equal_rates=True, drops=drops(model.model))
            tried.run(data, members)  # the first step as it is, the second recorded
            _wait(model.device)
            began = time.perf_counter()
            tried.run(data, members)
            _wait(model.device)
    except torch.OutOfMemoryError:
        return 0.0
    return len(group) * _STEPS / (time.perf_counter() - began)


def _repeated(m: Member) -> Member:
    """Return a client that takes its first batch again and again: one shape, which is recorded once."""
    return replace(m, assignment=replace(m.assignment, steps=_STEPS), schedule=[*m.schedule] * _STEPS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
