"""The accountants by name, and the two questions put to them: ε for a given noise, and the noise for a given ε.

Another accountant is a class of the contract in `fedspan.privacy.accountant`, in a file of its own, and an entry in
`ACCOUNTANTS`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from fedspan.privacy.accountant import AccountantFactory, DPEvent
from fedspan.privacy.pld import PLDAccountant
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_MAX_NOISE = 2.0**16

ACCOUNTANTS: Mapping[str, AccountantFactory] = {
    "pld": PLDAccountant,
}
"""Name in `privacy.accountant` -> what makes a new accountant."""


def accountant_named(name: str) -> AccountantFactory:
    """Return what makes accountants of that name.

    Raises
    ------
    FedspanError
        For an unknown name.
    """
    if name not in ACCOUNTANTS:
        raise FedspanError(f"privacy.accountant = {name!r}{nearest(name, ACCOUNTANTS)}")
    return ACCOUNTANTS[name]


def epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: AccountantFactory = PLDAccountant
) -> float:
    """Return ε at that δ of `steps` sums with noise N(0, (zC)²), each over a Poisson sample of rate q.

    An upper bound, as tight as the accountant's; infinite for z = 0.

    Raises
    ------
    FedspanError
        For a value out of range, or where the accountant's library is not installed.
    """
    return total_epsilon([DPEvent(noise_multiplier, sample_rate, steps)], delta, accountant)


def noise_for(
    epsilon: float, sample_rate: float, steps: int, delta: float, accountant: AccountantFactory = PLDAccountant
) -> float:
    """Return the smallest noise multiplier z (to 0.1 %, rounded up) with which `steps` releases stay within ε.

    Raises
    ------
    FedspanError
        For an ε that no noise up to 2¹⁶ reaches.
    """
    if not epsilon > 0:
        raise FedspanError(f"epsilon = {epsilon}: expected above 0")

    def enough(z: float) -> bool:
        return total_epsilon([DPEvent(z, sample_rate, steps)], delta, accountant) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
        if high > _MAX_NOISE:
            raise FedspanError(
                f"epsilon = {epsilon} at delta = {delta}: no noise multiplier up to {_MAX_NOISE:g} reaches it"
            )
    low = high / 2
    while low > 1e-3 and enough(low):
        low, high = low / 2, low
    # ε falls by orders of magnitude as z grows, so the bisection is on log z.
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def merged(events: Iterable[DPEvent]) -> tuple[DPEvent, ...]:
    """Return the events with those of equal noise and sample rate counted together, sorted."""
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[event.noise_multiplier, event.sample_rate] += event.count
    return tuple(DPEvent(z, q, count) for (z, q), count in sorted(counts.items()) if count)


def total_epsilon(events: Iterable[DPEvent], delta: float, accountant: AccountantFactory) -> float:
    """Return ε at that δ of all the events: 0 for none, infinite where one of them has no noise."""
    if not 0 < delta < 1:
        raise FedspanError(f"delta = {delta}: expected above 0 and below 1")
    # Merged, since floating-point sums may depend on the order in which a client happened to take part.
    events = merged(events)
    if not events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    return _composed_epsilon(events, delta, accountant)


@functools.lru_cache(maxsize=4096)
def _composed_epsilon(events: tuple[DPEvent, ...], delta: float, factory: AccountantFactory) -> float:
    accountant = factory()
    for event in events:
        accountant.compose(event)
    return accountant.epsilon(delta)
