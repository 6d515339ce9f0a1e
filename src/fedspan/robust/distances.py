"""Distances of updates from each other and from the broadcast, measured by what they do to the weights.

An adapter counts as its product s·B·A, never as its factors, and without the m×n matrix; everything else as the tensor
it is. Where what was sent differs between clients (a readout of each rank), the changes are compared, not what came
back. All of it in float64: an attacker chooses the sizes, and a square of float32 overflows at 1e19.

Shapes: B (m, r), A (r, n); K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Tensors, Update, Vector
from fedspan.support import parallel
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Cohort:
    """The encoded answers of one exchange, each with the answer of a client that learnt nothing."""

    updates: Sequence[Update]
    idle: Sequence[Update | None]
    """None: not known, and counted as zeros."""
    averages_factors: bool = False
    """The method's result depends on each client's gauge, so the gauge is looked at too."""

    @classmethod
    def of(
        cls, method: Method, updates: Sequence[Update], sent: Sequence[Broadcast], ask: str, averages_factors: bool
    ) -> Cohort:
        """Return the cohort of one exchange's answers to the broadcasts that each client was sent."""
        if ask != "train":
            return cls(updates, [None] * len(updates), averages_factors)
        known: dict[int, Update] = {}
        for broadcast in sent:
            if id(broadcast) not in known:
                idle = _idle(method, broadcast)
                # One object for equal answers: where all clients started alike, their answers alone need be compared.
                known[id(broadcast)] = next((other for other in known.values() if _alike(idle, other)), idle)
        return cls(updates, [known[id(broadcast)] for broadcast in sent], averages_factors)

    def only(self, keep: Sequence[int]) -> Cohort:
        """Return the cohort of these updates alone."""
        return replace(self, updates=[self.updates[k] for k in keep], idle=[self.idle[k] for k in keep])

    def scaling_problem(self, number: int) -> str | None:
        """Return what is wrong with the scalings of an update, or None.

        The server sets them: otherwise a client could hide a large update in a large scaling.
        """
        update, idle = self.updates[number], self.idle[number]
        sent = {} if idle is None else idle.scalings()
        for name, scaling in update.scalings().items():
            if scaling != sent.get(name, scaling):
                return f"{name} has scaling {scaling:g}, expected {sent[name]:g}"
        return None

    def size(self, number: int) -> float:
        """Return ‖change‖_F over all modules and tensors: s B A − s₀ B₀ A₀ of an adapter, x − x₀ of anything else.

        Where the method averages factors, plus (s B − s₀ B₀)(A − A₀): see `crossings`.
        """
        update, idle = self.updates[number], self.idle[number]
        total = 0.0
        for name in _pairs(update):
            pair = _change(update, idle, name)
            total += lowrank.norm(pair) ** 2
            if self.averages_factors and idle is not None:
                own, start = _delta(update, name), _delta(idle, name)
                total += lowrank.norm(LowRank(own.b - start.b, own.a - start.a)) ** 2
        for part in _tensors(update):
            total += _squared(_difference(update, idle, part))
        return float(total**0.5) if total == total else float("inf")

    def distances(self) -> Tensor:
        """Return ‖change_i − change_j‖_F (K, K), which no gauge changes."""
        first = self.updates[0]
        shared = all(idle is self.idle[0] for idle in self.idle)
        idle: Sequence[Update | None] = [None] * len(self.updates) if shared else self.idle

        def of_module(name: str) -> Tensor:
            return product_squares([_change(u, i, name) for u, i in zip(self.updates, idle, strict=True)])

        total = torch.zeros((len(self.updates),) * 2, dtype=torch.float64)
        for squares in parallel.ordered_map(of_module, _pairs(first)):
            total += squares
        for part in _tensors(first):
            total += _vector_squares([_difference(u, i, part) for u, i in zip(self.updates, idle, strict=True)])
        return _root(total)

    def crossings(self) -> Tensor:
        """Return ‖(s_i B_i − s_j B_j)(A_i − A_j)‖_F (K, K): the error of averaging two clients' factors.

        Half the weighted sum of these products over all pairs is T − B̄Ā to the last digit (the residual of FedEx-LoRA,
        Singhal et al. 2025, 2410.09432), so clients that are near by this measure and by their products may be
        averaged factor by factor. (B·c, A/c) is at |c − 1|²/|c| times its product from itself, whatever c is; a
        rotation is seen as well.
        """

        def of_module(name: str) -> Tensor:
            return _crossing_squares([_delta(update, name) for update in self.updates])

        total = torch.zeros((len(self.updates),) * 2, dtype=torch.float64)
        for squares in parallel.ordered_map(of_module, _pairs(self.updates[0])):
            total += squares
        return _root(total)


def _idle(method: Method, sent: Broadcast) -> Update:
    """Return the answer of a client that learnt nothing, which the others' answers are changes of."""
    # Without corrections, which such a client would never have met; any rate that is not 0 will do.
    started = method.start(replace(sent, correction={}), None)
    return method.encode(Update("", 1.0, started.adapter, started.dense, rate_sum=1.0), started, None)[0]


def _alike(x: Update, y: Update) -> bool:
    """Return whether two answers are the same to the bit."""
    if _tensors(x) != _tensors(y) or _pairs(x) != _pairs(y):
        return False
    held = [
        (getattr(x.factors(name), part), getattr(y.factors(name), part)) for name in _pairs(x) for part in ("a", "b")
    ]
    held += [(_tensor(x, where), _tensor(y, where)) for where in _tensors(x)]
    return all(s is not None and t is not None and torch.equal(s, t) for s, t in held)


def _pairs(update: Update) -> list[str]:
    return list(update.scalings())


def _delta(update: Update, name: str) -> LowRank:
    f = update.factors(name)
    return LowRank(f.b.double() * f.scaling, f.a.double())


def _change(update: Update, idle: Update | None, name: str) -> LowRank:
    own = _delta(update, name)
    return own if idle is None else lowrank.stack([own, _delta(idle, name)], [1.0, -1.0])


def _tensors(update: Update) -> list[tuple[str, str]]:
    """Return the places of the tensors outside factor pairs.

    (module, part) of a vector, (name, "") of a dense weight, ("", name) of a second moment.
    """
    parts = [(name, part) for name, p in update.modules.items() if isinstance(p, Vector) for part in p.values]
    return [*parts, *((name, "") for name in update.dense), *(("", name) for name in update.moments)]


def _tensor(update: Update, where: tuple[str, str]) -> Tensor | None:
    module, part = where
    if not part:
        return update.dense.get(module)
    if not module:
        return update.moments.get(part)
    payload = update.modules.get(module)
    held: Tensors = payload.values if isinstance(payload, Vector) else {}
    return held.get(part)


def _difference(update: Update, idle: Update | None, where: tuple[str, str]) -> Tensor:
    own = _tensor(update, where)
    if own is None:
        raise FedspanError(f"{update.client_id} sent no {'/'.join(where).strip('/')}, which others did")
    own = lowrank.promote(own)
    start = _tensor(idle, where) if idle is not None else None
    if start is None:
        return own
    own, start = padded([own, lowrank.promote(start)])
    return own - start


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in one shape: one of smaller rank fills the leading rows or columns, as in a fold."""
    shapes = {t.shape for t in tensors}
    if len(shapes) == 1:
        return list(tensors)
    rows, columns = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    return [torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0])) for t in tensors]


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _vector_squares(vectors: Sequence[Tensor]) -> Tensor:
    """Return ‖x_i − x_j‖² (K, K), each difference taken before it is squared."""
    x = torch.stack(padded(vectors)).flatten(1)
    total = torch.zeros((len(x),) * 2, dtype=torch.float64)
    for i in range(len(x) - 1):
        total[i, i + 1 :] = torch.linalg.vector_norm(x[i + 1 :] - x[i], dim=1, dtype=torch.float64).square()
    return total + total.mT


def product_squares(pairs: Sequence[LowRank]) -> Tensor:
    """Return ‖X_i − X_j‖_F² (K, K) of X_k = B_k A_k, by subtraction before squaring: nothing cancels afterwards.

    With A_kᵀ = Q_k R_k and Y_k = B_k R_kᵀ, X_k = Y_k Q_kᵀ. Split Q_j = Q_i S + E, S = Q_iᵀ Q_j: then

        ‖X_i − X_j‖² = ‖Y_i − Y_j Sᵀ‖² + ‖Y_j Eᵀ‖²,

    which is the QR of [A_iᵀ, A_jᵀ] by blocks, with products of matrices in place of one QR for every pair. The work is
    O(K² r² (m + n)), the memory O(K r (m + n)).

    Parameters
    ----------
    pairs
        Of one shape (m, n), the ranks as they are; float64.
    """
    m, n = pairs[0].shape
    count, width = len(pairs), max(min(x.rank, n) for x in pairs)
    # Transposed, so that the long side lies in one piece. A row of zeros, where a rank is smaller, is no direction.
    y, q = pairs[0].b.new_zeros((count, width, m)), pairs[0].a.new_zeros((count, width, n))
    for k, x in enumerate(pairs):
        basis, triangle = torch.linalg.qr(x.a.mT)
        y[k, : len(triangle)], q[k, : len(triangle)] = triangle @ x.b.mT, basis.mT
    small = torch.linalg.qr(y.mT, mode="r")[1]  # (K, min(m, width), width): as long as Y in every direction
    total = torch.zeros((count, count), dtype=torch.float64)
    for i in range(count - 1):
        others = q[i + 1 :].reshape(-1, n)
        s = others @ q[i].mT  # (others·width, width), the blocks Sᵀ
        outside = small[i + 1 :] @ torch.addmm(others, s, q[i], alpha=-1).view(-1, width, n)
        inside = torch.baddbmm(y[i].expand(count - 1 - i, -1, -1), s.view(-1, width, width).mT, y[i + 1 :], alpha=-1)
        total[i, i + 1 :] = _squares(inside) + _squares(outside)
    return total + total.mT


def _crossing_squares(pairs: Sequence[LowRank]) -> Tensor:
    """Return ‖(B_i − B_j)(A_i − A_j)‖_F² (K, K); smaller ranks are padded with zeros."""
    b, a = torch.stack(padded([x.b for x in pairs])), torch.stack(padded([x.a for x in pairs]))
    total = torch.zeros((len(pairs),) * 2, dtype=torch.float64)
    for i in range(len(pairs) - 1):
        left, right = b[i + 1 :] - b[i], a[i + 1 :] - a[i]
        # The factors have been subtracted: this is the size of one product, tr(BᵀB AAᵀ), and no difference.
        total[i, i + 1 :] = ((left.mT @ left) * (right @ right.mT)).sum(dim=(-2, -1)).clamp(min=0)
    return total + total.mT


def _squares(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return size.square()


def _root(squares: Tensor) -> Tensor:
    """Return the distances; one that overflowed or is NaN counts as infinite."""
    distances: Tensor = torch.nan_to_num(squares, nan=float("inf"), posinf=float("inf")).sqrt()
    return distances.fill_diagonal_(0.0)
