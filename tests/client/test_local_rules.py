"""The order of a client's local operations, step by step against autograd by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from local_training import start_of, tensors, texts
from torch import Tensor

from fedspan.client.training import Assignment, TrainingSettings, gradient, train
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models import FederatedModel

__all__ = ["texts"]

SGD = LocalConfig(optimizer="sgd", learning_rate=0.5, warmup=0.0, weight_decay=0.0, batch_size=24, clip_norm=None)
CLIPPED = SGD.model_copy(update={"clip_norm": 1e-2})


def steps(model: FederatedModel, sent: Broadcast, data: Encoded, local: LocalConfig, count: int) -> dict[str, Tensor]:
    """Trained tensors after full-batch steps: every one of them sees the same gradient function."""
    work = Assignment("client-0", sent, np.arange(len(data)), count, 1.0)
    return tensors(train(model, work, data, TrainingSettings(local=local), 0))


def after(sent: Broadcast, trained: dict[str, Tensor]) -> Broadcast:
    """The broadcast that starts from trained tensors."""
    adapter = {name: replace(f, b=trained[f"{name}/b"], a=trained[f"{name}/a"]) for name, f in sent.adapter.items()}
    return replace(sent, adapter=adapter, dense={name: trained[name] for name in sent.dense})


def test_a_rounds_gradient_is_the_mean_over_its_batches(bases: dict[str, Path], texts: Encoded) -> None:
    """Batches of half the rows are a pass over all of them: their mean gradient and loss are those of the whole."""
    model = tiny.load(bases["bert"], "classification")
    halves, whole = (SGD.model_copy(update={"batch_size": size}) for size in (len(texts) // 2, len(texts)))
    results = []
    for local, batches in ((halves, 2), (whole, 1)):
        sent = replace(tiny.broadcast(model), recipe=Recipe(gradient=True, probe_batches=batches))
        work = Assignment("client-0", sent, np.arange(len(texts)), 1, 1.0)
        results.append(gradient(model, work, texts, TrainingSettings(local=local), 0))
    two, one = results
    assert two.train_loss == pytest.approx(one.train_loss, rel=1e-5)
    for name, payload in one.update.modules.items():
        expected = payload.tensors()["gradient"]
        torch.testing.assert_close(two.update.modules[name].tensors()["gradient"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strength", [300.0, 1e4])
def test_the_proximal_term_is_clipped_with_the_gradient(
    bases: dict[str, Path], texts: Encoded, strength: float
) -> None:
    """One step later the term is not zero: the second step is rate · clip · d/‖d‖ with d = ∇f(w) + μ(w − w_0), where
    the term is as long as the gradient and where it outweighs it."""
    model = tiny.load(bases["llama"], "classification")
    plain = tiny.broadcast(model)
    sent = replace(plain, recipe=Recipe(proximal=strength))
    start, (once, twice) = start_of(sent), (steps(model, sent, texts, CLIPPED, count) for count in (1, 2))
    there = after(plain, once)
    further = steps(model, there, texts, SGD, 1)

    def flat(x: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        return torch.cat([(x[n] - y[n]).double().flatten() for n in once])

    gradient_there, term = flat(once, further) / SGD.learning_rate, strength * flat(once, start)
    assert strength > 1e3 or 0.3 < float(term.norm() / gradient_there.norm()) < 3
    step = gradient_there + term
    expected = -step / step.norm() * CLIPPED.learning_rate * 1e-2
    assert float(step.norm()) > 1e-2
    assert float((flat(twice, once) - expected).norm()) < 1e-3 * float(expected.norm())


def test_the_correction_is_added_after_clipping(bases: dict[str, Path], texts: Encoded) -> None:
    """The step with a correction is the clipped step and rate times all of the correction."""
    model = tiny.load(bases["bert"], "classification")
    sent = tiny.broadcast(model)
    plain, start = steps(model, sent, texts, CLIPPED, 1), start_of(sent)
    name = next(n for n in plain if n.endswith("/b"))
    correction = {name: torch.full_like(start[name], 3.0)}
    recipe = replace(sent.recipe, corrected=True)
    corrected = steps(model, replace(sent, correction=correction, recipe=recipe), texts, CLIPPED, 1)
    torch.testing.assert_close(corrected[name], plain[name] - 0.5 * 3.0, rtol=1e-5, atol=1e-5)
