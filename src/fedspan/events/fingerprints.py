"""Fingerprints of the public keys and certificates of a deployment, as OpenSSH and OpenSSL show them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import ssl
from pathlib import Path

from fedspan.support.errors import FedspanError


def of_identity(key: bytes) -> str:
    """Return the SHA-256 of a raw public Ed25519 key, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def of_node_key(path: Path) -> str:
    """Return the fingerprint of a public key in OpenSSH's format, as `ssh-keygen -lf` shows it.

    Raises
    ------
    FedspanError
        When the file holds no such key.
    """
    try:
        blob = base64.b64decode(path.read_text(encoding="ascii").split()[1], validate=True)
    except (OSError, ValueError, IndexError, binascii.Error):
        raise FedspanError(f"{path} holds no public key in OpenSSH's format: expected one") from None
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def of_certificate(path: Path) -> str:
    """Return the SHA-256 of a certificate, as `openssl x509 -fingerprint -sha256` shows it but without colons.

    Raises
    ------
    FedspanError
        When the file holds no certificate.
    """
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text(encoding="ascii"))).hexdigest()
    except (OSError, ValueError, binascii.Error):
        raise FedspanError(f"{path} holds no certificate: expected one in PEM") from None


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_folder(folder: Path) -> dict[str, str]:
    """Return the fingerprints of the public keys and certificates in a folder of a deployment, by the file's name."""
    found: dict[str, str] = {}
    for name in ("ca.crt", "server.crt"):
        if (folder / name).exists():
            found[name] = of_certificate(folder / name)
    for path in (folder / "node.pub", *sorted((folder / "nodes").glob("*.pub"))):
        if path.exists():
            found[path.relative_to(folder).as_posix()] = of_node_key(path)
    return found
