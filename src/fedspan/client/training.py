"""A client's local work: from the broadcast that it received to its update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedspan.algebra.galore import GaloreAdamW
from fedspan.client.batching import add_gradients, autocast, schedule
from fedspan.client.head_cores import HeadCores
from fedspan.client.learning_rates import groups as rate_groups
from fedspan.client.learning_rates import rate
from fedspan.client.optimizer_state import put_state, state_by_name
from fedspan.config import Config, EngineConfig, LocalConfig, PrivacyConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Update, Vector
from fedspan.models import FederatedModel, seeded
from fedspan.models.counted_dropout import CountedDropout, step_seeds
from fedspan.models.placement import seed_each_gpu
from fedspan.models.streams import drops
from fedspan.privacy.example_dp import clipped_sum, parts_of, private_gradients
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The settings that the local work of a client depends on."""

    seed: int = 0
    local: LocalConfig = field(default_factory=LocalConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @classmethod
    def of(cls, config: Config) -> TrainingSettings:
        """Return those of a run."""
        return cls(config.seed, config.local, config.privacy, config.engine)

    def with_engine(self, name: Any) -> TrainingSettings:
        """Return the same settings for work by the engine of this name."""
        return self.with_options(name=name)

    def with_options(self, **options: Any) -> TrainingSettings:
        """Return the same settings with other options of the engine."""
        return replace(self, engine=self.engine.model_copy(update=options))


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The outcome of one client's local work in one round."""

    update: Update
    train_loss: float
    """Mean over the steps; NaN where it is not released."""
    steps: int
    optimizer_bytes: int = 0
    """Size of the local optimizer's state at the end, step counts left out."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings of the run that a client's work belongs to, where clients of several runs share a pass."""

    seed: int
    local: LocalConfig
    round_num: int


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One client's local work in one round."""

    client_id: str
    broadcast: Broadcast
    """The adapter, patch, dense weights and recipe that it starts from."""
    rows: np.ndarray
    """Its examples, as rows of the training data."""
    steps: int
    weight: float
    """The weight of this client in averages."""
    secret: int | None = None
    """The secret of this work alone, unknown to everyone but the site, from which its coins and noise are drawn."""
    terms: Terms | None = None
    """Its run's own settings; None for those of all work that is done with it."""
    run: int | None = None
    """Number of its run, whose clients then share passes with each other alone; None: with any."""

    def under(self, settings: TrainingSettings, round_num: int) -> tuple[TrainingSettings, int]:
        """Return the settings and the round of this work, given those of all work that is done with it."""
        if self.terms is None:
            return settings, round_num
        return replace(settings, seed=self.terms.seed, local=self.terms.local), self.terms.round_num


def num_steps(config: LocalConfig, num_examples: int) -> int:
    """Return the optimizer steps of one round for a client with this number of examples."""
    if config.epochs is not None:
        return config.epochs * math.ceil(num_examples / config.batch_size)
    return config.steps or 10


_OWN_SIZES = ("steps", "epochs", "batch_size")
_OWN_RATES = ("learning_rate", "warmup", "schedule", "schedule_rounds", "warmup_rounds")


def shared_part(config: LocalConfig) -> LocalConfig:
    """Return these settings without those that every client of a pass may have of its own."""
    plain = LocalConfig()
    own = {name: getattr(plain, name) for name in (*_OWN_SIZES, *_OWN_RATES)}
    return config.model_copy(update=own)


def work_on(
    model: FederatedModel, work: Assignment, data: Encoded, settings: TrainingSettings, round_num: int
) -> LocalResult:
    """Do one client's local work: train, or compute a gradient where the recipe asks for one."""
    settings, round_num = work.under(settings, round_num)
    private = settings.privacy.dp == "example"
    if work.broadcast.recipe.gradient:
        # The configuration was refused for it; should a server ask all the same, nothing may leave without noise.
        if private:
            raise FedspanError("privacy.dp = 'example': a gradient was requested that no noise is added to")
        return gradient(model, work, data, settings, round_num)
    return (train_privately if private else train)(model, work, data, settings, round_num)


def train(
    model: FederatedModel, work: Assignment, data: Encoded, settings: TrainingSettings, round_num: int
) -> LocalResult:
    """Train one client from its broadcast, on its own rows of the training data.

    The run's seed, the round and the client's id determine the batches and the dropout, whatever was trained before.
    """
    model.load(work.broadcast)
    sent, local = work.broadcast, settings.local
    recipe = sent.recipe
    key = (settings.seed, round_num, work.client_id)
    chosen = model.trainable(recipe)
    trained = TrainedTensors(chosen, sent)
    optimizer = _optimizer(model, trained, sent, local, key)
    put_state(optimizer, trained.stepped, sent.optimizer)
    total, rates = torch.zeros((), device=model.device), 0.0
    planned = sum(rate(local, step, work.steps, round_num) for step in range(work.steps))
    with model.training(settings.engine.compile, settings.engine.checkpointing), seeded(*key, "dropout"):
        seed_each_gpu(model.places, *key, "dropout")
        masks = _masks(model, work.steps, settings, key)
        for step, parts in enumerate(schedule(model, data.subset(work.rows), work.steps, local, settings.engine, key)):
            now = rate(local, step, work.steps, round_num)
            rates += now
            for group in optimizer.param_groups:
                group["lr"] = now * group["rate_factor"]
            with masks[step]:
                total += add_gradients(model, parts, settings.engine)
            if recipe.tail_penalty is not None:
                strength, tail = recipe.tail_penalty
                torch.autograd.backward(strength * model.tail_penalty(tail))
            trained.gradients()
            if local.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained.stepped.values(), local.clip_norm)
            # After clipping: SCAFFOLD's correction is itself a difference of means of clipped gradients.
            trained.correct()
            optimizer.step()
            trained.follow()
            trained.drift(now / planned)
            optimizer.zero_grad(set_to_none=True)
    moments = _second_moments(optimizer, trained, recipe.carries_moments)
    kept = state_by_name(optimizer, trained.stepped) if local.keep_optimizer else {}
    update = Update(work.client_id, work.weight, model.adapter(), model.dense(), moments, rates, kept)
    return LocalResult(update, float(total) / work.steps, work.steps, _state_bytes(optimizer))


def train_privately(
    model: FederatedModel, work: Assignment, data: Encoded, settings: TrainingSettings, round_num: int
) -> LocalResult:
    """Train one client by DP-SGD: with g_i the gradient of example i alone, each step goes along

        (Σ_i g_i · min(1, C/‖g_i‖) + N(0, (zC)² I)) / (q n),    i by independent coins of q = min(1, batch_size/n).

    Each example's loss is the mean over its own answer tokens; `local.clip_norm` does not apply. The local
    optimizer takes these gradients as it would any others. The mean loss is not released, since no noise hides what
    it reveals of the examples: it is NaN.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (1607.00133); the gradients per example are
    those of one adapter per example in one pass (`models.stacked`).
    """
    sent, local, recipe = work.broadcast, settings.local, work.broadcast.recipe
    model.check(recipe)
    examples = data.subset(work.rows)
    sampled = min(1.0, local.batch_size / len(examples))
    width = min(-(-2 * local.batch_size // local.accumulate), len(examples))
    rates = [rate(local, step, work.steps, round_num) for step in range(work.steps)]
    with (
        private_gradients(model, sent, settings.privacy, work.secret, width) as private,
        model.training(),
        # From the secret too. An example's mask depends on its place among those that were drawn; were the masks known,
        # one example more would change what all that follow it add, by more than C.
        seeded(work.secret, settings.seed, round_num, work.client_id, "dropout"),
    ):
        weights = nn.Parameter(private.weights())
        optimizer = plain_optimizer([{"params": [weights]}], local)
        for step, now in enumerate(rates):
            mark = f"{round_num}/{work.client_id}/{step}"
            total = torch.zeros_like(weights.data)
            for part in parts_of(private.chosen(mark, len(examples), sampled), width):
                batch = {name: value.to(model.device) for name, value in examples.batch(part).items()}
                with autocast(model, settings.engine):
                    own = private.of(batch)
                total += clipped_sum(own, settings.privacy.clip)
            weights.grad = private.noised(total, weights, mark, sampled * len(examples))
            if recipe.tail_penalty is not None:
                weights.grad += private.penalty(*recipe.tail_penalty)
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.step()
            # The stack holds one copy of the weights per example: all of them start the next step alike.
            private.put(weights.data)
        update = Update(work.client_id, work.weight, private.adapter(), private.dense(), {}, sum(rates))
    return LocalResult(update, math.nan, work.steps, _state_bytes(optimizer))


def gradient(
    model: FederatedModel, work: Assignment, data: Encoded, settings: TrainingSettings, round_num: int
) -> LocalResult:
    """Compute the mean gradient over a few batches, of the weights of the target modules, with dropout off."""
    model.load(work.broadcast)
    weights = model.target_weights()
    key = (settings.seed, round_num, work.client_id, "gradient")
    steps = work.broadcast.recipe.probe_batches
    total = torch.zeros((), device=model.device)
    with model.differentiable(weights):
        for parts in schedule(model, data.subset(work.rows), steps, settings.local, settings.engine, key):
            total += add_gradients(model, parts, settings.engine, 1 / steps)
        modules = {name: Vector({"gradient": model.oriented(name, w)}) for name, w in weights.items()}
    update = Update(work.client_id, work.weight, modules, {})
    return LocalResult(update, float(total) / steps, steps)


def _masks(
    model: FederatedModel, steps: int, settings: TrainingSettings, key: tuple[object, ...]
) -> Sequence[AbstractContextManager[Any]]:
    """Return the dropout of each step: on a GPU the masks that the client has in a cohort too, else torch's own.

    Torch's own too where such a client is never in a cohort. Checkpointing draws it again with the same result.
    """
    engine = settings.engine
    alone = engine.compile or engine.checkpointing or settings.local.accumulate > 1 or bool(model.places)
    if model.device.type != "cuda" or alone or not drops(model.model):
        return [nullcontext()] * steps
    seeds = torch.tensor(step_seeds(generator(*key, "dropout").initial_seed(), steps), device=model.device)
    return [CountedDropout(own[None]) for own in seeds]


class TrainedTensors:
    """The tensors that a client trains, and the parameters that the optimizer steps on for them.

    For a tensor that is confined to a subspace, the parameter is its coordinates; otherwise it is the tensor itself.
    """

    def __init__(self, chosen: Mapping[str, nn.Parameter], sent: Broadcast) -> None:
        self.chosen, self.mu = chosen, sent.recipe.proximal
        self.subspaces = {
            name: replace(space, basis=space.basis.to(p))
            for name, space in sent.subspaces.items()
            if (p := chosen.get(name)) is not None
        }
        fixed = self.subspaces.keys() if not self.mu else chosen.keys()
        self.start = {name: chosen[name].detach().clone() for name in fixed}
        corrections = {name: value.to(chosen[name]) for name, value in sent.correction.items()}
        self.correction, self.movement = ({}, corrections) if sent.recipe.drifts else (corrections, {})
        self.stepped = dict(chosen) | {
            name: nn.Parameter(space.coordinates(torch.zeros_like(chosen[name])))
            for name, space in self.subspaces.items()
        }
        self.heads: dict[str, HeadCores] = {}
        if sent.recipe.heads:
            self._divide(sent.recipe.heads)

    def _divide(self, heads: int) -> None:
        """Let the blocks of every confined tensor, and their scales, be the parameters of the optimizer."""
        for name, space in self.subspaces.items():
            cores = HeadCores(space.coordinates(self.start[name]), heads)
            self.heads[name] = cores
            self.stepped |= {name: cores.matrices, f"{name}/scales": cores.scales}

    @torch.no_grad()
    def gradients(self) -> None:
        """Turn the loss's gradients into those of the parameters that the optimizer steps on."""
        if self.mu:
            for name, p in self.chosen.items():
                if p.grad is not None:
                    p.grad.add_(p - self.start[name], alpha=self.mu)
        for name, space in self.subspaces.items():
            p = self.chosen[name]
            grad = None if p.grad is None else space.coordinates(p.grad)
            p.grad = None
            if name in self.heads:
                self.heads[name].take(grad)
            else:
                self.stepped[name].grad = grad

    @torch.no_grad()
    def correct(self) -> None:
        """Add the server's correction to the gradients of this step."""
        for name, value in self.correction.items():
            p = self.chosen[name]
            p.grad = value.clone() if p.grad is None else p.grad.add_(value)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the tensors to their new coordinates."""
        for name, space in self.subspaces.items():
            moved = self.heads[name].moved() if name in self.heads else self.stepped[name]
            self.chosen[name].copy_(self.start[name] + space.expand(moved))

    @torch.no_grad()
    def drift(self, share: float) -> None:
        """Move the tensors by this share of the movement that the server asks for."""
        for name, value in self.movement.items():
            self.chosen[name].add_(value, alpha=share)


def _optimizer(
    model: FederatedModel, trained: TrainedTensors, sent: Broadcast, config: LocalConfig, key: tuple[object, ...]
) -> torch.optim.Optimizer:
    stepped, recipe = trained.stepped, sent.recipe
    if recipe.galore is None and not recipe.carries_moments:
        return plain_optimizer(rate_groups(stepped, model.heads, config), config)
    if recipe.galore is None:
        # AdamW in plain operations: torch's own has no start for its second moments.
        adamw = GaloreAdamW(
            rate_groups(stepped, model.heads, config), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        for name, moment in sent.moments.items():
            adamw.start_from(stepped[name], moment.to(stepped[name]).expand(stepped[name].shape))
        return adamw
    projected = {name: p for name, p in stepped.items() if name in model.projected}
    plain = {name: p for name, p in stepped.items() if name not in model.projected}
    seed = generator(*key, "galore").initial_seed()
    groups = [{**group, **asdict(recipe.galore), "seed": seed} for group in rate_groups(projected, model.heads, config)]
    groups += rate_groups(plain, model.heads, config)
    optimizer = GaloreAdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    for name, moment in sent.moments.items():
        optimizer.start_from(stepped[name], moment.to(stepped[name]))
    return optimizer


def plain_optimizer(groups: list[dict[str, Any]], config: LocalConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD as the settings say; fused, which is one pass over memory instead of seven."""
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)


def _second_moments(optimizer: torch.optim.Optimizer, trained: TrainedTensors, of_all: bool) -> dict[str, torch.Tensor]:
    """Return the second moments of GaLore's optimizer by name, those of plain tensors too where they are asked for."""
    if not isinstance(optimizer, GaloreAdamW):
        return {}
    held = optimizer.second_moments(of_all)
    return {name: held[p].cpu() for name, p in trained.stepped.items() if p in held}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the optimizer's state without counts and marks, which are single numbers."""
    held = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in held if t.ndim)
