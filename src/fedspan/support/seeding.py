"""Random generators from keys: no draw depends on earlier draws elsewhere, or on any global state."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator(*key: object) -> torch.Generator:
    """Return a generator that depends on `key` alone: such as (run seed, round, client, purpose)."""
    # Not Python's hash, which is salted per process.
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
