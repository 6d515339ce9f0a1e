"""ε against what others have published, and against the closed forms of the Gaussian mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

pytest.importorskip("dp_accounting")

from fedspan.methods import METHODS
from fedspan.privacy.accountant import DPEvent
from fedspan.privacy.accounting import epsilon, merged, noise_for
from fedspan.privacy.budget import Account, Budget


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def solve(delta_of: Callable[[float], float], delta: float) -> float:
    """The ε with that δ, δ(ε) falling."""
    low, high = 0.0, 1.0
    while delta_of(high) > delta:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def analytic(z: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018 (1805.06530), theorem 8, for k steps as one of noise z/√k:
    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), μ = √k/z."""
    mu = math.sqrt(steps) / z
    return solve(lambda e: normal_cdf(mu / 2 - e / mu) - math.exp(e) * normal_cdf(-mu / 2 - e / mu), delta)


def sampled_once(z: float, q: float, delta: float) -> float:
    """One Poisson-sampled Gaussian, in closed form: P = (1−q) N(0, z²) + q N(1, z²) against Q = N(0, z²), and the
    other way round; P/Q grows in x, so each hockey stick is two tails."""

    def added(e: float) -> float:
        x = z * z * math.log((math.exp(e) - 1 + q) / q) + 0.5
        return (1 - q) * normal_cdf(-x / z) + q * normal_cdf((1 - x) / z) - math.exp(e) * normal_cdf(-x / z)

    def removed(e: float) -> float:
        if math.exp(-e) <= 1 - q:
            return 0.0
        x = z * z * math.log((math.exp(-e) - 1 + q) / q) + 0.5
        p = (1 - q) * normal_cdf(x / z) + q * normal_cdf((x - 1) / z)
        return normal_cdf(x / z) - math.exp(e) * p

    return solve(lambda e: max(added(e), removed(e)), delta)


PUBLISHED = [
    # Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3.2: q = 0.01, σ = 4, δ = 1e-5.
    pytest.param(4.0, 0.01, 10_000, 1.26, id="Abadi-100-epochs"),
    pytest.param(4.0, 0.01, 40_000, 2.55, id="Abadi-400-epochs"),
    # Bu et al. 2020, "Deep Learning with Gaussian Differential Privacy", figure 4: MNIST, batches of 256, 20 epochs.
    pytest.param(1.3, 256 / 60_000, 4687, 1.34, id="Bu-MNIST"),
]


@pytest.mark.parametrize(("z", "q", "steps", "moments"), PUBLISHED)
def test_within_a_third_below_the_published_moments_bounds(z: float, q: float, steps: int, moments: float) -> None:
    """They come from moments with Abadi's conversion, which is loose: a tight ε lies below, by no more than a third."""
    assert 0.67 * moments < epsilon(z, q, steps, 1e-5) < moments


@pytest.mark.parametrize(("z", "q", "steps", "moments"), PUBLISHED)
def test_the_published_moments_bounds_come_out_to_one_percent(z: float, q: float, steps: int, moments: float) -> None:
    """The same library's moments (Rényi divergences) with Abadi's conversion, ε = min_α T·R(α) + log(1/δ)/(α − 1)."""
    import dp_accounting
    from dp_accounting import rdp

    orders = [1 + x / 10 for x in range(5, 100)] + list(range(11, 64))
    accountant = rdp.RdpAccountant(orders)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
    found = min(r + math.log(1e5) / (a - 1) for a, r in zip(accountant._orders, accountant._rdp, strict=True))
    assert found == pytest.approx(moments, rel=0.01)


@pytest.mark.parametrize("z", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_everybody_every_time_is_the_analytic_gaussian_mechanism(z: float, steps: int) -> None:
    """q = 1: an upper bound of Balle and Wang's exact ε, by at most 1e-4 relative or 1e-4."""
    exact = analytic(z, steps, 1e-5)
    assert exact * (1 - 1e-6) - 1e-6 <= epsilon(z, 1.0, steps, 1e-5) <= exact * (1 + 1e-4) + 1e-4


@pytest.mark.parametrize("z", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_one_sampled_step_is_its_closed_form(z: float, q: float, delta: float) -> None:
    """An upper bound of the exact ε, by at most 1e-3 relative or 1e-4."""
    exact = sampled_once(z, q, delta)
    assert exact * (1 - 1e-6) - 1e-6 <= epsilon(z, q, 1, delta) <= exact * (1 + 1e-3) + 1e-4


def test_two_libraries_agree() -> None:
    """Opacus's PRV accountant, where it is installed: within its own stated error of 0.01."""
    accountants = pytest.importorskip("opacus.accountants")
    for z, q, steps in ((1.1, 256 / 60_000, 14_062), (1.0, 0.5, 12)):
        other = accountants.PRVAccountant()
        other.history = [(z, q, steps)]
        assert epsilon(z, q, steps, 1e-5) == pytest.approx(other.get_epsilon(1e-5), abs=0.0205)


def test_more_noise_fewer_steps_and_smaller_samples_spend_less() -> None:
    at = epsilon(1.0, 0.2, 20, 1e-5)
    assert epsilon(1.1, 0.2, 20, 1e-5) < at < epsilon(1.0, 0.2, 21, 1e-5)
    assert epsilon(1.0, 0.19, 20, 1e-5) < at < epsilon(1.0, 0.2, 20, 1e-6)
    assert epsilon(1.0, 0.2, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.2, 1, 1e-5) == math.inf


@pytest.mark.parametrize(("wanted", "q", "steps"), [(1.0, 1.0, 10), (8.0, 0.5, 12), (3.0, 0.01, 900)])
def test_the_noise_for_a_budget_is_enough_and_hardly_more(wanted: float, q: float, steps: int) -> None:
    z = noise_for(wanted, q, steps, 1e-5)
    assert epsilon(z, q, steps, 1e-5) <= wanted < epsilon(z * 0.998, q, steps, 1e-5)


def test_a_budget_stops_before_and_not_after() -> None:
    """It allows exactly the rounds whose end is within ε, however they are told."""
    event, budget, rounds = DPEvent(3.0, 0.3), Budget(1e-5, 2.0), 0
    while budget.allows(event):
        budget, rounds = budget.plus(event), rounds + 1
    assert rounds > 1
    assert epsilon(3.0, 0.3, rounds, 1e-5) == budget.spent <= 2.0
    assert epsilon(3.0, 0.3, rounds + 1, 1e-5) > 2.0
    assert budget.events == (DPEvent(3.0, 0.3, rounds),)
    assert not budget.allows(event)
    assert budget.allows(DPEvent(1000.0, 0.3))
    mixed = Budget(1e-5).plus(DPEvent(1.5, 0.3)).plus(DPEvent(2.0, 1.0)).plus(DPEvent(1.5, 0.3))
    assert set(mixed.events) == {DPEvent(1.5, 0.3, 2), DPEvent(2.0, 1.0)}
    assert mixed.spent > max(epsilon(1.5, 0.3, 2, 1e-5), epsilon(2.0, 1.0, 1, 1e-5))
    assert Budget(1e-5, None).allows(DPEvent(0.0, 1.0))


def test_exchanges_of_one_round_are_one_release_about_one_sample() -> None:
    """Fed-SB asks three times in the first round and once later. Exchanges share their round's coins: at q = 1 they add
    up as so many steps, at q < 1 they cost more than as many steps with coins of their own."""
    exchanges = METHODS["fed_sb"]().exchanges
    all_in = Account(exchanges, 2.0, 1.0, 1e-5)
    assert all_in.spent(5) == pytest.approx(analytic(2.0, 7, 1e-5), rel=1e-4)
    sampled = Account(exchanges, 2.0, 0.2, 1e-5)
    assert sampled.event(0) == DPEvent(2.0 / math.sqrt(3), 0.2)
    assert sampled.event(1) == DPEvent(2.0, 0.2)
    assert sampled.spent(1) > epsilon(2.0, 0.2, 3, 1e-5)
    assert sampled.spent(1) == pytest.approx(sampled_once(2.0 / math.sqrt(3), 0.2, 1e-5), rel=1e-3)


def test_an_account_ends_the_run_before_the_round_that_would_exceed_it() -> None:
    account = Account(METHODS["ffa_lora"]().exchanges, 1.0, 0.5, 1e-5, 8.0)
    rounds = next(t for t in range(1000) if not account.allows(t))
    assert account.spent(rounds) <= 8.0 < account.spent(rounds + 1)
    assert account.spent(0) == 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: epsilon(-1.0, 0.5, 1, 1e-5), "noise_multiplier = -1.0: expected at least 0"),
        (lambda: epsilon(1.0, 0.0, 1, 1e-5), "sample_rate = 0.0: expected above 0 and at most 1"),
        (lambda: epsilon(1.0, 1.5, 1, 1e-5), "sample_rate = 1.5: expected above 0 and at most 1"),
        (lambda: epsilon(1.0, 0.5, -1, 1e-5), "-1 steps: expected at least 0"),
        (lambda: epsilon(1.0, 0.5, 1, 0.0), "delta = 0.0: expected above 0 and below 1"),
        (lambda: Budget(1e-5, 0.0), "epsilon = 0.0: expected above 0"),
        (lambda: noise_for(-1.0, 0.5, 1, 1e-5), "epsilon = -1.0: expected above 0"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        make()


def test_equal_releases_are_counted_together() -> None:
    """Two and three of one kind are five of it, and those of another sample rate are none of them."""
    events = [DPEvent(1.0, 0.1, 2), DPEvent(1.0, 0.2, 7), DPEvent(1.0, 0.1, 3), DPEvent(2.0, 0.1, 0)]
    assert merged(events) == (DPEvent(1.0, 0.1, 5), DPEvent(1.0, 0.2, 7))
