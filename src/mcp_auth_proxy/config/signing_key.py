"""The private key of a client, and the signature algorithms that it supports (RFC 7518 §3.1)."""

from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""The values of ``signing_alg``."""

SMALLEST_RSA = 2048
"""Bits (RFC 7518 §3.3)."""

_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A private key and the algorithm to sign with."""

    key: PrivateKey = field(repr=False)
    algorithm: str

    def __eq__(self, other: object) -> bool:
        # Private keys of cryptography are equal only to themselves: each reload would look like a new key.
        if not isinstance(other, SigningKey):
            return NotImplemented
        return self.algorithm == other.algorithm and self.key.public_key() == other.key.public_key()

    def __hash__(self) -> int:
        return hash(self.algorithm)


def read(pem: str, algorithm: str | None = None) -> SigningKey:
    """Return the key in a PEM text. ``algorithm`` defaults to the first one that the key supports.

    Raises ValueError. Its text continues "<configuration key>: …" and never contains the private key.
    """
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except TypeError:
        raise ValueError("is encrypted: give a key without a passphrase, protected by its file or secret") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not a private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None
    if not isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise ValueError("is a key of an unsupported type: use RSA, EC (P-256, P-384, P-521) or Ed25519")
    supported = _algorithms(key)
    if algorithm is not None and algorithm not in supported:
        raise ValueError(f"can't sign with {algorithm}: this key is for {', '.join(supported)}")
    return SigningKey(key, algorithm or supported[0])


def _algorithms(key: PrivateKey) -> tuple[str, ...]:
    if isinstance(key, RSAPrivateKey):
        if key.key_size < SMALLEST_RSA:
            raise ValueError(f"is an RSA key of {key.key_size} bits: at least {SMALLEST_RSA} are needed")
        return tuple(name for name in ALGORITHMS if name[:2] in ("RS", "PS"))
    if isinstance(key, Ed25519PrivateKey):
        return ("EdDSA",)
    if key.curve.name not in _CURVES:
        raise ValueError(f"is on the curve {key.curve.name}: use P-256, P-384 or P-521")
    return (_CURVES[key.curve.name],)
