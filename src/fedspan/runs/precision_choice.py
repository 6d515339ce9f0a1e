"""The precision of a run's local work: chosen at its beginning, kept in its folder, told by its summary."""

from __future__ import annotations

from fedspan.client import precision
from fedspan.client.precision import PrecisionChoice
from fedspan.runs.context import RunContext


def chosen_precision(context: RunContext) -> PrecisionChoice | None:
    """Return the precision for a run whose settings leave it open; None for real sites, which choose their own."""
    if context.coordinator is not None:
        return None
    return precision.choose(context.model, context.data["train"], context.config, context.device)


def use_precision(context: RunContext, name: str) -> None:
    """Let the run's executor do its local work in this precision."""
    executor = context.executor
    executor.context.training = executor.context.training.with_options(precision=name)
    precision.prepare(context.model, executor.context.training.engine)


def used_precision(context: RunContext) -> str:
    """Return the type of the matrix products of the run's local work."""
    if context.coordinator is not None:
        return "sites"
    if context.model.trains != "adapter" or context.config.model.dtype == "float32":
        return precision.precision_used(context.device, context.executor.context.training.engine)
    return context.config.model.dtype
