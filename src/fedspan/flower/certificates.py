"""The keys and certificates of a deployment: the certificate authority, the server, the nodes and the identities.

All keys are on elliptic curves: P-384 for TLS and for node keys, as Flower requires, Ed25519 for the identities that
sign the keys of secure sums. Everything is made by the `cryptography` library and returned as the bytes of a file;
nothing is written.
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
"""The longest validity that strict TLS libraries accept."""
# Certificates are valid from an hour ago, because the clocks of different machines differ.
_SLACK = timedelta(hours=1)
_PEM = serialization.Encoding.PEM
_OPEN = serialization.NoEncryption()


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and its public counterpart, each as the bytes of a file."""

    private: bytes
    public: bytes
    """A certificate or a public key."""


def certificate_authority(name: str) -> KeyPair:
    """Make a certificate authority for one federation, valid for ten years; it can sign servers, not authorities.

    Parameters
    ----------
    name
        The certificate's common name.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return _pair(key, builder.sign(key, hashes.SHA384()))


def server_certificate(authority: KeyPair, hosts: Sequence[str]) -> KeyPair:
    """Make a TLS certificate for a server under all of its names, valid for 825 days.

    Parameters
    ----------
    authority
        As `certificate_authority` made it.
    hosts
        Names and addresses of the server; the first one is the common name.

    Raises
    ------
    FedspanError
        When a host is neither a DNS name nor an IP address.
    """
    assert hosts, "a server certificate needs at least one host"
    issuer = x509.load_pem_x509_certificate(authority.public)
    signer = serialization.load_pem_private_key(authority.private, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "certificate_authority makes keys on an elliptic curve"
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


def node_key(comment: str) -> KeyPair:
    """Make the key with which a site's node authenticates itself to the server, in OpenSSH's formats."""
    key = ec.generate_private_key(ec.SECP384R1())
    return KeyPair(
        key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _OPEN),
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        + f" {comment}\n".encode(),
    )


def identity_key() -> KeyPair:
    """Make an Ed25519 key with which a site signs what it sends to the other sites through the server.

    The public part is the 32 bytes in hexadecimal digits.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    return KeyPair(
        key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _OPEN),
        key.public_key().public_bytes_raw().hex().encode(),
    )


def _name(text: str) -> x509.Name:
    # X.509 limits a common name to 64 characters.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def check_host(host: str) -> None:
    """Check that a certificate can be valid for a host.

    Raises
    ------
    FedspanError
        When it is neither a DNS name nor an IP address.
    """
    if not isinstance(host, str):
        raise FedspanError(f"host {host!r}: expected a DNS name or an IP address, such as fed.example.org or 10.0.0.5")
    _alternative(host)


def _alternative(host: str) -> x509.GeneralName:
    """Return a host in the form of a certificate's alternative names."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    # Neither an address that means an interface of one machine, nor the one that means all of them.
    if address is not None and "%" not in host and not address.is_unspecified:
        return x509.IPAddress(address)
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


def _pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> KeyPair:
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _OPEN)
    return KeyPair(private, certificate.public_bytes(_PEM))
