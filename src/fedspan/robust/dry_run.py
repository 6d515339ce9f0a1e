"""Properties of a method that a dry run shows: one round of it with one client on a single small matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedspan.methods.base import Method, aggregate
from fedspan.methods.messages import Broadcast, Factors, Request, Template, Update, Vector

_RANK, _SIZE = 2, 4


def sends_pairs(method: Method) -> bool:
    """Return whether factor pairs leave the clients, each in a gauge of its own."""
    answers, _ = _round(method, 1.0)
    return any(update.scalings() for update in answers)


def averages_factors(method: Method) -> bool:
    """Return whether the clients' next starting point depends on the gauge of the pairs that they sent.

    True for every method that sends pairs and is not gauge-invariant; and for one whose product alone is (FedEx-LoRA,
    whose patch makes up for the error of its averaged factors): it is run with (B, A) and with (2B, A/2).
    """
    if not sends_pairs(method):
        return False
    if not method.info.gauge_invariant:
        return True
    _, one = _round(method, 1.0)
    _, other = _round(method, 2.0)
    return any(
        not torch.allclose(x, y)
        for name, f in one.adapter.items()
        for x, y in ((f.b, other.adapter[name].b), (f.a, other.adapter[name].a))
    )


def _round(method: Method, gauge: float) -> tuple[list[Update], Broadcast]:
    """Return one client's answer to each exchange of the first round, and the broadcast of the second."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn((_SIZE, _SIZE), generator=rng)
    dense = {} if method.info.trains == "adapter" else {"x": base}
    state = method.init(Template({"x": (_SIZE, _SIZE)}, _RANK, num_clients=1), dense)
    learnt, answers = Update("", 1.0, {}, {}), []
    for number, exchange in enumerate(method.exchanges):
        state = replace(state, exchange=number)
        sent = method.start(method.broadcast(state, Request(_RANK)), None)
        if exchange.ask == "gradient":
            sent = replace(sent, recipe=replace(sent.recipe, gradient=True))
            learnt = Update("one", 1.0, {"x": Vector({"gradient": base})}, {})
        elif exchange.ask == "train":
            learnt = _trained(sent, gauge)
        update, _ = method.encode(learnt, sent, None)
        answers.append(replace(update, num_examples=1.0))
        state, _ = aggregate(method, state, answers[-1:])
    return answers, method.broadcast(state, Request(_RANK))


def _trained(sent: Broadcast, gauge: float) -> Update:
    step = torch.linspace(0.1, 1.0, _SIZE * _RANK).reshape(_SIZE, _RANK)
    # Moved by the same step in every gauge, so that only the gauge differs between two runs.
    factors = {
        name: Factors((f.b + step) * gauge, f.a / gauge, f.scaling)
        if sent.recipe.train_a and sent.recipe.train_b
        else f
        for name, f in sent.adapter.items()
    }
    asked = sent.recipe.galore is not None or sent.recipe.carries_moments
    moments = {name: value.square() for name, value in sent.dense.items()} if asked else {}
    return Update("one", 1.0, factors, sent.dense, moments, rate_sum=1.0)
