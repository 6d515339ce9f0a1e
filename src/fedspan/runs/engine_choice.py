"""The choice of the engine that does the clients' local work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedspan.client import calibration, cohort, grouping
from fedspan.client import precision as precisions
from fedspan.client.training import Assignment, TrainingSettings, num_steps
from fedspan.federation.clients import Client
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Recipe, Request
from fedspan.runs.context import RunContext


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine of one method's local work."""

    name: str
    """`auto` (clients share a pass where that is faster), `cohort`, `sequential`, or `sites` (each chooses its own)."""
    reason: str | None = None
    """The reason why clients cannot share a pass, where the settings would have allowed it; on a GPU how many do."""


def choose_engine(context: RunContext, recipe: Recipe) -> EngineChoice:
    """Return the engine for clients that train by this recipe.

    Raises
    ------
    FedspanError
        When `engine.name = "cohort"` and the model or the recipe does not allow it.
    """
    if context.coordinator is not None:
        return EngineChoice("sites")
    name = context.config.engine.name
    if name == "sequential":
        return EngineChoice(name)
    reason = cohort.applies(context.model, context.data["train"], recipe, TrainingSettings.of(context.config))
    if reason is None:
        return EngineChoice(name)
    if name == "cohort":
        raise cohort.refusal(reason)
    return EngineChoice("sequential", reason)


def engine_used(
    context: RunContext, choice: EngineChoice, method: Method, state: ServerState, cohort_of_round: Sequence[Client]
) -> EngineChoice:
    """Return what the choice amounts to in a round of these clients: `cohort`, `sequential` or `sites`, with a reason.

    Parameters
    ----------
    state
        The server's state that the clients start from.
    """
    if choice.name in ("sequential", "sites"):
        return choice
    if not cohort_of_round:
        # Under client-level privacy a round may draw nobody; later ones go by the same choice.
        return EngineChoice(choice.name, "no client takes part in the first round")
    training = context.executor.context.training
    if context.device.type != "cpu":
        precision = precisions.precision_used(context.device, training.engine)
        size = grouping.UNMEASURED if training.engine.cohort_size == "auto" else training.engine.cohort_size
        return EngineChoice("cohort", f"up to {size} clients a pass, {precision}")
    assignments = _assignments(context, method, state, cohort_of_round)
    groups = grouping.plan(context.model, context.data["train"], assignments, training)
    if choice.name == "cohort" or any(len(group) > 1 for group in groups):
        return EngineChoice("cohort")
    alone = len(cohort_of_round) == 1
    return EngineChoice("sequential", "one client takes part" if alone else "one client fills a pass over this model")


def _assignments(
    context: RunContext, method: Method, state: ServerState, cohort_of_round: Sequence[Client]
) -> list[Assignment]:
    """Return the work of a round, as far as its size is concerned."""
    local = context.config.local
    broadcasts = {rank: method.broadcast(state, Request(rank)) for rank in {c.rank for c in cohort_of_round}}
    return [
        Assignment(c.client_id, broadcasts[c.rank], c.indices, num_steps(local, len(c.indices)), 1.0)
        for c in cohort_of_round
    ]


def measured_cohort_size(
    context: RunContext, choice: EngineChoice, method: Method, state: ServerState, cohort_of_round: Sequence[Client]
) -> int | None:
    """Return how many clients should share a pass on this run's GPU; None where that is not to be measured.

    It is not on a CPU, whose rule is fixed, not where several processes have a GPU each, and not where the passes are
    shared with other runs, for all of which it is measured.
    """
    engine = context.config.engine
    here = context.model.device.type != "cpu" and context.coordinator is None and not context.shared
    if not here or choice.name not in ("auto", "cohort") or engine.cohort_size != "auto" or not cohort_of_round:
        return None
    assignments = _assignments(context, method, state, cohort_of_round)
    return calibration.cohort_size(
        context.model, context.data["train"], assignments, TrainingSettings.of(context.config)
    )
