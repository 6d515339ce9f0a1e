"""The cryptography of secure sums; the only file that imports the libraries for it.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), AES-256 in counter mode, Ed25519 (RFC 8032)
and Shamir's secret sharing (1979) over GF(2^128). Every key is derived for one purpose in one context and used once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np

from fedspan.privacy.fixed_point import Words
from fedspan.support.errors import FedspanError

try:
    from Crypto.Protocol.SecretSharing import Shamir
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise FedspanError(f"secure sums need the package {error.name}: pip install 'fedspan[secure]'") from None

__all__ = ["Ed25519PrivateKey"]

SECRET = 32
"""Bytes of every secret, public key, digest and share here."""
SIGNATURE = 64
SEALED_EXTRA = 12 + 16
"""Bytes that sealing adds: nonce and tag."""
_VERSION = b"fedspan secure sums 2"
_BLOCK = 16  # Shamir's, in bytes
_CHUNK = 1 << 15  # words of mask at a time: 256 KiB, so that they are added while they are in the cache


def pack(*parts: bytes) -> bytes:
    """Return the parts, each after its length in 4 bytes: two different lists never give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpack(content: bytes, num_parts: int) -> list[bytes]:
    """Return the parts that `pack` was given.

    Raises
    ------
    FedspanError
        When the content is not exactly that many packed parts.
    """
    if not isinstance(content, bytes):
        raise FedspanError(f"a {type(content).__name__}: expected bytes")
    parts: list[bytes] = []
    start = 0
    while start < len(content) and len(parts) < num_parts:
        stop = start + 4 + int.from_bytes(content[start : start + 4], "big")
        parts.append(content[start + 4 : stop])
        start = stop
    if start != len(content) or len(parts) != num_parts:
        raise FedspanError(f"{len(content)} bytes that are not {num_parts} parts")
    return parts


def digest(*parts: bytes) -> bytes:
    """Return the SHA-256 of the packed parts."""
    return sha256(pack(_VERSION, *parts)).digest()


def new_secret() -> bytes:
    """Return 32 bytes from the operating system: an X25519 private key, or the seed of a mask."""
    return os.urandom(SECRET)


def public_key(private: bytes) -> bytes:
    """Return the public key of an X25519 private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def derive(secret: bytes, *context: bytes) -> bytes:
    """Derive by HKDF-SHA256 a key for one purpose, in one sum, between the parties that the context names."""
    return HKDF(SHA256(), SECRET, salt=None, info=pack(_VERSION, *context)).derive(secret)


def agree(private: bytes, public: bytes, *context: bytes) -> bytes:
    """Return the key that both ends of an X25519 agreement derive.

    Raises
    ------
    FedspanError
        When the public key is one of the few with which every private key agrees on the same secret.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise FedspanError(f"{public.hex()} is not a usable public key") from None
    return derive(shared, *context)


def check_public_key(public: bytes) -> None:
    """Raise a FedspanError where every private key would agree on the same secret with this public key."""
    agree(new_secret(), public, b"check")


def seal(key: bytes, content: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate the content, and authenticate the context with it."""
    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """Return the content that was sealed; None when the key, the bytes or the context are not those of `seal`."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], context)
    except (InvalidTag, ValueError):
        return None


def signed(public: bytes, signature: bytes, content: bytes) -> bool:
    """Return whether this is the Ed25519 signature of the content under that key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a 32-byte secret into shares: any `threshold` of them restore it, fewer say nothing about it.

    Share i belongs to the point i + 1 of a polynomial of degree threshold - 1, for each half of the secret.
    """
    # In halves, since the library shares secrets of 16 bytes.
    halves = [
        Shamir.split(threshold, num_shares, secret[half : half + _BLOCK], False) for half in range(0, SECRET, _BLOCK)
    ]
    return [low + high for (_, low), (_, high) in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Restore the secret from exactly `threshold` shares by index, from 0; too few or wrong ones give another."""
    return b"".join(
        Shamir.combine([(index + 1, share[half : half + _BLOCK]) for index, share in shares.items()], False)
        for half in range(0, SECRET, _BLOCK)
    )


def add_masks(words: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Perform words += Σ mask(plus) - Σ mask(minus) mod 2^64 in place; mask(key) is AES-256-CTR's key stream, from 0.

    Counter 0 is safe since no key gives two masks: `derive` binds the key to the sum and to the mask's owners.
    """
    zeros = bytes(8 * _CHUNK)
    buffer = bytearray(8 * _CHUNK + _BLOCK - 1)  # the library asks for room for one more block
    streams = [(Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor(), True) for key in plus]
    streams += [(Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor(), False) for key in minus]
    for start in range(0, len(words), _CHUNK):
        piece = words[start : start + _CHUNK]
        for stream, positive in streams:
            stream.update_into(zeros[: 8 * len(piece)], buffer)
            mask = np.frombuffer(buffer, "<u8", len(piece))
            if positive:
                piece += mask
            else:
                piece -= mask
