"""Client sampling: which clients take part in a round.

A sampler is one small frozen class with `draw` and `expected_size`. A new one is a class here and a line in `SAMPLERS`;
the engine, the coordinator of real sites, the checks of a configuration and the Flower strategy all ask it and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedspan.config import FederationConfig
from fedspan.privacy.gaussian import uniform
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

# The key that keeps these draws apart from others made from the same seed and round.
_UNIFORM = 0x70617274


class ClientSampler(Protocol):
    """The choice of a round's clients, by their positions in a list that does not change during a run."""

    def draw(self, num_clients: int, round_num: int) -> list[int]:
        """Return the sorted positions of the clients drawn for a round (counted from 0)."""

    def expected_size(self, num_clients: int) -> float:
        """Return how many clients a round has on average; a whole number where it is always the same."""


def _check_participation(participation: float) -> None:
    if not 0 < participation <= 1:
        raise FedspanError(f"participation = {participation}: expected a share above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class UniformSampler:
    """A fixed number of distinct clients, every set of that size equally likely.

    The draw depends on (seed, round, number of clients) alone, so it is the same for every method.

    Parameters
    ----------
    participation
        Share of the clients; `participation * num_clients` is rounded half up, and is at least 1.
    min_clients
        The least number of clients drawn.
    seed
        The run's seed.
    stream
        Tells apart independent draws of one round, such as those for training and for evaluation.

    Raises
    ------
    FedspanError
        For a share outside (0, 1], a negative seed or round, or more required clients than there are.
    """

    participation: float
    min_clients: int = 1
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        _check_participation(self.participation)
        if self.seed < 0:
            raise FedspanError(f"seed = {self.seed}: expected 0 or more")

    def size(self, num_clients: int) -> int:
        """Return the number of clients drawn in every round."""
        if self.min_clients > num_clients:
            raise FedspanError(f"min_clients = {self.min_clients} with {num_clients} clients: expected at most as many")
        return min(num_clients, max(1, self.min_clients, int(self.participation * num_clients + 0.5)))

    def expected_size(self, num_clients: int) -> float:
        """Return the number of clients drawn in every round."""
        return self.size(num_clients)

    def draw(self, num_clients: int, round_num: int) -> list[int]:
        """Return the sorted positions of the clients drawn for a round."""
        if round_num < 0:
            raise FedspanError(f"round_num = {round_num}: expected 0 or more")
        key = [_UNIFORM, self.seed, round_num, *([self.stream] if self.stream else [])]
        rng = np.random.default_rng(key)
        return sorted(rng.choice(num_clients, size=self.size(num_clients), replace=False).tolist())


@dataclass(frozen=True, slots=True)
class PoissonSampler:
    """Every client by an independent coin, as privacy amplification by sampling requires; a round may be empty.

    The accounting assumes that it is secret whether a client is in a round, and that clients are in it independently
    of each other: so the coins are drawn from the server's secret, not from the run's seed, and their number is free.
    The server alone has that secret, and must be trusted with it: whoever knows it knows every round's clients, as the
    server does anyway. Every client and everyone who reads the configuration knows the run's seed.

    Parameters
    ----------
    participation
        The probability that a client is drawn.
    secret
        Returns the server's secret, at least 0; asked for when a round is drawn.

    Raises
    ------
    FedspanError
        For a probability outside (0, 1], or a negative secret or round.
    """

    participation: float
    secret: Callable[[], int]

    def __post_init__(self) -> None:
        _check_participation(self.participation)

    def expected_size(self, num_clients: int) -> float:
        """Return q·N."""
        return self.participation * num_clients

    def draw(self, num_clients: int, round_num: int) -> list[int]:
        """Return the sorted positions of the clients whose coins came up."""
        secret = self.secret()
        if secret < 0 or round_num < 0:
            raise FedspanError("a negative secret or round: expected 0 or more")
        # From the stream that noise is drawn from, too: a generator made for statistics can be recovered from what it
        # drew, and who took part in a few rounds would then give away all others.
        coins = uniform(secret, "clients", round_num, self.participation, count=num_clients)
        drawn: list[int] = np.flatnonzero(coins.numpy() < self.participation).tolist()
        return drawn


def _uniform(federation: FederationConfig, seed: int, secret: Callable[[], int]) -> ClientSampler:
    return UniformSampler(federation.participation, federation.min_clients, seed)


def _poisson(federation: FederationConfig, seed: int, secret: Callable[[], int]) -> ClientSampler:
    return PoissonSampler(federation.participation, secret)


SAMPLERS: Mapping[str, Callable[[FederationConfig, int, Callable[[], int]], ClientSampler]] = {
    "uniform": _uniform,
    "poisson": _poisson,
}
"""Name in `federation.sampler` -> its constructor, from ([federation], the run's seed, the server's secret)."""


def _no_secret() -> int:
    raise ValueError("federation.sampler = 'poisson' draws clients by secret coins: expected the server's secret")


def create_sampler(
    federation: FederationConfig, seed: int, dp: str, secret: Callable[[], int] | None = None
) -> ClientSampler:
    """Return the sampler that the settings name.

    `federation.sampler = "auto"` is `poisson` where client-level privacy is amplified by sampling, else `uniform`.

    Parameters
    ----------
    seed
        The run's seed.
    dp
        `privacy.dp`.
    secret
        Returns the server's secret; needed by `poisson` when a round is drawn.

    Raises
    ------
    FedspanError
        For an unknown sampler, or one that the privacy accounting is not true of.
    """
    amplified = dp == "client" and federation.participation < 1
    name = federation.sampler
    if name == "auto":
        name = "poisson" if amplified else "uniform"
    if name not in SAMPLERS:
        raise FedspanError(f"federation.sampler = {name!r}{nearest(name, ['auto', *SAMPLERS])}")
    if amplified and name != "poisson":
        raise FedspanError(
            f"federation.sampler = {name!r} with privacy.dp = 'client': its accounting holds for independent coins; "
            "expected 'auto' or 'poisson'"
        )
    if name == "poisson" and not amplified:
        raise FedspanError(
            "federation.sampler = 'poisson': a round may have no client, which only privacy.dp = 'client' with "
            "federation.participation below 1 can take; expected 'uniform'"
        )
    return SAMPLERS[name](federation, seed, secret or _no_secret)
