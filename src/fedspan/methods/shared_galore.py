"""Shared-projector GaLore: all clients train in one gradient subspace and send coordinates alone.

Shapes: W and its gradient G (m, n), turned so that m ≤ n; P (m, r); Z (r, n); the probe Ω (m, r + 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank, scales
from fedspan.algebra.galore import projector, takes_left
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Direct, Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import (
    Broadcast,
    ClientState,
    Diagnostics,
    Recipe,
    Request,
    Subspace,
    Template,
    Tensors,
    Update,
    Vector,
)
from fedspan.methods.patches import Patch, PatchLog, patch_sum
from fedspan.methods.spectral import leading
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

Basis = Literal["projector", "energy", "seeded"]
_OVERSAMPLING = 8


@dataclass(frozen=True, slots=True)
class _SharedGaloreOptions:
    rank: int
    refresh: int
    basis: Basis
    repeats: int
    scale: float
    probe_batches: int
    svd: Literal["exact", "randomized"]


def shared_galore(
    rank: int = 8,
    refresh: int = 1,
    basis: Basis = "projector",
    repeats: int = 1,
    scale: float = 1.0,
    probe_batches: int = 2,
    svd: Literal["exact", "randomized"] = "randomized",
) -> Method:
    """Shared-projector GaLore: one consensus gradient subspace P for all clients; only coordinates in it travel.

    At a refresh every client sends the sketch Q_k Q_kᵀ Ω of its gradient G_k, Q_k being the top-r left singular vectors
    of G_k, and P becomes the leading eigenvectors of Σ p_k Q_k Q_kᵀ. Then each trains W + P Z_k, by Adam on Z_k, and

        W ← W + P Σ p_k Z_k.

    Exact, because W_k − W = P Z_k; linear, so that sums are all that the server needs; r·n numbers up instead of m·n;
    and the rank of what was learnt grows with every refresh, as that of a LoRA adapter never does.

    Source: ours: GaLore (Zhao et al. 2024, 2403.03507) in a consensus subspace as GLoRA has one of updates (Chen et al.
    2026, 2605.06733), here of gradients.
    Differences: unlike GaLore inside a client (`fedftg`), the projector is common to all and changes between rounds
    alone, and Adam starts afresh with it.

    The weights are not sent again: a client that took part in the last round fetches the Σ p_k Z_k it led to, one
    that was away every P Σ p_k Z_k that it missed, or their sum where that is smaller (`PatchLog`).

    Parameters
    ----------
    rank
        r, the dimension of the subspace; a layer with a narrower side is trained whole.
    refresh
        Number of rounds between two new subspaces.
    basis
        `projector`: every client's subspace counts by its weight alone. `energy`: eigenvectors of Σ p_k G_k G_kᵀ, where
        a client with larger gradients counts for more. `seeded`: random directions from the run's seed; no client is
        asked for a gradient, and P does not travel.
    repeats
        Number of power iterations on the clients' sum; each costs their sketches once more.
    scale
        Factor on the trained step (α in GaLore).
    probe_batches
        Number of batches whose mean gradient each client sketches.
    svd
        Algorithm for a client's Q_k, exact or randomized.
    """
    options = _SharedGaloreOptions(rank, refresh, basis, repeats, scale, probe_batches, svd)
    for name, least in (("rank", 1), ("refresh", 1), ("repeats", 0), ("probe_batches", 1)):
        if getattr(options, name) < least:
            raise FedspanError(f"method.{name} = {getattr(options, name)}: expected at least {least}")
    if not scale > 0:
        raise FedspanError(f"method.scale = {scale}: expected more than 0")
    ask: list[Exchange] = []
    if basis != "seeded":
        ask = [Exchange(SUM, "gradient", refresh), *[Exchange(SUM, "again", refresh)] * repeats]

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        names = state.template.modules
        asked = bool(ask) and ask[0].due(state.round_num)
        first = not asked or state.exchange == 0  # of this round
        if asked and state.exchange < len(ask):
            spaces = {name: Subspace(_probe(state, name, options), _side(state.template, name)) for name in names}
            held = state.exchange == 0  # the first probe is drawn from the run's seed
        else:
            spaces = {name: _space(state, name, options) for name in names}
            held = _holds_space(state, request, options)
        return Broadcast(
            {},
            state.dense,
            Recipe(confined=True, probe_batches=probe_batches),
            subspaces=spaces,
            seeded=frozenset({"subspaces"} if held else ()) | (frozenset(names) if first else {"dense"}),
            news=_news(_log(state), request.seen, basis == "seeded") if first else (),
        )

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        if update.modules:
            spaces = sent.subspaces
            sketches = {name: _sketch(_gradient(update, name), x, options) for name, x in spaces.items()}
            return replace(update, modules={name: Vector({"sketch": x}) for name, x in sketches.items()}), kept
        moved = {}
        for name, x in sent.subspaces.items():
            step = lowrank.promote(update.dense[name]) - lowrank.promote(sent.dense[name])
            # The columns of the basis are as long as the scale.
            moved[name] = Vector({"z": x.coordinates(step) / scale**2})
        rest = {name: value for name, value in update.dense.items() if name not in moved}
        return replace(update, modules=moved, dense=rest), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        if state.exchange < len(ask):
            return _estimate(state, partial, options, last=state.exchange == len(ask) - 1), {}
        dense, steps = dict(partial.mean_dense()), {}
        for name in state.template.modules:
            x, z = _space(state, name, options), partial.mean(name)["z"]
            steps[name] = LowRank(x.basis, z) if x.side == "left" else LowRank(z, x.basis.mT)
            dense[name] = lowrank.promote(state.dense[name]) + x.expand(z)
        return advance(state, dense=dense, patches=_log(state).append(steps)), {}

    return Method(
        info=_info(options),
        init=_init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(*ask, Exchange(SUM)),
        encode=encode,
        complete=_complete,
        vector=Direct(read=lambda state: state.dense, write=_write),
    )


def _info(options: _SharedGaloreOptions) -> MethodInfo:
    up, down = ["r max(m,n)"], ["r max(m,n)"]
    if options.basis != "seeded":
        sketch = f"(r+{_OVERSAMPLING})min(m,n)"
        up.append(f"{1 + options.repeats}{sketch}" if options.repeats else sketch)
        down = ["r(m+n)"]
        down += [f"{options.repeats}{sketch}" if options.repeats > 1 else sketch] if options.repeats else []
    return MethodInfo(
        name="shared_galore",
        title="Shared-projector GaLore",
        paper="ours (2403.03507 + 2605.06733)",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up=" + ".join(up),
        traffic_down=" + ".join(down),
        trains="targets",
    )


def _init(template: Template, dense: Tensors) -> ServerState:
    # A client without any message has seen version 0; version 1 is the base that every site has.
    return ServerState(template, {}, dense, patches=PatchLog({}, version=1))


def _log(state: ServerState) -> PatchLog:
    assert state.patches is not None
    return state.patches


def _side(template: Template, name: str) -> Literal["left", "right"]:
    return "left" if takes_left(template.modules[name]) else "right"


def _drawn(state: ServerState, name: str, columns: int, *key: object) -> Tensor:
    """Return orthonormal columns (m, ≤ columns) from the run's seed."""
    short = min(state.template.modules[name])
    rng = generator(state.template.seed, "shared_galore", name, *key)
    normal = torch.randn((short, min(columns, short)), generator=rng, dtype=torch.float64)
    q: Tensor = torch.linalg.qr(normal)[0]
    return q.to(lowrank.promote(state.dense[name]))


def _probe(state: ServerState, name: str, options: _SharedGaloreOptions) -> Tensor:
    """Return Ω: random at first, then the range of the last sum."""
    if state.exchange:
        return state.modules[name]["probe"]
    return _drawn(state, name, options.rank + _OVERSAMPLING, state.round_num, "probe")


def _space(state: ServerState, name: str, options: _SharedGaloreOptions) -> Subspace:
    """Return the subspace of training: P, its columns as long as the scale."""
    if options.basis == "seeded":
        p = _drawn(state, name, options.rank, state.round_num // options.refresh, "basis")
    else:
        p = state.modules[name]["basis"]
    return Subspace(p * options.scale, _side(state.template, name))


def _holds_space(state: ServerState, request: Request, options: _SharedGaloreOptions) -> bool:
    """Return whether a client has P already: from the seed, or from a round since P was made."""
    made_in = _log(state).version - state.round_num % options.refresh
    return options.basis == "seeded" or request.seen >= made_in


def _gradient(update: Update, name: str) -> Tensor:
    return lowrank.promote(update.vector(name)["gradient"])


def _sketch(grad: Tensor, asked: Subspace, options: _SharedGaloreOptions) -> Tensor:
    """Return Q Qᵀ Ω, or G Gᵀ Ω (m, r + 8), of a client's gradient G."""
    turned = grad if asked.side == "left" else grad.mT
    omega = asked.basis.to(turned)
    if options.basis == "energy":
        return turned @ (turned.mT @ omega)
    near = projector(turned, min(options.rank, *turned.shape), options.svd, generator("shared_galore", "sketch"))
    u, s, _ = torch.linalg.svd(near.mT @ turned, full_matrices=False)
    # A gradient of smaller rank names no other directions.
    q: Tensor = near @ u[:, lowrank.above_rounding(s, float(scales.norms(turned)))]
    return q @ (q.mT @ omega)


def _estimate(state: ServerState, partial: Partial, options: _SharedGaloreOptions, last: bool) -> ServerState:
    """Return the state with the next probe, or in the end P, from Y = S Ω, S being the clients' sum."""
    modules: dict[str, Tensors] = {}
    for name, shape in state.template.modules.items():
        y = partial.mean(name)["sketch"]
        if not last:
            modules[name] = {"probe": torch.linalg.qr(y)[0]}
            continue
        rank = min(options.rank, *shape)
        p = leading(_probe(state, name, options).to(y), y).u[:, :rank]
        # Where the clients name fewer directions than r, the spare ones are random: they can still learn.
        spare = _drawn(state, name, rank, state.round_num, "spare").to(y)
        more = torch.linalg.qr(torch.cat([p, spare], dim=1))[0][:, p.shape[1] : rank]
        modules[name] = {"basis": torch.cat([p, more], dim=1)}
    return replace(state, modules=modules)


def _complete(template: Template, held: Broadcast, news: Sequence[Mapping[str, Patch]]) -> list[Tensor]:
    """Return the weights after one step in the subspaces that are held."""
    if len(news) != 1:
        return []
    made: list[Tensor] = []
    for name, z in news[0].items():
        space, before = held.subspaces.get(name), held.dense.get(name)
        if space is None or before is None or not isinstance(z, Tensor):
            continue
        (m, n), rank = template.modules[name], space.basis.shape[1]
        if z.shape != ((rank, n) if space.side == "left" else (m, rank)) or before.shape != (m, n):
            raise FedspanError(f"coordinates of {name} in shape {tuple(z.shape)}: expected those of its subspace")
        made.append(lowrank.promote(before) + space.expand(z))
    return made


def _news(log: PatchLog, seen: int, seeded: bool) -> tuple[Mapping[str, Patch], ...]:
    """Return what a client must fetch to hold the weights: only coordinates in subspaces that it holds or can draw."""
    news, missed = log.since(seen), log.version - seen
    if missed > len(log.increments) or not (seeded or missed == 1):
        return news
    return tuple({name: _coordinates(patch) for name, patch in increment.items()} for increment in news)


def _coordinates(patch: Patch) -> Patch:
    """Return Z of P Z (or of Z Pᵀ)."""
    if not isinstance(patch, LowRank):
        return patch
    return patch.a if takes_left(patch.shape) else patch.b


def _write(state: ServerState, values: Tensors) -> ServerState:
    """Return the state with other weights. The difference is in no subspace: the last increment holds it densely."""
    log = _log(state)
    apart = {name: values[name] - state.dense[name] for name in state.template.modules}
    apart = {name: x for name, x in apart.items() if bool(x.any())}
    if apart:
        total, *rest = (
            {**held, **{name: patch_sum(held.get(name), x) for name, x in apart.items()}}
            for held in (log.total, *log.increments[-1:])
        )
        log = PatchLog(total, log.version, (*log.increments[:-1], *rest))
    return replace(state, dense=values, patches=log)
