"""Messages between servers and clients, and the template of a run: plain frozen data.

Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.patches import Patch

Tensors = Mapping[str, Tensor]
Diagnostics = Mapping[str, Any]
"""A method's measurements: numbers, or numbers by module; JSON as it is."""
ClientState = Mapping[str, Tensor]
"""The tensors that a client keeps between its rounds, on its own site."""


@dataclass(frozen=True, slots=True)
class Template:
    """The constants of a run: the adapted modules, the server's rank, the scaling rule, the seed."""

    modules: Mapping[str, tuple[int, int]]
    """Module name -> (m, n); where target weights are trained, their name among the dense weights -> their shape."""
    rank: int
    """The largest client rank, and the server's unless the method's options say otherwise."""
    alpha: float = 16.0
    rslora: bool = False
    seed: int = 0
    num_clients: int = 0
    """All clients of the run, participating or not; 0: unknown."""
    adaptive: bool = True
    """The clients' optimizer scales its steps entry by entry, as AdamW does and plain SGD does not."""

    def scaling(self, rank: int) -> float:
        """Return s = α/r, or α/√r for rsLoRA (Kalajdzievski 2023, 2312.03732)."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's adapter, ΔW = scaling · B·A. The scaling travels with the factors, always."""

    b: Tensor  # (m, r)
    a: Tensor  # (r, n)
    scaling: float

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.b.shape[1]

    def tensors(self) -> Tensors:
        """Return the two factors by name, A before B."""
        return {"a": self.a, "b": self.b}

    def with_tensors(self, tensors: Tensors) -> Factors:
        """Return a pair of other factors with the same scaling."""
        return Factors(tensors["b"], tensors["a"], self.scaling)

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """Return the pair with `change` applied to each factor."""
        return Factors(change(self.b), change(self.a), self.scaling)

    def delta(self) -> LowRank:
        """Return ΔW with the scaling folded into B."""
        return LowRank(lowrank.promote(self.b) * self.scaling, lowrank.promote(self.a))


@dataclass(frozen=True, slots=True)
class Vector:
    """Named tensors in coordinates that all clients share, scalings folded in: a vector space, safe to sum.

    Where clients' ranks differ, the smaller tensor fills the leading rows or columns.
    """

    values: Tensors

    def tensors(self) -> Tensors:
        """Return the tensors by name."""
        return self.values

    def with_tensors(self, tensors: Tensors) -> Vector:
        """Return a vector of other tensors."""
        return Vector(tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> Vector:
        """Return the vector with `change` applied to each tensor."""
        return Vector({name: change(value) for name, value in self.values.items()})


Payload = Factors | Vector
"""One module's part of an update. Both kinds have `tensors()`, `with_tensors()` and `map()`, so that code that only
moves, counts or casts tensors works on both."""


@dataclass(frozen=True, slots=True)
class GaloreOptions:
    """Local GaLore (Zhao et al. 2024, 2403.03507): see `fedspan.algebra.galore`."""

    rank: int = 8
    update_gap: int = 50
    scale: float = 1.0
    svd: Literal["exact", "randomized", "power"] = "randomized"
    side: Literal["auto", "left", "right"] = "auto"
    on_refresh: Literal["keep", "project", "reset"] = "keep"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Instructions for local training beyond the run's own `[local]` settings."""

    train_a: bool = True
    train_b: bool = True
    galore: GaloreOptions | None = None
    tail_penalty: tuple[float, int] | None = None
    """(λ, k): add λ·Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F to the loss (HetLoRA's rank self-pruning)."""
    proximal: float = 0.0
    """μ: add μ/2·Σ ‖x − x₀‖² over everything that is trained to the loss, x₀ as in the broadcast (FedProx)."""
    confined: bool = False
    """Trained tensors move only inside the subspaces of the broadcast that training starts from."""
    heads: int = 0
    """With h > 0 the coordinates Z of a confined tensor are h square blocks on the diagonal (`head_mask`), each the
    product of a trained scale, which starts at 1, and a trained matrix. 0: they are free."""
    carries_moments: bool = False
    """AdamW's second moments start from those of the broadcast, and the update holds those that it ends with."""
    corrected: bool = False
    """The broadcast's correction, where it has one, is added to the gradients."""
    drifts: bool = False
    """The broadcast's correction is a movement, of which every step makes a share η_t/Σ η beside its own."""
    gradient: bool = False
    """Nothing is trained: the update is a gradient. Set by the round loop for the exchanges that ask for one."""
    probe_batches: int = 1
    """Number of batches over which that gradient is the mean."""
    align: Literal["a", "b"] | None = None
    """The one factor by which FedRot-LoRA's clients turn their trained pair towards the one that was sent."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """The directions in which one trained tensor X₀ (m, n) may move; the optimizer works on Z, which starts at 0.

    Clipping and weight decay act on Z too (with `Recipe.heads`, on its blocks and their scales).
    """

    basis: Tensor
    """(m, q) on the left: X = X₀ + basis·Z.  (n, q) on the right: X = X₀ + Z·basisᵀ."""
    side: Literal["left", "right"] = "left"

    def coordinates(self, x: Tensor) -> Tensor:
        """Return basisᵀ·X or X·basis: from a gradient that of Z; from a step, with an orthonormal basis, Z."""
        return self.basis.mT @ x if self.side == "left" else x @ self.basis

    def expand(self, z: Tensor) -> Tensor:
        """Return basis·Z or Z·basisᵀ."""
        return self.basis @ z if self.side == "left" else z @ self.basis.mT


def head_of(rank: int, heads: int) -> Tensor:
    """Return the head (r,) that each of r directions belongs to, in h runs as equal in length as can be."""
    runs = torch.tensor_split(torch.arange(rank), min(heads, rank))
    return torch.cat([torch.full_like(run, head) for head, run in enumerate(runs)])


def head_mask(rank: int, heads: int) -> Tensor:
    """Return the mask (r, r) of the h square blocks on the diagonal."""
    head = head_of(rank, heads)
    return head[:, None] == head


@dataclass(frozen=True, slots=True)
class Request:
    """A client's properties that its broadcast depends on."""

    rank: int | None
    """The rank that the client can train; none: everything the server has."""
    seen: int = 0
    """The newest patch version that the client already holds."""


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A client's starting point: base + patch, an adapter to train, dense weights (heads or full weights)."""

    adapter: Mapping[str, Factors]
    dense: Tensors
    recipe: Recipe = Recipe()
    patch: Mapping[str, Patch] = field(default_factory=dict)
    """Everything to be added to the original base, old and new."""
    news: tuple[Mapping[str, Patch], ...] = ()
    """The part of `patch` that this client does not hold yet."""
    seeded: frozenset[str] = frozenset()
    """Parts ("a", "b", "dense", "subspaces", or a dense weight's name) that the client has already, from the run's
    seed or an earlier message, so that they do not travel."""
    correction: Tensors = field(default_factory=dict)
    """By trained tensor: to be added to its gradient in every step, after clipping; with `Recipe.drifts`, a movement to
    be added over the whole round."""
    subspaces: Mapping[str, Subspace] = field(default_factory=dict)
    """By trained tensor ("MODULE/a", "MODULE/b" for factors): the only directions in which it moves."""
    moments: Tensors = field(default_factory=dict)
    """By trained tensor: second moments that the local optimizer starts from. With GaLore those of projected gradients;
    otherwise in any shape that expands to the tensor's."""
    optimizer: Tensors = field(default_factory=dict)
    """By "TENSOR:PART": the state of the local optimizer that the client kept and continues. It never travels."""


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one client's local work; `encode` reduces it to the part that leaves the site."""

    client_id: str
    num_examples: float
    modules: Mapping[str, Payload]
    dense: Tensors
    """Trained dense weights, absolute values."""
    moments: Tensors = field(default_factory=dict)
    """By trained tensor: the second moments that the local optimizer ended with, corrected for their start, where the
    recipe has GaLore (of the projected tensors) or asks for them (of all)."""
    rate_sum: float = 0.0
    """Σ of the steps' learning rates. It stays on the site, and so do the moments unless the method sends them."""
    optimizer: Tensors = field(default_factory=dict)
    """By "TENSOR:PART": the state that the local optimizer ended with, under `local.keep_optimizer`. It stays on the
    site."""

    def factors(self, module: str) -> Factors:
        """Return the module's factor pair, or raise a TypeError where it holds another payload."""
        payload = self.modules[module]
        if not isinstance(payload, Factors):
            raise TypeError(f"{module} holds a {type(payload).__name__}, not a factor pair")
        return payload

    def vector(self, module: str) -> Tensors:
        """Return the module's tensors in shared coordinates, or raise a TypeError where it holds a factor pair."""
        payload = self.modules[module]
        if not isinstance(payload, Vector):
            raise TypeError(f"{module} holds a {type(payload).__name__}, not a vector")
        return payload.values

    def scalings(self) -> dict[str, float]:
        """Return module -> scaling for the modules that hold a factor pair."""
        return {name: p.scaling for name, p in self.modules.items() if isinstance(p, Factors)}

    def named_tensors(self) -> dict[tuple[str, str], Tensor]:
        """Return (module, part) -> tensor of every payload and ("", name) -> dense weight, without moments."""
        named = {("", name): value for name, value in self.dense.items()}
        return named | {(name, part): t for name, p in self.modules.items() for part, t in p.tensors().items()}
