"""Randomness from keys: no draw depends on how much was drawn before it, or on any global state."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator(*key: object) -> torch.Generator:
    """A generator that depends on nothing but `key`: (run seed, round, client, purpose) and the like."""
    # Not Python's hash: that is salted per process.
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
