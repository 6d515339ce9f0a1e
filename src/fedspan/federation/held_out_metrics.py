"""The metrics that evaluations by the clients leave out, and the lines that say so."""

from __future__ import annotations

from collections.abc import Sequence

from fedspan.config import Config
from fedspan.data.metric_sums import StatisticsLayout, summable
from fedspan.support.errors import FedspanError


def left_out_notes(config: Config, layout: StatisticsLayout, metrics: Sequence[str]) -> tuple[str, ...]:
    """Return a line for each reason why some of a run's metrics are not among its clients' figures.

    Parameters
    ----------
    layout
        The statistics that the clients send.
    metrics
        All metrics of the run.
    """
    able = summable(metrics)
    pooled = [name for name in metrics if name not in able]
    unbounded = [name for name in able if name not in layout.metrics]
    if not layout.with_loss:
        unbounded.append("the loss")
    ending = "; evaluation.where = 'both' has them measured on the server's rows"
    ending = "" if config.evaluation.where == "both" else ending
    notes = []
    if pooled:
        need = "it needs" if len(pooled) == 1 else "they need"
        notes.append(
            f"{_are(pooled)} not among the clients' figures: {need} the values of all rows at one place, and clients "
            f"send sums{ending}"
        )
    if unbounded:
        share = "it has" if len(unbounded) == 1 else "they have"
        notes.append(
            f"{_are(unbounded)} not among the clients' figures: {share} no bound on the share of one row, which the "
            f"noise of privacy.dp = '{config.privacy.dp}' needs"
        )
    return tuple(notes)


def check_judged(config: Config, layout: StatisticsLayout, metrics: Sequence[str], judged_by_clients: bool) -> None:
    """Refuse an early stop by figures that the clients' evaluations do not have.

    Parameters
    ----------
    judged_by_clients
        The clients' figures find the best round.

    Raises
    ------
    FedspanError
        When the first metric is not among them.
    """
    patience = config.evaluation.patience
    if patience is not None and judged_by_clients and metrics[0] not in layout.metrics:
        expected = f"one of {', '.join(layout.metrics)}" if layout.metrics else "a metric that follows from sums"
        raise FedspanError(
            f"evaluation.patience = {patience}: {metrics[0]} is not among the clients' figures, by which rounds are "
            f"judged here; expected as the first of data.metrics {expected}"
        )


def _are(names: Sequence[str]) -> str:
    """Return names as the subject of a sentence, with its verb."""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{', '.join(names[:-1])} and {names[-1]} are"
