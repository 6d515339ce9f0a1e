"""GaLore-AdamW: the projection, its laws, and a run that resumes bit for bit from plain tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedspan.algebra.galore import GaloreAdamW, Side, _refresh, projector, state_numel_of, takes_left
from fedspan.methods import METHODS
from fedspan.methods.messages import GaloreOptions, Request, Template

torch.set_num_threads(1)
NEVER = 10**9
SHAPES = [(8, 13), (13, 8), (9, 9)]


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quadratic(target: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss whose gradient keeps full rank and changes its singular vectors as W moves."""
    left = gaussian(91, target.shape[0], target.shape[0], dtype=target.dtype)
    return lambda w: (left @ (w - target)).square().mean() + (w - target).pow(4).mean()


def run(w: Tensor, loss: Callable[[Tensor], Tensor], steps: int, **options: Any) -> tuple[Tensor, GaloreAdamW]:
    p = nn.Parameter(w.clone())
    optimizer = GaloreAdamW([p], **{"lr": 0.05, "svd": "exact", **options})
    go(p, optimizer, loss, steps)
    return p.detach(), optimizer


def go(p: nn.Parameter, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(8, 13), (5,), (2, 3, 4)], ids=str)
def test_without_a_rank_it_is_adamw(shape: tuple[int, ...], weight_decay: float) -> None:
    """A group without `rank`, of any shape, takes torch's own AdamW steps."""
    target = gaussian(0, *shape)
    loss = lambda w: (w - target).pow(4).sum()  # noqa: E731
    ours, _ = run(gaussian(1, *shape), loss, 25, weight_decay=weight_decay)
    p = nn.Parameter(gaussian(1, *shape))
    go(p, torch.optim.AdamW([p], lr=0.05, weight_decay=weight_decay), loss, 25)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_full_rank_it_is_adamw_on_the_rotated_weights(shape: tuple[int, int], weight_decay: float) -> None:
    """rank = min(m, n), exact SVD, one projector for ever: W_t = P·V_t with V_t torch's AdamW from PᵀW_0."""
    w0, loss = gaussian(1, *shape), quadratic(gaussian(2, *shape))
    w = w0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(w), w)
    tall = shape[0] > shape[1]
    p = torch.from_numpy(np.linalg.svd((grad.mT if tall else grad).numpy())[0])
    back = (lambda v: (p @ v).mT) if tall else (lambda v: p @ v)
    rotated = nn.Parameter(p.mT @ (w0.mT if tall else w0))
    go(rotated, torch.optim.AdamW([rotated], lr=0.05, weight_decay=weight_decay), lambda v: loss(back(v)), 20)
    ours, _ = run(w0, loss, 20, rank=min(shape), update_gap=NEVER, weight_decay=weight_decay)
    torch.testing.assert_close(ours, back(rotated.detach()), rtol=1e-10, atol=1e-10)
    # A rotation that is not the identity: plain AdamW goes elsewhere.
    plain, _ = run(w0, loss, 20, weight_decay=weight_decay)
    assert float((plain - ours).norm()) > 0.1


def ldadam(m: Any, v: Any, turn: Any, seen: int) -> tuple[Any, Any]:
    """Entry by entry: E[(Σ_j o_ij g_j)²] with g_j taken as independent, of mean m̂_j and second moment v̂_j."""
    mean, power = m / (1 - 0.8**seen), v / (1 - 0.95**seen)
    moved = np.zeros_like(v)
    for i in range(v.shape[0]):
        for column in range(v.shape[1]):
            variance = sum(turn[i, j] ** 2 * (power[j, column] - mean[j, column] ** 2) for j in range(v.shape[0]))
            centre = sum(turn[i, j] * mean[j, column] for j in range(v.shape[0]))
            moved[i, column] = (1 - 0.95**seen) * abs(variance + centre**2)
    return turn @ m, moved


@pytest.mark.parametrize("on_refresh", ["keep", "project", "reset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_the_papers_formula(shape: tuple[int, int], on_refresh: str) -> None:
    """Three projectors long, against the formulas written out in numpy float64.

    The signs of singular vectors are free, and kept moments remember them: the oracle checks the space and takes P.
    """
    w0, loss = gaussian(3, *shape), quadratic(gaussian(4, *shape))
    p = nn.Parameter(w0.clone())
    options: dict[str, Any] = {"rank": 3, "update_gap": 4, "scale": 0.7, "svd": "exact", "on_refresh": on_refresh}
    optimizer = GaloreAdamW([p], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05, **options)
    m, v = np.zeros((3, max(shape))), np.zeros((3, max(shape)))
    basis, age = np.zeros((min(shape), 3)), 0
    for step in range(11):
        before = p.detach().numpy().copy()
        go(p, optimizer, loss, 1)
        assert p.grad is not None
        grad = p.grad.numpy().T if shape[0] > shape[1] else p.grad.numpy()
        if step % 4 == 0:
            old, basis = basis, optimizer.state[p]["projector"].numpy().copy()
            top = np.linalg.svd(grad)[0][:, :3]
            np.testing.assert_allclose(basis @ basis.T, top @ top.T, atol=1e-9)
            if on_refresh == "reset":
                m, v, age = 0 * m, 0 * v, 0
            elif on_refresh == "project" and step:
                m, v = ldadam(m, v, basis.T @ old, age)
        r, age = basis.T @ grad, age + 1
        m, v = 0.8 * m + 0.2 * r, 0.95 * v + 0.05 * r**2
        update = basis @ (m / (1 - 0.8**age) / (np.sqrt(v / (1 - 0.95**age)) + 1e-6))
        update = update.T if shape[0] > shape[1] else update
        np.testing.assert_allclose(p.detach().numpy(), before - 0.05 * (0.7 * update + 0.05 * before), atol=1e-11)


@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_has_the_rank_until_a_refresh_and_more_after_it(shape: tuple[int, int], svd: str) -> None:
    """ΔW of one projector has rank r, of two up to 2r: what LoRA cannot do and GaLore is for."""
    w0, loss = gaussian(5, *shape), quadratic(gaussian(6, *shape))
    ranks = [
        int(torch.linalg.matrix_rank(run(w0, loss, steps, rank=2, update_gap=6, svd=svd)[0] - w0))
        for steps in (1, 6, 7, 12, 13)
    ]
    assert ranks[:2] == [2, 2]
    assert 2 < ranks[2] <= 4
    assert ranks[2] <= ranks[3] < ranks[4] <= 6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_acts(shape: tuple[int, int]) -> None:
    """A group with a rank does move in r directions only, one without in all: no silently inactive projection."""
    w0, loss = gaussian(7, *shape), quadratic(gaussian(8, *shape))
    with_rank, optimizer = run(w0, loss, 5, rank=2)
    without, plain = run(w0, loss, 5)
    assert int(torch.linalg.matrix_rank(with_rank - w0)) == 2
    assert int(torch.linalg.matrix_rank(without - w0)) == min(shape)
    assert "projector" in next(iter(optimizer.state.values()))
    assert "projector" not in next(iter(plain.state.values()))


def test_fedftg_asks_for_a_projection() -> None:
    """The method's recipe carries the rank and all options of the optimizer, or none for its full-rank arm."""
    state = METHODS["fedftg"]().init(Template({"x": (8, 6)}, 4), {})
    recipe = METHODS["fedftg"](galore_rank=5, on_refresh="reset").broadcast(state, Request(None)).recipe
    assert recipe.galore == GaloreOptions(rank=5, on_refresh="reset")
    assert METHODS["fedftg"](galore_rank=None).broadcast(state, Request(None)).recipe.galore is None
    p = nn.Parameter(gaussian(0, 8, 6))
    group = GaloreAdamW([{"params": [p], **asdict(recipe.galore)}]).param_groups[0]
    assert (group["rank"], group["on_refresh"], group["svd"]) == (5, "reset", "randomized")


@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
def test_a_transposed_weight_takes_transposed_steps(svd: str) -> None:
    """For m > n the projection is from the right, which is the left one of the transposed problem."""
    w0, loss = gaussian(9, 14, 6), quadratic(gaussian(10, 14, 6))
    options: dict[str, Any] = {"rank": 3, "update_gap": 4, "svd": svd, "weight_decay": 0.1}
    tall, first = run(w0, loss, 10, **options)
    wide, second = run(w0.mT.contiguous(), lambda w: loss(w.mT), 10, **options)
    torch.testing.assert_close(tall, wide.mT, rtol=1e-9, atol=1e-9)
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_the_scale_multiplies_the_projected_step_and_not_the_decay() -> None:
    w0, loss = gaussian(11, 6, 9), quadratic(gaussian(12, 6, 9))
    steps = [
        run(w0, loss, 1, rank=2, scale=scale, weight_decay=0.5)[0] - w0 * (1 - 0.05 * 0.5) for scale in (1.0, 0.25)
    ]
    torch.testing.assert_close(steps[1], 0.25 * steps[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_state_has_the_papers_size(shape: tuple[int, int]) -> None:
    """m·r + 2·n·r for m ≤ n (Zhao et al. 2024, table 1), against 2·m·n of AdamW."""
    r, (m, n) = 3, sorted(shape)
    _, projected = run(gaussian(0, *shape), quadratic(gaussian(1, *shape)), 1, rank=r)
    assert projected.state_numel() == m * r + 2 * n * r
    _, plain = run(gaussian(0, *shape), quadratic(gaussian(1, *shape)), 1)
    assert plain.state_numel() == 2 * m * n


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), m=st.integers(1, 12), n=st.integers(1, 12), side=st.sampled_from(["auto", "left", "right"]))
def test_the_formula_of_the_states_size_is_its_size(data: st.DataObject, m: int, n: int, side: Side) -> None:
    """`state_numel_of` is what the state holds after a step, for every shape, side and rank, and none."""
    rank = data.draw(st.none() | st.integers(1, min(m, n)))
    p = nn.Parameter(gaussian(0, m, n))
    p.grad = gaussian(1, m, n)
    optimizer = GaloreAdamW([p], rank=rank, side=side)
    optimizer.step()
    assert optimizer.state_numel() == state_numel_of((m, n), rank, side)
    scalar = nn.Parameter(torch.zeros(()))
    scalar.grad = torch.ones(())
    optimizer = GaloreAdamW([scalar])
    optimizer.step()
    assert optimizer.state_numel() == state_numel_of((), None) == 2


@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_side_is_the_side(shape: tuple[int, int], side: Side, svd: str) -> None:
    """One projector long, ΔW = P·(…) with P (m, r) on the left and (…)·Pᵀ with P (n, r) on the right, any shape."""
    w0, loss = gaussian(21, *shape), quadratic(gaussian(22, *shape))
    after, optimizer = run(w0, loss, 4, rank=2, side=side, svd=svd)
    p = next(iter(optimizer.state.values()))["projector"]
    delta = after - w0 if side == "left" else (after - w0).mT
    assert p.shape == (delta.shape[0], 2)
    torch.testing.assert_close(p @ (p.mT @ delta), delta)
    assert takes_left(shape) == (shape[0] <= shape[1])
    auto = run(w0, loss, 4, rank=2, svd=svd)[0]
    chosen = run(w0, loss, 4, rank=2, svd=svd, side="left" if takes_left(shape) else "right")[0]
    assert torch.equal(auto, chosen)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)], ids=str)
def test_power_refreshes_close_in_on_the_leading_directions(shape: tuple[int, int]) -> None:
    """On a gradient that stays, one step each: orth(G Gᵀ P), nearer the exact basis every time and aligned with P."""
    u, v = (torch.linalg.qr(gaussian(seed, size, 40))[0] for seed, size in enumerate(shape))
    grad = u * torch.linspace(1, 0.5, 40, dtype=u.dtype) ** 4 @ v.mT
    rng = torch.Generator().manual_seed(0)
    p = torch.linalg.qr(gaussian(5, shape[0], 6))[0]
    top = u[:, :6] @ u[:, :6].mT
    errors = []
    for _ in range(60):
        new = projector(grad, 6, "power", rng, p)
        expected = np.linalg.qr((grad @ (grad.mT @ p)).numpy())[0]
        np.testing.assert_allclose((new @ new.mT).numpy(), expected @ expected.T, atol=1e-10)
        errors.append(float(torch.linalg.matrix_norm(new @ new.mT - top)))
        p = new
    assert errors[-1] < 0.05 * errors[0]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    # Once there it stays there, signs included, so that moments kept in these coordinates stay meaningful.
    exact = projector(grad, 6, "exact", rng)
    torch.testing.assert_close(projector(grad, 6, "power", rng, exact), exact)
    torch.testing.assert_close(projector(grad, 6, "power", rng, -exact), -exact)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projecting_moments_by_a_signed_permutation_is_exact(shape: tuple[int, int], seeded: bool) -> None:
    """P_new = P_old R: the moments are only renamed, so the run goes on as if nothing had happened."""
    p = nn.Parameter(gaussian(31, *shape))
    p.grad = gaussian(32, *shape)
    options: dict[str, Any] = {"rank": 4, "svd": "exact", "on_refresh": "project"}
    optimizer = GaloreAdamW([p], **options)
    if seeded:
        optimizer.start_from(p, gaussian(33, 4, max(shape)).square())
    for i in range(3):
        p.grad = gaussian(34 + i, *shape)
        optimizer.step()
    state = {name: value.clone() for name, value in optimizer.state[p].items()}
    turn = torch.eye(4, dtype=p.dtype)[torch.tensor([2, 0, 3, 1])] * torch.tensor([1.0, -1, -1, 1], dtype=p.dtype)
    _refresh(optimizer.state[p], state["projector"] @ turn, optimizer.param_groups[0], 3)
    moved = optimizer.state[p]
    torch.testing.assert_close(moved["exp_avg"], turn.mT @ state["exp_avg"], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved["exp_avg_sq"], turn.mT.abs() @ state["exp_avg_sq"], rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 9))
def test_projected_second_moments_stay_at_or_above_zero(seed: int, steps: int) -> None:
    """For unrelated bases too, where V̂ − M̂∘M̂ may be negative."""
    p = nn.Parameter(gaussian(seed, 7, 5))
    optimizer = GaloreAdamW([p], rank=3, update_gap=1, on_refresh="project", betas=(0.3, 0.999), svd="exact")
    for i in range(steps):
        p.grad = gaussian(seed + i + 1, 7, 5)
        optimizer.step()
    assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())
    assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize("on_refresh", ["keep", "project", "reset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_moments_are_read_back_corrected(shape: tuple[int, int], on_refresh: str) -> None:
    """V̂ = Σ w_i R_i∘R_i / Σ w_i over what the moments have seen; of one constant gradient exactly R∘R.

    Of the projected parameters alone: a head's are as large as the head, and nobody asks for them.
    """
    p, idle, head = (nn.Parameter(gaussian(41, *shape)) for _ in range(3))
    grad = gaussian(42, *shape)
    optimizer = GaloreAdamW([p, idle], rank=3, update_gap=3, svd="exact", on_refresh=on_refresh)
    optimizer.add_param_group({"params": [head], "rank": None})
    assert optimizer.second_moments() == {}
    for _ in range(5):
        p.grad, head.grad = grad, grad
        optimizer.step()
        (found,) = optimizer.second_moments().items()
        assert found[0] is p
        r = optimizer.state[p]["projector"].mT @ (grad if takes_left(shape) else grad.mT)
        torch.testing.assert_close(found[1], r.square(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_moments_may_start_elsewhere(shape: tuple[int, int], rank: int | None) -> None:
    """V = β₂ᵗ V₀ + (1−β₂) Σ β₂^{t−i} R_i∘R_i has mass 1 and is not corrected; M still is."""
    p = nn.Parameter(gaussian(51, *shape))
    optimizer = GaloreAdamW([p], lr=0.1, betas=(0.8, 0.95), rank=rank, svd="exact", update_gap=NEVER)
    grads = [gaussian(52 + i, *shape) for i in range(4)]
    start = gaussian(60, *((3, max(shape)) if rank else shape)).square()
    kept = start.clone()
    optimizer.start_from(p, start)
    assert optimizer.second_moments() == {}
    m, v = np.zeros(start.shape), start.numpy().copy()
    for t, grad in enumerate(grads, start=1):
        before, p.grad = p.detach().clone(), grad
        optimizer.step()
        turned = grad if rank is None or takes_left(shape) else grad.mT
        basis = optimizer.state[p]["projector"].numpy() if rank else np.eye(shape[0])
        r = basis.T @ turned.numpy()
        m, v = 0.8 * m + 0.2 * r, 0.95 * v + 0.05 * r**2
        step = basis @ (m / (1 - 0.8**t) / (np.sqrt(v) + 1e-8))
        step = step if turned is grad else step.T
        np.testing.assert_allclose(p.detach().numpy(), before.numpy() - 0.1 * step, atol=1e-11)
    assert torch.equal(start, kept)
    if rank is None:
        return
    torch.testing.assert_close(optimizer.second_moments()[p], torch.from_numpy(v))
    # What one optimizer ends with is what another may start from: V̂ itself, whatever the first one's age.
    other = nn.Parameter(gaussian(51, *shape))
    again = GaloreAdamW([other], rank=rank)
    again.start_from(other, optimizer.second_moments()[p])
    torch.testing.assert_close(again.state[other]["exp_avg_sq"], torch.from_numpy(v))


def test_a_reset_ends_seeded_moments() -> None:
    """From the second refresh on it is the run that was never seeded."""
    (seeded, first), (plain, second) = (
        (p := nn.Parameter(gaussian(71, 6, 8)), GaloreAdamW([p], rank=2, update_gap=2, svd="exact", on_refresh="reset"))
        for _ in range(2)
    )
    first.start_from(seeded, torch.full((2, 8), 5.0, dtype=torch.float64))
    for i in range(5):
        for p, optimizer in ((seeded, first), (plain, second)):
            p.grad = gaussian(80 + i, 6, 8)
            optimizer.step()
        same = torch.equal(first.second_moments()[seeded], second.second_moments()[plain])
        assert same == (i >= 2)


def test_seeded_moments_survive_a_resume() -> None:
    """A saved state says whether its second moments were seeded."""
    runs = []
    for resumed in (False, True):
        p = nn.Parameter(gaussian(71, 6, 8))
        optimizer = GaloreAdamW([p], rank=2)
        optimizer.start_from(p, torch.full((2, 8), 5.0, dtype=torch.float64))
        for i in range(4):
            if resumed and i == 2:
                saved = optimizer.state_dict()
                optimizer = GaloreAdamW([p])
                optimizer.load_state_dict(saved)
            p.grad = gaussian(80 + i, 6, 8)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


def test_what_moments_cannot_start_from_is_named() -> None:
    p, other = nn.Parameter(gaussian(0, 6, 8)), nn.Parameter(gaussian(0, 6, 8))
    optimizer = GaloreAdamW([p], rank=2, side="right")
    with pytest.raises(ValueError, match=r"shape \(2, 8\): expected \(2, 6\)"):
        optimizer.start_from(p, torch.zeros(2, 8))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"down to (-1.0|nan): expected none below 0"):
            optimizer.start_from(p, torch.full((2, 6), wrong))
    with pytest.raises(ValueError, match="expected one of this optimizer's"):
        optimizer.start_from(other, torch.zeros(2, 6))
    optimizer.start_from(p, torch.zeros(2, 6))
    p.grad = gaussian(1, 6, 8)
    optimizer.step()
    with pytest.raises(ValueError, match="after 1 steps: expected before the first"):
        optimizer.start_from(p, torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "rank"), [(60, 90, 8), (128, 128, 16), (40, 400, 4), (20, 30, 18)])
def test_a_randomized_projector_captures_the_energy(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    """‖PᵀG‖² is at least 0.99 of the exact projector's on decaying spectra, and P is orthonormal."""
    for seed, decay in ((0, 0.75), (1, 1.0), (2, 2.0)):
        u, _ = torch.linalg.qr(gaussian(seed, m, m, dtype=dtype))
        v, _ = torch.linalg.qr(gaussian(seed + 9, n, m, dtype=dtype))
        grad = u * torch.arange(1, m + 1, dtype=dtype) ** -decay @ v.mT
        rng = torch.Generator().manual_seed(seed)
        exact, fast = (projector(grad, rank, kind, rng) for kind in ("exact", "randomized"))
        assert exact.shape == fast.shape == (m, rank)
        assert float((fast.mT @ grad).norm() ** 2) >= 0.99 * float((exact.mT @ grad).norm() ** 2)
        for p in (exact, fast):
            gap = torch.linalg.matrix_norm(p.mT @ p - torch.eye(rank, dtype=dtype))
            assert float(gap) < 10 * rank**0.5 * torch.finfo(dtype).eps


def network() -> nn.Sequential:
    """Two layers to project, of either orientation, and their biases; the weights depend on nothing global."""
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 5))
    for i, p in enumerate(model.parameters()):
        p.data = gaussian(i, *p.shape, dtype=torch.float32) * 0.3
    return model


def train(model: nn.Sequential, optimizer: GaloreAdamW, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = gaussian(1000 + step, 32, 10, dtype=torch.float32)
        y = x[:, :5].argmax(dim=1)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make(model: nn.Sequential, **options: Any) -> GaloreAdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    projected = {"params": matrices, **asdict(GaloreOptions(rank=3, update_gap=5)), "seed": 7, **options}
    return GaloreAdamW([projected, {"params": rest}], lr=0.03, weight_decay=0.01)


@pytest.mark.parametrize("on_refresh", ["keep", "project", "reset"])
@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
@pytest.mark.parametrize("stop", [0, 3, 5, 6], ids=["start", "midway", "before a refresh", "after a refresh"])
def test_resumed_is_uninterrupted_bit_for_bit(stop: int, svd: str, on_refresh: str, tmp_path: Path) -> None:
    """Through safetensors and JSON, as a checkpoint stores it; in between the global random state changes."""
    whole = network()
    train(whole, make(whole, svd=svd, on_refresh=on_refresh), 0, 13)
    model = network()
    optimizer = make(model, svd=svd, on_refresh=on_refresh)
    train(model, optimizer, 0, stop)
    saved = optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    assert all(type(value) is Tensor for value in tensors.values())
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "groups.json").write_text(json.dumps(saved["param_groups"]))

    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(tmp_path / "optimizer.safetensors").items():
        i, key = name.split(".")
        state.setdefault(int(i), {})[key] = value
    torch.manual_seed(12345)
    again = network()
    again.load_state_dict(model.state_dict())
    resumed = make(again)
    resumed.load_state_dict({"state": state, "param_groups": json.loads((tmp_path / "groups.json").read_text())})
    train(again, resumed, stop, 13)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_projector_depends_on_the_seed_and_on_no_global_state() -> None:
    """Two runs of one seed are equal bit for bit, whatever was drawn meanwhile; another seed is another run."""
    results = []
    for seed, noise in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(noise)
        model = network()
        # Oversampled to the full width, all seeds would find the exact projector: the wide layer decides.
        wide = nn.Parameter(gaussian(5, 60, 80, dtype=torch.float32))
        optimizer = GaloreAdamW([wide], lr=0.1, rank=2, svd="randomized", seed=seed)
        go(wide, optimizer, quadratic(gaussian(6, 60, 80, dtype=torch.float32)), 3)
        before = torch.get_rng_state()
        train(model, make(model, seed=seed), 0, 3)
        assert torch.equal(before, torch.get_rng_state())
        results.append(wide.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("on_refresh", ["keep", "project", "reset"])
@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
def test_a_real_network_learns(svd: str, on_refresh: str) -> None:
    """Rank 3 of 10 and 5, a refresh every 5 steps: the loss of a small classifier halves within 150 steps."""
    model = network()
    losses = train(model, make(model, svd=svd, on_refresh=on_refresh), 0, 150)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_only_parameters_with_a_gradient_move() -> None:
    """One without a gradient keeps its value and gets no state; each counts its own steps."""
    p, q = nn.Parameter(gaussian(0, 4, 6)), nn.Parameter(gaussian(1, 4, 6))
    optimizer = GaloreAdamW([p, q], rank=2, weight_decay=0.1)
    p.grad = gaussian(2, 4, 6)
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state
    assert int(optimizer.state[p]["step"]) == 1


def test_step_evaluates_its_closure() -> None:
    p = nn.Parameter(gaussian(0, 4, 6))
    optimizer = GaloreAdamW([p], rank=2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first is not None
    assert second is not None
    assert second < first


@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
def test_a_gradient_that_is_not_finite_shows_in_the_weights(svd: str) -> None:
    """As under plain AdamW: the update then fails its check for NaN; no decomposition fails in training."""
    for options in ({"rank": 2}, {}):
        p = nn.Parameter(gaussian(0, 4, 6))
        p.grad = torch.full_like(p, torch.inf)
        GaloreAdamW([p], svd=svd, **options).step()
        assert not bool(torch.isfinite(p).any())


@pytest.mark.parametrize("svd", ["exact", "randomized", "power"])
def test_a_zero_gradient_moves_nothing(svd: str) -> None:
    p = nn.Parameter(gaussian(0, 4, 6))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer = GaloreAdamW([p], rank=2, svd=svd)
    optimizer.step()
    assert torch.equal(p, before)
    assert bool(torch.isfinite(optimizer.state[p]["projector"]).all())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 6), {"rank": 5}, r"rank = 5 for a layer of shape \(4, 6\): expected at most 4"),
        ((6, 4), {"rank": 5}, r"rank = 5 for a layer of shape \(6, 4\): expected at most 4"),
        ((4,), {"rank": 1}, r"shape \(4,\): expected a matrix"),
        ((4, 6, 2), {"rank": 1}, r"shape \(4, 6, 2\): expected a matrix"),
        ((4, 6), {"rank": 0}, "rank = 0: expected at least 1"),
        ((4, 6), {"rank": 1, "update_gap": 0}, "update_gap = 0: expected at least 1"),
        ((4, 6), {"rank": 1, "scale": -1.0}, "scale = -1.0: expected at least 0"),
        ((4, 6), {"rank": 1, "svd": "fast"}, "svd = 'fast': expected one of exact, randomized, power"),
        ((4, 6), {"rank": 1, "side": "top"}, "side = 'top': expected one of auto, left, right"),
        ((4, 6), {"rank": 1, "on_refresh": "x"}, "on_refresh = 'x': expected one of keep, project, reset"),
        ((4, 6), {"lr": float("nan")}, "lr = nan: expected at least 0"),
        ((4, 6), {"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\): expected both at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaloreAdamW([nn.Parameter(torch.zeros(shape))], **options)


def test_one_group_of_many_layers_names_the_layer_that_is_too_small() -> None:
    """And a group that was refused is not half added."""
    large, small = nn.Parameter(torch.zeros(9, 9)), nn.Parameter(torch.zeros(9, 3))
    optimizer = GaloreAdamW([large], rank=4)
    with pytest.raises(ValueError, match=r"rank = 4 for a layer of shape \(9, 3\)"):
        optimizer.add_param_group({"params": [small]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [small], "rank": None})
    with pytest.raises(ValueError, match=r"bfloat16: expected torch.float32 or torch.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(9, 9, dtype=torch.bfloat16))]})
