"""Figures of personalised models, and means of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedspan.client.evaluation import Figures
from fedspan.client.executors import EvaluationTask
from fedspan.federation.clients import Client
from fedspan.federation.exchange import WINDOW
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.runs.checkpoint import Checkpoint
from fedspan.runs.context import RunContext


def personal_metrics(
    context: RunContext, method: Method, saved: Checkpoint, clients: Sequence[Client]
) -> dict[str, float]:
    """Return the mean over the clients of how each one's own model scores on the common test data."""
    return mean_figures(list(personal_figures(context, method, saved, clients).values()))


def personal_figures(
    context: RunContext,
    method: Method,
    saved: Checkpoint,
    clients: Sequence[Client],
    own: tuple[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, Figures]:
    """Return for every client how its own model scores on the common test data.

    Parameters
    ----------
    own
        A split, and the clients that are to be judged on rows of their own in it, with these rows.
    """
    received: dict[int, Broadcast] = {}
    figures: dict[str, Figures] = {}
    scored = [client for client in clients if own is None or client.client_id in own[1]]
    # A window at a time, as in training: there may be more personal models than memory holds.
    for start in range(0, len(scored), WINDOW):
        tasks: dict[str, EvaluationTask] = {}
        for client in scored[start : start + WINDOW]:
            if client.rank not in received:
                received[client.rank] = method.broadcast(saved.state, Request(client.rank))
            model = method.start(received[client.rank], saved.client_states.get(client.client_id))
            split, rows = ("test", None) if own is None else (own[0], own[1][client.client_id])
            tasks[client.client_id] = context.evaluation_task(model, whole=own is not None, split=split, rows=rows)
        figures |= zip(tasks, context.evaluate(tasks.values()), strict=True)
    return figures


def mean_figures(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the plain mean of every metric, over those for which it is defined; of the loss, over all."""
    return {name: _mean([f[name] for f in figures], whole=name == "loss") for name in figures[0]}


def _mean(values: Sequence[float], whole: bool) -> float:
    defined = values if whole else [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
