"""A client's local work: from what it was sent to its update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.galore import GaloreAdamW
from fedspan.methods.messages import Broadcast, Recipe, Update
from fedspan.models import FederatedModel, seeded
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


def train(
    model: FederatedModel,
    broadcast: Broadcast,
    examples: Encoded,
    config: LocalConfig,
    *,
    steps: int,
    client_id: str,
    weight: float,
    key: tuple[object, ...],
) -> LocalResult:
    """Train from `broadcast` on the client's own examples.

    Parameters
    ----------
    steps
        Optimizer steps.
    weight
        What this client counts for in averages.
    key
        (run seed, round): with the client's id it fixes the batches and the dropout.
    """
    model.load(broadcast)
    recipe = broadcast.recipe
    chosen = model.trainable(recipe)
    optimizer = _optimizer(model, chosen, recipe, config, key=(*key, client_id))
    warmup = max(1, round(config.warmup * steps))
    total = torch.zeros((), device=model.device)
    parameters = list(chosen.values())
    model.model.train()
    with seeded(*key, client_id, "dropout"):
        schedule = batches(len(examples), config.batch_size, steps, generator(*key, client_id, "batches"))
        for step, indices in enumerate(schedule):
            rate = config.learning_rate * min(1.0, (step + 1) / warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(model, examples.batch(indices))
            total += loss.detach()
            if recipe.tail_penalty is not None:
                strength, tail = recipe.tail_penalty
                loss = loss + strength * model.tail_penalty(tail)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.model.eval()
    update = Update(client_id, weight, model.adapter(), model.dense())
    return LocalResult(update, float(total) / steps, steps)


def _loss(model: FederatedModel, batch: dict[str, Tensor]) -> Tensor:
    moved = {name: value.to(model.device) for name, value in batch.items()}
    loss: Tensor = model.model(**moved).loss
    return loss


def _optimizer(
    model: FederatedModel,
    chosen: dict[str, nn.Parameter],
    recipe: Recipe,
    config: LocalConfig,
    key: tuple[object, ...],
) -> torch.optim.Optimizer:
    if recipe.galore is None:
        return torch.optim.AdamW(chosen.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    projected = [p for name, p in chosen.items() if name in model.projected]
    plain = [p for name, p in chosen.items() if name not in model.projected]
    seed = generator(*key, "galore").initial_seed()
    groups: list[dict[str, object]] = [{"params": projected, **asdict(recipe.galore), "seed": seed}]
    if plain:
        groups.append({"params": plain})
    return GaloreAdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
