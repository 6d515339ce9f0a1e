"""The summary of a run: the same keys and values in Python as in `summary.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from fedspan.data.class_metrics import ClassReport
from fedspan.data.metrics import METRICS
from fedspan.federation.clients import Client
from fedspan.federation.held_out import ClientEvaluation
from fedspan.runs.base_record import EncodingEntry, encoding_entry, label_names
from fedspan.runs.best import BestRound, best_round
from fedspan.runs.client_evaluation import held_out_rows
from fedspan.runs.client_figures import ClientData, ClientFigures, WorstClient, worst_client
from fedspan.runs.context import RunContext
from fedspan.runs.precision_choice import used_precision
from fedspan.support import standard_json
from fedspan.support.versions import installed_version

Figures = dict[str, float | None]
"""Name of a metric, or `loss` -> its value; None where it is NaN or infinite."""


class FinalMetrics(TypedDict):
    """Figures of the finished models. A key is absent where there is nothing to measure."""

    server: NotRequired[Figures]
    """The server's full state, on the whole test data."""
    unseen: NotRequired[Figures]
    """The server's full state, on unseen data."""
    clients: NotRequired[Figures]
    """The clients' final models on the whole test data: the mean over the clients. Where the clients judge alone
    (`evaluation.where`): on all of their held-out rows together."""
    per_rank: NotRequired[dict[str, Figures]]
    """Rank -> the model that a client of that rank receives, on the whole test data."""
    own_data: NotRequired[Figures]
    """The clients' final models on their own held-out data: the mean over the clients that have some."""
    per_client: NotRequired[dict[str, Figures]]
    """Client -> its final model on its own part of the test data: rows that were held out of its file, or are in the
    test file of the same name. Of clients that are named after their files; where the clients judge alone
    (`evaluation.where`), of all clients, on their held-out rows."""


class Metrics(FinalMetrics):
    """All figures of a run."""

    base: Figures | None
    """The untouched base; None where it was not evaluated."""
    local: Figures | None
    """The control in which every client trains alone, the mean over the clients; None where it did not run."""


class Totals(TypedDict):
    """Costs of all rounds together."""

    bytes_up: int
    """Sent by the clients."""
    bytes_down: int
    """Sent to the clients."""
    server_seconds: float
    """The server's own work."""
    client_seconds: float
    """Busy time of all clients, added up."""
    train_wall_seconds: float
    """Time that the server waited for the clients."""
    peak_server_bytes: int
    """The largest of any round."""
    optimizer_bytes: int
    """The largest that any client's local optimizer held."""
    rejected: int
    """Answers that were left out."""
    rounds: int
    """Finished rounds."""
    wall_seconds: float
    """Of this process, from the first phase to the summary; a resumed run counts from where it was resumed."""


class DataEntry(TypedDict):
    """The data of the run; in a federation of real sites, the server's own."""

    kind: str
    """`instruction`, `classification` or `image`."""
    rows: dict[str, int]
    """Split (`train`, `test`, `unseen`) -> its rows."""
    num_classes: int | None
    """None without classes."""
    label_names: list[str] | None
    """Names of the classes in the order of their ids; None where the data has none."""


class ClientEntry(TypedDict):
    """One client of the run."""

    client_id: str
    rank: int
    num_examples: int
    """Its training examples."""
    figures: Figures | None
    """Its final model on its own part of the test data or its own held-out rows, else on the common test data; None
    where it was not evaluated."""
    rows: int
    """Examples that these figures are of."""
    data: ClientData | None
    """`own` or `test`: the data that they are on."""


class Summary(TypedDict):
    """The summary of a finished run. The headline figures are of the metric that `metric` names."""

    method: str
    options: dict[str, Any]
    """The method's options, as they were given."""
    metric: str
    higher_is_better: bool
    base: float | None
    """The untouched base."""
    local: float | None
    """The mean of the clients that train alone."""
    federated: float | None
    """The mean of the clients' final models."""
    server: float | None
    """The server's full state; None for a personalised method."""
    unseen: float | None
    """The server's full state on unseen data; None where there is none."""
    per_rank: dict[str, float | None]
    """Rank -> the model that a client of that rank receives; empty where it was not measured."""
    metrics: Metrics
    """Every metric of everything that was evaluated."""
    rows: dict[str, int]
    """Key of `metrics` -> the examples that its figures are of; of means over the clients' own data, all together."""
    worst_client: WorstClient | None
    """The client with the worst headline figure; None where no client's model was evaluated."""
    classes: ClassReport | None
    """Confusion matrix, precision and recall of the server's full state; None without such a state or classes."""
    client_evaluation: ClientEvaluation | None
    """The clients' evaluation of the final models on their own held-out rows; None where they do not judge
    (`evaluation.where`)."""
    best: BestRound | None
    """The best round by the validation data, or by the clients' held-out rows; None without either. Its model is
    `adapter-best` or `model-best`, of a personalised method `adapters-best/CLIENT` (at real sites it is not kept)."""
    stopped_early: bool
    """The run ended before its last round, since its validation figures no longer improved."""
    totals: Totals
    data: DataEntry
    clients: list[ClientEntry]
    labels: list[str] | None
    """Name of every class in the order of their ids; None without classes."""
    encoding: EncodingEntry
    precision: str
    """The type of the base's matrix products in training: `float32`, `tf32` or `bfloat16`; `sites` where each site
    chooses its own."""
    notes: list[str]
    """Lines on how base and data were read where that may surprise, and on metrics that were left out."""
    seed: int
    epsilon: float | None
    """ε of everything that the run has released, under `privacy.dp`; None without it, where no noise was added, and
    where sites keep their own ledgers."""
    versions: dict[str, str]
    """Python and the packages that the result depends on; `unknown` for one without metadata."""


def summarise(
    context: RunContext,
    history: Sequence[Mapping[str, Any]],
    *,
    base: Mapping[str, float] | None,
    base_rows: int,
    local: Mapping[str, float] | None,
    final: FinalMetrics,
    rows: Mapping[str, int],
    each: Mapping[str, ClientFigures],
    classes: ClassReport | None,
    by_clients: ClientEvaluation | None,
    stopped_early: bool,
    wall_seconds: float,
    spent: Mapping[str, float],
) -> Summary:
    """Return the summary of a finished run.

    Parameters
    ----------
    history
        The records of its rounds.
    base, local
        Figures of the untouched base and of the clients that train alone.
    base_rows
        Clients' rows that the figures of the base are of, where the clients judge alone.
    rows, each, classes, by_clients
        As in `runs.final.Final`.
    stopped_early
        The run ended before its last round (`evaluation.patience`).
    spent
        `epsilon`, where the run counts it.
    """
    metric, info = context.metrics[0], context.method.info

    def headline(figures: Mapping[str, float | None] | None) -> float | None:
        return None if figures is None else figures[metric]

    summary = {
        "method": info.name,
        "options": {key: value for key, value in context.config.method.items() if key != "name"},
        "metric": metric,
        "higher_is_better": METRICS[metric].higher_is_better,
        "base": headline(base),
        "local": headline(final.get("clients") if info.alone else local),
        "federated": headline(final.get("clients")),
        "server": headline(final.get("server")),
        "unseen": headline(final.get("unseen")),
        "per_rank": {rank: headline(figures) for rank, figures in final.get("per_rank", {}).items()},
        "metrics": {"base": base, "local": local, **final},
        "rows": {**_test_rows(context, base, local, base_rows), **rows},
        "worst_client": worst_client(each, metric),
        "classes": classes,
        "client_evaluation": by_clients,
        "best": best_round(history, metric, len(context.data.get("validation", ()))),
        "stopped_early": stopped_early,
        "totals": _totals(history, wall_seconds),
        "data": context.described,
        "clients": [_entry(c, each.get(c.client_id)) for c in context.clients],
        "labels": label_names(context),
        "encoding": encoding_entry(context),
        "precision": used_precision(context),
        "notes": list(context.notes),
        "seed": context.config.seed,
        "epsilon": spent.get("epsilon"),
        "versions": versions(),
    }
    # As the file gives it back, so that a program sees the same in both.
    return cast(Summary, standard_json.standard(summary))


def _totals(history: Sequence[Mapping[str, Any]], wall_seconds: float) -> Totals:
    def total(key: str) -> Any:
        return sum(record[key] for record in history)

    def largest(key: str) -> Any:
        return max((record[key] for record in history), default=0)

    return {
        "bytes_up": total("bytes_up"),
        "bytes_down": total("bytes_down"),
        "server_seconds": total("server_seconds"),
        "client_seconds": total("client_seconds"),
        "train_wall_seconds": total("train_wall_seconds"),
        "peak_server_bytes": largest("peak_server_bytes"),
        "optimizer_bytes": largest("optimizer_bytes"),
        "rejected": sum(len(record["rejected"]) for record in history),
        "rounds": len(history),
        "wall_seconds": wall_seconds,
    }


def _test_rows(context: RunContext, base: object, local: object, base_rows: int) -> dict[str, int]:
    whole, most = len(context.data["test"]), context.config.evaluation.max_examples
    if context.config.evaluation.where == "clients":
        mine = sum(len(rows) for _, rows in held_out_rows(context).values())
        return {**({} if base is None else {"base": base_rows}), **({} if local is None else {"local": mine})}
    rows = {} if base is None else {"base": whole}
    # The controls are personal models, which are evaluated on as many examples as the rounds.
    return rows if local is None else {**rows, "local": min(whole, most or whole)}


def _entry(client: Client, own: ClientFigures | None) -> ClientEntry:
    return {
        "client_id": client.client_id,
        "rank": client.rank,
        "num_examples": client.num_examples,
        "figures": None if own is None else {**own.figures},
        "rows": 0 if own is None else own.rows,
        "data": None if own is None else own.data,
    }


def versions() -> dict[str, str]:
    packages = ("fedspan", "torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}
