"""A client that proves itself by a signature in place of a secret: private_key_jwt (RFC 7523 §2.2 and §3)."""

import secrets

import jwt

from mcp_auth_proxy.config.signing_key import SigningKey

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

LIFETIME = 120
"""Seconds that an assertion is good for: it is used at once, and clocks differ a little."""


def build(key: SigningKey, *, client_id: str, audience: str, now: float) -> str:
    """Return a fresh assertion for one request; ``now`` is in Unix seconds.

    ``audience`` is the issuer identifier of the authorization server: the endpoint's URL, which RFC 7523 §3 allows
    too, lets a hostile server use the assertion at another one (draft-ietf-oauth-rfc7523bis §4; MCP client
    credentials extension). ``jti`` is never used again.
    """
    issued = int(now)
    claims: dict[str, object] = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "jti": secrets.token_urlsafe(24),
        "iat": issued,
        "exp": issued + LIFETIME,
    }
    return jwt.encode(claims, key.key, algorithm=key.algorithm)


def form(assertion: str) -> list[tuple[str, str]]:
    """Return the fields that carry an assertion (RFC 7523 §2.2)."""
    return [("client_assertion_type", ASSERTION_TYPE), ("client_assertion", assertion)]
