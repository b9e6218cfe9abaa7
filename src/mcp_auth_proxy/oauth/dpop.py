"""DPoP (RFC 9449): tokens bound to a key of the proxy, and the proofs sent with them."""

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

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, excerpt
from mcp_auth_proxy.models import DpopUse
from mcp_auth_proxy.oauth import documents, oauth_error
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.signing import sign

ALGORITHM = "ES256"
"""The algorithm to sign with: the one in the examples of RFC 9449, so every server supports it."""

TOKEN_TYPE = "DPoP"

MAX_NONCE = 1024
"""Maximum length of a nonce. Longer ones are ignored."""

_COORDINATE = 32
# RFC 9449 §8.1: nonce = 1*NQCHAR
_NONCE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


@dataclass(frozen=True)
class Key:
    """The key pair of one grant, on the curve P-256."""

    _private: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """Return a new key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, text: str) -> Self:
        """Return the key from its ``text``. Raises ValueError, which never contains the text."""
        key = load_pem_private_key(text.encode("ascii"), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not a key for DPoP")
        return cls(key)

    @property
    def text(self) -> str:
        """The private key as PKCS #8 in PEM form. To be stored encrypted only."""
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

        ``url`` is the URL of the request; its query and fragment are left out of the proof. ``ath`` is the ``digest``
        of the access token sent with it. ``jti`` is unique.
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
        return sign(claims, self._private, algorithm=ALGORITHM, headers=headers)


def digest(text: str) -> str:
    """Return the SHA-256 of ASCII text in base64url: ``ath`` of an access token (RFC 9449 §4.2)."""
    return _base64url(hashlib.sha256(text.encode("ascii")).digest())


def without_query(url: str) -> str:
    """Return a URL for ``htu``: without query and fragment, otherwise unchanged (RFC 9449 §4.2)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path or "/", "", ""))


def read_nonce(value: str | None) -> str:
    """Return the value of a DPoP-Nonce field; empty if it is absent or invalid (RFC 9449 §8.1)."""
    nonce = (value or "").strip()
    return nonce if len(nonce) <= MAX_NONCE and _NONCE.fullmatch(nonce) else ""


def required_nonce(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """Return the nonce that a token endpoint requires in a retry (RFC 9449 §8); empty if it requires none."""
    if status not in (400, 401):
        return ""
    try:
        error = oauth_error.code(documents.parse_object(body).get("error"))
    except ValueError:
        return ""
    return read_nonce(headers.get("dpop-nonce")) if error == "use_dpop_nonce" else ""


def decide(use: DpopUse, metadata: ServerMetadata, *, challenged: bool, demanded: bool, server: str) -> bool:
    """Return whether to request tokens that are bound to a key.

    ``challenged``: the resource sent a DPoP challenge. ``demanded``: its metadata says that it accepts no other tokens.
    Raises AuthorizationError if the configuration can't lead to a token that works.
    """
    supported = metadata.dpop_signing_alg_values_supported
    if use is DpopUse.OFF:
        if demanded:
            raise AuthorizationError(
                f"Server {server} accepts only tokens that are bound to a key (dpop_bound_access_tokens_required, "
                f"RFC 9728 §2; RFC 9449), but {server_key(server, 'oauth.dpop')} is off. Set it to auto.",
                hint=ConfigHint("oauth.dpop", "auto"),
            )
        return False
    if supported is not None and ALGORITHM not in supported and (demanded or use is DpopUse.REQUIRED):
        known = excerpt(", ".join(supported)) or "nothing"
        raise AuthorizationError(
            f"The authorization server {excerpt(metadata.issuer)} accepts DPoP proofs signed with {known} "
            f"(dpop_signing_alg_values_supported, RFC 9449 §5.1), but this proxy signs with {ALGORITHM}."
        )
    return use is DpopUse.REQUIRED or ((challenged or demanded) and ALGORITHM in (supported or ()))


def token_types(use: DpopUse, *, bound: bool, proved: bool) -> tuple[str, ...]:
    """Return the token types to accept in a token response (RFC 9449 §5).

    ``bound``: the previous token was bound to the key, so the next one must be too. ``proved``: the request had a
    proof.
    """
    if not proved:
        return ("Bearer",)
    return (TOKEN_TYPE,) if bound or use is DpopUse.REQUIRED else (TOKEN_TYPE, "Bearer")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
