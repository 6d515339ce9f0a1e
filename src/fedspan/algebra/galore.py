"""GaLore: AdamW whose moments live in a low-rank projection of each weight's gradient. Needs torch alone.

Shapes: weight and gradient G (m, n); r the rank. The projector is on one side of the weight, by default the
narrower one. Left: P (m, r) from G's left singular vectors, and R = PᵀG (r, n). Right: the same for Gᵀ, so P (n, r)
and R (r, m).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

SVDKind = Literal["exact", "randomized", "power"]
OnRefresh = Literal["keep", "project", "reset"]
Side = Literal["auto", "left", "right"]

_COUNTED = ("projector", "exp_avg", "exp_avg_sq")
OVERSAMPLING = 10
"""Extra columns of the randomized range finder (Halko, Martinsson and Tropp 2011 advise 5 to 10)."""


class GaloreAdamW(torch.optim.Optimizer):
    """AdamW in the subspace of each gradient's leading singular vectors.

    At every `update_gap`-th step P = top-r left singular vectors of G (on the left side). Between refreshes

        R = Pᵀ G,   M = β₁ M + (1−β₁) R,   V = β₂ V + (1−β₂) R∘R,
        W ← W − lr · (scale · P (M̂ / (√V̂ + ε)) + weight_decay · W),

    with M̂ and V̂ corrected for their zero start. Groups without a `rank` are plain AdamW.

    Source: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
    (2403.03507).
    Differences: weight decay is scaled by lr alone and never projected, as in AdamW; `side` other than "auto", `svd`
    other than "exact" and `on_refresh` other than "keep" are not the paper's.

    Laws: at full rank the trajectory is AdamW's on the rotated weights PᵀW; between two refreshes ΔW has rank
    at most r (without weight decay); a weight and its transpose take transposed steps; a run resumed from
    `state_dict` is the uninterrupted one bit for bit. The state holds plain tensors only, for a weight projected
    on the left: "projector" (m, r), "exp_avg" and "exp_avg_sq" (r, n), "step" (), so that `state_numel_of` gives its
    size; "seeded" () marks second moments that did not start from zero.

    Parameters
    ----------
    params
        Parameters, or groups of them. A group may set any of the options below; one with a `rank` holds
        matrices only. One rank serves all matrices of its group, so it must fit the smallest; smaller layers
        go into a group of their own. ``asdict(GaloreOptions(...))`` has the keys of a projected group.
    lr
        Step size.
    betas, eps
        Adam's (β₁, β₂) and ε.
    weight_decay
        Decoupled, as in AdamW.
    rank
        r of the projection; none: plain AdamW.
    update_gap
        Steps between two refreshes of the projector; the first step always makes one.
    scale
        Factor on the projected step (α in the paper).
    svd
        Algorithm for P at a refresh. "exact"; "randomized": a range finder with oversampling 10 and one power
        iteration; "power": orth(G Gᵀ P_old), one power iteration from the last basis, randomized at the first refresh.
    side
        The side that P is on: "auto", the narrower one, as in the paper; "left" or "right", for any shape.
    on_refresh
        Treatment of the moments in the new basis. "keep": unchanged, as in the paper. "reset": both start again
        from zero, and so does their correction. "project": LDAdam's rule (Robert et al. 2024, 2410.16103), which
        takes V̂ − M̂∘M̂ for a variance; with O = P_newᵀ P_old and c = 1 − β₂ᵗ after t gradients (1 where V was seeded)

            M ← O M,   V ← c · | (O∘O)(V̂ − M̂∘M̂) + (O M̂)∘(O M̂) |.

        The paper turns its basis at every step; here the rule is applied when P changes.
    seed
        Of the randomized projector, with the step and the parameter's position; no global state is used.

    Raises
    ------
    FedspanError
        For an option out of range; for a projected parameter that is no matrix or is smaller than the rank;
        for a parameter in half precision, whose moments would lose small steps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_gap: int = 50,
        scale: float = 1.0,
        svd: SVDKind = "randomized",
        side: Side = "auto",
        on_refresh: OnRefresh = "keep",
        seed: int = 0,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        projection = {
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
            "svd": svd,
            "side": side,
            "on_refresh": on_refresh,
            "seed": seed,
        }
        super().__init__(params, {**adam, **projection})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that its options are valid and fit its parameters."""
        super().add_param_group(param_group)
        # Checked afterwards: only then are the defaults filled in.
        try:
            _check_group(self.param_groups[-1])
        except FedspanError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient, and return the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _step(p, self.state[p], group, index)
                index += 1
        return loss

    def start_from(self, parameter: Tensor, second_moment: Tensor) -> None:
        """Let the parameter's second moments start from V₀ instead of zero.

        V is then a running average whose weights sum to 1 from the first step on, so that V̂ = V; M still starts from
        zero and is corrected for it. A refresh with `on_refresh = "reset"` ends this, as it does the moments.

        Parameters
        ----------
        second_moment
            V₀ ≥ 0, in the coordinates of R: (r, n) on the left side, (r, m) on the right, as the weight without a rank.

        Raises
        ------
        FedspanError
            For a parameter that is not this optimizer's or has taken a step, another shape, a negative entry or NaN.
        """
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise FedspanError(f"a parameter of shape {tuple(parameter.shape)}: expected one of this optimizer's")
        state = self.state[parameter]
        if state:
            raise FedspanError(f"second moments after {int(state['step'])} steps: expected before the first")
        expected = moment_shape(parameter.shape, group["rank"], group["side"])
        if tuple(second_moment.shape) != expected:
            raise FedspanError(f"second moments of shape {tuple(second_moment.shape)}: expected {expected}")
        if not bool((second_moment >= 0).all()):  # a NaN fails too
            raise FedspanError(f"second moments down to {float(second_moment.min())}: expected none below 0")
        state["step"] = torch.zeros((), dtype=torch.int64)
        state["seeded"] = torch.ones(())
        state["exp_avg_sq"] = second_moment.detach().to(parameter, copy=True)
        state["exp_avg"] = torch.zeros_like(state["exp_avg_sq"])

    def second_moments(self, of_all: bool = False) -> dict[Tensor, Tensor]:
        """Return V̂, corrected for its start, of every projected parameter that has taken a step, for `start_from`.

        Parameters
        ----------
        of_all
            Of the parameters without a projection too.
        """
        moments: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"] if of_all or group["rank"] is not None else ():
                state = self.state.get(p, {})
                if state and int(state["step"]):
                    moments[p] = state["exp_avg_sq"] / _mass(state, group, _age(group, int(state["step"])))
        return moments

    def state_numel(self) -> int:
        """Return the number of entries in the state without counts and marks: the sum of `state_numel_of`."""
        return sum(t.numel() for state in self.state.values() for name, t in state.items() if name in _COUNTED)


def takes_left(shape: Sequence[int], side: Side = "auto") -> bool:
    """Return whether the projector of a weight (m, n) is on its left."""
    return side == "left" or (side == "auto" and shape[0] <= shape[1])


def state_numel_of(shape: Sequence[int], rank: int | None, side: Side = "auto") -> int:
    """Return the size of one weight's state: m·r + 2·n·r numbers with P on the left, n·r + 2·m·r on the right.

    Without a rank, for a weight of any shape, 2 of its size.
    """
    if rank is None:
        return 2 * math.prod(shape)
    m, n = shape
    short, long = (m, n) if takes_left(shape, side) else (n, m)
    return short * rank + 2 * long * rank


def moment_shape(shape: Sequence[int], rank: int | None, side: Side) -> tuple[int, ...]:
    """Return the shape of one weight's second moments: (r, n) with P on the left, (r, m) on the right."""
    if rank is None:
        return tuple(shape)
    return rank, shape[1] if takes_left(shape, side) else shape[0]


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise FedspanError(f"betas = {tuple(group['betas'])}: expected both at least 0 and below 1")
    for name in ("lr", "eps", "weight_decay", "scale"):
        if not group[name] >= 0:
            raise FedspanError(f"{name} = {group[name]}: expected at least 0")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise FedspanError(f"a parameter of type {p.dtype}: expected torch.float32 or torch.float64")
    if group["rank"] is not None:
        _check_projection(group)


def _check_projection(group: dict[str, Any]) -> None:
    """Refuse options of the projection that are out of range, and parameters that do not fit its rank."""
    for name in ("rank", "update_gap"):
        if group[name] < 1:
            raise FedspanError(f"{name} = {group[name]}: expected at least 1")
    for name, kind in (("svd", SVDKind), ("side", Side), ("on_refresh", OnRefresh)):
        choices = get_args(kind)
        if group[name] not in choices:
            raise FedspanError(f"{name} = {group[name]!r}: expected one of {', '.join(choices)}")
    for p in group["params"]:
        if p.ndim != 2:
            raise FedspanError(f"a projected parameter of shape {tuple(p.shape)}: expected a matrix (m, n)")
        if group["rank"] > min(p.shape):
            fits = f"expected at most {min(p.shape)}"
            raise FedspanError(f"rank = {group['rank']} for a layer of shape {tuple(p.shape)}: {fits}")


def _step(p: Tensor, state: dict[str, Tensor], group: dict[str, Any], index: int) -> None:
    assert p.grad is not None
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.int64)
    done = int(state["step"])
    state["step"] += 1
    if group["rank"] is None:
        direction = _adam(p.grad, state, group, done + 1)
    else:
        direction = _projected(p.grad, state, group, done, index)
    # Decay first, from the weight before the step, as AdamW does.
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(direction, alpha=group["lr"])


def _projected(grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], done: int, index: int) -> Tensor:
    """Return scale · P adam(PᵀG), in the gradient's own orientation."""
    left = takes_left(grad.shape, group["side"])
    turned = grad if left else grad.mT
    if done % group["update_gap"] == 0:
        rng = generator(group["seed"], done, index)
        _refresh(state, projector(turned, group["rank"], group["svd"], rng, state.get("projector")), group, done)
    p = state["projector"]
    step: Tensor = group["scale"] * (p @ _adam(p.mT @ turned, state, group, _age(group, done + 1)))
    return step if left else step.mT


def _age(group: dict[str, Any], done: int) -> int:
    """Return the number of gradients in the moments after `done` steps."""
    if done and group["rank"] is not None and group["on_refresh"] == "reset":
        # They are as old as the projector, and so is the correction of their zero start.
        return int((done - 1) % group["update_gap"]) + 1
    return done


def _mass(state: dict[str, Tensor], group: dict[str, Any], age: int) -> float:
    """Return the sum of the weights of the running average V: V̂ = V / mass."""
    return 1.0 if "seeded" in state else 1.0 - group["betas"][1] ** age


def _adam(grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], age: int) -> Tensor:
    """Return M̂ / (√V̂ + ε) after adding `grad` to the moments, which then hold `age` gradients."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].lerp_(grad, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = second.sqrt().div_(_mass(state, group, age) ** 0.5).add_(group["eps"])
    corrected: Tensor = first / (1 - beta1**age)
    return corrected / root


def _refresh(state: dict[str, Tensor], new: Tensor, group: dict[str, Any], done: int) -> None:
    """Put the new projector in place and carry the moments over."""
    old = state.get("projector")
    state["projector"] = new
    if old is None or group["on_refresh"] == "keep":
        return
    first, second = state["exp_avg"], state["exp_avg_sq"]
    if group["on_refresh"] == "reset":
        first.zero_()
        second.zero_()
        state.pop("seeded", None)
        return
    rotation = new.mT @ old  # (r, r)
    mass = _mass(state, group, done)
    mean = first / (1 - group["betas"][0] ** done)
    variance = second / mass - mean.square()
    state["exp_avg"] = rotation @ first
    # The estimate of a variance may be negative where few gradients were seen; LDAdam takes the absolute value.
    state["exp_avg_sq"] = mass * (rotation.square() @ variance + (rotation @ mean).square()).abs()


def projector(grad: Tensor, rank: int, svd: SVDKind, rng: torch.Generator, last: Tensor | None = None) -> Tensor:
    """Return an orthonormal P (m, r), the top left singular vectors of G (m, n), exactly or approximately.

    A gradient that is not finite gives a projector of NaN, so that the weights become NaN, as under plain AdamW.

    Parameters
    ----------
    rank
        r, at most min(m, n).
    rng
        On the CPU; "exact" draws nothing.
    last
        The basis that "power" starts from; none: it draws one, as "randomized" does. The result is aligned with
        `last`, column by column, rather than with the singular vectors, so that moments kept in it stay meaningful.
    """
    # A finite sum has finite terms, and costs a tenth of looking at each; otherwise they may be large alone.
    if not math.isfinite(float(grad.sum())) and not bool(torch.isfinite(grad).all()):
        return grad.new_full((grad.shape[0], rank), torch.nan)
    if svd == "exact":
        left: Tensor = torch.linalg.svd(grad, full_matrices=False).U
        return left[:, :rank].contiguous()
    if svd == "power" and last is not None:
        basis, triangle = torch.linalg.qr(_times(grad, _times(grad.mT, last)))
        return torch.where(triangle.diagonal() < 0, -basis, basis).contiguous()
    width = min(rank + OVERSAMPLING, *grad.shape)
    # Drawn on the CPU, so that every device gets the same numbers.
    probe = torch.randn((grad.shape[1], width), generator=rng, dtype=grad.dtype).to(grad.device)
    # Orthonormalised between the products: the power iteration cubes the spread of the singular values.
    basis = torch.linalg.qr(_times(grad, probe)).Q
    basis = torch.linalg.qr(_times(grad, torch.linalg.qr(_times(grad.mT, basis)).Q)).Q
    inner = torch.linalg.svd(basis.mT @ grad, full_matrices=False).U
    top: Tensor = basis @ inner[:, :rank]
    return top


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Return X·Y for a Y of few columns, as (YᵀXᵀ)ᵀ: BLAS is up to twenty times slower with Y on the right."""
    product: Tensor = (y.mT @ x.mT).mT
    return product
