"""A site's folder: what its files may contain, and the messages about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspan.config import Config, to_toml
from fedspan.site.settings import SiteSettings
from fedspan.support.errors import FedspanError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(to_toml(Config()))
    (tmp_path / "sites.json").write_text(json.dumps({"clinic": "00" * 32}))
    return tmp_path


def read(folder: Path, lines: str) -> SiteSettings:
    (folder / "site.toml").write_text(f'client_id = "clinic"\n{lines}\n')
    return SiteSettings.read(folder)


def write_key(path: Path, key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> None:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def test_a_sites_own_settings_stand_over_the_federations(folder: Path) -> None:
    key = Ed25519PrivateKey.generate()
    write_key(folder / "identity.key", key)
    text = 'rank = 3\nthreads = 2\nidentity = "identity.key"\n[data]\ntask = "files"\ntrain = ["a.jsonl"]'
    settings = read(folder, text)
    assert (settings.client_id, settings.rank, settings.own_data) == ("clinic", 3, True)
    assert (settings.config.threads, settings.config.seed) == (2, Config().seed)
    assert settings.identity == key.private_bytes_raw()
    assert settings.trusted == {"clinic": bytes(32)}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("rank = true", "rank = True, expected a positive integer"),
        ("data = 3", r"data = 3, expected a section \[data\]"),
        ("config = 3", "config = 3, expected the name of a file"),
        ("identity = 3", "identity = 3, expected the name of a file"),
        ("threads = 2020-01-01", "threads"),
        ('config = "elsewhere.toml"', "elsewhere.toml"),
        ('identity = "absent.key"', "identity = 'absent.key' or sites.json cannot be read"),
        ('identity = "locked.key"', "identity = 'locked.key' or sites.json cannot be read"),
        ('identity = "other.key"', "expected an Ed25519 private key"),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(folder: Path, lines: str, expected: str) -> None:
    write_key(folder / "locked.key", Ed25519PrivateKey.generate(), b"secret")
    write_key(folder / "other.key", X25519PrivateKey.generate())
    with pytest.raises(FedspanError, match=expected) as caught:
        read(folder, lines)
    assert "\n" not in str(caught.value)
