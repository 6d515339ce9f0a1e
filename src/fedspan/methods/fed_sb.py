"""Fed-SB: a small square core between two fixed bases is all that is trained and averaged.

Shapes: B (m, r), V (n, r); R (r, r); A = R Vᵀ (r, n); the probe Ω (n, r + 8), the range Q (m, r + 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.base import Direct, Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import (
    Broadcast,
    ClientState,
    Diagnostics,
    Factors,
    Recipe,
    Request,
    Subspace,
    Template,
    Tensors,
    Update,
    Vector,
)
from fedspan.methods.patches import Patch, PatchLog
from fedspan.methods.readout import fresh_adapter
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

_OVERSAMPLING = 8
_ESTIMATE = 2
"""Exchanges of the first round before training: the range of the mean gradient, then the gradient in it."""


def fed_sb(first_step: float = 0.0, probe_batches: int = 4) -> Method:
    """Fed-SB: ΔW = s B R Vᵀ with B and V fixed for the whole run; clients train R alone, and R̄ = Σ p_k R_k is exact.

    B and V hold the first r left and right singular vectors of the clients' mean gradient G at the start, from two
    sums: Y = Σ p_k G_k Ω, and Z = Σ p_k G_kᵀ Q with Q = orth(Y); then G ≈ Q Zᵀ. Afterwards r² numbers per module travel
    either way, for any number of clients; but learning never leaves those two spaces.

    Source: Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
    (Private) Federated LoRA Fine-Tuning" (2502.15436), with the initialisation of LoRA-SB (Ponkshe et al. 2024,
    2411.19557).
    Differences: the bases come from a randomized range finder on the mean gradient, where LoRA-SB decomposes the first
    step of full fine-tuning (under AdamW the gradient's signs) densely; R starts at zero, so that the first model is
    the base, where LoRA-SB starts from that step's singular values (see `first_step`).

    B and V travel once, to a client's first training; `Broadcast.news` holds the core that the adapter is made of
    afterwards. Ranks above a layer's narrower side leave the spare directions empty.

    Parameters
    ----------
    first_step
        η of a gradient step W − η G that R starts from, cut to rank r: s R = −η Σ_r. 0: R starts at 0.
    probe_batches
        Number of batches whose mean gradient each client sketches before the first round.
    """
    if not first_step >= 0:
        raise FedspanError(f"method.first_step = {first_step}: expected at least 0")
    if probe_batches < 1:
        raise FedspanError(f"method.probe_batches = {probe_batches}: expected at least 1")

    def init(template: Template, dense: Tensors) -> ServerState:
        return ServerState(template, {}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        recipe = Recipe(train_b=False, confined=True, probe_batches=probe_batches)
        # Heads go with the first exchange of a round.
        sent_before = frozenset({"dense"} if state.exchange and state.round_num == 0 else ())
        if state.round_num or state.exchange == _ESTIMATE:
            return _training(state, request, recipe, sent_before)
        # ΔW = 0: gradients are asked at the base. The first probe is drawn from the run's seed.
        start = Broadcast(fresh_adapter(state.template, state.template.rank), state.dense, recipe)
        first = frozenset({"a", "b"} if state.exchange else {"a", "b", "subspaces"})
        return replace(
            start, seeded=first | sent_before, subspaces={name: _probe(state, name) for name in state.template.modules}
        )

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        modules = {name: Vector(_answer(update, sent, name)) for name in update.modules}
        return replace(update, modules=modules), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        means = {name: partial.mean(name) for name in state.template.modules}
        if state.round_num == 0 and state.exchange == 0:
            ranges = {name: {"range": torch.linalg.qr(mean["sketch"])[0]} for name, mean in means.items()}
            return replace(state, modules=ranges), {}
        if state.round_num == 0 and state.exchange == 1:
            bases = {name: _bases(state, name, mean["sketch"], first_step) for name, mean in means.items()}
            # From now on a client that has trained, and so has seen version 1, holds the bases.
            return replace(state, modules=bases, patches=PatchLog({}, version=1)), {}
        modules = {name: {**held, "core": means[name]["core"]} for name, held in state.modules.items()}
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="fed_sb",
            title="Fed-SB",
            paper="2502.15436",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up="rr",
            traffic_down="rr",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM, "gradient", every=0), Exchange(SUM, "again", every=0), Exchange(SUM)),
        encode=encode,
        complete=_complete,
        vector=Direct(_read, _write),
    )


def _training(state: ServerState, request: Request, recipe: Recipe, sent_before: frozenset[str]) -> Broadcast:
    s = state.template.scaling(state.template.rank)
    adapter = {name: Factors(t["b"], _trained_factor(t["core"], t["v"], s), s) for name, t in state.modules.items()}
    spaces = {f"{name}/a": Subspace(t["v"], "right") for name, t in state.modules.items()}
    cores = {name: t["core"] for name, t in state.modules.items()}
    return Broadcast(
        adapter,
        state.dense,
        recipe,
        # A zero core need not be sent.
        news=(cores,) if any(bool(core.any()) for core in cores.values()) else (),
        seeded=sent_before | {"a"} | ({"b", "subspaces"} if request.seen else frozenset()),
        subspaces=spaces,
    )


def _trained_factor(core: Tensor, v: Tensor, scaling: float) -> Tensor:
    return core / scaling @ v.mT


def _complete(template: Template, held: Broadcast, news: Sequence[Mapping[str, Patch]]) -> list[Tensor]:
    """Return the trained factors of the cores, of the modules whose V is held."""
    s, cores = template.scaling(template.rank), news[-1] if news else {}
    made: list[Tensor] = []
    for name in template.modules:
        space = held.subspaces.get(f"{name}/a")
        if space is None:
            continue
        core = cores.get(name, torch.zeros((template.rank,) * 2))  # a zero core is not sent
        if not isinstance(core, Tensor) or core.shape != (space.basis.shape[1],) * 2:
            raise FedspanError(f"a core of {name} in another shape: expected a square of {space.basis.shape[1]}")
        made.append(_trained_factor(core, space.basis, s))
    return made


def _probe(state: ServerState, name: str) -> Subspace:
    """Return the subspace in which the mean gradient is measured: Ω on the right, then the range found there."""
    if state.exchange:
        return Subspace(state.modules[name]["range"], "left")
    m, n = state.template.modules[name]
    width = min(state.template.rank + _OVERSAMPLING, m, n)
    return Subspace(torch.randn((n, width), generator=generator(state.template.seed, "fed_sb", name)), "right")


def _answer(update: Update, sent: Broadcast, name: str) -> Tensors:
    """Return a gradient's coordinates in the subspace of the broadcast, or s R, the adapter's between B and V."""
    payload = update.modules[name]
    if isinstance(payload, Vector):
        grad = lowrank.promote(payload.values["gradient"])
        asked = sent.subspaces[name]
        return {"sketch": replace(asked, basis=asked.basis.to(grad)).coordinates(grad)}
    b, v = sent.adapter[name].b, sent.subspaces[f"{name}/a"].basis
    if payload.rank != b.shape[1]:
        raise FedspanError(f"an adapter of rank {payload.rank}: expected rank {b.shape[1]} for every client")
    delta = payload.delta()
    return {"core": (b.to(delta.b).mT @ delta.b) @ (delta.a @ v.to(delta.a))}


def _bases(state: ServerState, name: str, coordinates: Tensor, first_step: float) -> Tensors:
    """Return B, V and s R from the mean gradient Q·C, C (r + 8, n)."""
    q, rank = state.modules[name]["range"].to(coordinates), state.template.rank
    u, sigma, vh = torch.linalg.svd(coordinates, full_matrices=False)

    def padded(x: Tensor) -> Tensor:
        kept = x[:, :rank]
        return torch.cat([kept, kept.new_zeros((len(kept), rank - kept.shape[1]))], dim=1)

    core = torch.zeros((rank, rank), dtype=sigma.dtype)
    core.diagonal()[: len(sigma)] = -first_step * sigma[:rank]
    return {"b": padded(q @ u), "v": padded(vh.mT), "core": core}


def _read(state: ServerState) -> Tensors:
    """Return s·R of every module, between bases common to all clients, and the heads."""
    return {**state.dense, **{f"{name}/core": t["core"] for name, t in state.modules.items() if "core" in t}}


def _write(state: ServerState, values: Tensors) -> ServerState:
    modules = {name: {**t, "core": values[f"{name}/core"]} for name, t in state.modules.items()}
    return replace(state, modules=modules, dense={name: values[name] for name in state.dense})
