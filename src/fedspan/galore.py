"""GaLore: AdamW whose moments live in a low-rank projection of each weight's gradient. Needs torch alone.

Shapes: weight and gradient G (m, n); r the rank; the projector spans the narrower side.
m ≤ n: P (m, r) from G's left singular vectors and R = PᵀG; m > n: the same for Gᵀ. So R is (r, max(m, n)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedspan.seeding import generator

SVDKind = Literal["exact", "randomized"]
OnRefresh = Literal["keep", "project", "reset"]

OVERSAMPLING = 10
"""Extra columns of the randomized range finder (Halko, Martinsson and Tropp 2011 advise 5 to 10)."""


class GaloreAdamW(torch.optim.Optimizer):
    """AdamW in the subspace of each gradient's leading singular vectors.

    At every `update_gap`-th step P = top-r left singular vectors of G (m ≤ n). Between refreshes

        R = Pᵀ G,   M = β₁ M + (1−β₁) R,   V = β₂ V + (1−β₂) R∘R,
        W ← W − lr · (scale · P (M̂ / (√V̂ + ε)) + weight_decay · W),

    with M̂ and V̂ corrected for their zero start. Groups without a `rank` are plain AdamW.

    Source: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
    (2403.03507).
    Differences: weight decay is scaled by lr alone and never projected, as in AdamW; the randomized projector
    and the choices of `on_refresh` other than "keep" are not the paper's.

    Laws: at full rank the trajectory is AdamW's on the rotated weights PᵀW; between two refreshes ΔW has rank
    at most r (without weight decay); a weight and its transpose take transposed steps; a run resumed from
    `state_dict` is the uninterrupted one bit for bit. The state holds plain tensors only, for a projected
    weight with m ≤ n: "projector" (m, r), "exp_avg" and "exp_avg_sq" (r, n), "step" (): m·r + 2·n·r numbers
    and a count.

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
        "exact", or "randomized": a range finder with oversampling 10 and one power iteration.
    on_refresh
        What becomes of the moments in the new basis. "keep": nothing, as in the paper. "project": M ← O M and
        V ← (O∘O) V with O = P_newᵀ P_old (the idea of LDAdam, Robert et al. 2024, 2410.16103, without its
        correction of the second moment). "reset": both start again from zero, and so does their correction.
    seed
        Of the randomized projector, with the step and the parameter's position; no global state is used.

    Raises
    ------
    ValueError
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
        on_refresh: OnRefresh = "keep",
        seed: int = 0,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        projection = {
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
            "svd": svd,
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
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; returns what `closure` returned."""
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

    def state_numel(self) -> int:
        """How many numbers the state holds, the step counts left out: Σ m·r + 2·n·r over projected m ≤ n."""
        return sum(t.numel() for state in self.state.values() for name, t in state.items() if name != "step")


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas = {tuple(group['betas'])}: expected both at least 0 and below 1")
    for name in ("lr", "eps", "weight_decay", "scale"):
        if not group[name] >= 0:
            raise ValueError(f"{name} = {group[name]}: expected at least 0")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a parameter of type {p.dtype}: expected torch.float32 or torch.float64")
    if group["rank"] is None:
        return
    for name in ("rank", "update_gap"):
        if group[name] < 1:
            raise ValueError(f"{name} = {group[name]}: expected at least 1")
    for name, choices in (("svd", get_args(SVDKind)), ("on_refresh", get_args(OnRefresh))):
        if group[name] not in choices:
            raise ValueError(f"{name} = {group[name]!r}: expected one of {', '.join(choices)}")
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(f"a projected parameter of shape {tuple(p.shape)}: expected a matrix (m, n)")
        if group["rank"] > min(p.shape):
            fits = f"expected at most {min(p.shape)}"
            raise ValueError(f"rank = {group['rank']} for a layer of shape {tuple(p.shape)}: {fits}")


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
    """scale · P adam(PᵀG), in the gradient's own orientation."""
    tall = grad.shape[0] > grad.shape[1]
    wide = grad.mT if tall else grad
    since = done % group["update_gap"]
    if since == 0:
        new = projector(wide, group["rank"], group["svd"], generator(group["seed"], done, index))
        _refresh(state, new, group["on_refresh"])
    p = state["projector"]
    # After a reset the moments are as old as the projector, and so is the correction of their zero start.
    age = since if group["on_refresh"] == "reset" else done
    step: Tensor = group["scale"] * (p @ _adam(p.mT @ wide, state, group, age + 1))
    return step.mT if tall else step


def _adam(grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], age: int) -> Tensor:
    """M̂ / (√V̂ + ε) after taking `grad` in; the moments have then seen `age` gradients."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].lerp_(grad, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = second.sqrt().div_((1 - beta2**age) ** 0.5).add_(group["eps"])
    corrected: Tensor = first / (1 - beta1**age)
    return corrected / root


def _refresh(state: dict[str, Tensor], new: Tensor, on_refresh: OnRefresh) -> None:
    """Put the new projector in place and carry the moments over."""
    old = state.get("projector")
    state["projector"] = new
    if old is None or on_refresh == "keep":
        return
    if on_refresh == "reset":
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        return
    rotation = new.mT @ old  # (r, r)
    state["exp_avg"] = rotation @ state["exp_avg"]
    state["exp_avg_sq"] = rotation.square() @ state["exp_avg_sq"]


def projector(grad: Tensor, rank: int, svd: SVDKind, rng: torch.Generator) -> Tensor:
    """Orthonormal P (m, r), the top left singular vectors of G (m, n) with m ≤ n, exactly or nearly.

    A gradient that is not finite gives a projector of NaN: the weights then show it, as under plain AdamW.

    Parameters
    ----------
    rng
        On the CPU; used by "randomized" only.
    """
    m, n = grad.shape
    if not bool(torch.isfinite(grad).all()):
        return grad.new_full((m, rank), torch.nan)
    if svd == "exact":
        left: Tensor = torch.linalg.svd(grad, full_matrices=False).U
        return left[:, :rank].contiguous()
    width = min(rank + OVERSAMPLING, m)
    # Drawn on the CPU, so that every device gets the same numbers.
    probe = torch.randn((n, width), generator=rng, dtype=grad.dtype).to(grad.device)
    # Orthonormalised between the products: the power iteration cubes the spread of the singular values.
    basis: Tensor = torch.linalg.qr(grad @ probe).Q
    basis = torch.linalg.qr(grad @ torch.linalg.qr(grad.mT @ basis).Q).Q
    inner = torch.linalg.svd(basis.mT @ grad, full_matrices=False).U
    top: Tensor = basis @ inner[:, :rank]
    return top
