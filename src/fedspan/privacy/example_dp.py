"""Example-level differential privacy on a client: DP-SGD over the adapters and heads that it trains.

Shapes: b examples, P trained numbers; G (b, P) the examples' own gradients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fedspan.config import PrivacyConfig
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Request, Template
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.stacked import Stack, stacked
from fedspan.privacy.accountant import Budget, Event
from fedspan.privacy.gaussian import fingerprint, normal, uniform
from fedspan.support.errors import FedspanError

_MARGIN = 1 - 2.0**-20
"""A clipped gradient stays this much below C, so that no rounding takes it above."""


def refusal(method: Method) -> str | None:
    """Why the clients of this method cannot train by DP-SGD, or none."""
    if method.info.trains != "adapter":
        return "its clients train base weights, of which no gradient per example is at hand"
    if any(exchange.ask == "gradient" for exchange in method.exchanges):
        return "its clients answer with a gradient that no noise was added to"
    recipe = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe
    if recipe.galore is not None or recipe.confined or recipe.proximal:
        return "its clients do not train their adapters by the plain local optimizer"
    return None


def release(privacy: PrivacyConfig, batch_size: int, num_examples: int, steps: int) -> Event:
    """What so many local steps release of a client's examples: batches of a Poisson sample of rate q = b/n, at most 1.

    Number of examples and of steps count as public.
    """
    return Event(privacy.noise_multiplier, min(1.0, batch_size / num_examples), steps)


def clipped_sum(grads: Tensor, clip: float) -> Tensor:
    """Σ_i g_i · min(1, C / ‖g_i‖) over the rows of G (b, P): (P,). A gradient with NaN or infinity counts as zero.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (1607.00133).
    """
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64)
    scale = (clip * _MARGIN / norms.clamp_min(1e-300)).clamp_max(1.0)
    sound = torch.isfinite(norms)
    if not bool(sound.all()):
        grads, scale = grads[sound], scale[sound]
    total: Tensor = scale.to(grads.dtype) @ grads
    return total


@dataclass(slots=True)
class PrivateGradients:
    """A client's steps: which examples are in each, and the noised mean of their clipped gradients.

    Coins and noise come from the site's secret and from the weights that the step starts from, so that a round that is
    worked on again from the same broadcast is the same to the bit, and from another one draws anew.
    """

    stack: Stack
    """The same adapter in every place, one example each."""
    model: FederatedModel
    privacy: PrivacyConfig
    secret: int
    width: int
    """Examples in one pass; a larger batch takes several."""
    active: int = field(default=0)

    @property
    def size(self) -> int:
        """P"""
        return self.stack.trained.values.shape[1]

    def weights(self) -> Tensor:
        """A copy of what is trained, (P,)."""
        return self.stack.trained.values[0].detach().clone()

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        """The same numbers for every example."""
        self.stack.trained.values.copy_(weights.expand_as(self.stack.trained.values))

    def chosen(self, mark: str, num_examples: int, rate: float) -> list[int]:
        """The examples of one step, each by a coin of its own; there may be none."""
        coins = uniform(self.secret, "examples", mark, count=num_examples)
        found: list[int] = torch.nonzero(coins < rate).flatten().tolist()
        return found

    def of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """G of the rows of a batch, at most `width` of them: (b, P), until it is called again."""
        count = len(batch["labels"])
        if count != self.active:
            self.stack.activate(count)
            self.active = count
        grads = self.stack.trained.grads
        assert grads is not None  # a stack that trains has some
        grads.zero_()
        torch.autograd.backward(client_losses(self.model, batch, count).sum())
        self.stack.gather_gradients()
        return grads[:count]

    def noised(self, total: Tensor, mark: str, expected: float) -> Tensor:
        """(Σ clipped + N(0, (zC)² I)) / expected: (P,), expected = q n and not how many were drawn."""
        spread = self.privacy.noise_multiplier * self.privacy.clip
        if spread:
            # The sum, not the coins alone: two different sums never share their noise.
            noise = normal(self.secret, "noise", mark, fingerprint([("", total)]), shape=total.shape)
            total = (total.cpu().double() + spread * noise).to(total)
        return total / expected

    def mark(self, weights: Tensor, *key: object) -> str:
        """What a step is known by: the round and the weights that it starts from."""
        return "/".join((*map(str, key), fingerprint([("", weights)])))

    def penalty(self, strength: float, tail: int) -> Tensor:
        """The gradient of HetLoRA's penalty, which is a matter of the weights and not of any example: (P,)."""
        self.stack.activate(1)
        self.active = 1
        grads = self.stack.trained.grads
        assert grads is not None
        grads.zero_()
        torch.autograd.backward(strength * self.stack.tail_penalties([tail]).sum())
        self.stack.gather_gradients()
        return grads[0].clone()

    def adapter(self) -> dict[str, Factors]:
        """Copies of what the steps have come to."""
        return self.stack.adapter(0)

    def dense(self) -> dict[str, Tensor]:
        """Copies of the heads."""
        return self.stack.dense(0)


@contextmanager
def private_gradients(
    model: FederatedModel, sent: Broadcast, privacy: PrivacyConfig, secret: int | None, width: int
) -> Iterator[PrivateGradients]:
    """The model with `width` copies of what was sent in it, one for each example of a pass.

    Raises
    ------
    ValueError
        Where there is no secret, or a layer mixes the rows of a batch or has no gradient per example.
    """
    if secret is None:
        raise FedspanError("privacy.dp = 'example': the site has no secret to draw noise from")
    for name, layer in model.model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise FedspanError(f"privacy.dp = 'example': {name} mixes the rows of a batch")
    with stacked(model, [sent] * width) as stack:
        yield PrivateGradients(stack, model, privacy, secret, width)


class Ledger:
    """What a site has released of its own data, in a file of its own, written before the work is done.

    Parameters
    ----------
    delta, limit
        Of the site's budget; a file that says otherwise is refused.
    """

    def __init__(self, path: Path, delta: float, limit: float | None = None) -> None:
        self.path = path
        self.budget = Budget(delta, limit)
        if path.exists():
            try:
                held = Budget.restored(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise FedspanError(f"{path}: {error}") from None
            if held.delta != delta:
                raise FedspanError(f"{path} counts at delta = {held.delta}: expected privacy.delta = {delta}")
            self.budget = Budget(delta, limit, held.events)

    @property
    def spent(self) -> float:
        """ε so far."""
        return self.budget.spent

    def allows(self, event: Event) -> bool:
        """Whether the site may do that."""
        return self.budget.allows(event)

    def charge(self, event: Event) -> None:
        """Count it, whether or not the work that follows comes to an end.

        Raises
        ------
        ValueError
            When it would exceed the budget: nothing may be done then.
        """
        after = self.budget.plus(event)
        if not self.budget.allows(event):
            raise FedspanError(
                f"the privacy budget of this site is spent: this round would come to epsilon = {after.spent:.4g}, "
                f"privacy.epsilon = {after.limit}"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".partial")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(after.record(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.budget = after


def parts_of(chosen: Sequence[int], width: int) -> list[list[int]]:
    """One step's examples in passes of at most `width`."""
    return [list(chosen[start : start + width]) for start in range(0, len(chosen), width)]
