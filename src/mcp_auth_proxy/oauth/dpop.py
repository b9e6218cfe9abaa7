"""Tokens that are bound to a key of ours, and the proofs that go with them (RFC 9449)."""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from mcp_auth_proxy.errors import AuthorizationError, ConfigHint
from mcp_auth_proxy.models import DpopUse
from mcp_auth_proxy.oauth import documents, oauth_error
from mcp_auth_proxy.oauth.discovery import ServerMetadata

ALGORITHM = "ES256"
"""What we sign with: the one that RFC 9449 itself shows, and every server knows."""

TOKEN_TYPE = "DPoP"

MAX_NONCE = 1024
"""Characters of a nonce that are repeated in a proof."""

_COORDINATE = 32
# RFC 9449 §8.1: nonce = 1*NQCHAR
_NONCE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


@dataclass(frozen=True)
class Key:
    """The key pair of one grant, on P-256."""

    _private: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """Return a fresh key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, text: str) -> Self:
        """Return the key that ``text`` was made of. Raises ValueError, which never repeats it."""
        key = load_pem_private_key(text.encode("ascii"), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not a key for DPoP")
        return cls(key)

    @property
    def text(self) -> str:
        """The private key, to be sealed: PKCS #8 in PEM form."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")

    @cached_property
    def public(self) -> Mapping[str, str]:
        """The public key as a JWK (RFC 7518 §6.2.1), members in the order of RFC 7638 §3.2."""
        numbers = self._private.public_key().public_numbers()
        x, y = (_base64url(number.to_bytes(_COORDINATE, "big")) for number in (numbers.x, numbers.y))
        return {"crv": "P-256", "kty": "EC", "x": x, "y": y}

    @cached_property
    def thumbprint(self) -> str:
        """The public key's SHA-256 thumbprint (RFC 7638): ``dpop_jkt``, and ``jkt`` in bound tokens."""
        return digest(json.dumps(dict(self.public), separators=(",", ":")))

    def proof(self, *, method: str, url: str, now: float, nonce: str = "", ath: str = "") -> str:
        """Return a proof for one request (RFC 9449 §4.2); ``now`` is in Unix seconds.

        ``url`` is the request's, of which query and fragment are left out. ``ath`` is the ``digest`` of the access
        token that goes with it. ``jti`` is never used again.
        """
        claims: dict[str, object] = {
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": without_query(url),
            "iat": int(now),
            **({"ath": ath} if ath else {}),
            **({"nonce": nonce} if nonce else {}),
        }
        headers = {"typ": "dpop+jwt", "jwk": dict(self.public)}
        return jwt.encode(claims, self._private, algorithm=ALGORITHM, headers=headers)


def digest(text: str) -> str:
    """Return the SHA-256 of ASCII text in base64url: ``ath`` of an access token (RFC 9449 §4.2)."""
    return _base64url(hashlib.sha256(text.encode("ascii")).digest())


def without_query(url: str) -> str:
    """Return a URL as ``htu`` has it: without query and fragment, else as it is spelt (RFC 9449 §4.2)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path or "/", "", ""))


def read_nonce(value: str | None) -> str:
    """Return a DPoP-Nonce field; empty where there is none, or one that breaks its grammar (RFC 9449 §8.1)."""
    nonce = (value or "").strip()
    return nonce if len(nonce) <= MAX_NONCE and _NONCE.fullmatch(nonce) else ""


def nonce_asked_for(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """Return the nonce that a token endpoint wants the same request with (RFC 9449 §8); empty: it wants none."""
    if status not in (400, 401):
        return ""
    try:
        error = oauth_error.code(documents.parse_object(body).get("error"))
    except ValueError:
        return ""
    return read_nonce(headers.get("dpop-nonce")) if error == "use_dpop_nonce" else ""


def decide(use: DpopUse, metadata: ServerMetadata, *, challenged: bool, demanded: bool, server: str) -> bool:
    """Return whether to ask for tokens that are bound to a key.

    ``challenged``: the resource has answered with a DPoP challenge; ``demanded``: its metadata says that it takes no
    other tokens. Raises AuthorizationError where what is configured can't lead to a token that works.
    """
    supported = metadata.dpop_signing_alg_values_supported
    if use is DpopUse.OFF:
        if demanded:
            raise AuthorizationError(
                f"Server {server} takes only tokens that are bound to a key (dpop_bound_access_tokens_required, "
                f"RFC 9728 §2; RFC 9449), and servers.{server}.oauth.dpop is off: set it to auto.",
                remedy=ConfigHint("oauth.dpop", "auto"),
            )
        return False
    if supported is not None and ALGORITHM not in supported and (demanded or use is DpopUse.REQUIRED):
        known = ", ".join(supported) or "nothing"
        raise AuthorizationError(
            f"The authorization server {metadata.issuer} takes DPoP proofs signed with {known} "
            f"(dpop_signing_alg_values_supported, RFC 9449 §5.1), and this proxy signs with {ALGORITHM}."
        )
    return use is DpopUse.REQUIRED or ((challenged or demanded) and ALGORITHM in (supported or ()))


def token_types(use: DpopUse, *, bound: bool, proved: bool) -> tuple[str, ...]:
    """Return the token types that a token response may have (RFC 9449 §5).

    ``bound``: the token before it was bound to the key, and the next one must be. ``proved``: there was a proof.
    """
    if not proved:
        return ("Bearer",)
    return (TOKEN_TYPE,) if bound or use is DpopUse.REQUIRED else (TOKEN_TYPE, "Bearer")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
