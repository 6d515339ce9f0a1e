"""The precision of the base's matrix products in training: `engine.precision`, and the choice that `auto` makes.

Which types a processor multiplies fast depends on its instructions: one with AMX or AVX512-BF16 gains by bfloat16, and
one without them takes several times as long as in float32. On a CPU `auto` therefore times the products of this base,
forward and backward, on rows like the run's own; on a GPU it is TF32 (`client.tensor_cores`). The choice changes
results, so that it is kept in the run's folder.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fedspan.client.tensor_cores import precision_used as float32_products
from fedspan.client.tensor_cores import tensor_cores
from fedspan.config import Config, EngineConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Recipe
from fedspan.models import FederatedModel
from fedspan.models.coarse_products import frozen_linears, products_in, rounded_weights
from fedspan.models.layers import shape_of
from fedspan.support.errors import FedspanError

_WORTHWHILE = 0.8
"""bfloat16 is taken where its products need at most this share of float32's time: the rest of a step stays as it is."""
_MOST_ROWS = 512
_OPERATIONS = 2e9
"""Of one timed product at most, so that the choice takes a second or two for large layers too."""
_REPEATS = 3
_MEASURED: dict[tuple[object, ...], float] = {}
"""Ratios of this process by processor, threads, shapes and rows."""


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """The precision that `auto` has come to."""

    name: str
    """`float32` or `bfloat16`."""
    reason: str


def reason_against(model: FederatedModel) -> str | None:
    """Return why the base's products cannot be in bfloat16, or None where they can."""
    if model.trains != "adapter":
        return "the method trains base weights, which stay in float32"
    if not frozen_linears(model):
        return "the base has no frozen linear layer in float32"
    return None


def check(model: FederatedModel, engine: EngineConfig) -> None:
    """Refuse bfloat16 where it was asked for and is not possible.

    Raises
    ------
    FedspanError
        Naming the reason.
    """
    reason = reason_against(model) if engine.precision == "bfloat16" else None
    if reason is not None:
        raise FedspanError(f"engine.precision = 'bfloat16': {reason}; expected float32 or auto")


def choose(model: FederatedModel, data: Encoded, config: Config, device: torch.device) -> PrecisionChoice | None:
    """Return the precision of a run on a CPU whose settings leave it open; None where nothing is left open.

    Parameters
    ----------
    data
        The training data, whose lengths say how large a product is.
    """
    if config.engine.precision != "auto" or device.type != "cpu":
        return None
    reason = reason_against(model)
    if reason is not None:
        return PrecisionChoice("float32", reason)
    ratio = bfloat16_to_float32(model, _rows(data, config.local.batch_size))
    if ratio <= _WORTHWHILE:
        return PrecisionChoice("bfloat16", f"{1 / ratio:.1f} times as fast as float32 here")
    compared = f"takes {ratio:.1f} times as long" if ratio > 1 else f"saves only {1 - ratio:.0%}"
    return PrecisionChoice("float32", f"bfloat16 {compared} here")


def bfloat16_to_float32(model: FederatedModel, rows: int) -> float:
    """Return the time of the base's products in bfloat16, conversions included, over that in float32.

    Parameters
    ----------
    rows
        Tokens of one step.
    """
    shapes = Counter(shape_of(layer) for layer in frozen_linears(model).values())
    key = (platform.processor(), torch.get_num_threads(), tuple(sorted(shapes.items())), rows)
    if key not in _MEASURED:
        seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
        for (m, n), count in shapes.items():
            for dtype, one in _seconds(m, n, max(16, min(rows, int(_OPERATIONS / (2 * m * n))))).items():
                seconds[dtype] += count * one
        _MEASURED[key] = seconds[torch.bfloat16] / seconds[torch.float32]
    return _MEASURED[key]


def _seconds(m: int, n: int, rows: int) -> dict[torch.dtype, float]:
    """Return the seconds of one layer's product forward and backward in each type, the fastest of a few."""
    x, g = torch.ones(rows, n), torch.ones(rows, m)  # whose values change no time, and draw no random number
    weights = {dtype: torch.ones(m, n, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    def both(weight: torch.Tensor) -> None:
        F.linear(x.to(weight.dtype), weight).to(x.dtype)
        (g.to(weight.dtype) @ weight).to(x.dtype)

    # In turns, so that whatever else the machine does meets both.
    taken: dict[torch.dtype, list[float]] = {dtype: [] for dtype in weights}
    for _ in range(_REPEATS + 1):
        for dtype, weight in weights.items():
            taken[dtype].append(_timed(partial(both, weight)))
    return {dtype: min(times[1:]) for dtype, times in taken.items()}


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rows(data: Encoded, batch_size: int) -> int:
    """Return the tokens of a typical step, at most as many as are timed."""
    return max(16, min(_MOST_ROWS, int(batch_size * data.lengths.float().mean())))


def prepare(model: FederatedModel, engine: EngineConfig) -> None:
    """Round the base's weights where they will be needed: before processes are started, which then share them."""
    if engine.precision == "bfloat16" and reason_against(model) is None:
        rounded_weights(model, torch.bfloat16)


def precision_used(device: torch.device, engine: EngineConfig) -> str:
    """Return the type of the frozen layers' products in training: `bfloat16`, `tf32` or `float32`."""
    return "bfloat16" if engine.precision == "bfloat16" else float32_products(device, engine)


@contextmanager
def products(model: FederatedModel, engine: EngineConfig, recipe: Recipe) -> Iterator[None]:
    """Compute training's matrix products inside in the precision of the settings.

    A gradient of the base's own weights is always computed in float32.
    """
    coarse = engine.precision == "bfloat16" and not recipe.gradient
    with (
        tensor_cores(model.device, engine),
        products_in(model, torch.bfloat16 if coarse else torch.float32),
    ):
        yield
