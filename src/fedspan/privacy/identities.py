"""The public identities of a federation's sites, which sign their keys for secure sums."""

from __future__ import annotations

import json
from pathlib import Path

from fedspan.support.errors import FedspanError

_BYTES = 32


def read_identities(path: Path) -> dict[str, bytes]:
    """Return the public Ed25519 keys that a `sites.json` lists, as raw bytes by client.

    Raises
    ------
    FedspanError
        When the file cannot be read, is anything else than keys in hexadecimal by client id, or has one key twice: a
        site could then sign in two names, and count as two where signatures are counted.
    """
    try:
        identities = {
            client: bytes.fromhex(key) for client, key in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FedspanError(f"{path} cannot be read ({error}): expected client ids with public keys") from None
    for client, key in identities.items():
        if len(key) != _BYTES:
            raise FedspanError(f"{path}: the key of {client!r} has {len(key)} bytes, expected {_BYTES}")
    owners: dict[bytes, str] = {}
    for client, key in identities.items():
        if (other := owners.setdefault(key, client)) != client:
            raise FedspanError(f"{path}: {other!r} and {client!r} have the same key: expected one for each site")
    return identities
