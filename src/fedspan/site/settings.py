"""The settings of one site, read from its folder."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspan import config as federation_settings
from fedspan.config import Config
from fedspan.privacy.identities import read_identities
from fedspan.support.errors import FedspanError
from fedspan.wire.names import check_name

_KEYS = ("client_id", "config", "data", "device", "identity", "model", "rank", "threads")


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """The settings of one site: `site.toml` beside the federation's `config.toml`."""

    config: Config
    """The federation's, with this site's own data, model, device and threads."""
    client_id: str
    rank: int | None = None
    """The rank that it can train; None: as the federation's settings say."""
    own_data: bool = False
    """All of `data.train` is this client's, instead of its part of the federation's partition."""
    identity: bytes | None = None
    """The private Ed25519 key that signs its keys for secure sums, 32 raw bytes."""
    trusted: Mapping[str, bytes] | None = None
    """The public Ed25519 keys of all sites, by client."""

    @classmethod
    def read(cls, folder: Path) -> SiteSettings:
        """Read the settings of a site's folder.

        Raises
        ------
        FedspanError
            For a file that is missing or wrong, in one line.
        """
        path = folder / "site.toml"
        entries = _entries(path)
        client_id, rank = entries.get("client_id"), entries.get("rank")
        if not isinstance(client_id, str) or not client_id:
            raise FedspanError(f"{path}: client_id = {client_id!r}, expected the name of this site on the server")
        # Not isinstance, for which `true` is a number.
        if rank is not None and (type(rank) is not int or rank < 1):
            raise FedspanError(f"{path}: rank = {rank!r}, expected a positive integer")
        check_name(client_id, f"{path}: client_id")
        config = federation_settings.load(folder / entries.get("config", "config.toml"), _overrides(entries))
        identity, trusted = _identities(folder, entries.get("identity"))
        return cls(config, client_id, rank, "train" in entries.get("data", {}), identity, trusted)


def _entries(path: Path) -> dict[str, Any]:
    """Return the entries of a `site.toml`, all of them known and of the right kind."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedspanError(f"{path} is not valid TOML: {error}") from None
    unknown = sorted(entries.keys() - set(_KEYS))
    if unknown:
        raise FedspanError(f"{path}: unknown key {unknown[0]!r}, expected one of {', '.join(_KEYS)}")
    for key in ("data", "model"):
        if not isinstance(entries.get(key, {}), dict):
            raise FedspanError(f"{path}: {key} = {entries[key]!r}, expected a section [{key}]")
    for key in ("config", "identity"):
        if not isinstance(entries.get(key, ""), str):
            raise FedspanError(f"{path}: {key} = {entries[key]!r}, expected the name of a file")
    return entries


def _overrides(entries: Mapping[str, Any]) -> list[str]:
    """Return a site's own settings as overrides of the federation's."""
    values = {f"{section}.{key}": x for section in ("data", "model") for key, x in entries.get(section, {}).items()}
    values |= {key: entries[key] for key in ("device", "threads") if key in entries}
    # JSON's values are TOML's too, except that JSON would escape characters such as 😀 in a way that TOML has not. A
    # date, which JSON has not, becomes a text that the setting's type refuses.
    return [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in values.items()]


def _identities(folder: Path, name: str | None) -> tuple[bytes | None, dict[str, bytes] | None]:
    """Return this site's private key and the public keys of all sites; None where signatures are not used."""
    if name is None:
        return None, None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key((folder / name).read_bytes(), None)
        trusted = read_identities(folder / "sites.json")
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise FedspanError(f"{folder}: identity = {name!r} or sites.json cannot be read ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise FedspanError(f"{folder}: identity = {name!r} is a {type(key).__name__}: expected an Ed25519 private key")
    return key.private_bytes_raw(), trusted
