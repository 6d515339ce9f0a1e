"""A cohort of honest clients around one common update, and what bad ones may send instead: small functions.

An attack sees everything (what was sent, what all honest clients answer) and returns what the bad clients send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, Factors, Payload, Request, Template, Update, Vector
from fedspan.support.seeding import generator

SHAPES = {"one": (40, 30), "two": (24, 24)}


@dataclass(frozen=True)
class Stage:
    """One exchange that trains: what each client was sent, and what it would answer if it were honest."""

    method: Method
    state: ServerState
    sent: tuple[Broadcast, ...]
    updates: tuple[Update, ...]

    def delivered(self, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        """What a client receives after these updates, as matrices: adapter and patch, or the weights' change."""
        state, _ = aggregate(self.method, self.state, list(updates))
        return received(self.method.broadcast(state, Request(None)), self.state)


def received(sent: Broadcast, before: ServerState) -> dict[str, torch.Tensor]:
    total = {name: f.delta().dense() for name, f in sent.adapter.items()}
    for name, patch in sent.patch.items():
        matrix = patch if isinstance(patch, torch.Tensor) else patch.dense()
        total[name] = total.get(name, torch.zeros_like(matrix)) + matrix
    return total | {name: value - before.dense[name] for name, value in sent.dense.items()}


def distance(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    """‖x − y‖ / ‖y‖ over everything."""
    return float(sum((x[n] - y[n]).norm() ** 2 for n in y) ** 0.5 / sum(v.norm() ** 2 for v in y.values()) ** 0.5)


def stage(
    method: Method,
    num_clients: int = 9,
    ranks: Sequence[int] = (4,),
    spread: float = 0.1,
    seed: int = 0,
    rounds: int = 1,
    dtype: torch.dtype = torch.float64,
    counts: Sequence[float] = (),
    shapes: dict[str, tuple[int, int]] = SHAPES,
    before: bool = False,
) -> Stage:
    """The round after `rounds` honest ones; clients move by one common step and noise of size `spread` beside it."""
    all_ranks = [ranks[k % len(ranks)] for k in range(num_clients)]
    # The server may keep as many directions as all clients together name.
    template = Template(
        dict(shapes), sum(all_ranks) if method.info.hetero_rank else ranks[0], 8.0, False, seed, num_clients
    )
    rng = generator("stage", seed)
    weights = shapes if method.info.trains != "adapter" else {}
    dense = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in {**weights, "head": (3, 4)}.items()}
    state = method.init(template, dense)
    if before:
        return Stage(method, state, (), ())
    for number in range(rounds):
        state, _ = aggregate(
            method, state, list(_round(method, state, all_ranks, spread, seed, number, counts).updates)
        )
    return _round(method, state, all_ranks, spread, seed, rounds, counts)


def _round(
    method: Method,
    state: ServerState,
    ranks: Sequence[int],
    spread: float,
    seed: int,
    number: int,
    counts: Sequence[float],
) -> Stage:
    sent, updates = [], []
    for k, rank in enumerate(ranks):
        broadcast = method.start(method.broadcast(state, Request(rank)), None)
        learnt = _learnt(f"client-{k:02d}", broadcast, spread, (seed, number, k))
        update, _ = method.encode(learnt, broadcast, None)
        sent.append(broadcast)
        updates.append(replace(update, num_examples=counts[k] if counts else 10.0))
    return Stage(method, state, tuple(sent), tuple(updates))


def _learnt(client: str, sent: Broadcast, spread: float, key: tuple[int, ...]) -> Update:
    def step(t: torch.Tensor, name: str, size: float) -> torch.Tensor:
        common = torch.randn(t.shape, generator=generator("common", *key[:2], name))
        own = torch.randn(t.shape, generator=generator("own", *key, name))
        return t + size * (common + spread * own).to(t)

    r = sent.recipe
    modules = {
        name: Factors(
            step(f.b, f"{name}/b", 1.0) if r.train_b else f.b,
            step(f.a, f"{name}/a", 0.1) if r.train_a else f.a,
            f.scaling,
        )
        for name, f in sent.adapter.items()
    }
    dense = {name: step(t, name, 1.0) for name, t in sent.dense.items()}
    moments = {name: step(t, name, 1.0).square() for name, t in sent.dense.items()} if r.galore else {}
    return Update(client, 10.0, modules, dense, moments, rate_sum=0.5)


Pass = Callable[[str, Sequence[Update], Sequence[Broadcast]], list[Update]]
"""(what was asked, the answers, what was sent) -> those that are folded."""


def play(method: Method, let_pass: Pass, num_clients: int = 7, rank: int = 4) -> ServerState:
    """A first round with all the method's exchanges, `let_pass` between the answers and the fold of each."""
    base = stage(method, num_clients, (rank,), dtype=torch.float32, before=True).state
    learnt: list[Update] = []
    state = base
    for number, exchange in enumerate(method.exchanges):
        state = replace(state, exchange=number)
        sent = [method.start(method.broadcast(state, Request(rank)), None)] * num_clients
        if exchange.ask == "gradient":
            sent = [replace(s, recipe=replace(s.recipe, gradient=True)) for s in sent[:1]] * num_clients
            learnt = [Update(f"client-{k:02d}", 10.0, _gradients(state, k), {}) for k in range(num_clients)]
        elif exchange.ask == "train":
            learnt = [_learnt(f"client-{k:02d}", sent[0], 0.1, (0, 0, k)) for k in range(num_clients)]
        answers = [replace(method.encode(u, s, None)[0], num_examples=10.0) for u, s in zip(learnt, sent, strict=True)]
        state, _ = aggregate(method, state, let_pass(exchange.ask, answers, sent))
    return state


def _gradients(state: ServerState, client: int) -> dict[str, Payload]:
    return {
        name: Vector({"gradient": torch.randn(shape, generator=generator("gradient", name, client))})
        for name, shape in state.template.modules.items()
    }


Attack = Callable[[Stage, Sequence[int]], list[Update]]
"""(the round, which clients are bad) -> what those send."""


def _each(change: Callable[[Update, Broadcast], Update]) -> Attack:
    return lambda stage, bad: [change(stage.updates[k], stage.sent[k]) for k in bad]


def _with_payloads(update: Update, change: Callable[[Payload], Payload]) -> Update:
    return replace(update, modules={name: change(p) for name, p in update.modules.items()})


def scaled(factor: float) -> Attack:
    """The product, the vector and the dense weights' change, times a number; −1 flips the sign."""

    def payload(p: Payload) -> Payload:
        if isinstance(p, Factors):
            return replace(p, b=p.b * factor)
        return Vector({name: value * factor for name, value in p.values.items()})

    def change(update: Update, sent: Broadcast) -> Update:
        dense = {name: sent.dense[name] + factor * (x - sent.dense[name]) for name, x in update.dense.items()}
        return replace(_with_payloads(update, payload), dense=dense)

    return _each(change)


def regauged(factor: float) -> Attack:
    """(B·c, A/c): the very product of an honest client, in another gauge. Nothing without a pair."""

    def payload(p: Payload) -> Payload:
        return Factors(p.b * factor, p.a / factor, p.scaling) if isinstance(p, Factors) else p

    return _each(lambda update, sent: _with_payloads(update, payload))


def rotated(stage: Stage, bad: Sequence[int]) -> list[Update]:
    """(B·G, Gᵀ·A) with G a rotation: no factor changes its size."""

    def payload(p: Payload) -> Payload:
        if not isinstance(p, Factors):
            return p
        g = torch.linalg.qr(torch.randn((p.rank, p.rank), generator=generator("turn"), dtype=torch.float64))[0].to(p.b)
        return Factors(p.b @ g, g.mT @ p.a, p.scaling)

    return [_with_payloads(stage.updates[k], payload) for k in bad]


def collusion(stage: Stage, bad: Sequence[int]) -> list[Update]:
    """All send one and the same update, of an honest one's size and no honest direction."""

    def other(t: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(t.shape, generator=generator("collusion", *t.shape)).to(t)
        return noise * (t.norm() / noise.norm())

    def payload(p: Payload) -> Payload:
        if isinstance(p, Factors):
            return Factors(other(p.b), p.a, p.scaling)
        return Vector({name: other(value) for name, value in p.values.items()})

    first = stage.updates[bad[0]]
    dense = {n: stage.sent[bad[0]].dense[n] + other(x - stage.sent[bad[0]].dense[n]) for n, x in first.dense.items()}
    same = replace(_with_payloads(first, payload), dense=dense)
    return [replace(same, client_id=stage.updates[k].client_id) for k in bad]


def stale(earlier: Stage) -> Attack:
    """What the client answered in an earlier round, as it was."""
    return lambda stage, bad: [earlier.updates[k] for k in bad]


def copied(stage: Stage, bad: Sequence[int]) -> list[Update]:
    """The first honest client's update under the bad clients' names."""
    honest = next(k for k in range(len(stage.updates)) if k not in bad)
    return [replace(stage.updates[honest], client_id=stage.updates[k].client_id) for k in bad]


def claiming(attack: Attack, examples: float) -> Attack:
    """The same with a claim of so many examples."""
    return lambda stage, bad: [replace(update, num_examples=examples) for update in attack(stage, bad)]


def spoilt(value: float) -> Attack:
    """One number in each tensor that is none: NaN or infinity."""

    def payload(p: Payload) -> Payload:
        if isinstance(p, Factors):
            b = p.b.clone()
            b[0, 0] = value
            return replace(p, b=b)
        return Vector({name: t.clone().index_fill_(0, torch.tensor([0]), value) for name, t in p.values.items()})

    def change(update: Update, sent: Broadcast) -> Update:
        dense = {name: t.clone().index_fill_(0, torch.tensor([0]), value) for name, t in update.dense.items()}
        return replace(_with_payloads(update, payload), dense=dense)

    return _each(change)


def mixed(stage: Stage, bad: Sequence[int], attack: Attack) -> list[Update]:
    """The whole cohort's answers with the bad clients' in place of their own, in the clients' order."""
    answers = {update.client_id: update for update in (*stage.updates, *attack(stage, bad))}
    return [answers[client] for client in sorted(answers)]


ATTACKS: dict[str, Attack] = {
    "sign flip": scaled(-1.0),
    "×100": scaled(100.0),
    "×−100": scaled(-100.0),
    "gauge 1e4": regauged(1e4),
    "rotation": rotated,
    "collusion": collusion,
    "copy": copied,
}
"""Those that need nothing but the round itself."""
