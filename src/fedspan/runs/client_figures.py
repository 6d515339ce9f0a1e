"""The figures of every single client in a summary, and the client that fares worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from fedspan.data.metrics import METRICS

ClientData = Literal["own", "test"]


class WorstClient(TypedDict):
    """The client with the worst headline figure."""

    client_id: str
    value: float
    rows: int
    """Examples that the figure is of."""
    data: ClientData
    """`own`: its own part of the test data or its own held-out rows; `test`: the common test data."""


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """The figures of one client's final model."""

    figures: Mapping[str, float]
    rows: int
    data: ClientData


def worst_client(clients: Mapping[str, ClientFigures], metric: str) -> WorstClient | None:
    """Return the client whose model has the worst figure of this metric; None where no client has one."""
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    known = {name: own for name, own in clients.items() if own.figures[metric] == own.figures[metric]}  # not NaN
    if not known:
        return None
    name = min(known, key=lambda one: (sign * known[one].figures[metric], one))
    own = known[name]
    return {"client_id": name, "value": own.figures[metric], "rows": own.rows, "data": own.data}
