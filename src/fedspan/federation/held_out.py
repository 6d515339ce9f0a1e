"""The evaluation of a federation by its clients: each judges what it receives on rows of its own, and sums come back.

Shapes: a vector of statistics is (size,) of float64, as `fedspan.data.metric_sums` lays it out. Where the server may
see sums alone, the clients' own figures follow in it, each with a 1 that counts it: their sum gives the mean over the
clients beside the figures of all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from fedspan.config import Config
from fedspan.data.class_metrics import ClassReport
from fedspan.data.metric_blocks import RowResults, Vector
from fedspan.data.metric_sums import StatisticsLayout, summable
from fedspan.data.metrics import METRICS
from fedspan.data.rows import Kind
from fedspan.methods.messages import Update
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.held_out_dp import mean_of_client
from fedspan.privacy.sum_layout import SumLayout
from fedspan.support.errors import FedspanError

MOST_NAMED = 256
"""Clients, above which a record holds no figures of every one."""
_LARGEST = 1e6
"""Size of a client's own figure, above which it is left out of a mean that is taken as a sum."""


class WorstHeldOut(TypedDict):
    """The client with the worst headline figure on its own rows."""

    client_id: str
    value: float
    rows: int


class OwnFigures(TypedDict):
    """One client's figures on its own held-out rows."""

    figures: dict[str, float]
    rows: int


class ClientEvaluation(TypedDict):
    """An evaluation by the clients. None stands for what the server may not see."""

    figures: dict[str, float]
    """Of all rows together, so that a client counts by its rows; under client-level privacy every client counts 1."""
    unweighted: dict[str, float] | None
    """The plain mean over the clients of each one's own figure."""
    spread: dict[str, float] | None
    """The standard deviation of the clients' own figures about their mean, over their number."""
    worst: WorstHeldOut | None
    rows: int | None
    """Held-out rows of all clients that answered."""
    clients: int
    """Clients that answered."""
    per_client: dict[str, OwnFigures] | None
    """By client; None where the server sees sums alone, or for more clients than `MOST_NAMED`."""
    left_out: dict[str, str]
    """Client -> the reason why it is not in the figures."""
    classes: ClassReport | None
    """Confusion matrix, precision and recall of each class, over all rows."""


@dataclass(frozen=True, slots=True)
class Collected:
    """The answers to one evaluation."""

    by_client: Mapping[str, Vector] = field(default_factory=dict)
    """Client -> its vector, where the server may see it."""
    total: Vector | None = None
    """The sum of the vectors, where it may see that alone; None where nobody answered."""
    num_clients: int = 0
    """Clients that answered."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Client -> the reason why it did not."""


@dataclass(frozen=True, slots=True)
class HeldOutTerms:
    """The form of the clients' answers, which every side derives from the settings and the labels."""

    layout: StatisticsLayout
    dp: str
    """`privacy.dp`."""
    sums: bool
    """The server sees sums alone."""

    @classmethod
    def of(cls, config: Config, metrics: Sequence[str], num_labels: int) -> HeldOutTerms:
        """Return the terms of a run whose metrics these are.

        Raises
        ------
        FedspanError
            Where the first of them cannot be computed from sums, or has no bound that noise could hide a row behind.
        """
        privacy = config.privacy
        layout = StatisticsLayout.of(metrics, num_labels, bounded=privacy.dp != "none")
        if metrics[0] not in layout.metrics and config.evaluation.where == "clients":
            kind: Kind = "classification" if num_labels else "instruction"
            fitting = [name for name, metric in METRICS.items() if metric.applies_to(kind, num_labels)]
            able = ", ".join(StatisticsLayout.of(fitting, num_labels, bounded=privacy.dp != "none").metrics)
            bound = f" of bounded terms, which privacy.dp = {privacy.dp!r} needs"
            noise = bound if metrics[0] in summable(metrics) else ""
            raise FedspanError(
                f"evaluation.where = 'clients': {metrics[0]} is not computed from sums{noise}; expected as the first "
                f"of data.metrics one of {able}"
            )
        return cls(layout, privacy.dp, privacy.secure_sums or privacy.fixed_point)

    @property
    def size(self) -> int:
        """Numbers of a client's vector."""
        return self.layout.size + (2 * self._num_figures if self._with_means else 0)

    def contribution(self, rows: RowResults, noised: Callable[[Vector], Vector] | None = None) -> Vector:
        """Return what leaves a client, (size,).

        Parameters
        ----------
        noised
            Adds the noise of example-level privacy, and counts it.

        Raises
        ------
        FedspanError
            Where the model's loss or predictions are not finite.
        """
        vector = self.layout.vector(rows)
        if not np.isfinite(vector).all():
            raise FedspanError("the loss or a prediction on its held-out rows is not finite")
        if self.dp == "client":
            return mean_of_client(self.layout, vector)
        if noised is not None:
            vector = noised(vector)
        return np.concatenate([vector, self._own_figures(vector)]) if self._with_means else vector

    def sum_layout(self) -> SumLayout:
        """Return the layout of a sum of contributions, to which masks are bound."""
        return SumLayout({f"statistics: {self.layout.described()}": (self.size,)}, {})

    def flattened(self, vector: Vector) -> Tensor:
        """Return a contribution as a client's part of that sum, (num_words,) in float64."""
        (name,) = self.sum_layout().dense
        update = Update("", 1.0, {}, {name: torch.from_numpy(vector)})
        return self.sum_layout().flatten(update, math.nan)

    def encoded(self, vector: Vector, point: FixedPoint, num_clients: int) -> Words:
        """Return a contribution as the words of a sum over at most that many clients, (num_words,).

        Raises
        ------
        FedspanError
            Where a number is too large for them.
        """
        try:
            return point.encode(self.flattened(vector), num_clients)
        except FedspanError as error:
            raise FedspanError(f"its statistics do not fit the fixed point of the sum ({error})") from None

    def of_sum(self, numbers: Tensor) -> Vector:
        """Return the summed contributions from the numbers of a sum."""
        return numbers[-self.size :].numpy()

    def problem_of_sum(self, total: Vector) -> str | None:
        """Return what shows that a sum is not one of statistics; None: nothing does."""
        return self.layout.problem(total[: self.layout.size]) if self.dp == "none" else None

    def problem(self, vector: Vector) -> str | None:
        """Return what is wrong with one client's vector; None: nothing that can be seen."""
        if vector.shape != (self.size,):
            return f"sent {vector.size} statistics: expected {self.size}"
        if self.dp == "client":
            if not np.isfinite(vector).all() or float(np.linalg.norm(vector)) > self.layout.sensitivity * (1 + 1e-6):
                return f"sent statistics whose norm is not within {self.layout.sensitivity:.3g}"
            return None
        if self.dp == "example":
            return None if np.isfinite(vector).all() else "sent statistics that are not finite"
        return self.layout.problem(vector[: self.layout.size])

    def evaluation(
        self, collected: Collected, noised: Callable[[Vector], Vector] | None = None, names: Sequence[str] = ()
    ) -> ClientEvaluation | None:
        """Return the figures from what came back; None where nothing did.

        Parameters
        ----------
        noised
            Makes of the clients' sum the noised mean of client-level privacy, and counts it.
        names
            Names of the classes, for the report on them.
        """
        total = _sum(collected)
        if total is None:
            return None
        vector = total[: self.layout.size]
        if noised is not None:
            vector = noised(vector)
        rows = None if self.dp == "client" else round(float(vector[0]))
        if rows == 0:
            return None
        own = {} if self.dp == "client" else self._each(collected.by_client)
        unweighted = _mean_of(own) if own else self._mean_of_sums(total)
        return ClientEvaluation(
            figures=self._shown(vector),
            unweighted=unweighted,
            spread=_spread_of(own) if own else None,
            worst=self._worst(own),
            rows=rows,
            clients=collected.num_clients,
            per_client=own if 0 < len(own) <= MOST_NAMED else None,
            left_out=dict(collected.problems),
            classes=self.layout.report(vector, names),
        )

    @property
    def _num_figures(self) -> int:
        return 1 + len(self.layout.metrics)

    @property
    def _with_means(self) -> bool:
        return self.sums and self.dp == "none"

    def _shown(self, vector: Vector) -> dict[str, float]:
        if self.dp == "none":
            return self.layout.figures(vector)
        # Noise may take a count below 0, and a share beyond it: what follows from the noised sums costs no privacy.
        return self.layout.figures(np.concatenate([vector[:3], np.maximum(vector[3:], 0.0)]))

    def _own_figures(self, vector: Vector) -> Vector:
        """Return each of a client's own figures after a 1 where it is defined, otherwise two zeros."""
        pairs = []
        for value in self.layout.figures(vector).values():
            known = math.isfinite(value) and abs(value) <= _LARGEST
            pairs += [1.0, value] if known else [0.0, 0.0]
        return np.asarray(pairs)

    def _mean_of_sums(self, total: Vector) -> dict[str, float] | None:
        if not self._with_means:
            return None
        pairs = total[self.layout.size :].reshape(self._num_figures, 2).tolist()
        names = ("loss", *self.layout.metrics)
        return {name: x / n if n > 0 else math.nan for name, (n, x) in zip(names, pairs, strict=True)}

    def _each(self, by_client: Mapping[str, Vector]) -> dict[str, OwnFigures]:
        held = {name: vector[: self.layout.size] for name, vector in sorted(by_client.items())}
        return {
            name: OwnFigures(figures=self._shown(vector), rows=round(float(vector[0])))
            for name, vector in held.items()
            if vector[0] > 0
        }

    def _worst(self, own: Mapping[str, OwnFigures]) -> WorstHeldOut | None:
        metric = self.layout.metrics[0] if self.layout.metrics else "loss"
        sign = 1.0 if metric != "loss" and METRICS[metric].higher_is_better else -1.0
        known = {name: each for name, each in own.items() if math.isfinite(each["figures"][metric])}
        if not known:
            return None
        name = min(known, key=lambda one: (sign * known[one]["figures"][metric], one))
        return WorstHeldOut(client_id=name, value=known[name]["figures"][metric], rows=known[name]["rows"])


def _sum(collected: Collected) -> Vector | None:
    if collected.by_client:
        total = np.zeros(len(next(iter(collected.by_client.values()))))
        for _, vector in sorted(collected.by_client.items()):  # in one order, for one result
            total = total + vector
        return total
    return collected.total


def _mean_of(own: Mapping[str, OwnFigures]) -> dict[str, float]:
    return {name: _over(own, name, lambda values: sum(values) / len(values)) for name in _names(own)}


def _spread_of(own: Mapping[str, OwnFigures]) -> dict[str, float]:
    return {name: _over(own, name, lambda values: float(np.std(values))) for name in _names(own)}


def _names(own: Mapping[str, OwnFigures]) -> list[str]:
    return list(next(iter(own.values()))["figures"])


def _over(own: Mapping[str, OwnFigures], name: str, function: Callable[[list[float]], float]) -> float:
    values = [each["figures"][name] for each in own.values() if not math.isnan(each["figures"][name])]
    return function(values) if values else math.nan


def record_of(evaluation: ClientEvaluation) -> dict[str, Any]:
    """Return an evaluation as a round's record keeps it."""
    return {key: value for key, value in evaluation.items() if key != "classes"}
