"""The keys and certificates of a deployment: who the server is, who the sites are, and who vouches for it.

All of them are elliptic-curve keys: P-384 for TLS and for node keys, which Flower asks for, Ed25519 for the identities
that sign the keys of secure sums.  Everything here is made by the `cryptography` library and returned as the bytes of
a file; nothing is written.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedspan.support.errors import FedspanError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
"""What the stricter TLS libraries take at most."""
# Clocks of different machines differ.
_SLACK = timedelta(hours=1)
_PEM = serialization.Encoding.PEM
_OPEN = serialization.NoEncryption()


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key and what goes with it in public, each the bytes of a file."""

    private: bytes
    public: bytes
    """A certificate or a public key."""


def authority(name: str) -> Pair:
    """A certificate authority for one federation, valid for ten years; it can vouch for servers, not for others.

    Parameters
    ----------
    name
        What a person sees who looks at the certificate.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return _pair(key, builder.sign(key, hashes.SHA384()))


def server_certificate(vouching: Pair, hosts: Sequence[str]) -> Pair:
    """A TLS certificate for a server under all of its names, valid for 825 days.

    Parameters
    ----------
    vouching
        As `authority` made it.
    hosts
        Names and addresses under which the server is reached; the first one is its common name.

    Raises
    ------
    ValueError
        When a host is neither a DNS name nor an IP address.
    """
    if not hosts:
        raise FedspanError("a server certificate for no host: expected at least one name or address")
    issuer = x509.load_pem_x509_certificate(vouching.public)
    signer = serialization.load_pem_private_key(vouching.private, None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise FedspanError("the authority's key is of another kind: expected one on an elliptic curve")
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name(hosts[0]), issuer.subject, key.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)]), critical=False
    )
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    return _pair(key, builder.sign(signer, hashes.SHA384()))


def node_key(comment: str) -> Pair:
    """A key by which a site's node proves who it is to the server, in OpenSSH's formats."""
    key = ec.generate_private_key(ec.SECP384R1())
    return Pair(
        key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _OPEN),
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        + f" {comment}\n".encode(),
    )


def identity_key() -> Pair:
    """An Ed25519 key by which a site signs what it says to the other sites through the server.

    The public part is its 32 bytes in hexadecimal digits.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    return Pair(
        key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _OPEN),
        key.public_key().public_bytes_raw().hex().encode(),
    )


def _name(text: str) -> x509.Name:
    # 64 characters are the most that a common name can have.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    """A host as a certificate names it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if not all(_is_label(label) for label in labels) or labels[-1].isdigit() or len(host) > 253:
        raise FedspanError(f"host {host!r}: expected a DNS name or an IP address, such as fed.example.org or 10.0.0.5")
    return x509.DNSName(host)


def _is_label(label: str) -> bool:
    plain = label.replace("-", "a")
    return 0 < len(label) < 64 and plain.isascii() and plain.isalnum() and label[0] != "-" and label[-1] != "-"


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _SLACK).not_valid_after(now - _SLACK + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Pair:
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _OPEN)
    return Pair(private, certificate.public_bytes(_PEM))
