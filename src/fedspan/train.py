"""A client's local work: from what it was sent to its update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedspan.config import Config, LocalConfig
from fedspan.data import Encoded
from fedspan.galore import GaloreAdamW
from fedspan.methods.messages import Broadcast, Recipe, Update
from fedspan.models import FederatedModel, seeded
from fedspan.models.losses import client_losses
from fedspan.seeding import generator


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What one client's work of one round came to."""

    update: Update
    train_loss: float
    """Mean over the steps."""
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One client's work of one round."""

    client_id: str
    broadcast: Broadcast
    """What it starts from."""
    rows: np.ndarray
    """Its examples, as rows of the training data."""
    steps: int
    weight: float
    """What this client counts for in averages."""


def num_steps(config: LocalConfig, num_examples: int) -> int:
    """Optimizer steps of one round for a client with so many examples."""
    if config.epochs is not None:
        return config.epochs * math.ceil(num_examples / config.batch_size)
    return config.steps or 10


def batches(num_examples: int, batch_size: int, steps: int, rng: torch.Generator) -> Iterator[list[int]]:
    """`steps` batches of indices, without replacement within each pass over the data."""
    order: list[int] = []
    size = min(batch_size, num_examples)
    for _ in range(steps):
        if not order:
            order = torch.randperm(num_examples, generator=rng).tolist()
        yield order[:size]
        order = order[size:]


def rate(config: LocalConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0."""
    warmup = max(1, round(config.warmup * steps))
    return config.learning_rate * min(1.0, (step + 1) / warmup)


def autocast(model: FederatedModel, config: Config) -> AbstractContextManager[Any]:
    """The type of the base's matrix products in training."""
    wanted = config.engine.autocast != "none"
    return torch.autocast(model.device.type, torch.bfloat16) if wanted else nullcontext()


def train(model: FederatedModel, work: Assignment, data: Encoded, config: Config, round_num: int) -> LocalResult:
    """One client's local work: from what it was sent, on its own rows of the training data.

    The run's seed, the round and the client's id fix the batches and the dropout.
    """
    model.load(work.broadcast)
    examples, recipe, local = data.subset(work.rows), work.broadcast.recipe, config.local
    key = (config.seed, round_num, work.client_id)
    chosen = model.trainable(recipe)
    optimizer = _optimizer(model, chosen, recipe, local, key)
    total = torch.zeros((), device=model.device)
    parameters = list(chosen.values())
    with model.training(config.engine.compile), seeded(*key, "dropout"):
        schedule = batches(len(examples), local.batch_size, work.steps, generator(*key, "batches"))
        for step, indices in enumerate(schedule):
            for group in optimizer.param_groups:
                group["lr"] = rate(local, step, work.steps)
            batch = {name: value.to(model.device) for name, value in examples.batch(indices).items()}
            with autocast(model, config):
                loss = client_losses(model, batch).sum()
            total += loss.detach()
            if recipe.tail_penalty is not None:
                strength, tail = recipe.tail_penalty
                loss = loss + strength * model.tail_penalty(tail)
            torch.autograd.backward(loss)
            if local.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, local.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    update = Update(work.client_id, work.weight, model.adapter(), model.dense())
    return LocalResult(update, float(total) / work.steps, work.steps)


def _optimizer(
    model: FederatedModel,
    chosen: dict[str, nn.Parameter],
    recipe: Recipe,
    config: LocalConfig,
    key: tuple[object, ...],
) -> torch.optim.Optimizer:
    if recipe.galore is None:
        return torch.optim.AdamW(
            chosen.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over memory instead of seven
        )
    projected = [p for name, p in chosen.items() if name in model.projected]
    plain = [p for name, p in chosen.items() if name not in model.projected]
    seed = generator(*key, "galore").initial_seed()
    groups: list[dict[str, object]] = [{"params": projected, **asdict(recipe.galore), "seed": seed}]
    if plain:
        groups.append({"params": plain})
    return GaloreAdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
