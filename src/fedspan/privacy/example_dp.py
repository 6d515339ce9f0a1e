"""Example-level differential privacy on a client: DP-SGD over the adapters and heads that it trains.

Shapes: b examples, P trained numbers; G (b, P) the examples' own gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedspan.config import PrivacyConfig
from fedspan.data import Encoded
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Factors, Request, Template
from fedspan.models import FederatedModel, rowwise
from fedspan.models.losses import client_losses
from fedspan.models.stacked import Stack, stacked
from fedspan.privacy.accountant import DPEvent
from fedspan.privacy.gaussian import fingerprint, normal, uniform
from fedspan.support.errors import FedspanError

_COPIES = 4
"""Examples of a pass in which it is tried whether gradients are those of each example alone."""
_MARGIN = 1 - 2.0**-20
"""A clipped gradient stays this much below C, so that no rounding takes it above."""


def refusal(method: Method) -> str | None:
    """Return the reason why the clients of this method cannot train by DP-SGD, or None."""
    if method.info.trains != "adapter":
        return "its clients train base weights, for which gradients per example are not available"
    if any(exchange.ask == "gradient" for exchange in method.exchanges):
        return "its clients send a gradient that no noise was added to"
    recipe = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe
    if recipe.galore is not None or recipe.confined or recipe.proximal:
        return "its clients do not train their adapters by the plain local optimizer"
    return None


def check_layers(model: FederatedModel, data: Encoded) -> None:
    """Check by values that every example's gradient is its own, whatever else is in the batch.

    Raises
    ------
    FedspanError
        Where a layer mixes the rows of a batch or has no gradient per example.
    """
    reason = "padding changes the model's results" if model.padding_matters else None
    reason = reason or rowwise.reason_against(model, data, _COPIES, 1)
    if reason is not None:
        raise FedspanError(f"privacy.dp = 'example': {reason}; expected a base with a gradient for each example")


def release(privacy: PrivacyConfig, batch_size: int, num_examples: int, steps: int) -> DPEvent:
    """Return the event of a client's local steps: each a batch by Poisson sampling at rate q = b/n, at most 1.

    The numbers of examples and of steps count as public.
    """
    return DPEvent(privacy.noise_multiplier, min(1.0, batch_size / num_examples), steps)


def clipped_sum(grads: Tensor, clip: float) -> Tensor:
    """Return Σ_i g_i · min(1, C / ‖g_i‖) over the rows of G (b, P): (P,). A gradient with NaN or infinity counts as 0.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (1607.00133).
    """
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64)
    scale = (clip * _MARGIN / norms.clamp_min(1e-300)).clamp_max(1.0)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        # Left out, not scaled to 0: 0 · inf is NaN, and one example must not decide whether the step is one.
        grads, scale = grads[finite], scale[finite]
    total: Tensor = scale.to(grads.dtype) @ grads
    return total


@dataclass(slots=True)
class PrivateGradients:
    """A client's DP-SGD steps: which examples are in each, and the noised mean of their clipped gradients.

    Coins and noise come from a secret of this piece of work alone, which its ledger derives from the site's secret and
    from everything that the work depends on. The same work again is the same to the bit; any other draws anew.
    """

    stack: Stack
    """Copies of the same adapter, one for each example of a pass."""
    model: FederatedModel
    privacy: PrivacyConfig
    secret: int
    width: int
    """Examples in one pass; a larger batch takes several."""
    active: int = field(default=0)
    """Copies in use."""

    @property
    def size(self) -> int:
        """P, the number of trained numbers."""
        return self.stack.trained.values.shape[1]

    def weights(self) -> Tensor:
        """Return a copy of the trained weights, (P,)."""
        return self.stack.trained.values[0].detach().clone()

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        """Give every copy these weights, (P,)."""
        self.stack.trained.values.copy_(weights.expand_as(self.stack.trained.values))

    def chosen(self, mark: str, num_examples: int, rate: float) -> list[int]:
        """Return the examples of one step, each drawn by a coin of its own; there may be none.

        The coins depend on the work and on the step's mark, and not on the weights: work that is repeated with another
        result, on a machine that rounds differently, is about the same draw in all its steps, and is counted so.
        """
        coins = uniform(self.secret, "examples", mark, count=num_examples)
        drawn: list[int] = torch.nonzero(coins < rate).flatten().tolist()
        return drawn

    def of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return G of the rows of a batch, at most `width` of them: (b, P), a buffer that the next call overwrites."""
        count = len(batch["labels"])
        if count != self.active:
            self.stack.activate(count)
            self.active = count
        grads = self.stack.trained.grads
        assert grads is not None  # a stack that is trained has gradients
        grads.zero_()
        torch.autograd.backward(client_losses(self.model, batch, count).sum())
        self.stack.gather_gradients()
        return grads[:count]

    def noised(self, total: Tensor, weights: Tensor, mark: str, expected: float) -> Tensor:
        """Return (Σ clipped + N(0, (zC)² I)) / expected: (P,), with expected = q n, not the number that was drawn.

        That number would reveal whether one more example was in the batch.

        Parameters
        ----------
        weights
            (P,), that the step starts from.
        """
        z, clip = self.privacy.noise_multiplier, self.privacy.clip
        spread = z * clip
        if spread:
            # Keyed by the sum too, and by z and C: two different sums under one noise would show their difference
            # without any, and one sum under twice the same noise would show itself.
            about = fingerprint([("sum", total), ("weights", weights.detach())])
            noise = normal(self.secret, "noise", mark, z, clip, expected, about, shape=total.shape)
            total = (total.cpu().double() + spread * noise).to(total)
        return total / expected

    def penalty(self, strength: float, tail: int) -> Tensor:
        """Return the gradient of HetLoRA's penalty, (P,): it depends on the weights alone, so it needs no noise."""
        self.stack.activate(1)
        self.active = 1
        grads = self.stack.trained.grads
        assert grads is not None
        grads.zero_()
        tails = torch.tensor([tail], device=grads.device)
        torch.autograd.backward(strength * self.stack.tail_penalties(tails).sum())
        self.stack.gather_gradients()
        return grads[0].clone()

    def adapter(self) -> dict[str, Factors]:
        """Return copies of the adapter as trained so far."""
        return self.stack.adapter(0)

    def dense(self) -> dict[str, Tensor]:
        """Return copies of the heads as trained so far."""
        return self.stack.dense(0)


@contextmanager
def private_gradients(
    model: FederatedModel, sent: Broadcast, privacy: PrivacyConfig, secret: int | None, width: int
) -> Iterator[PrivateGradients]:
    """Put `width` copies of the broadcast adapter into the model, one for each example of a pass.

    `check_layers` has found before any training that each of them then gets the gradient of its own example.
    """
    if secret is None:
        raise ValueError("privacy.dp = 'example': the site has no secret to draw noise from")
    with stacked(model, [sent] * width) as stack:
        yield PrivateGradients(stack, model, privacy, secret, width)


def parts_of(chosen: Sequence[int], width: int) -> list[list[int]]:
    """Return one step's examples in passes of at most `width`."""
    return [list(chosen[start : start + width]) for start in range(0, len(chosen), width)]
