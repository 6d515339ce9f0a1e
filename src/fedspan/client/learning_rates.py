"""Learning rates: over the rounds of a federation, over the steps of a round, and of groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from fedspan.config import LocalConfig, PrivacyConfig
from fedspan.methods.messages import Recipe
from fedspan.support.errors import FedspanError


def rate(config: LocalConfig, step: int, steps: int, round_num: int = 0) -> float:
    """Return the learning rate of a step of a round, both counted from 0.

    It follows from the settings and the round's number alone, so that all clients of a round agree on it, at whichever
    site they are, and so do a resumed run and one that never stopped.
    """
    warmup = max(1, round(config.warmup * steps))
    return config.learning_rate * min(1.0, (step + 1) / warmup) * round_factor(config, round_num)


def round_factor(config: LocalConfig, round_num: int) -> float:
    """Return the factor on the learning rates of a round, counted from 0.

    With W rounds of warm-up and R = `schedule_rounds`, round r has (r + 1)/W while r < W; from then on, with
    t = (r − W)/(R − W), 1 − t (`linear`) or ½(1 + cos πt) (`cosine`). Rounds after the last of the schedule, which an
    extended run has, keep that one's factor.
    """
    if round_num < config.warmup_rounds:
        return (round_num + 1) / config.warmup_rounds
    if config.schedule == "constant" or config.schedule_rounds is None:
        return 1.0
    last = config.schedule_rounds - 1
    done = (min(round_num, last) - config.warmup_rounds) / (config.schedule_rounds - config.warmup_rounds)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def has_groups(config: LocalConfig) -> bool:
    """Return whether some parameters have learning rates of their own."""
    return config.head_learning_rate is not None or config.lora_plus_ratio is not None


def groups(stepped: Mapping[str, nn.Parameter], heads: Collection[str], config: LocalConfig) -> list[dict[str, Any]]:
    """Return the parameters of an optimizer in groups of one learning rate, each with its factor as `rate_factor`.

    LoRA+ gives B a multiple λ of A's rate (Hayou et al. 2024, 2402.12354).

    Parameters
    ----------
    stepped
        Parameters by name; the factors of an adapter are `MODULE/a` and `MODULE/b`.
    heads
        Names of the modules that are trained whole.
    """
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in stepped.items():
        by_factor.setdefault(_factor(name, heads, config), []).append(parameter)
    return [{"params": own, "rate_factor": factor} for factor, own in by_factor.items()]


def _factor(name: str, heads: Collection[str], config: LocalConfig) -> float:
    if name.endswith("/b"):
        return config.lora_plus_ratio or 1.0
    if config.head_learning_rate is not None and any(name.startswith(f"{head}.") for head in heads):
        return config.head_learning_rate / config.learning_rate
    return 1.0


def check_groups(config: LocalConfig, recipe: Recipe, trains: str, privacy: PrivacyConfig) -> None:
    """Refuse learning rates of groups where there are no such groups, or where one rate is taken for all.

    Raises
    ------
    FedspanError
        Naming the setting.
    """
    if not has_groups(config):
        return
    key = "head_learning_rate" if config.head_learning_rate is not None else "lora_plus_ratio"
    given = f"local.{key} = {getattr(config, key)}"
    if recipe.corrected or recipe.drifts:
        raise FedspanError(f"{given}: this method's corrections assume one learning rate for all that is trained")
    if privacy.dp == "example":
        raise FedspanError(f"{given}: privacy.dp = 'example' trains everything as one vector; expected one rate")
    if config.lora_plus_ratio is not None and (trains != "adapter" or recipe.confined or not recipe.train_b):
        raise FedspanError(
            f"local.lora_plus_ratio = {config.lora_plus_ratio}: this method trains no factor B; expected a method of "
            "adapters that does"
        )
