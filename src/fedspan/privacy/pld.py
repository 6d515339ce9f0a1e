"""The accountant by privacy loss distributions, from Google's dp-accounting (the extra `fedspan[dp]`)."""

from __future__ import annotations

from typing import Any

from fedspan.privacy.accountant import DPEvent
from fedspan.support.errors import FedspanError

_MAX_COARSE_STEPS = 1000
"""Up to this many steps a coarse grid is precise enough: its rounding, always upwards, adds up over the steps."""


class PLDAccountant:
    """Discretised privacy loss distributions of Poisson-sampled Gaussian mechanisms, composed by convolution.

    ε is an upper bound, by at most 2 % or 0.02 (the grid of the privacy loss, rounded upwards).

    Source: Meiser and Mohammadi 2018 (2017/1034, eprint) and Koskela et al. 2020 (1906.03049) for privacy loss
    distributions, Doroshenko et al. 2022 (2207.04380) for the discretisation; the sampled Gaussian mechanism is that of
    Abadi et al. 2016 (1607.00133) and Mironov et al. 2019 (1908.10530).

    Raises
    ------
    FedspanError
        Where the library is not installed.
    """

    def __init__(self) -> None:
        try:
            import dp_accounting  # noqa: F401
        except ImportError:
            raise FedspanError("privacy.dp needs the accountant: pip install 'fedspan[dp]'") from None
        self._events: list[DPEvent] = []

    def compose(self, event: DPEvent) -> None:
        """Account for the event's releases too."""
        # Only noted: the grid is chosen from the number of all steps, before the first distribution is made.
        self._events.append(event)

    def epsilon(self, delta: float) -> float:
        """Return ε at that δ of everything composed so far."""
        import dp_accounting
        from dp_accounting import pld

        coarse = sum(event.count for event in self._events) <= _MAX_COARSE_STEPS
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3 if coarse else 1e-4)
        for event in self._events:
            step: Any = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            if event.sample_rate < 1:
                step = dp_accounting.PoissonSampledDpEvent(event.sample_rate, step)
            accountant.compose(step, event.count)
        return float(accountant.get_epsilon(delta))
