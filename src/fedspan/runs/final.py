"""The evaluation of the models that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fedspan.client.evaluation import Figures as Evaluated
from fedspan.client.executors import EvaluationTask
from fedspan.data.class_metrics import ClassReport, class_report
from fedspan.federation.held_out import ClientEvaluation
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.runs.base_record import label_names
from fedspan.runs.client_figures import ClientFigures
from fedspan.runs.context import RunContext
from fedspan.runs.loop import MethodRun
from fedspan.runs.scoring import mean_figures, personal_figures
from fedspan.runs.summary import FinalMetrics


@dataclass(frozen=True, slots=True)
class Final:
    """The figures of the models that a run ends with."""

    metrics: FinalMetrics
    rows: Mapping[str, int]
    """Key of `metrics` -> the examples that its figures are of; of means over the clients' own data, all together."""
    clients: Mapping[str, ClientFigures] = field(default_factory=dict)
    """Client -> the figures of its final model; empty where the models are at real sites."""
    classes: ClassReport | None = None
    """Of the server's full state on the whole test data, or of what the clients received on all of their rows; None
    where there is no such state, or are no classes."""
    by_clients: ClientEvaluation | None = None
    """The clients' own evaluation of it; None where they do not judge."""


def final_metrics(context: RunContext, run: MethodRun) -> Final:
    """Evaluate what the clients end with and the server's full state, on the whole test data and on unseen data."""
    by_clients = None if context.held_out is None else run.final_by_clients()
    if context.config.evaluation.where == "clients":
        return _by_clients(context, by_clients)
    return replace(_by_server(context, run), by_clients=by_clients)


def _by_clients(context: RunContext, found: ClientEvaluation | None) -> Final:
    """Return the figures of an evaluation by the clients as the run's."""
    if found is None:
        return Final({}, {})
    rows = found["rows"] or 0
    final: FinalMetrics = {"clients": {**found["figures"]}}
    counted = {"clients": rows}
    if found["unweighted"] is not None:
        final["own_data"], counted["own_data"] = {**found["unweighted"]}, rows
    each = found["per_client"] or {}
    if each:
        final["per_client"], counted["per_client"] = {name: {**own["figures"]} for name, own in each.items()}, rows
    named = {name: ClientFigures(own["figures"], own["rows"], "own") for name, own in each.items()}
    return Final(final, counted, named, found["classes"], found)


def _by_server(context: RunContext, run: MethodRun) -> Final:
    if not context.method.info.personalised:
        return _of_one_model(context, run)
    if context.coordinator is not None:
        return Final({}, {})  # the clients' own models are at their sites
    return _of_personal_models(context, run)


def _of_personal_models(context: RunContext, run: MethodRun) -> Final:
    common = personal_figures(context, run.method, run.saved, run.clients)
    final: FinalMetrics = {"clients": {**mean_figures(list(common.values()))}}
    rows = {"clients": _rows(next(iter(common.values())))}
    own: dict[str, Evaluated] = {}
    kept = {client.client_id: client.holdout for client in context.clients if len(client.holdout)}
    if kept:
        own = personal_figures(context, run.method, run.saved, run.clients, ("train", kept))
        final["own_data"] = {**mean_figures(list(own.values()))}
        rows["own_data"] = sum(map(_rows, own.values()))
    if context.site_tests:
        sites = personal_figures(context, run.method, run.saved, run.clients, ("test", context.site_tests))
        final["per_client"] = {client: {**values} for client, values in sites.items()}
        rows["per_client"] = sum(map(_rows, sites.values()))
        own |= sites
    return Final(final, rows, _each_client(own, common))


def _of_one_model(context: RunContext, run: MethodRun) -> Final:
    server, by_rank = _received(context, run)
    per_rank = _differs_by_rank(context.method) and context.config.evaluation.per_rank
    tasks = _tasks(context, server, by_rank, per_rank)
    # All at once, so that no worker process waits while another finishes one of them.
    figures = dict(zip(tasks, context.evaluate(tasks.values()), strict=True))
    final: FinalMetrics = {"server": {**figures["server"]}}
    rows = {"server": _rows(figures["server"]), "clients": _rows(figures["server"])}
    if "unseen" in figures:
        final["unseen"], rows["unseen"] = {**figures["unseen"]}, _rows(figures["unseen"])
    final["clients"] = {**figures["server"]}
    common = {client.client_id: figures["server"] for client in context.clients}
    if per_rank:
        of_rank = {rank: figures.get(f"rank {rank}", figures["server"]) for rank in by_rank}
        final["per_rank"] = {str(rank): {**values} for rank, values in of_rank.items()}
        common = {client.client_id: of_rank[client.rank] for client in context.clients}
        final["clients"] = {**mean_figures(list(common.values()))}
        rows["per_rank"] = rows["server"]
    sites = {client: figures[f"site {client}"] for client in context.site_tests}
    if sites:
        final["per_client"] = {client: {**values} for client, values in sites.items()}
        rows["per_client"] = sum(map(_rows, sites.values()))
    own = {name.removeprefix("own "): values for name, values in figures.items() if name.startswith("own ")}
    if own:
        final["own_data"], rows["own_data"] = {**mean_figures(list(own.values()))}, sum(map(_rows, own.values()))
    return Final(final, rows, _each_client({**own, **sites}, common), _classes(context, figures["server"]))


def _rows(figures: Evaluated) -> int:
    return len(figures.references)


def _each_client(own: Mapping[str, Evaluated], common: Mapping[str, Evaluated]) -> dict[str, ClientFigures]:
    """Return every client's figures, on its own data where it has some."""
    chosen = {client: (own[client], "own") if client in own else (values, "test") for client, values in common.items()}
    return {
        client: ClientFigures(values, _rows(values), "own" if data == "own" else "test")
        for client, (values, data) in chosen.items()
    }


def _classes(context: RunContext, figures: Evaluated) -> ClassReport | None:
    names = label_names(context)
    return None if names is None else class_report(figures.predicted, figures.references, names)


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
