"""What a site's folder says of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedspan import config as settings
from fedspan.config import Config
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Settings:
    """What a site's folder says: `site.toml` beside the federation's `config.toml`."""

    config: Config
    client_id: str
    rank: int | None = None
    """What it can train; none: as the federation's settings say."""
    own_data: bool = False
    """All of `data.train` is this client's, instead of its part of the federation's partition."""
    identity: bytes | None = None
    """The private Ed25519 key that signs its keys for secure sums, raw."""
    trusted: Mapping[str, bytes] | None = None
    """The public ones of all sites."""

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """The settings of that folder.

        Raises
        ------
        ValueError
            For a file that is missing or wrong, in one line.
        """
        path = folder / "site.toml"
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FedspanError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FedspanError(f"{path} is not valid TOML: {error}") from None
        known = {"client_id", "rank", "identity", "config", "device", "threads", "data", "model"}
        odd = sorted(entries.keys() - known)
        if odd:
            raise FedspanError(f"{path}: unknown key {odd[0]!r}, expected one of {', '.join(sorted(known))}")
        client_id = entries.get("client_id")
        if not isinstance(client_id, str) or not client_id:
            raise FedspanError(f"{path}: client_id = {client_id!r}, expected the name of this site on the server")
        rank = entries.get("rank")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise FedspanError(f"{path}: rank = {rank!r}, expected a count")
        with_own = [
            f"{section}.{key}={_toml(value)}"
            for section in ("data", "model")
            for key, value in entries.get(section, {}).items()
        ]
        with_own += [f"{key}={_toml(entries[key])}" for key in ("device", "threads") if key in entries]
        config = settings.load(folder / entries.get("config", "config.toml"), with_own)
        identity, trusted = _identities(folder, entries.get("identity"))
        return cls(config, client_id, rank, "train" in entries.get("data", {}), identity, trusted)


def _toml(value: object) -> str:
    return json.dumps(value)  # JSON's strings, numbers, booleans and arrays are TOML's too


def _identities(folder: Path, name: str | None) -> tuple[bytes | None, dict[str, bytes] | None]:
    """This site's private key and everybody's public ones."""
    if name is None:
        return None, None
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key((folder / name).read_bytes(), None)
        sites = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
        trusted = {client: bytes.fromhex(public) for client, public in sites.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FedspanError(f"{folder}: identity = {name!r} or sites.json cannot be read ({error})") from None
    raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    return key.private_bytes(*raw), trusted
