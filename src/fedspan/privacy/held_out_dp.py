"""Differential privacy of statistics of held-out rows: bounded contributions, noise, and their place in a ledger.

A vector is as `fedspan.data.metric_sums` lays it out, of bounded statistics alone: what one row adds to it, its count
apart, has a norm of at most Δ = `StatisticsLayout.sensitivity`. K is the number of the run's clients, z the noise
multiplier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
import torch

from fedspan.data.metric_blocks import Vector
from fedspan.data.metric_sums import HEADER, StatisticsLayout
from fedspan.privacy.gaussian import fingerprint, normal

Charge = Callable[[str], None]
"""(digest of everything that the noise is keyed by) -> nothing; raises where the release must not be made."""


def mean_of_client(layout: StatisticsLayout, vector: Vector) -> Vector:
    """Return one client's statistics as means over its rows, whose norm is at most Δ; 0 for a client without rows.

    Its count and its loss are left out: neither is bounded.
    """
    mean = np.zeros_like(vector)
    if vector[0] > 0:
        mean[HEADER:] = vector[HEADER:] / vector[0]
        norm = float(np.linalg.norm(mean))
        # By rounding alone: the statistics of one row are bounded, and so is their mean.
        mean *= min(1.0, layout.sensitivity / norm) if norm > 0 else 1.0
    return mean


def noised_mean(
    layout: StatisticsLayout,
    total: Vector,
    num_clients: int,
    noise_multiplier: float,
    about: tuple[object, ...],
    secret: Callable[[], int],
    charge: Charge,
) -> Vector:
    """Return the mean over the run's clients of their means, for client-level privacy:

        (Σ_k v_k + N(0, (zΔ)² I)) / K,    ‖v_k‖ ≤ Δ.

    K is the number of clients of the run and not of those that answered, which would reveal whether one of them did.
    Every client is asked, so that no sampling amplifies the noise.

    Parameters
    ----------
    total
        Σ_k v_k.
    about
        Names the release, such as its round; the noise depends on it and on the sum.
    charge
        Called before the noise is drawn.

    Raises
    ------
    BudgetSpent
        By `charge`.
    """
    noised = _noised(layout, total, noise_multiplier, ("clients", *about), secret, charge)
    mean = noised / num_clients
    mean[0] = 1.0  # figures divide by the number of rows
    return mean


def noised_rows(
    layout: StatisticsLayout,
    vector: Vector,
    noise_multiplier: float,
    about: tuple[object, ...],
    secret: Callable[[], int],
    charge: Charge,
) -> Vector:
    """Return one client's statistics with noise N(0, (zΔ)² I), for example-level privacy of its held-out rows.

    Their number is public, as that of the training examples is. Held-out rows are never trained on: a person with one
    row spends ε in this ledger or in the one of training, not in both.

    Raises
    ------
    BudgetSpent
        By `charge`.
    """
    noised = _noised(layout, vector, noise_multiplier, ("rows", *about), secret, charge)
    noised[0] = vector[0]
    return noised


def _noised(
    layout: StatisticsLayout,
    vector: Vector,
    noise_multiplier: float,
    about: tuple[object, ...],
    secret: Callable[[], int],
    charge: Charge,
) -> Vector:
    """Return the vector with noise that is keyed by the vector itself, so that no two of them share their noise."""
    content = fingerprint([("statistics", torch.from_numpy(vector.copy()))])
    key = json.dumps([layout.described(), noise_multiplier, *map(str, about), content])
    release = hashlib.sha256(key.encode()).hexdigest()
    charge(release)
    noised = vector.copy()
    if noise_multiplier > 0:
        drawn = normal(secret(), "held-out", release, shape=(vector.size - HEADER,)).numpy()
        noised[HEADER:] += noise_multiplier * layout.sensitivity * drawn
    return noised
