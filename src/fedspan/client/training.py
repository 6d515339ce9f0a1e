"""A client's local work: from what it was sent to its update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedspan.algebra.galore import GaloreAdamW
from fedspan.config import Config, LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Update, Vector
from fedspan.models import FederatedModel, seeded
from fedspan.models.losses import client_losses
from fedspan.privacy.example_dp import clipped_sum, parts_of, private_gradients
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What one client's work of one round came to."""

    update: Update
    train_loss: float
    """Mean over the steps."""
    steps: int
    optimizer_bytes: int = 0
    """What the local optimizer held at its end, step counts left out."""


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
    secret: int | None = None
    """The site's own, which nobody else knows: what its noise is drawn from."""


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


def work_on(model: FederatedModel, work: Assignment, data: Encoded, config: Config, round_num: int) -> LocalResult:
    """What one client answers: what it learns, or a gradient where that is asked for."""
    private = config.privacy.dp == "example"
    if work.broadcast.recipe.gradient:
        if private:
            raise FedspanError("privacy.dp = 'example': a gradient was asked for that no noise is added to")
        return gradient(model, work, data, config, round_num)
    return (train_privately if private else train)(model, work, data, config, round_num)


def train(model: FederatedModel, work: Assignment, data: Encoded, config: Config, round_num: int) -> LocalResult:
    """One client's local work: from what it was sent, on its own rows of the training data.

    The run's seed, the round and the client's id fix the batches and the dropout.
    """
    model.load(work.broadcast)
    sent, local = work.broadcast, config.local
    recipe = sent.recipe
    key = (config.seed, round_num, work.client_id)
    chosen = model.trainable(recipe)
    moved = Moved(chosen, sent, model.device)
    optimizer = _optimizer(model, moved, sent, local, key)
    total, rates = torch.zeros((), device=model.device), 0.0
    with model.training(config.engine.compile), seeded(*key, "dropout"):
        for step, batch in enumerate(_schedule(model, work, data, local, key)):
            now = rate(local, step, work.steps)
            rates += now
            for group in optimizer.param_groups:
                group["lr"] = now
            with autocast(model, config):
                loss = client_losses(model, batch).sum()
            total += loss.detach()
            if recipe.tail_penalty is not None:
                strength, tail = recipe.tail_penalty
                loss = loss + strength * model.tail_penalty(tail)
            torch.autograd.backward(loss)
            moved.gradients()
            if local.clip_norm is not None:
                nn.utils.clip_grad_norm_(moved.stepped.values(), local.clip_norm)
            moved.correct()
            optimizer.step()
            moved.follow()
            optimizer.zero_grad(set_to_none=True)
    moments = _second_moments(optimizer, moved)
    update = Update(work.client_id, work.weight, model.adapter(), model.dense(), moments, rates)
    return LocalResult(update, float(total) / work.steps, work.steps, _state_bytes(optimizer))


def train_privately(
    model: FederatedModel, work: Assignment, data: Encoded, config: Config, round_num: int
) -> LocalResult:
    """`train` by DP-SGD: with g_i the gradient of example i alone, each step goes along

        (Σ_i g_i · min(1, C/‖g_i‖) + N(0, (zC)² I)) / (q n),    i by independent coins of q = min(1, batch_size/n).

    Each example's loss is the mean over its own answer tokens; `local.clip_norm` has nothing left to do. The local
    optimizer takes these gradients as it would any others. The mean loss is not told, since nothing hides what it says
    of the examples: it is NaN.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (1607.00133); the gradients per example are
    those of one adapter per example in one pass (`models.stacked`).
    """
    sent, local, recipe = work.broadcast, config.local, work.broadcast.recipe
    model.check(recipe)
    examples = data.subset(work.rows)
    sampled, width = min(1.0, local.batch_size / len(examples)), min(2 * local.batch_size, len(examples))
    rates = [rate(local, step, work.steps) for step in range(work.steps)]
    with (
        private_gradients(model, sent, config.privacy, work.secret, width) as private,
        model.training(),
        seeded(config.seed, round_num, work.client_id, "dropout"),
    ):
        weights = nn.Parameter(private.weights())
        optimizer = plain_optimizer([{"params": [weights]}], local)
        for step, now in enumerate(rates):
            mark = private.mark(weights, round_num, work.client_id, step)
            total = torch.zeros_like(weights.data)
            for part in parts_of(private.chosen(mark, len(examples), sampled), width):
                batch = {name: value.to(model.device) for name, value in examples.batch(part).items()}
                with autocast(model, config):
                    own = private.of(batch)
                total += clipped_sum(own, config.privacy.clip)
            weights.grad = private.noised(total, mark, sampled * len(examples))
            if recipe.tail_penalty is not None:
                weights.grad += private.penalty(*recipe.tail_penalty)
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.step()
            private.put(weights.data)
        update = Update(work.client_id, work.weight, private.adapter(), private.dense(), {}, sum(rates))
    return LocalResult(update, math.nan, work.steps, _state_bytes(optimizer))


def gradient(model: FederatedModel, work: Assignment, data: Encoded, config: Config, round_num: int) -> LocalResult:
    """The mean gradient over a few batches with respect to the weights of the target modules, dropout off."""
    model.load(work.broadcast)
    weights = model.target_weights()
    key = (config.seed, round_num, work.client_id, "gradient")
    steps = work.broadcast.recipe.probe_batches
    total = torch.zeros((), device=model.device)
    with model.differentiable(weights):
        for batch in _schedule(model, replace(work, steps=steps), data, config.local, key):
            with autocast(model, config):
                loss = client_losses(model, batch).sum()
            total += loss.detach()
            torch.autograd.backward(loss / steps)
        modules = {name: Vector({"gradient": model.oriented(name, w)}) for name, w in weights.items()}
    update = Update(work.client_id, work.weight, modules, {})
    return LocalResult(update, float(total) / steps, steps)


def _schedule(
    model: FederatedModel, work: Assignment, data: Encoded, config: LocalConfig, key: tuple[object, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """The client's batches, on the model's device."""
    examples = data.subset(work.rows)
    for indices in batches(len(examples), config.batch_size, work.steps, generator(*key, "batches")):
        yield {name: value.to(model.device) for name, value in examples.batch(indices).items()}


class Moved:
    """The tensors that a client trains, and what the optimizer steps on for each: the tensor, or its coordinates."""

    def __init__(self, chosen: Mapping[str, nn.Parameter], sent: Broadcast, device: torch.device) -> None:
        self.chosen, self.mu = chosen, sent.recipe.proximal
        self.subspaces = {
            name: replace(space, basis=space.basis.to(device, p.dtype))
            for name, space in sent.subspaces.items()
            if (p := chosen.get(name)) is not None
        }
        fixed = self.subspaces.keys() if not self.mu else chosen.keys()
        self.start = {name: chosen[name].detach().clone() for name in fixed}
        self.correction = {name: value.to(chosen[name]) for name, value in sent.correction.items()}
        self.stepped = dict(chosen) | {
            name: nn.Parameter(space.coordinates(torch.zeros_like(chosen[name])))
            for name, space in self.subspaces.items()
        }

    @torch.no_grad()
    def gradients(self) -> None:
        """From the loss's gradients to those that the optimizer sees."""
        if self.mu:
            for name, p in self.chosen.items():
                if p.grad is not None:
                    p.grad.add_(p - self.start[name], alpha=self.mu)
        for name, space in self.subspaces.items():
            p = self.chosen[name]
            self.stepped[name].grad = None if p.grad is None else space.coordinates(p.grad)
            p.grad = None

    @torch.no_grad()
    def correct(self) -> None:
        """What the server has every step add to the gradients."""
        for name, value in self.correction.items():
            p = self.chosen[name]
            p.grad = value.clone() if p.grad is None else p.grad.add_(value)

    @torch.no_grad()
    def follow(self) -> None:
        """The tensors at their new coordinates."""
        for name, space in self.subspaces.items():
            self.chosen[name].copy_(self.start[name] + space.expand(self.stepped[name]))


def _optimizer(
    model: FederatedModel, moved: Moved, sent: Broadcast, config: LocalConfig, key: tuple[object, ...]
) -> torch.optim.Optimizer:
    stepped, recipe = moved.stepped, sent.recipe
    if recipe.galore is None:
        return plain_optimizer([{"params": list(stepped.values())}], config)
    projected = [p for name, p in stepped.items() if name in model.projected]
    plain = [p for name, p in stepped.items() if name not in model.projected]
    seed = generator(*key, "galore").initial_seed()
    groups: list[dict[str, object]] = [{"params": projected, **asdict(recipe.galore), "seed": seed}]
    if plain:
        groups.append({"params": plain})
    optimizer = GaloreAdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    for name, moment in sent.moments.items():
        optimizer.start_from(stepped[name], moment.to(stepped[name]))
    return optimizer


def plain_optimizer(groups: list[dict[str, Any]], config: LocalConfig) -> torch.optim.Optimizer:
    """AdamW or SGD as the settings say; fused, which is one pass over memory instead of seven."""
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)


def _second_moments(optimizer: torch.optim.Optimizer, moved: Moved) -> dict[str, torch.Tensor]:
    """What GaLore's optimizer ended with, by name; nothing of another."""
    if not isinstance(optimizer, GaloreAdamW):
        return {}
    held = optimizer.second_moments()
    return {name: held[p].cpu() for name, p in moved.stepped.items() if p in held}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts and marks, which are single numbers, left out."""
    held = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in held if t.ndim)
