"""One secure sum between honest clients, which a test stops or disturbs where it likes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspan.privacy.fixed_point import Words
from fedspan.privacy.secure_sum import (
    Aggregator,
    Participant,
)

SESSION = b"run 7/round 3/exchange 0"
NAMES = ("amiens", "basel", "cadiz", "delft", "evora", "faro", "ghent")


def vectors(num_clients: int, num_words: int, seed: int = 0) -> dict[str, Words]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 2**64, num_words, np.uint64, endpoint=False) for name in NAMES[:num_clients]}


def plain(values: dict[str, Words]) -> Words:
    total = np.zeros_like(next(iter(values.values())))
    for vector in values.values():
        total = total + vector
    return total


@dataclass
class Run:
    """One sum between honest clients, stopped where a test likes."""

    num_clients: int = 4
    threshold: int = 3
    session: bytes = SESSION
    num_words: int = 5
    signed: bool = False
    values: dict[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = NAMES[: self.num_clients]
        self.values = self.values or vectors(self.num_clients, self.num_words)
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.trusted = (
            {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
            if self.signed
            else None
        )
        self.server = Aggregator(self.session, self.threshold, self.num_words, self.trusted)
        self.clients = {
            name: Participant(
                self.session, name, self.num_words, self.identities[name] if self.signed else None, self.trusted
            )
            for name in self.names
        }

    def keys(self) -> dict[str, bytes]:
        return self.server.keys({name: one.advertise() for name, one in self.clients.items()})

    def sent(self) -> dict[str, dict[str, bytes]]:
        keys = self.keys()
        return {name: one.share(keys, self.threshold) for name, one in self.clients.items()}

    def handed(self) -> dict[str, dict[str, bytes]]:
        return self.server.route(self.sent())

    def masked(self, lost: tuple[str, ...] = ()) -> dict[str, Words]:
        handed = self.handed()
        vectors = {n: one.mask(self.values[n], handed[n]) for n, one in self.clients.items() if n not in lost}
        for name, vector in vectors.items():
            self.server.add(name, vector)
        return vectors

    def answers(self, lost: tuple[str, ...] = ()) -> dict[str, bytes]:
        self.masked(lost)
        survivors = self.server.survivors()
        return {name: self.clients[name].unmask(survivors) for name in survivors}
