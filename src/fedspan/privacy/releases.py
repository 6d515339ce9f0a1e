"""Releases of differential privacy by the draw of coins that they are about, since those of one draw add up first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedspan.privacy.accountant import DPEvent
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Release:
    """A noised result that is about to be seen by others."""

    sample: str
    """Name of the draw of coins: two releases share it exactly where they share their coins."""
    name: str
    """Digest of what is released. The identical thing again is no new release."""
    event: DPEvent


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything that was released about one draw of coins, of one step or of several."""

    sample_rate: float
    steps: int
    noise: Mapping[str, float]
    """Release -> its noise multiplier z."""

    @property
    def event(self) -> DPEvent:
        """All releases as one: what is amplified by sampling is their joint noise.

        This holds too where later releases depend on earlier ones, and on those about other draws (Vadhan and Zhang
        2022, "Concurrent composition theorems for differential privacy", 2207.08335).
        """
        return DPEvent(joint_noise(self.noise.values()), self.sample_rate, self.steps)

    def with_release(self, name: str, event: DPEvent) -> Sample:
        """Return the sample with one release more.

        Raises
        ------
        FedspanError
            When its coins are others than those of this sample.
        """
        if (event.sample_rate, event.count) != (self.sample_rate, self.steps):
            raise FedspanError(
                f"a release at rate {event.sample_rate:g} over {event.count} steps: expected {self.sample_rate:g} over "
                f"{self.steps}, as before for the same coins"
            )
        return replace(self, noise={**self.noise, name: event.noise_multiplier})


def joint_noise(noise_multipliers: Iterable[float]) -> float:
    """Return the z of one Gaussian mechanism that reveals as much as several about the same sample: (Σ z_i⁻²)^(−½)."""
    given = sorted(noise_multipliers)
    if not given or given[0] == 0:
        return 0.0
    if given[0] == given[-1]:
        return given[0] / math.sqrt(len(given))
    return 1 / math.sqrt(sum(z**-2 for z in given))


def with_release(samples: Mapping[str, Sample], release: Release) -> dict[str, Sample]:
    """Return the samples after a release; they are equal where the identical thing was released before."""
    event = release.event
    sample = samples.get(release.sample, Sample(event.sample_rate, event.count, {}))
    return {**samples, release.sample: sample.with_release(release.name, event)}


def samples_record(samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Return the samples as JSON."""
    return {name: [s.sample_rate, s.steps, dict(s.noise)] for name, s in samples.items()}


def restored_samples(record: Mapping[str, Any]) -> dict[str, Sample]:
    """Return the samples that `samples_record` was made of.

    Raises
    ------
    FedspanError
        When the JSON is not that of samples.
    """
    try:
        samples = {
            str(name): Sample(float(rate), int(steps), {str(key): float(z) for key, z in noise.items()})
            for name, (rate, steps, noise) in record.items()
        }
        for sample in samples.values():
            _ = sample.event  # which checks the numbers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FedspanError(f"a privacy ledger that cannot be read ({error})") from None
    return samples
