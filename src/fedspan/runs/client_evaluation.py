"""Evaluations by a run's clients, simulated or at real sites: the same vectors, and so the same figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from fedspan.client.evaluation import Figures
from fedspan.client.executors import EvaluationTask
from fedspan.data.metric_blocks import Vector
from fedspan.federation.clients import Client
from fedspan.federation.exchange import WINDOW, Question
from fedspan.federation.held_out import ClientEvaluation, Collected, HeldOutTerms
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.privacy.budget import BudgetSpent
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.held_out_dp import noised_mean, noised_rows
from fedspan.privacy.ledgers import ClientLedger
from fedspan.runs.base_record import label_names
from fedspan.runs.checkpoint import Checkpoint
from fedspan.runs.context import RunContext
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.precision import rounded_broadcast

_SIMULATED = "simulated"
"""Stands for the run in the ledgers of simulated clients."""


def evaluated_by_clients(
    context: RunContext,
    method: Method,
    saved: Checkpoint,
    clients: Sequence[Client],
    *,
    whole: bool,
    ledger: ClientLedger | None = None,
    released: bool = True,
) -> ClientEvaluation | None:
    """Return the figures of what every client receives of a state, on the clients' own held-out rows.

    A personalised method's clients judge their own models. It returns none where no client answered, or where the
    privacy budget allows no such release; a line says so.

    Parameters
    ----------
    whole
        On all held-out rows, not only as many as `evaluation.max_examples` allows each client between rounds.
    ledger
        Of client-level privacy.
    released
        The figures are published; a control's models are not under the noise of a method, nor are its figures.
    """
    terms = context.held_out
    assert terms is not None  # asked for where clients judge
    try:
        if context.coordinator is None:
            collected = _simulated(context, terms, method, saved, clients, whole, released)
        else:
            question, sent = _question(method, saved), _Broadcasts(method, saved)
            collected = context.coordinator.evaluate(question, clients, sent, terms, whole)
        noised = None
        if terms.dp == "client":
            noised = _noised(context, terms, saved.state.round_num, ledger)
        return terms.evaluation(collected, noised, label_names(context) or ())
    except BudgetSpent as error:
        context.emit("budget", line=f"the clients' rows are not evaluated after round {saved.state.round_num}: {error}")
    except FedspanError as error:
        # What was trained is worth keeping, whatever becomes of one evaluation.
        context.emit(
            "note", line=f"no figures of the clients' rows after round {saved.state.round_num}: {one_line(error)}"
        )
    return None


def held_out_rows(context: RunContext) -> dict[str, tuple[str, np.ndarray]]:
    """Return the split and the rows that each simulated client judges models on."""
    kept = {c.client_id: ("train", c.holdout) for c in context.clients if len(c.holdout)}
    return {**{name: ("test", rows) for name, rows in context.site_tests.items()}, **kept}


class _Broadcasts:
    """The broadcasts of a state to its clients; clients with equal requests share one."""

    def __init__(self, method: Method, saved: Checkpoint) -> None:
        self.method, self.saved = method, saved
        self._made: dict[Request, Broadcast] = {}

    def __call__(self, client: Client) -> Broadcast:
        """Return what this client receives."""
        # The centralised control has one adapter, at the largest rank.
        rank = None if self.method.info.pooled else client.rank
        request = Request(rank, self.saved.seen.get(client.client_id, 0))
        if request not in self._made:
            self._made[request] = self.method.broadcast(self.saved.state, request)
        return self._made[request]


def _question(method: Method, saved: Checkpoint) -> Question:
    """Return the question: its number is that after the last of the method's exchanges."""
    state = saved.state
    version = state.patches.version if state.patches else 0
    number, exchange = len(method.exchanges), method.exchanges[0]
    return Question(
        state.template, state.round_num, number, exchange, (0, 1), False, saved.counted, saved.seen, version
    )


def _simulated(
    context: RunContext,
    terms: HeldOutTerms,
    method: Method,
    saved: Checkpoint,
    clients: Sequence[Client],
    whole: bool,
    released: bool,
) -> Collected:
    """Return the contributions of simulated clients, summed in fixed point where the server would see sums alone."""
    by_client: dict[str, Vector] = {}
    problems: dict[str, str] = {}
    for client_id, figures in _figures(context, method, saved, clients, whole):
        noised = None
        if terms.dp == "example" and released:
            noised = _noised_rows(context, terms, client_id, saved.state.round_num)
        try:
            by_client[client_id] = terms.contribution(figures.rows, noised)
        except FedspanError as error:
            problems[client_id] = str(error)
    if not terms.sums or not by_client:
        return Collected(by_client, None, len(by_client), problems)
    point = FixedPoint(context.config.privacy.fraction_bits)
    words: Words = np.zeros(terms.sum_layout().num_words, dtype=np.uint64)
    for vector in by_client.values():
        words = words + terms.encoded(vector, point, len(by_client))
    return Collected({}, terms.of_sum(point.decode(words)), len(by_client), problems)


def _figures(
    context: RunContext, method: Method, saved: Checkpoint, clients: Sequence[Client], whole: bool
) -> Iterator[tuple[str, Figures]]:
    """Yield every client's figures on its own rows, working on a window of clients at a time."""
    rows, sent = held_out_rows(context), _Broadcasts(method, saved)
    judges = [client for client in clients if client.client_id in rows]
    for start in range(0, len(judges), WINDOW):
        tasks: dict[str, EvaluationTask] = {}
        for client in judges[start : start + WINDOW]:
            arrived = rounded_broadcast(sent(client), context.config.wire.down)
            model = method.start(arrived, saved.client_states.get(client.client_id))
            split, own = rows[client.client_id]
            tasks[client.client_id] = context.evaluation_task(model, whole=whole, split=split, rows=own)
        yield from zip(tasks, context.evaluate(tasks.values()), strict=True)


def _noised(
    context: RunContext, terms: HeldOutTerms, round_num: int, ledger: ClientLedger | None
) -> Callable[[Vector], Vector]:
    """Return what makes the noised mean of client-level privacy of a sum."""
    if ledger is None:
        raise FedspanError("figures of the clients' rows that no ledger counts")
    multiplier = context.config.privacy.noise_multiplier
    charge = partial(ledger.charge_held_out, round_num)
    num_clients = context.config.federation.num_clients
    return lambda total: noised_mean(terms.layout, total, num_clients, multiplier, (round_num,), ledger.secret, charge)


def _noised_rows(
    context: RunContext, terms: HeldOutTerms, client_id: str, round_num: int
) -> Callable[[Vector], Vector]:
    """Return what adds the noise of example-level privacy to a simulated client's statistics."""
    ledgers = context.examples
    assert ledgers is not None  # simulated clients have them
    place = f"{_SIMULATED}/{round_num}"
    charge = partial(ledgers.charge_held_out, client_id, place)
    about, multiplier = (client_id, place), context.config.privacy.noise_multiplier
    return lambda vector: noised_rows(terms.layout, vector, multiplier, about, ledgers.held_out_secret, charge)
