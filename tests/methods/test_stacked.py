"""Layers of one shape in the same calls: the result of each by itself, or none where it would not be accurate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import pytest
import torch

from fedspan.methods import METHODS, spectral, stacked
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.methods.queries import Sums, own_contribution
from fedspan.methods.spectral import Approximation, ApproximationSpec

M, N, CLIENTS, RANK = 90, 80, 12, 4
WEIGHTS = [(1.0 + k % 3) / sum(1.0 + j % 3 for j in range(CLIENTS)) for k in range(CLIENTS)]
SPECS = [
    ApproximationSpec(4, "energy"),
    ApproximationSpec(4, "projector"),
    ApproximationSpec(4, "projector", ordered=False),
    ApproximationSpec(3, "projector", vote=3),
]


def key(number: int) -> tuple[object, ...]:
    return 0, 3, f"layer{number}", "spectral"


Layer = list[Factors]


def layer(seed: int, scaling: float = 1.0) -> Layer:
    """Clients that see one decaying target, each with noise of its own."""
    rng = torch.Generator().manual_seed(seed)
    b, a = torch.randn(M, RANK, generator=rng) * 0.5 ** torch.arange(RANK), torch.randn(RANK, N, generator=rng)
    return [
        Factors(b + 0.1 * torch.randn(M, RANK, generator=rng), a + 0.1 * torch.randn(RANK, N, generator=rng), scaling)
        for _ in WEIGHTS
    ]


def sums_of(layer: Layer) -> Sums:
    updates = [Update("", 1.0, {"x": f}, {}) for f in layer]
    return Sums([own_contribution(update, "x") for update in updates], WEIGHTS)


def solve(layers: Sequence[Layer], spec: ApproximationSpec, numbers: Sequence[int]) -> list[Approximation | None]:
    return stacked.solve(layers, WEIGHTS, spec, [key(i) for i in numbers])


def by_itself(layer: Layer, spec: ApproximationSpec, number: int) -> Approximation:
    return spectral.run_procedure(spectral.procedure_for((M, N), spec, *key(number)), sums_of(layer))


def close(found: Approximation | None, expected: Approximation, tolerance: float = 2e-4) -> None:
    assert found is not None
    assert found.estimated
    assert found.state.rank == expected.state.rank
    products = [x.state.b.double() @ x.state.a.double() for x in (found, expected)]
    assert float((products[0] - products[1]).norm()) <= tolerance * float(products[1].norm())
    assert found.lost_squared == pytest.approx(expected.lost_squared, rel=1e-3)
    assert found.size_squared == pytest.approx(expected.size_squared, rel=1e-4)
    u = found.state.b.double()
    torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_together_are_layers_by_themselves(spec: ApproximationSpec) -> None:
    layers = [layer(seed) for seed in range(3)]
    found = solve(layers, spec, range(3))
    for number, one in enumerate(layers):
        close(found[number], by_itself(one, spec, number))
    (alone,) = solve(layers[1:2], spec, [1])
    assert alone is not None
    close(alone, by_itself(layers[1], spec, 1))


@pytest.mark.parametrize("by", [-90, 80])
@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_scalings_far_from_one_are_powers_of_two(spec: ApproximationSpec, by: int) -> None:
    plain, moved = (solve([layer(1, s)], spec, [0])[0] for s in (1.0, 2.0**by))
    assert plain is not None
    assert moved is not None
    torch.testing.assert_close(moved.state.a * 2.0**-by, plain.state.a, rtol=1e-5, atol=1e-6)
    assert moved.size_squared == pytest.approx(plain.size_squared * 4.0**by, rel=1e-5)


def same_space() -> Layer:
    """A sketch shows all of a sum of one space's projectors, and all of a T of few directions."""
    first = layer(5)[0]
    return [Factors(first.b, first.a, 1.0 + 0.1 * k) for k in range(CLIENTS)]


def zeros() -> Layer:
    return [Factors(torch.zeros(M, RANK), torch.zeros(RANK, N), 1.0)] * CLIENTS


def changed(b: Callable[[torch.Tensor], torch.Tensor], a: Callable[[torch.Tensor], torch.Tensor]) -> Layer:
    """One client's factors are others."""
    whole = layer(6)
    whole[3] = Factors(b(whole[3].b), a(whole[3].a), 1.0)
    return whole


def dependent() -> Layer:
    """A client's columns are the same but for rounding: its space is not that of a Gram matrix."""
    return changed(lambda b: b[:, [0, 0, 2, 3]] * (1 + 1e-7 * torch.arange(4)), lambda a: a)


def cancelling() -> Layer:
    """A client's terms are a hundred times its product."""
    gauge = torch.eye(RANK) + 1e2 * torch.diag(torch.ones(RANK - 1), 1)
    return changed(lambda b: b @ gauge, lambda a: torch.linalg.solve(gauge, a))


def enormous() -> Layer:
    """The squares of a client's factor are beyond float32."""
    return changed(lambda b: b * 2.0**70, lambda a: a)


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (same_space, SPECS[0]),
        (same_space, SPECS[1]),
        (zeros, SPECS[0]),
        (zeros, SPECS[1]),
        (dependent, SPECS[1]),
        (cancelling, SPECS[0]),
        (enormous, SPECS[0]),
        (enormous, SPECS[1]),
    ],
)
def test_what_is_not_accurate_is_left_to_the_caller_and_disturbs_no_other(
    make: object, spec: ApproximationSpec
) -> None:
    assert callable(make)
    layers = [layer(0), make(), layer(2)]
    found = solve(layers, spec, range(3))
    assert found[1] is None
    for number in (0, 2):
        close(found[number], by_itself(layers[number], spec, number))


@pytest.mark.parametrize("method", ["glora", "flexlora"])
def test_a_step_on_another_device_is_that_of_the_cpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that the factors are elsewhere, the step asks no layer by itself, and broadcasts the same products."""
    rng = torch.Generator().manual_seed(0)
    names = ("one", "two")
    shared = {name: (torch.randn(200, 2, generator=rng), torch.randn(2, 200, generator=rng)) for name in names}

    def update(k: int) -> Update:
        def noisy(x: torch.Tensor) -> torch.Tensor:
            return x + 0.3 * torch.randn(x.shape, generator=rng)

        modules = {name: Factors(noisy(b), noisy(a), 0.5) for name, (b, a) in shared.items()}
        return Update(f"client-{k:03d}", 1.0 + k % 2, modules, {})

    updates = [update(k) for k in range(100)]
    made = METHODS[method]()
    state = made.init(Template(dict.fromkeys(names, (200, 200)), 2), {})
    expected, about = aggregate(made, state, updates)
    asked: list[object] = []
    run = spectral.run_procedure
    monkeypatch.setattr(import_module("fedspan.methods.glora"), "_device_type", lambda partial: "cuda")
    monkeypatch.setattr(spectral, "run_procedure", lambda *given: asked.append(given) or run(*given))
    found, said = aggregate(made, state, updates)
    assert asked == []
    assert said["truncation_error"] == pytest.approx(about["truncation_error"], rel=1e-3)
    for name in names:
        x, y = (held.modules[name]["u"] @ held.modules[name]["c"] for held in (found, expected))
        assert float((x - y).norm()) <= 2e-4 * float(y.norm())


def test_other_kinds_of_layers_are_not_solved_here() -> None:
    plain, spec = layer(0), SPECS[1]
    assert stacked.applies(plain, spec)
    assert not stacked.applies(plain, ApproximationSpec(4, "projector", both_sides=True))
    assert not stacked.applies(plain, ApproximationSpec(4, "energy", tolerance=0.1))
    assert not stacked.applies([*plain[1:], Factors(plain[0].b[:, :2], plain[0].a[:2], 1.0)], spec)
    assert not stacked.applies([f.map(torch.Tensor.double) for f in plain], spec)
