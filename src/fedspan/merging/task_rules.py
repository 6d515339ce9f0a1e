"""Merging rules beyond a federation's: TIES, DARE and magnitude pruning, by PEFT's own functions.

They act on the entries of the changes of the weights, τ_k = s_k B_k A_k, as PEFT's `add_weighted_adapter` does with the
combination types `ties_svd`, `dare_linear_svd`, `dare_ties_svd` and `magnitude_prune_svd`. They aim at one model that
does several tasks, not at the average of a federation, and no exactness is claimed for them.

Sources: TIES, Yadav et al. 2023, arXiv 2306.01708; DARE, Yu et al. 2023, arXiv 2311.03099.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedspan.adapters.compatibility import check_compatible
from fedspan.adapters.state_dict import Adapter
from fedspan.algebra.lowrank import LowRank
from fedspan.merging.merge_report import MergeReport, Tally
from fedspan.merging.parts import common_config, delta_of, frozen_weights, largest_rank, mean_delta, whole_weights
from fedspan.models.loading import seeded
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import plain, whole
from fedspan.support.suggest import nearest

TASK_RULES: Mapping[str, bool] = {"ties": True, "dare_linear": False, "dare_ties": True, "magnitude_prune": False}
"""Rule -> whether it is a mean over the adapters that agree in sign; the others are sums."""
Sign = Literal["total", "frequency"]
_LARGEST = 10.0
"""Of a factor. Numbers of examples, which every other rule takes, would multiply the changes by hundreds."""


@dataclass(frozen=True, slots=True)
class TaskRule:
    """One of these rules with its options."""

    name: str
    density: float = 0.5
    """Share of the entries of every change that is kept: the largest, or with DARE random ones."""
    majority_sign_method: Sign = "total"
    """The sign of an entry is that of the sum of the values, or of most of them (TIES and DARE with TIES)."""
    seed: int = 0
    """Of DARE's random draws."""

    def weights(self, given: Sequence[float] | None, number: int) -> list[float]:
        """Return PEFT's weights: factors of the changes, not shares.

        Where none are given they are 1 for the means, and 1/N for the sums, which makes means of them.

        Raises
        ------
        FedspanError
            For a factor above 10, which is a number of examples.
        """
        if given is not None:
            factors = [float(weight) for weight in given]
            if max(factors) > _LARGEST:
                shares = " ".join(f"{weight / sum(factors):.3g}" for weight in factors)
                raise FedspanError(
                    f"weights = {' '.join(f'{weight:g}' for weight in factors)}: {self.name} multiplies the changes by "
                    f"them; expected factors of at most {_LARGEST:g}, such as the shares {shares}"
                )
            return factors
        return [1.0 if TASK_RULES[self.name] else 1.0 / number] * number

    def apply(self, module: str, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged change (m, n) of one module."""
        from peft.utils import merge_utils

        options: dict[str, Any] = {"density": self.density}
        if TASK_RULES[self.name]:
            options["majority_sign_method"] = self.majority_sign_method
        with seeded(self.seed, module), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density")  # 1 prunes nothing, which was asked for
            merged: Tensor = getattr(merge_utils, self.name)(list(changes), torch.tensor(weights), **options)
        return merged


def create_rule(name: str, **options: Any) -> TaskRule:
    """Return the rule of this name, with PEFT's names of its options.

    Raises
    ------
    FedspanError
        For an unknown option or a value out of range.
    """
    valid = [field.name for field in fields(TaskRule) if field.name != "name"]
    if unknown := [key for key in options if key not in valid]:
        raise FedspanError(f"unknown key 'method.{unknown[0]}'{nearest(unknown[0], valid)}")
    density = plain(options.get("density", 0.5))
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise FedspanError(f"method.density = {density!r}: expected a number above 0 and at most 1")
    sign = options.get("majority_sign_method", "total")
    if sign not in get_args(Sign):
        raise FedspanError(f"method.majority_sign_method = {sign!r}: expected 'total' or 'frequency'")
    return TaskRule(name, float(density), sign, whole("method.seed", options.get("seed", 0), 0))


def combine_tasks(
    adapters: Sequence[Adapter],
    rule: TaskRule,
    *,
    weights: Sequence[float] | None,
    rank: int | None,
    labels: Sequence[str],
) -> tuple[Adapter, MergeReport]:
    """Merge adapters in memory by one of these rules; whole weights (heads) are averaged.

    Parameters
    ----------
    weights
        PEFT's; see `TaskRule.weights`. Heads are averaged by their shares.
    rank
        The largest rank that may be written; none: that of the result, which is in general the layer's own.
    """
    check_compatible(labels, adapters)
    factors_of = rule.weights(weights, len(adapters))
    shares = [weight / math.fsum(factors_of) for weight in factors_of]
    tally = Tally(rank, largest_rank(adapters))
    factors = {}
    for name in adapters[0].factors:
        changes = [delta_of(adapter.factors[name]).dense().float() for adapter in adapters]
        merged = rule.apply(name, changes, factors_of)
        result = LowRank(merged, torch.eye(merged.shape[1], dtype=merged.dtype))
        factors[name] = tally.fit(name, result, mean_delta(adapters, shares, name))
    dense = whole_weights(labels, adapters, _means(adapters, shares))
    first = adapters[0]
    config, frozen = common_config(adapters), frozen_weights(adapters)
    merged_adapter = Adapter(factors, dense, config, first.embeddings, frozen, first.stacks)
    return merged_adapter, tally.report(rule.name, factors_of, len(dense), {})


def _means(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    for name, first in adapters[0].dense.items():
        if first.is_floating_point():
            total = sum((p * a.dense[name].double() for p, a in zip(shares, adapters, strict=True)), first.double() * 0)
            means[name] = total.to(first.dtype)
    return means
