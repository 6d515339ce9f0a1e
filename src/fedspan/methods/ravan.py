"""Ravan: several small cores between orthonormal bases, each with a scale of its own, are all that is trained.

Shapes: r = Σ ρ_i over h heads; B = [B_1 … B_h] (m, r), V = [V_1 … V_h] (n, r); K_i (ρ_i, ρ_i), K = diag(K_1 … K_h).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

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
    head_mask,
)
from fedspan.methods.patches import Patch
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator


def ravan(heads: int = 4) -> Method:
    """Ravan: ΔW = s Σ_i t_i B_i H_i V_iᵀ; clients train the cores H_i and scales t_i, the server averages t_i H_i.

    With K_i = t_i H_i the average Σ p_k K_ki is exact, since all bases are fixed and common. For the numbers of one r×r
    core (Fed-SB) h cores of r/√h rows fit, which together reach a rank √h times as large. A head whose direction
    matters gets a larger scale, and with it larger steps: the gradient of H_i is t_i times that of K_i. Scales start
    every round at 1, the learnt ones being part of K.

    Source: Raje et al. 2025, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning" (2506.05568).
    Differences: all clients train all heads, where the paper lets a weak client choose some of them; the bases are
    orthonormal across heads, drawn from the run's seed, and never travel; cores start at zero, so that the first
    model is the base. The rank r counts all heads together.

    A rank above a layer's narrower side leaves the spare directions empty.

    Parameters
    ----------
    heads
        h: the rank is divided among so many heads as evenly as it can be; 1 is one core and one scale.
    """
    if heads < 1:
        raise FedspanError(f"method.heads = {heads}: expected at least 1")

    def init(template: Template, dense: Tensors) -> ServerState:
        return ServerState(template, {name: _bases(template, name) for name in template.modules}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        s = state.template.scaling(state.template.rank)
        cores = {name: t["core"] for name, t in state.modules.items()}
        return Broadcast(
            {name: _adapter(t, s) for name, t in state.modules.items()},
            state.dense,
            Recipe(train_b=False, confined=True, heads=heads),
            # The adapter is made of the core, which alone travels; a zero core need not.
            news=(_packed(cores, heads),) if any(bool(core.any()) for core in cores.values()) else (),
            seeded=frozenset({"a", "b", "subspaces"}),
            subspaces={f"{name}/a": Subspace(t["v"], "right") for name, t in state.modules.items()},
        )

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        cores = {name: _core_of(update, sent, name) for name in update.modules}
        modules = {name: Vector({"cores": core}) for name, core in _packed(cores, heads).items()}
        return replace(update, modules=modules), kept

    def complete(template: Template, held: Broadcast, news: Sequence[Mapping[str, Patch]]) -> list[Tensor]:
        s, mask = template.scaling(template.rank), head_mask(template.rank, heads)
        made: list[Tensor] = []
        for name, packed in (news[-1] if news else {}).items():
            if f"{name}/a" not in held.subspaces:
                continue
            if not isinstance(packed, Tensor) or packed.shape != (1, int(mask.sum())):
                raise FedspanError(f"cores of {name} in another shape: expected (1, {int(mask.sum())})")
            core = packed.new_zeros(mask.shape)
            core[mask] = packed[0]
            made.append(_trained_factor(core, held.subspaces[f"{name}/a"].basis, s))
        return made

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        modules: dict[str, Tensors] = {}
        for name, held in state.modules.items():
            mean = partial.mean(name)["cores"]
            core = mean.new_zeros(held["core"].shape)
            core[head_mask(len(core), heads)] = mean[0]
            modules[name] = {**held, "core": core}
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="ravan",
            title="Ravan",
            paper="2506.05568",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up=f"rr/{heads}",
            traffic_down=f"rr/{heads}",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
        complete=complete,
        vector=Direct(_read, _write),
    )


def _adapter(held: Tensors, scaling: float) -> Factors:
    core = held["core"]
    return Factors(held["b"].to(core), _trained_factor(core, held["v"], scaling), scaling)


def _trained_factor(core: Tensor, v: Tensor, scaling: float) -> Tensor:
    return core / scaling @ v.to(core).mT


def _bases(template: Template, name: str) -> Tensors:
    """Return B and V with orthonormal columns, drawn from the run's seed, and K = 0."""
    rank = template.rank
    m, n = template.modules[name]
    return {
        "b": _orthonormal(m, rank, template.seed, name, "b"),
        "v": _orthonormal(n, rank, template.seed, name, "v"),
        "core": torch.zeros(rank, rank),
    }


def _orthonormal(size: int, rank: int, *key: object) -> Tensor:
    drawn = torch.randn((size, min(rank, size)), generator=generator(*key, "ravan"))
    basis = torch.linalg.qr(drawn)[0]
    return torch.cat([basis, basis.new_zeros((size, rank - basis.shape[1]))], dim=1)


def _core_of(update: Update, sent: Broadcast, name: str) -> Tensor:
    """Return s·K, the adapter's coordinates between B and V."""
    x, b, v = update.factors(name), sent.adapter[name].b, sent.subspaces[f"{name}/a"].basis
    if x.rank != b.shape[1]:
        raise FedspanError(f"an adapter of rank {x.rank}: expected rank {b.shape[1]} for every client")
    delta = x.delta()
    return _coordinates(b.to(delta.b), delta.b) @ _coordinates(v.to(delta.a), delta.a.mT).mT


def _coordinates(basis: Tensor, x: Tensor) -> Tensor:
    """Return Z with basis·Z = X. The bases are orthonormal in float32 alone, which a float64 update would see."""
    gram = basis.mT @ basis
    # Spare directions are columns of zeros.
    coordinates: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-3) @ (basis.mT @ x)
    return coordinates


def _packed(cores: Tensors, heads: int) -> dict[str, Tensor]:
    """Return the entries inside the heads' blocks, (1, Σ ρ_i²)."""
    return {name: core[head_mask(len(core), heads)][None] for name, core in cores.items()}


def _read(state: ServerState) -> Tensors:
    """Return s·K of every module, between bases common to all clients, and the heads of the model."""
    return {**state.dense, **{f"{name}/core": t["core"] for name, t in state.modules.items()}}


def _write(state: ServerState, values: Tensors) -> ServerState:
    modules = {name: {**t, "core": values[f"{name}/core"]} for name, t in state.modules.items()}
    return replace(state, modules=modules, dense={name: values[name] for name in state.dense})
