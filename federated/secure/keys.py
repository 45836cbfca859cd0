"""Keys, masks and sealed shares, by the `cryptography` package (the extra "privacy").

    seed of a pair = HKDF-SHA256(X25519(own private key, other's public key), purpose)
    mask of a seed = AES-256 in counter mode over zeros, as words of 32 bits, little-endian

Every key serves one round, so that a counter may start at zero and a share is sealed once by its
key (ChaCha20-Poly1305).
Sources: RFC 7748 (X25519), RFC 5869 (HKDF), NIST SP 800-38A (counter mode), RFC 8439.
"""

from __future__ import annotations

import functools
import hashlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from jaxfm.federated.secure.shamir import Random

KEY_BYTES = 32
_CHUNK = 2**16  # words, whose mask stays in the processor's cache
_ZEROS = bytes(4 * _CHUNK)


class KeyPair(NamedTuple):
    """X25519 keys of 32 bytes."""

    private: bytes
    public: bytes


def key_pair(random: Random) -> KeyPair:
    """Fresh keys."""
    private = random(KEY_BYTES)
    return KeyPair(private, public_key(private))


def public_key(private: bytes) -> bytes:
    """The public key of a private one."""
    return _package().Private.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, publics: dict[int, bytes], purpose: bytes) -> dict[int, bytes]:
    """Secrets of 32 bytes, one with the owner of each public key, who computes the same.

    Args:
      private: one's own key.
      publics: the others' keys, by client.
      purpose: what they are for; secrets for several purposes say nothing of each other.
    Raises:
      ValueError: a public key that is none.
    """
    package, secrets = _package(), {}
    own = package.Private.from_private_bytes(private)
    for client, public in publics.items():
        try:
            shared = own.exchange(package.Public.from_public_bytes(public))
        except ValueError:
            raise ValueError(
                f"The public key of client {client} is no X25519 key; it was changed on the way."
            ) from None
        derive = package.HKDF(package.SHA256(), KEY_BYTES, None, b"jaxfm secure sum: " + purpose)
        secrets[client] = derive.derive(shared)
    return secrets


def add_mask(words: np.ndarray, seed: bytes, sign: int) -> None:
    """Adds (sign 1) or subtracts (sign -1) a seed's mask, in place, to words u32[m] mod 2^32."""
    package = _package()
    stream = package.Cipher(package.AES(seed), package.CTR(bytes(16))).encryptor()
    mask = np.empty(_CHUNK + 4, np.uint32)  # the cipher wants room for one more block
    operate = np.add if sign > 0 else np.subtract
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        stream.update_into(memoryview(_ZEROS)[: 4 * len(part)], mask.data.cast("B"))
        operate(part, mask[: len(part)].view("<u4"), out=part)


def seal(key: bytes, text: bytes) -> bytes:
    """The text, encrypted and authenticated; 16 bytes longer. A key seals one text."""
    return _package().ChaCha20Poly1305(key).encrypt(bytes(12), text, None)


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The text that `seal` was given; None where anything was changed."""
    package = _package()
    try:
        return package.ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except (package.InvalidTag, ValueError):
        return None


def digest(seed: bytes) -> bytes:
    """32 bytes by which a seed that comes back is known to be the same, and which hide it."""
    return hashlib.sha256(b"jaxfm secure sum: self mask" + seed).digest()


@functools.cache
def _package() -> SimpleNamespace:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise ImportError(
            "Masks and keys of secure sums need the cryptography package: "
            "pip install 'jaxfm[privacy]'."
        ) from error
    return SimpleNamespace(
        InvalidTag=InvalidTag,
        Private=x25519.X25519PrivateKey,
        Public=x25519.X25519PublicKey,
        Cipher=Cipher,
        ChaCha20Poly1305=ChaCha20Poly1305,
        AES=AES,
        CTR=CTR,
        SHA256=SHA256,
        HKDF=HKDF,
    )
