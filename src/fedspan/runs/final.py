"""The evaluation of the models that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedspan.client.executors import EvaluationTask
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.runs.context import RunContext
from fedspan.runs.loop import MethodRun
from fedspan.runs.scoring import mean_figures, personal_metrics
from fedspan.runs.summary import FinalMetrics


def final_metrics(context: RunContext, run: MethodRun) -> FinalMetrics:
    """Evaluate what the clients end with and the server's full state, on the whole test data and on unseen data."""
    if not context.method.info.personalised:
        return _of_one_model(context, run)
    if context.coordinator is not None:
        return {}  # the clients' own models are at their sites
    return _of_personal_models(context, run)


def _of_personal_models(context: RunContext, run: MethodRun) -> FinalMetrics:
    final: FinalMetrics = {"clients": {**personal_metrics(context, run.method, run.saved, run.clients)}}
    if any(len(client.holdout) for client in context.clients):
        final["own_data"] = {**personal_metrics(context, run.method, run.saved, run.clients, own_data=True)}
    return final


def _of_one_model(context: RunContext, run: MethodRun) -> FinalMetrics:
    server, by_rank = _received(context, run)
    per_rank = _differs_by_rank(context.method) and context.config.evaluation.per_rank
    tasks = _tasks(context, server, by_rank, per_rank)
    # All at once, so that no worker process waits while another finishes one of them.
    figures = dict(zip(tasks, context.evaluate(tasks.values()), strict=True))
    final: FinalMetrics = {"server": {**figures["server"]}}
    if "unseen" in figures:
        final["unseen"] = {**figures["unseen"]}
    final["clients"] = {**figures["server"]}
    if per_rank:
        of_rank = {rank: figures.get(f"rank {rank}", figures["server"]) for rank in by_rank}
        final["per_rank"] = {str(rank): {**values} for rank, values in of_rank.items()}
        final["clients"] = {**mean_figures([of_rank[client.rank] for client in context.clients])}
    if context.site_tests:
        final["per_client"] = {client: {**figures[f"site {client}"]} for client in context.site_tests}
    own = [values for name, values in figures.items() if name.startswith("own ")]
    if own:
        final["own_data"] = {**mean_figures(own)}
    return final


def _differs_by_rank(method: Method) -> bool:
    """Return whether clients of different ranks may receive different models."""
    return method.info.trains == "adapter" and not method.info.pooled


def _tasks(
    context: RunContext, server: Broadcast, by_rank: Mapping[int, Broadcast], per_rank: bool
) -> dict[str, EvaluationTask]:
    """Return the evaluations by name: `server`, `unseen`, `rank R` where it differs from the server's, `own CLIENT`,
    and `site CLIENT` for its part of the test data."""
    tasks = {"server": context.evaluation_task(server)}
    if "unseen" in context.data:
        tasks["unseen"] = context.evaluation_task(server, split="unseen")
    if per_rank:
        cut = {rank: sent for rank, sent in by_rank.items() if not _same_adapter(sent, server)}
        tasks |= {f"rank {rank}": context.evaluation_task(sent) for rank, sent in cut.items()}
    for client in context.clients:
        if len(client.holdout):
            task = context.evaluation_task(by_rank[client.rank], split="train", rows=client.holdout)
            tasks[f"own {client.client_id}"] = task
    ranks = {client.client_id: client.rank for client in context.clients}
    for name, rows in context.site_tests.items():
        sent = by_rank.get(ranks.get(name, 0), server)
        tasks[f"site {name}"] = context.evaluation_task(sent, rows=rows)
    return tasks


def _received(context: RunContext, run: MethodRun) -> tuple[Broadcast, dict[int, Broadcast]]:
    """Return the server's full state as a broadcast, and what a client of each rank receives of it."""
    server = run.method.broadcast(run.saved.state, Request(None))
    ranks = sorted({client.rank for client in context.clients})
    if run.method.info.pooled:
        return server, dict.fromkeys(ranks, server)  # the centralised control has one adapter, at the largest rank
    return server, {rank: run.method.broadcast(run.saved.state, Request(rank)) for rank in ranks}


def _same_adapter(x: Broadcast, y: Broadcast) -> bool:
    """Return whether two readouts of one state are the same adapter, so that one evaluation does for both."""
    return all(
        f.scaling == y.adapter[name].scaling
        and torch.equal(f.b, y.adapter[name].b)
        and torch.equal(f.a, y.adapter[name].a)
        for name, f in x.adapter.items()
    )
