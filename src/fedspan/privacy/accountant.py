"""How much privacy was spent: ε at a given δ, over Gaussian mechanisms on Poisson samples.

The arithmetic is that of Google's dp-accounting (the extra `fedspan[dp]`), by privacy loss distributions.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.methods.folds import Exchange

_FEW = 1000
"""Steps up to which a coarser grid is as exact: its rounding, always upwards, adds up over the steps."""
_WIDEST = 2.0**16


@dataclass(frozen=True, slots=True)
class Event:
    """`count` releases of a sum that one client (or example) moves by at most C, each with noise N(0, (zC)²)."""

    noise_multiplier: float
    """z; 0: no noise, and no privacy."""
    sample_rate: float
    """q: everybody is in it by an independent coin of this probability; 1: everybody is in it."""
    count: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise FedspanError(f"noise_multiplier = {self.noise_multiplier}: expected at least 0")
        if not 0 < self.sample_rate <= 1:
            raise FedspanError(f"sample_rate = {self.sample_rate}: expected above 0 and at most 1")
        if self.count < 0:
            raise FedspanError(f"{self.count} steps: expected at least 0")


def require() -> None:
    """Raise a ValueError where the accountant is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise FedspanError("privacy.dp needs the accountant: pip install 'fedspan[dp]'") from None


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of `steps` sums with noise N(0, (zC)²), each over a Poisson sample of rate q, at that δ.

    Neighbours differ by one client (or example) that is there or not. The value is an upper bound, by at most 2 % or
    0.02 (the grid of the privacy loss, rounded upwards); infinite for z = 0.

    Source: Meiser and Mohammadi 2018 (2017/1034, eprint) and Koskela et al. 2020 (1906.03049) for privacy loss
    distributions, Doroshenko et al. 2022 (2207.04380) for the discretisation; the sampled Gaussian mechanism is that of
    Abadi et al. 2016 (1607.00133) and Mironov et al. 2019 (1908.10530).

    Raises
    ------
    ValueError
        For a value out of range, or where the library is not installed.
    """
    return _spent(((Event(noise_multiplier, sample_rate, steps)),), delta)


def noise_for(epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier z (to 0.1 %, rounded up) with which `steps` releases stay within ε.

    Raises
    ------
    ValueError
        For an ε that no noise up to 2¹⁶ reaches.
    """
    if not epsilon > 0:
        raise FedspanError(f"epsilon = {epsilon}: expected above 0")

    def enough(z: float) -> bool:
        return _spent((Event(z, sample_rate, steps),), delta) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
        if high > _WIDEST:
            raise FedspanError(
                f"epsilon = {epsilon} at delta = {delta}: no noise multiplier up to {_WIDEST:g} reaches it"
            )
    low = high / 2
    while low > 1e-3 and enough(low):
        low, high = low / 2, low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class Budget:
    """What was released of somebody's data, and how much more may be."""

    delta: float
    limit: float | None = None
    """The largest ε; none: no limit, spending is only counted."""
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise FedspanError(f"delta = {self.delta}: expected above 0 and below 1")
        if self.limit is not None and not self.limit > 0:
            raise FedspanError(f"epsilon = {self.limit}: expected above 0")

    @property
    def spent(self) -> float:
        """ε at δ of everything that was released."""
        return _spent(_gathered(self.events), self.delta)

    def plus(self, event: Event) -> Budget:
        """After that release."""
        return replace(self, events=_gathered((*self.events, event)))

    def allows(self, event: Event) -> bool:
        """Whether that release would stay within the limit."""
        return self.limit is None or self.plus(event).spent <= self.limit

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "delta": self.delta,
            "epsilon": self.limit,
            "events": [[e.noise_multiplier, e.sample_rate, e.count] for e in self.events],
        }

    @classmethod
    def restored(cls, record: Mapping[str, Any]) -> Budget:
        """What `record` made JSON of.

        Raises
        ------
        ValueError
            When it is something else.
        """
        try:
            events = tuple(Event(float(z), float(q), int(count)) for z, q, count in record["events"])
            limit = record["epsilon"]
            return cls(float(record["delta"]), None if limit is None else float(limit), events)
        except (KeyError, TypeError, ValueError) as error:
            raise FedspanError(f"a privacy budget that cannot be read ({error})") from None


@dataclass(frozen=True, slots=True)
class Account:
    """What a run under client-level privacy spends: a matter of its rounds alone, not of who took part."""

    exchanges: Sequence[Exchange]
    """The method's."""
    noise_multiplier: float
    sample_rate: float
    """q: every client is in a round by an independent coin of this probability."""
    delta: float
    limit: float | None = None

    def event(self, round_num: int) -> Event:
        """One round's release. The exchanges of a round ask the same clients, so they are one release about one sample:
        k Gaussian mechanisms of noise z are one of noise z/√k, and that is what the sampling amplifies."""
        due = sum(exchange.due(round_num) for exchange in self.exchanges)
        return Event(self.noise_multiplier / math.sqrt(due), self.sample_rate)

    def budget(self, rounds: int) -> Budget:
        """After the first so many rounds."""
        budget = Budget(self.delta, self.limit)
        for round_num in range(rounds):
            budget = budget.plus(self.event(round_num))
        return budget

    def spent(self, rounds: int) -> float:
        """ε after the first so many rounds."""
        return self.budget(rounds).spent

    def allows(self, round_num: int) -> bool:
        """Whether this round, counted from 0, still fits the limit after all rounds before it."""
        return self.budget(round_num).allows(self.event(round_num))


def _gathered(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal releases counted together."""
    counts: Counter[tuple[float, float]] = Counter()
    for e in events:
        counts[e.noise_multiplier, e.sample_rate] += e.count
    return tuple(Event(z, q, count) for (z, q), count in sorted(counts.items()) if count)


@functools.lru_cache(maxsize=4096)
def _spent(events: tuple[Event, ...], delta: float) -> float:
    if not 0 < delta < 1:
        raise FedspanError(f"delta = {delta}: expected above 0 and below 1")
    events = tuple(e for e in events if e.count)
    if not events:
        return 0.0
    if any(e.noise_multiplier == 0 for e in events):
        return math.inf
    require()
    import dp_accounting
    from dp_accounting import pld

    few = sum(e.count for e in events) <= _FEW
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3 if few else 1e-4)
    for e in events:
        step: Any = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        if e.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(e.sample_rate, step)
        accountant.compose(step, e.count)
    return float(accountant.get_epsilon(delta))
