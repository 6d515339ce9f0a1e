"""The galore suite: one optimizer step of GaLore and of AdamW on one weight, and one refresh of the projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.algebra.galore import GaloreAdamW, SVDKind, projector, state_numel_of
from fedspan.bench.harness import Arm, Bench, CaseKey, Floor
from fedspan.support.seeding import generator

SUITE = "galore"
KINDS: tuple[SVDKind, ...] = ("exact", "randomized", "power")
_SVD = 27.0  # as in the server suite


def run(bench: Bench) -> None:
    """Measure every layer and rank: the step between refreshes, then the refresh alone."""
    for m, n, rank in _grid(bench.options.quick):
        _measure(bench, m, n, rank)


def _grid(quick: bool) -> Iterator[tuple[int, int, int]]:
    shapes = ((512, 512),) if quick else ((1024, 1024), (4096, 1024), (4096, 4096))
    return ((m, n, rank) for m, n in shapes for rank in ((8, 64) if quick else (8, 64, 128)))


def _measure(bench: Bench, m: int, n: int, rank: int) -> None:
    step: CaseKey = {"phase": "step", "m": m, "n": n, "r": rank}
    refresh: CaseKey = {**step, "phase": "refresh"}
    if not bench.missing(SUITE, step, ["adamw", "galore"]) and not bench.missing(SUITE, refresh, KINDS):
        return
    device = bench.options.device
    grad = torch.randn((m, n), generator=generator("bench", SUITE, m, n)).to(device)
    size = m * n
    arms = [_step_arm(name, grad, rank) for name in ("adamw", "galore")]
    # Bytes: the weight is read and written, the gradient read. Operations: the two products with the projector.
    bench.measure(SUITE, step, arms, floor=Floor(4.0 * 3 * size, 2 * 2.0 * size * rank))
    wide = grad.mT if m > n else grad
    short, long = wide.shape
    dense = _SVD * short**2 * long / bench.machine.gemm
    last = _previous_basis(wide, rank)
    arms = [
        Arm(kind, partial(_refresh, wide, rank, kind, last), expected=dense if kind == "exact" else 0.0)
        for kind in KINDS
    ]
    # The two products of one power step: every arm does more.
    floor = Floor(4.0 * size, 2 * 2.0 * size * rank)
    bench.measure(SUITE, refresh, arms, floor=floor, check=partial(_captured, wide))


def _step_arm(name: str, grad: Tensor, rank: int) -> Arm:
    m, n = grad.shape
    weight = nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad
    if name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight], lr=1e-3)
    else:
        # The only refresh is in the first step, which is not timed.
        optimizer = GaloreAdamW([weight], lr=1e-3, rank=rank, update_gap=2**31)
    return Arm(name, optimizer.step, prepare=optimizer.step, details=partial(_memory, optimizer, (m, n), rank))


def _memory(optimizer: torch.optim.Optimizer, shape: tuple[int, int], rank: int, _: Any) -> Mapping[str, int]:
    """Return the bytes of the optimizer's state, counted and by formula: 2·m·n, or m·r + 2·n·r for m ≤ n, numbers."""
    counted = sum(t.numel() * t.element_size() for s in optimizer.state.values() for k, t in s.items() if k != "step")
    formula = state_numel_of(shape, rank if isinstance(optimizer, GaloreAdamW) else None)
    return {"state_bytes": counted, "formula_bytes": 4 * formula}


def _previous_basis(wide: Tensor, rank: int) -> Tensor:
    """Return the basis of an earlier gradient, from which a power step starts: half of its energy is noise."""
    noise = torch.randn(wide.shape, generator=generator("bench", "last", *wide.shape)).to(wide.device)
    return projector(wide + noise, rank, "randomized", generator("bench", "last"))


def _refresh(wide: Tensor, rank: int, kind: SVDKind, last: Tensor) -> Tensor:
    return projector(wide, rank, kind, generator("bench", "refresh"), last)


def _captured(wide: Tensor, outputs: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the share of the gradient's energy that each projector keeps."""
    total = float(wide.norm()) ** 2
    return {name: {"energy": float((p.mT @ wide).norm()) ** 2 / total} for name, p in outputs.items()}
