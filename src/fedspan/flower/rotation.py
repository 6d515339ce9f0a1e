"""The rotation of the keys and certificates of a deployment, where they are used: at the server, or at a site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from fedspan.events import fingerprints
from fedspan.flower import certificates, deployment, expiry
from fedspan.flower.certificates import KeyPair
from fedspan.support.errors import FedspanError


def rotate(folder: Path, authority: Path | None = None) -> Iterator[str]:
    """Replace the keys of a site's folder, or the key and certificate of a server's, and say what has to follow.

    Parameters
    ----------
    authority
        The folder with the authority's `ca.key` and `ca.crt`, which a server's certificate needs.

    Raises
    ------
    FedspanError
        When the folder is neither, or the authority is not that of the server; nothing is changed then.
    """
    if (folder / "server.crt").exists():
        yield from _server(folder, authority)
        return
    if authority is not None:
        raise FedspanError(f"--ca {authority}: expected it for a server's folder only; {folder} holds no server.crt")
    client_id, identity = deployment.renew_keys(folder)
    yield f"new node key {fingerprints.of_node_key(folder / 'node.pub')}"
    yield (
        f"send {folder / 'node.pub'} to the server, replace the old key in nodes/ with it, and run ./register.sh there"
    )
    yield f'put this line into sites.json at the server and at every site: "{client_id}": "{identity}"'
    yield "then start start.sh again"


def _server(folder: Path, authority: Path | None) -> Iterator[str]:
    """Replace a server's key and certificate by new ones for the same names."""
    if authority is None:
        raise FedspanError(f"{folder} is a server's folder: expected --ca DIR, the folder with the authority's ca.key")
    signer = _authority(folder, authority)
    made = certificates.server_certificate(signer, _hosts(folder / "server.crt"))
    deployment.replace_all(folder, (("server.key", made.private, 0o600), ("server.crt", made.public, 0o644)))
    until = expiry.validity(folder / "server.crt").until
    yield f"new server.crt {fingerprints.of_certificate(folder / 'server.crt')}, valid until {until:%Y-%m-%d}"
    yield "start superlink.sh and proxy.sh again; nothing changes at the sites"


def _authority(folder: Path, authority: Path) -> KeyPair:
    expiry.check([authority / "ca.crt"])
    if fingerprints.of_certificate(authority / "ca.crt") != fingerprints.of_certificate(folder / "ca.crt"):
        raise FedspanError(f"{authority / 'ca.crt'} is not the {folder / 'ca.crt'} that the sites have: expected that")
    try:
        return KeyPair((authority / "ca.key").read_bytes(), (authority / "ca.crt").read_bytes())
    except OSError as error:
        raise FedspanError(
            f"{authority / 'ca.key'} cannot be read ({error.strerror}): expected the authority's key"
        ) from None


def _hosts(path: Path) -> list[str]:
    """Return the names and addresses of a server's certificate, its common name first."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
